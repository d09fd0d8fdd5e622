//! The guest's user space, from the kernel's hand-over to the service.

use std::{
    fs::{self, DirBuilder},
    io,
    os::{fd::AsRawFd, unix::fs::DirBuilderExt},
    path::{Path, PathBuf},
    sync::Arc,
};

use bulkhead_agent_api::{AGENT_PORT, SHARED_FS_TAG};
use nix::{
    mount::{MsFlags, mount},
    sys::{
        reboot::{RebootMode, reboot},
        resource::{RLIM_INFINITY, Resource, setrlimit},
        socket::{AddressFamily, SockFlag, SockType, socket},
    },
    unistd::{chdir, chroot, sethostname},
};
use thiserror::Error;

use crate::{
    apparmor::Profiles,
    cgroup::{self, CgroupError},
    log,
    memory::SharedMemory,
    mirrors::Mirrors,
    network::PlatformDevices,
    serve::{self, Guest, ServeError},
    transport::Transport,
};

/// Where the cgroup file system is mounted.
const CGROUP_ROOT: &str = "/sys/fs/cgroup";

/// Where the shares of the host are mounted.
const SHARED_DIR: &str = "/run/bulkhead/shared";

/// The bus of the devices that become network interfaces.
const PLATFORM_BUS: &str = "/sys/bus/platform";
/// Where the memory is mounted that containers share.
const MEMORY_DIR: &str = "/run/bulkhead/memory";

/// Where copies of shares are mounted.
const MIRROR_DIR: &str = "/run/bulkhead/mirrors";

/// Descriptors that a process may have by default: the kernel's own upper bound (`fs.nr_open`).
const OPEN_FILES: u64 = 1_048_576;

