//! What attacker code in the VMM's process would try, for a test that it all fails.
//!
//! Only a build with the feature `back-door` has this, and a release cannot be built with it. There
//! a guest that names the extended attribute [`MAGIC`] makes every kind of thread try everything,
//! each at its next turn. A line on standard error tells how each attempt ended. The handler of
//! forbidden system calls lets the attacker go on, so that the next can be tried.

use std::{
    cell::Cell,
    ffi::CStr,
    io,
    sync::atomic::{AtomicBool, Ordering},
};

use libc::{c_long, syscall};
use vm_memory::VolatileSlice;

use crate::devices::virtio::queue;

#[cfg(not(debug_assertions))]
compile_error!("the feature back-door is for tests; no release may have it");

/// The extended attribute that a guest asks for to let the attacker in.
pub const MAGIC: &[u8] = b"user.bulkhead.break-out";

/// The most descriptors that are tried.
const DESCRIPTORS: c_long = 64;

/// The first user id that a pod has not by default.
const NOT_ITS_OWN: c_long = 0x4_0000;

static OPEN: AtomicBool = AtomicBool::new(false);

thread_local! {
    static VISITED: Cell<bool> = const { Cell::new(false) };
    /// An attempt is being made.
    static TRYING: Cell<bool> = const { Cell::new(false) };
    /// The attempt was stopped by a filter.
    static FILTERED: Cell<bool> = const { Cell::new(false) };
}

/// Called by each thread at its turns. Once the back door is open, the attacker is there the first
/// time.
pub fn visit() {
    if OPEN.load(Ordering::SeqCst) && !VISITED.replace(true) {
        attack();
    }
}

