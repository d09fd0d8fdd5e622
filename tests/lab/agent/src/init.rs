//! PID 1: from the initramfs to the root file system, then reaping until the server ends.

use std::fs::{self, File};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::process::Command;

use nix::errno::Errno;
use nix::sched::{CpuSet, sched_getaffinity, sched_setaffinity};
use nix::sys::reboot::{RebootMode, reboot};
use nix::sys::wait::wait;
use nix::unistd::{Pid, chdir, chroot, sethostname};
use rustix::mount::{MountFlags, mount, mount_move};

use crate::{Context, Result};

/// Where a copy of this program is for tests that restart containerd.
const AGENT_IN_LAB: &str = "/usr/local/sbin/lab-agent";

const PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// Modules that no alias loads when they are needed, or not in time.
const MODULES: [&str; 8] = [
    "kvm-amd",
    "overlay",
    "tun",
    "loop",
    "fuse",
    "vhost_vsock",
    "br_netfilter",
    "virtio_net",
];

/// Runs the lab; ends it when the server ends or anything fails.
pub fn run() -> Result<()> {
    if let Err(error) = live() {
        eprintln!("lab-agent: {error}");
    }
    reboot(RebootMode::RB_AUTOBOOT).context(|| "reboot".into())?;
    Ok(())
}

fn live() -> Result<()> {
    leave_first_processor()?;
    enter_root()?;
    mount_all()?;
    sethostname("lab").context(|| "set the host's name".into())?;
    fs::copy("/proc/self/exe", AGENT_IN_LAB).context(|| format!("write {AGENT_IN_LAB}"))?;
    helper(Command::new("modprobe").arg("--all").args(MODULES))?;
    helper(Command::new("ip").args(["link", "set", "lo", "up"]))?;
    let _vm = keep_vm()?;
    write("/proc/sys/net/ipv4/ip_forward", "1")?;
    let server = Command::new(AGENT_IN_LAB)
        .arg("serve")
        .env_clear()
        .env("PATH", PATH)
        .env("HOME", "/root")
        .env("LANG", "C.UTF-8")
        .current_dir("/root")
        .process_group(0)
        .spawn()
        .context(|| format!("run {AGENT_IN_LAB}"))?;
    loop {
        match wait() {
            Ok(status) => {
                let ended = status.pid().map(nix::unistd::Pid::as_raw);
                if ended.and_then(|pid| u32::try_from(pid).ok()) == Some(server.id()) {
                    return Err(format!("the server ended: {status:?}").into());
                }
            }
            Err(Errno::EINTR) => {}
            Err(error) => return Err(format!("wait for any process: {error}").into()),
        }
    }
}

/// Keeps every process of the lab, virtual CPUs above all, off the first of several processors.
///
/// When any processor restores its FPU's state, QEMU (up to 11.1 at least) also clears a flag of the
/// first processor (`cpu_clear_ignne`), by an unlocked change of the word that says whether that
/// processor runs a guest and through which page tables. A change that the first processor makes at
/// the same moment is lost; VMRUN, #VMEXIT, CLGI and STGI make them.
fn leave_first_processor() -> Result<()> {
    let this = Pid::from_raw(0);
    let mut processors = sched_getaffinity(this).context(|| "read the CPU affinity".into())?;
    let has = |number| processors.is_set(number).unwrap_or(false);
    if (1..CpuSet::count()).any(has) {
        processors
            .unset(0)
            .and_then(|()| sched_setaffinity(this, &processors))
            .context(|| "leave CPU 0".into())?;
    }
    Ok(())
}

nix::ioctl_write_int_bad!(
    /// `KVM_CREATE_VM` (linux/kvm.h)
    create_vm,
    nix::request_code_none!(0xae, 0x01)
);

/// Makes a VM that is there as long as the lab is.
///
/// With the first VM and after the last, the host's kernel patches the code of each task switch
/// (`preempt_notifier_key`), by way of a breakpoint instruction. A processor that QEMU emulates may
/// meet the breakpoint after the patch is complete, and then the kernel panics ("Oops: int3").
fn keep_vm() -> Result<OwnedFd> {
    let kvm = File::options()
        .read(true)
        .write(true)
        .open("/dev/kvm")
        .context(|| "open /dev/kvm".into())?;
    // SAFETY: the request takes a plain integer, the kind of the machine.
    let vm = unsafe { create_vm(kvm.as_raw_fd(), 0) }.context(|| "create a VM".into())?;
    // SAFETY: the request has made the descriptor, which nobody else knows.
    Ok(unsafe { OwnedFd::from_raw_fd(vm) })
}