/// Why the guest cannot come up.
#[derive(Debug, Error)]
enum BootError {
    /// A system call.
    #[error("failed to {what}")]
    System {
        /// What was tried on what.
        what: &'static str,
        /// The system's answer.
        #[source]
        source: io::Error,
    },
    /// The cgroup file system.
    #[error(transparent)]
    Cgroup(#[from] CgroupError),
    /// The service.
    #[error(transparent)]
    Serve(#[from] ServeError),
}

fn failed<E: Into<io::Error>>(what: &'static str) -> impl FnOnce(E) -> BootError {
    move |source| BootError::System {
        what,
        source: source.into(),
    }
}

/// The life of PID 1. Its end is the end of the VM.
pub fn run(started_ns: u64) -> ! {
    std::panic::set_hook(Box::new(|panic| end_vm(&panic.to_string())));
    match boot(started_ns) {
        Ok(()) => end_vm("the host closed the agent's connection"),
        Err(error) => end_vm(&log::chain(&error)),
    }
}

/// With `panic=-1 reboot=t` on the command line a reset is what ends a VM, and the host reports
/// it with the last lines of the console.
fn end_vm(why: &str) -> ! {
    // The log is a device, and the first steps run before there are any.
    if !Path::new("/dev/kmsg").exists() {
        let _ = devices();
    }
    log::error(why);
    let _ = reboot(RebootMode::RB_AUTOBOOT);
    // Only without CAP_SYS_BOOT; the kernel panics when PID 1 exits, which ends the VM as well.
    std::process::exit(1);
}

fn boot(started_ns: u64) -> Result<(), BootError> {
    // The host answers while the file systems are mounted; nothing is served before they are.
    let ready_ns = serve::boottime_ns();
    let host = Transport::Vsock
        .dial(AGENT_PORT)
        .map_err(failed("dial the host over vsock"))?;
    own_root()?;
    file_systems()?;
    cgroup::delegate_controllers(Path::new(CGROUP_ROOT))?;
    loopback_up().map_err(failed("bring lo up"))?;
    sethostname("bulkhead").map_err(failed("set the host name"))?;
    limits()?;
    let guest = Guest {
        transport: Transport::Vsock,
        shared_dir: PathBuf::from(SHARED_DIR),
        cgroup_root: PathBuf::from(CGROUP_ROOT),
        memory: SharedMemory::new(MEMORY_DIR.into()),
        mirrors: Mirrors::new(MIRROR_DIR.into()),
        profiles: Profiles::default(),
        devices: Arc::new(PlatformDevices::new(PathBuf::from(PLATFORM_BUS))),
        started_ns,
        ready_ns,
    };
    Ok(serve::run(guest, host)?)
}

/// The initramfs is the root that cannot be moved away, so no container could change its root
/// with it. A bind mount of it, moved over it, can be.
fn own_root() -> Result<(), BootError> {
    for dir in ["/dev", "/proc", "/run", "/sys", "/tmp"] {
        make_dir(dir).map_err(failed("make the mount points of the guest"))?;
    }
    let none: Option<&str> = None;
    // Any directory will do, as it is left again at once.
    mount(Some("/"), "/run", none, MsFlags::MS_BIND, none).map_err(failed("bind the root"))?;
    chdir("/run").map_err(failed("enter the bound root"))?;
    mount(Some("."), "/", none, MsFlags::MS_MOVE, none).map_err(failed("move the bound root"))?;
    chroot(".").map_err(failed("change into the bound root"))?;
    chdir("/").map_err(failed("enter the new root"))?;
    // Both mounts at once, by their file system: nobody shall write to the agent's binary.
    let read_only = MsFlags::MS_REMOUNT | MsFlags::MS_RDONLY;
    mount(none, "/", none, read_only, none).map_err(failed("make the root read-only"))
}

fn file_systems() -> Result<(), BootError> {
    let safe = MsFlags::MS_NOSUID | MsFlags::MS_NODEV | MsFlags::MS_NOEXEC;
    let no_dev = MsFlags::MS_NOSUID | MsFlags::MS_NODEV;
    let new = |kind: &str, at: &'static str, flags: MsFlags, data: Option<&str>| {
        mount(Some(kind), at, Some(kind), flags, data)
    };
    devices()?;
    new("proc", "/proc", safe, None).map_err(failed("mount /proc"))?;
    new("sysfs", "/sys", safe, None).map_err(failed("mount /sys"))?;
    new("tmpfs", "/run", no_dev, Some("mode=0755")).map_err(failed("mount /run"))?;
    new("tmpfs", "/tmp", no_dev, Some("mode=1777")).map_err(failed("mount /tmp"))?;
    new("cgroup2", CGROUP_ROOT, safe, None).map_err(failed("mount /sys/fs/cgroup"))?;
    make_dir("/dev/pts").map_err(failed("make /dev/pts"))?;
    let data = Some("mode=0620,ptmxmode=0666");
    new(
        "devpts",
        "/dev/pts",
        MsFlags::MS_NOSUID | MsFlags::MS_NOEXEC,
        data,
    )
    .map_err(failed("mount /dev/pts"))?;
    make_dir("/run/bulkhead").map_err(failed("make /run/bulkhead"))?;
    make_dir(SHARED_DIR).map_err(failed("make /run/bulkhead/shared"))?;
    let shared = mount(
        Some(SHARED_FS_TAG),
        SHARED_DIR,
        Some("virtiofs"),
        MsFlags::empty(),
        None::<&str>,
    );
    shared.map_err(failed("mount the host's shares"))
}

fn devices() -> Result<(), BootError> {
    let kind = Some("devtmpfs");
    mount(kind, "/dev", kind, MsFlags::MS_NOSUID, Some("mode=0755")).map_err(failed("mount /dev"))
}

fn make_dir(path: &str) -> io::Result<()> {
    match DirBuilder::new().mode(0o755).create(path) {
        Err(error) if error.kind() != io::ErrorKind::AlreadyExists => Err(error),
        _ => Ok(()),
    }
}

/// The limits that a service manager gives a container engine on a host.
fn limits() -> Result<(), BootError> {
    let unlimited = [Resource::RLIMIT_NPROC, Resource::RLIMIT_CORE];
    for resource in unlimited {
        setrlimit(resource, RLIM_INFINITY, RLIM_INFINITY).map_err(failed("set limits"))?;
    }
    setrlimit(Resource::RLIMIT_NOFILE, OPEN_FILES, OPEN_FILES).map_err(failed("set limits"))
}

/// Brings up the loopback device of this process's network namespace, see netdevice(7).
pub fn loopback_up() -> io::Result<()> {
    let socket = socket(
        AddressFamily::Inet,
        SockType::Datagram,
        SockFlag::SOCK_CLOEXEC,
        None,
    )?;
    // SAFETY: all zeros is a valid `ifreq`, an empty name and a number.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    for (to, from) in request.ifr_name.iter_mut().zip(c"lo".to_bytes()) {
        *to = from.cast_signed();
    }
    let flags = libc::IFF_UP | libc::IFF_RUNNING;
    request.ifr_ifru.ifru_flags = i16::try_from(flags).map_err(io::Error::other)?;
    // SAFETY: an open socket and a whole `ifreq`, which this request only reads.
    let result = unsafe { libc::ioctl(socket.as_raw_fd(), libc::SIOCSIFFLAGS, &raw const request) };
    if result < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

/// The kernel's release, as `uname -r` has it.
pub fn kernel_release() -> String {
    fs::read_to_string("/proc/sys/kernel/osrelease")
        .map(|text| text.trim().to_owned())
        .unwrap_or_default()
}