/// Lets the attacker in if this request of the guest asks for it.
pub fn look_at(request: &[VolatileSlice<'_>]) {
    let mut bytes = vec![0; queue::total(request)];
    queue::gather(request, &mut bytes);
    if bytes.windows(MAGIC.len()).any(|window| window == MAGIC) {
        OPEN.store(true, Ordering::SeqCst);
    }
}

/// Called by the handler of forbidden calls: whether it was an attempt, which has failed now.
pub(crate) fn was_attempt(context: *mut libc::c_void) -> bool {
    if !TRYING.get() {
        return false;
    }
    FILTERED.set(true);
    // SAFETY: the kernel passes the interrupted thread's registers, which are its own.
    let context = unsafe { &mut *context.cast::<libc::ucontext_t>() };
    let result = usize::try_from(libc::REG_RAX)
        .ok()
        .and_then(|register| context.uc_mcontext.gregs.get_mut(register));
    if let Some(result) = result {
        *result = -i64::from(libc::EPERM);
    }
    true
}

fn attack() {
    let thread = std::thread::current();
    let thread = thread
        .name()
        .unwrap_or("?")
        .trim_end_matches(char::is_numeric);
    for (what, attempt) in ATTEMPTS {
        FILTERED.set(false);
        TRYING.set(true);
        let result = attempt();
        TRYING.set(false);
        let outcome = match result {
            Ok(()) => "DONE".to_owned(),
            Err(_) if FILTERED.get() => "stopped by the filter".to_owned(),
            Err(error) => format!("stopped by the kernel: {error}"),
        };
        eprintln!("back door: {thread}: {what}: {outcome}");
    }
    eprintln!("back door: {thread}: end");
}

type Attempt = fn() -> io::Result<()>;

/// Whether a system call did what it was asked to.
fn done(result: c_long) -> io::Result<()> {
    if result == -1 {
        Err(io::Error::last_os_error())
    } else {
        Ok(())
    }
}

/// A system call with these arguments, the rest being 0.
macro_rules! call {
    ($number:ident $(, $argument:expr)*) => {
        // SAFETY: pointers among the arguments are null or to constants, and what the calls would
        // do to the process is what is being tested.
        done(unsafe { syscall(libc::$number $(, $argument)*, 0, 0, 0, 0, 0, 0) })
    };
}

/// Succeeds if the attempt does for one of the descriptors.
fn with_any_descriptor(attempt: impl Fn(c_long) -> io::Result<()>) -> io::Result<()> {
    let mut last = Ok(());
    for descriptor in 0..DESCRIPTORS {
        last = attempt(descriptor);
        if last.is_ok() {
            break;
        }
    }
    last
}

/// Files that every host has on which the tests run, and no container.
const HOSTS: [&CStr; 3] = [
    c"usr/local/bin/bulkhead-vmm",
    c"run/bulkhead/ids",
    c"var/lib/containerd/io.containerd.metadata.v1.bolt/meta.db",
];

/// A way up from wherever a descriptor is.
const UP: &str = "../../../../../../../../../../";

fn open_at(directory: c_long, path: &CStr, flags: i32) -> io::Result<()> {
    let how = [
        u64::from(flags.unsigned_abs() | libc::O_CLOEXEC.unsigned_abs()),
        0,
        0,
    ];
    // SAFETY: the path and the structure (`struct open_how`) outlive the call.
    let plain = unsafe { syscall(libc::SYS_openat, directory, path.as_ptr(), flags, 0) };
    done(plain).or_else(|_| {
        // SAFETY: as above.
        done(unsafe {
            syscall(
                libc::SYS_openat2,
                directory,
                path.as_ptr(),
                how.as_ptr(),
                size_of_val(&how),
            )
        })
    })
}

fn open_hosts_files(prefix: &str, directory: c_long) -> io::Result<()> {
    let mut last = Ok(());
    for path in HOSTS {
        let path = format!("{prefix}{}\0", path.to_string_lossy());
        let path = CStr::from_bytes_until_nul(path.as_bytes()).map_err(io::Error::other)?;
        last = open_at(directory, path, libc::O_RDONLY);
        if last.is_ok() {
            break;
        }
    }
    last
}

const HERE: c_long = libc::AT_FDCWD as c_long;

/// What is tried, by each thread.
pub const ATTEMPTS: &[(&str, Attempt)] = &[
    // Files
    ("open a file of the host by its path", || {
        open_hosts_files("/", HERE)
    }),
    ("open a file of the host from a share", || {
        with_any_descriptor(|fd| open_hosts_files(UP, fd))
    }),
    ("open the memory of a process", || {
        open_at(HERE, c"/proc/1/mem", libc::O_RDWR)
    }),
    ("open a process's root through procfs", || {
        with_any_descriptor(|fd| open_at(fd, c"../../1/root", libc::O_PATH))
    }),
    ("create a file in its root", || {
        open_at(HERE, c"/file", libc::O_CREAT | libc::O_WRONLY)
    }),
    ("make a device", || {
        with_any_descriptor(|fd| {
            call!(
                SYS_mknodat,
                fd,
                c"kmsg".as_ptr(),
                libc::S_IFCHR | 0o600,
                libc::makedev(1, 11)
            )
        })
    }),
    ("open /dev/kvm", || open_at(HERE, c"/dev/kvm", libc::O_RDWR)),
    ("open a file by its handle", || {
        with_any_descriptor(|fd| {
            call!(
                SYS_open_by_handle_at,
                fd,
                b"\x08\0\0\0\x01\0\0\0\x02\0\0\0\0\0\0\0".as_ptr(),
                libc::O_RDONLY
            )
        })
    }),
    // Sockets
    ("make an IPv4 socket", || {
        call!(SYS_socket, libc::AF_INET, libc::SOCK_STREAM)
    }),
    ("make a netlink socket", || {
        call!(SYS_socket, libc::AF_NETLINK, libc::SOCK_RAW)
    }),
    ("make a packet socket", || {
        call!(SYS_socket, libc::AF_PACKET, libc::SOCK_RAW)
    }),
    ("make a vsock", || {
        call!(SYS_socket, libc::AF_VSOCK, libc::SOCK_STREAM)
    }),
    ("make a Unix socket", || {
        call!(SYS_socket, libc::AF_UNIX, libc::SOCK_STREAM)
    }),
    ("connect a socket", || {
        with_any_descriptor(|fd| call!(SYS_connect, fd, b"\x01\0/x".as_ptr(), 4))
    }),
    // Processes
    ("fork", || call!(SYS_fork)),
    ("execute a program", || {
        call!(SYS_execve, c"/proc/self/exe".as_ptr())
    }),
    ("execute an open file", || {
        with_any_descriptor(|fd| call!(SYS_execveat, fd, c"".as_ptr(), 0, 0, libc::AT_EMPTY_PATH))
    }),
    ("attach to its parent", || {
        call!(SYS_ptrace, libc::PTRACE_ATTACH, 0)
    }),
    ("be traced", || call!(SYS_ptrace, libc::PTRACE_TRACEME)),
    ("read another process's memory", || {
        call!(SYS_process_vm_readv, 2)
    }),
    ("refer to another process", || call!(SYS_pidfd_open, 2)),
    ("take another process's descriptor", || {
        with_any_descriptor(|fd| call!(SYS_pidfd_getfd, fd, 0))
    }),
    ("kill every process", || call!(SYS_kill, -1, libc::SIGKILL)),
    ("kill its group", || call!(SYS_kill, 0, libc::SIGCONT)),
    ("kill by thread", || call!(SYS_tkill, 2, libc::SIGKILL)),
    // Mounts and namespaces
    ("mount", || {
        call!(
            SYS_mount,
            c"none".as_ptr(),
            c"/".as_ptr(),
            c"tmpfs".as_ptr()
        )
    }),
    ("unmount", || {
        call!(SYS_umount2, c"/".as_ptr(), libc::MNT_DETACH)
    }),
    ("make a file system", || {
        call!(SYS_fsopen, c"tmpfs".as_ptr())
    }),
    ("clone a mount", || {
        with_any_descriptor(|fd| call!(SYS_open_tree, fd, c"".as_ptr(), libc::AT_EMPTY_PATH | 1))
    }),
    ("attach a mount", || {
        with_any_descriptor(|fd| call!(SYS_move_mount, fd, c"".as_ptr(), HERE, c"/".as_ptr(), 4))
    }),
    ("change its root", || call!(SYS_chroot, c"/".as_ptr())),
    ("make a user namespace", || {
        call!(SYS_unshare, libc::CLONE_NEWUSER)
    }),
    ("make a mount namespace", || {
        call!(SYS_unshare, libc::CLONE_NEWNS)
    }),
    ("make a network namespace", || {
        call!(SYS_unshare, libc::CLONE_NEWNET)
    }),
    ("join a namespace", || {
        with_any_descriptor(|fd| call!(SYS_setns, fd))
    }),
    // KVM
    ("create a VM", || {
        with_any_descriptor(|fd| call!(SYS_ioctl, fd, 0xae01))
    }),
    ("create a vCPU", || {
        with_any_descriptor(|fd| call!(SYS_ioctl, fd, 0xae41, 100))
    }),
    ("give the guest other memory", || {
        with_any_descriptor(|fd| call!(SYS_ioctl, fd, 0x4020_ae46, 0))
    }),
    // Memory
    ("map executable memory", || {
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
        call!(
            SYS_mmap,
            0,
            4096,
            libc::PROT_READ | libc::PROT_EXEC,
            flags,
            -1
        )
    }),
    ("make memory executable", || {
        let page = [0_u8; 8192];
        let start = page.as_ptr().addr().next_multiple_of(4096);
        call!(
            SYS_mprotect,
            start,
            4096,
            libc::PROT_READ | libc::PROT_WRITE | libc::PROT_EXEC
        )
    }),
    ("make a file of memory", || {
        call!(SYS_memfd_create, c"x".as_ptr())
    }),
    ("handle page faults", || call!(SYS_userfaultfd, 1)),
    // What a kernel's holes are often found in
    ("set up io_uring", || call!(SYS_io_uring_setup, 1)),
    ("load a BPF program", || call!(SYS_bpf, 5)),
    ("count performance events", || call!(SYS_perf_event_open, 0)),
    ("add a key", || {
        call!(
            SYS_add_key,
            c"user".as_ptr(),
            c"x".as_ptr(),
            c"x".as_ptr(),
            1,
            -4
        )
    }),
    ("make a message queue", || {
        call!(SYS_msgget, 0, libc::IPC_CREAT)
    }),
    ("make shared memory", || {
        call!(SYS_shmget, 0, 4096, libc::IPC_CREAT)
    }),
    // Rights
    ("become root of the host", || {
        call!(SYS_setresuid, -1, NOT_ITS_OWN, -1)
    }),
    ("serve files as somebody else of the host", || {
        // setfsuid(2) tells the id before, whether it has changed it or not.
        call!(SYS_setfsuid, NOT_ITS_OWN)?;
        // SAFETY: -1 is no id, and only asks.
        match unsafe { syscall(libc::SYS_setfsuid, -1) } {
            NOT_ITS_OWN => Ok(()),
            _ => Err(io::ErrorKind::PermissionDenied.into()),
        }
    }),
    ("raise a capability", || {
        let header = [0x2008_0522_u32, 0];
        let all = [u32::MAX; 6];
        call!(SYS_capset, header.as_ptr(), all.as_ptr())
    }),
    ("become dumpable", || {
        call!(SYS_prctl, libc::PR_SET_DUMPABLE, 1)
    }),
    ("let others trace it", || {
        call!(SYS_prctl, libc::PR_SET_PTRACER, -1)
    }),
    ("outlive its parent", || {
        call!(SYS_prctl, libc::PR_SET_PDEATHSIG)
    }),
    ("change its filter", || call!(SYS_seccomp, 1)),
    ("raise a limit", || {
        call!(SYS_prlimit64, 0, libc::RLIMIT_CORE)
    }),
    ("handle SIGSYS itself", || {
        call!(SYS_rt_sigaction, libc::SIGSYS, 0, 0, 8)
    }),
    ("take a processor", || call!(SYS_sched_setaffinity, 0)),
    ("become a real-time task", || {
        call!(SYS_sched_setscheduler, 0, libc::SCHED_FIFO)
    }),
    // The machine
    ("load a module", || call!(SYS_finit_module, -1)),
    ("load a kernel", || call!(SYS_kexec_load)),
    ("reboot", || call!(SYS_reboot, 0)),
    ("set the clock", || call!(SYS_clock_settime, 0)),
    ("read the kernel's log", || call!(SYS_syslog, 10)),
    ("set the host's name", || {
        call!(SYS_sethostname, c"x".as_ptr(), 1)
    }),
];