/// Loads the disk's driver, mounts the disk and makes it the root.
fn enter_root() -> Result<()> {
    mount_at("devtmpfs", "/dev", "devtmpfs", MountFlags::empty(), c"")?;
    let driver = File::open("/virtio_blk.ko").context(|| "open /virtio_blk.ko".into())?;
    nix::kmod::finit_module(&driver, c"", nix::kmod::ModuleInitFlags::empty())
        .context(|| "load virtio_blk".into())?;
    fs::create_dir_all("/new").context(|| "create /new".into())?;
    // The rest of a fresh file system's inode tables need not be zeroed: the disk is thrown away.
    mount_at(
        "/dev/vda",
        "/new",
        "ext4",
        MountFlags::NOATIME,
        c"noinit_itable",
    )?;
    mount_move("/dev", "/new/dev").context(|| "move /dev".into())?;
    chdir("/new").context(|| "enter /new".into())?;
    mount_move(".", "/").context(|| "move the root".into())?;
    chroot(".").context(|| "change the root".into())?;
    chdir("/").context(|| "enter /".into())
}

fn mount_all() -> Result<()> {
    let safe = MountFlags::NOSUID | MountFlags::NODEV | MountFlags::NOEXEC;
    let in_memory = MountFlags::NOSUID | MountFlags::NODEV;
    mount_at("proc", "/proc", "proc", safe, c"")?;
    mount_at("sysfs", "/sys", "sysfs", safe, c"")?;
    mount_at("cgroup2", "/sys/fs/cgroup", "cgroup2", safe, c"nsdelegate")?;
    mount_at("bpf", "/sys/fs/bpf", "bpf", safe, c"mode=700")?;
    mount_at("debugfs", "/sys/kernel/debug", "debugfs", safe, c"")?;
    mount_at(
        "securityfs",
        "/sys/kernel/security",
        "securityfs",
        safe,
        c"",
    )?;
    mount_at("tmpfs", "/run", "tmpfs", in_memory, c"mode=755")?;
    mount_at("tmpfs", "/tmp", "tmpfs", in_memory, c"mode=1777")?;
    let devpts = MountFlags::NOSUID | MountFlags::NOEXEC;
    mount_at(
        "devpts",
        "/dev/pts",
        "devpts",
        devpts,
        c"gid=5,mode=620,ptmxmode=666",
    )?;
    mount_at("tmpfs", "/dev/shm", "tmpfs", in_memory, c"mode=1777")?;
    mount_at("mqueue", "/dev/mqueue", "mqueue", safe, c"")?;
    mount_at("hugetlbfs", "/dev/hugepages", "hugetlbfs", in_memory, c"")?;
    for (link, target) in [
        ("/dev/fd", "/proc/self/fd"),
        ("/dev/stdin", "/proc/self/fd/0"),
        ("/dev/stdout", "/proc/self/fd/1"),
        ("/dev/stderr", "/proc/self/fd/2"),
    ] {
        std::os::unix::fs::symlink(target, link).context(|| format!("create {link}"))?;
    }
    // As systemd does for its slices: every controller for every cgroup below the root.
    let available = fs::read_to_string("/sys/fs/cgroup/cgroup.controllers")
        .context(|| "read cgroup.controllers".into())?;
    let all: Vec<String> = available
        .split_whitespace()
        .map(|controller| format!("+{controller}"))
        .collect();
    write("/sys/fs/cgroup/cgroup.subtree_control", &all.join(" "))
}

/// Mounts a file system, making the directory for it.
pub fn mount_at(
    source: &str,
    target: &str,
    kind: &str,
    flags: MountFlags,
    options: &std::ffi::CStr,
) -> Result<()> {
    fs::create_dir_all(target).context(|| format!("create {target}"))?;
    mount(source, target, kind, flags, Some(options)).context(|| format!("mount {target}"))
}

fn write(path: &str, content: &str) -> Result<()> {
    fs::write(path, content).context(|| format!("write {content:?} to {path}"))
}

/// Runs a program of the lab that must succeed.
pub fn helper(command: &mut Command) -> Result<()> {
    let status = command
        .env("PATH", PATH)
        .status()
        .context(|| format!("run {command:?}"))?;
    if !status.success() {
        return Err(format!("{command:?} failed: {status}").into());
    }
    Ok(())
}
