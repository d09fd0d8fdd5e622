//! Calls that each filter allows or forbids, with arguments that make them fail or do nothing.

use std::mem::size_of;

use kvm_bindings::{
    KVMIO, kvm_cpuid2, kvm_enable_cap, kvm_fpu, kvm_ioeventfd, kvm_irq_routing, kvm_irqfd,
    kvm_msrs, kvm_regs, kvm_sregs, kvm_userspace_memory_region,
};
use libc::{
    AF_INET, AF_UNIX, AT_EMPTY_PATH, AT_FDCWD, AT_NO_AUTOMOUNT, AT_SYMLINK_FOLLOW,
    AT_SYMLINK_NOFOLLOW, CLONE_FS, CLONE_NEWNS, CLONE_NEWUSER, EPOLL_CTL_ADD, EPOLL_CTL_DEL,
    EPOLL_CTL_MOD, F_DUPFD, F_DUPFD_CLOEXEC, F_GETFD, F_SETFL, FIONBIO, MADV_DONTNEED,
    MADV_HUGEPAGE, MAP_ANONYMOUS, MAP_FIXED, MAP_PRIVATE, MAP_SHARED, MREMAP_FIXED, MREMAP_MAYMOVE,
    MSG_CMSG_CLOEXEC, MSG_NOSIGNAL, O_CLOEXEC, O_CREAT, O_PATH, O_RDONLY, O_RDWR, O_TMPFILE,
    PR_SET_DUMPABLE, PR_SET_NAME, PR_SET_NO_NEW_PRIVS, PROT_EXEC, PROT_READ, PROT_WRITE, SIGABRT,
    SIGBUS, SIGKILL, SIGSEGV, SIGSYS, SOCK_CLOEXEC, SOCK_DGRAM, SOCK_STREAM, TIOCSTI,
};
use syscalls::Sysno;
use vmm_sys_util::ioctl::{_IOC_NONE, _IOC_READ, _IOC_WRITE, ioctl_expr};

/// A system call; arguments that are not given are 0.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Call {
    pub name: &'static str,
    pub arguments: Vec<i64>,
}

impl Call {
    pub fn number(&self) -> i32 {
        self.name.parse::<Sysno>().unwrap().id()
    }

    /// The number and the arguments as text.
    pub fn words(&self) -> Vec<String> {
        let number = self.number().to_string();
        let arguments = self.arguments.iter().map(i64::to_string);
        [number].into_iter().chain(arguments).collect()
    }
}

macro_rules! calls {
    ($($name:ident($($argument:expr),* $(,)?)),* $(,)?) => {
        vec![$(Call {
            name: stringify!($name),
            arguments: vec![$($argument as i64),*],
        }),*]
    };
}

/// A list of calls.
type Calls = fn() -> Vec<Call>;

/// The name of a running thread's filter, and the calls of its own list.
pub const FILTERS: [(&str, Calls); 5] = [
    ("vcpu", vcpu),
    ("devices", devices),
    ("main", main),
    ("fs", fs),
    ("net", net),
];

/// All calls that a filter allows.
pub fn of(name: &str) -> Vec<Call> {
    let own = FILTERS.iter().find(|(filter, _)| *filter == name);
    let own = own.map(|(_, calls)| calls());
    let all = || FILTERS.iter().flat_map(|(_, calls)| calls()).chain(setup());
    let mut calls = own.unwrap_or_else(|| all().collect());
    calls.extend(common());
    calls
}

/// The number of one of KVM's requests, from what the kernel's header says of it.
const fn kvm<T>(direction: u32, number: u32) -> u64 {
    #[allow(clippy::cast_possible_truncation, reason = "structures are short")]
    ioctl_expr(direction, KVMIO, number, size_of::<T>() as u32)
}

const ANY_FD: i32 = 99;
const ANONYMOUS: i32 = MAP_PRIVATE | MAP_ANONYMOUS;
const READ_WRITE: i32 = PROT_READ | PROT_WRITE;
const BY_DESCRIPTOR: i32 = AT_EMPTY_PATH | AT_NO_AUTOMOUNT | AT_SYMLINK_NOFOLLOW;
const SET_MODE_FILTER: i32 = 1;

pub fn common() -> Vec<Call> {
    calls![
        write(-1),
        writev(2),
        close(-1),
        fcntl(-1, F_GETFD),
        futex(),
        sched_yield(),
        restart_syscall(),
        getrandom(),
        sched_getaffinity(0),
        clock_gettime(libc::CLOCK_MONOTONIC),
        brk(),
        mmap(0, 0, READ_WRITE, ANONYMOUS, -1),
        mmap(0, 0, 0, ANONYMOUS | libc::MAP_NORESERVE, -1),
        mprotect(0, 0, READ_WRITE),
        mremap(0, 0, 0, MREMAP_MAYMOVE),
        munmap(),
        madvise(0, 0, MADV_DONTNEED),
        rt_sigprocmask(0, 0, 0, 8),
        rt_sigaction(SIGABRT, 0, 0, 8),
        rt_sigaction(SIGBUS, 0, 0, 8),
        rt_sigaction(SIGSEGV, 0, 0, 8),
        sigaltstack(),
        getpid(),
        gettid(),
        tgkill(-1, -1, SIGABRT),
    ]
}

fn vcpu() -> Vec<Call> {
    calls![
        ioctl(-1, kvm::<()>(_IOC_NONE, 0x80)),
        ioctl(-1, kvm::<kvm_irq_routing>(_IOC_WRITE, 0x6a)),
        ioctl(-1, kvm::<kvm_regs>(_IOC_READ, 0x81)),
    ]
}

fn devices() -> Vec<Call> {
    calls![
        epoll_wait(-1),
        epoll_ctl(-1, EPOLL_CTL_ADD),
        read(-1),
        socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC),
        ioctl(-1, FIONBIO),
        sendto(-1, 0, 0, MSG_NOSIGNAL),
        shutdown(-1),
    ]
}

fn main() -> Vec<Call> {
    calls![
        ppoll(0, -1),
        read(-1),
        recvmsg(-1, 0, MSG_CMSG_CLOEXEC),
        sendmsg(-1, 0, MSG_NOSIGNAL),
        statx(-1, 0, BY_DESCRIPTOR),
        epoll_ctl(-1, EPOLL_CTL_ADD),
        epoll_ctl(-1, EPOLL_CTL_DEL),
        pread64(-1),
    ]
}

fn fs() -> Vec<Call> {
    calls![
        epoll_wait(-1),
        read(-1),
        clock_nanosleep(libc::CLOCK_REALTIME),
        openat(ANY_FD, 0, O_RDWR | O_CLOEXEC),
        openat(ANY_FD, 0, O_PATH | O_CLOEXEC),
        openat2(-1),
        statx(-1, 0, BY_DESCRIPTOR),
        fstatfs(-1),
        readlinkat(-1),
        getdents64(-1),
        lseek(-1),
        preadv(-1),
        pwritev2(-1),
        fallocate(-1),
        ftruncate(-1),
        copy_file_range(-1),
        fsync(-1),
        fdatasync(-1),
        syncfs(-1),
        mkdirat(-1),
        mknodat(-1),
        symlinkat(),
        linkat(-1, 0, -1, 0, AT_SYMLINK_FOLLOW),
        unlinkat(-1),
        renameat2(-1),
        fchmodat(-1),
        fchownat(-1, 0, 0, 0, AT_EMPTY_PATH),
        utimensat(ANY_FD, 0, 0, AT_EMPTY_PATH),
        getxattr(),
        setxattr(),
        listxattr(),
        removexattr(),
        setfsuid(-1),
        setfsgid(-1),
        capget(),
        capset(),
        umask(0o22),
    ]
}

fn net() -> Vec<Call> {
    calls![
        epoll_wait(-1),
        epoll_ctl(-1, EPOLL_CTL_MOD),
        read(-1),
        readv(-1),
        writev(ANY_FD),
    ]
}

/// What only the set-up may do.
pub fn setup() -> Vec<Call> {
    calls![
        prctl(PR_SET_NAME),
        prctl(PR_SET_NO_NEW_PRIVS, 1),
        seccomp(SET_MODE_FILTER),
        clone3(),
        // As glibc starts threads, but with an impossible place for their own memory.
        clone(0x003d_0f00, 0, 0, 0, -1),
        rseq(),
        set_robust_list(),
        sched_getaffinity(1),
        rt_sigaction(libc::SIGRTMIN(), 0, 0, 8),
        tgkill(-1, -1, libc::SIGRTMIN()),
        unshare(CLONE_FS),
        fchdir(-1),
        prlimit64(0, -1),
        eventfd2(0, -1),
        epoll_create1(-1),
        statx(-1, 0, AT_EMPTY_PATH),
        fcntl(-1, F_DUPFD_CLOEXEC),
        mmap(0, 0, READ_WRITE, MAP_SHARED, -1),
        madvise(0, 0, MADV_HUGEPAGE),
        ioctl(-1, kvm::<()>(_IOC_NONE, 0x00)),
        ioctl(-1, kvm::<()>(_IOC_NONE, 0x01)),
        ioctl(-1, kvm::<()>(_IOC_NONE, 0x03)),
        ioctl(-1, kvm::<()>(_IOC_NONE, 0x04)),
        ioctl(-1, kvm::<kvm_cpuid2>(_IOC_READ | _IOC_WRITE, 0x05)),
        ioctl(-1, kvm::<()>(_IOC_NONE, 0x41)),
        ioctl(-1, kvm::<kvm_userspace_memory_region>(_IOC_WRITE, 0x46)),
        ioctl(-1, kvm::<()>(_IOC_NONE, 0x47)),
        ioctl(-1, kvm::<kvm_irqfd>(_IOC_WRITE, 0x76)),
        ioctl(-1, kvm::<kvm_ioeventfd>(_IOC_WRITE, 0x79)),
        ioctl(-1, kvm::<kvm_regs>(_IOC_WRITE, 0x82)),
        ioctl(-1, kvm::<kvm_sregs>(_IOC_READ, 0x83)),
        ioctl(-1, kvm::<kvm_sregs>(_IOC_WRITE, 0x84)),
        ioctl(-1, kvm::<kvm_msrs>(_IOC_WRITE, 0x89)),
        ioctl(-1, kvm::<kvm_fpu>(_IOC_WRITE, 0x8d)),
        ioctl(-1, kvm::<kvm_cpuid2>(_IOC_WRITE, 0x90)),
        ioctl(-1, kvm::<kvm_enable_cap>(_IOC_WRITE, 0xa3)),
        ioctl(-1, kvm::<()>(_IOC_NONE, 0xce)),
    ]
}

/// What no filter allows.
pub fn never() -> Vec<Call> {
    calls![
        // Other programs and processes.
        execve(),
        execveat(-1),
        fork(),
        clone(libc::SIGCHLD),
        clone(CLONE_NEWUSER | libc::SIGCHLD),
        wait4(-1),
        ptrace(-1),
        process_vm_readv(-1),
        process_vm_writev(-1),
        pidfd_open(-1),
        pidfd_getfd(-1),
        pidfd_send_signal(-1),
        kill(i32::MAX, SIGKILL),
        tkill(i32::MAX, SIGKILL),
        tgkill(-1, -1, SIGKILL),
        rt_sigqueueinfo(i32::MAX, SIGKILL),
        setpriority(-1),
        // Files by path.
        open(0, O_RDONLY),
        creat(),
        openat(AT_FDCWD, 0, O_PATH | O_CLOEXEC),
        openat(AT_FDCWD, 0, O_RDONLY | O_CLOEXEC),
        openat(ANY_FD, 0, O_RDWR | O_CREAT | O_CLOEXEC),
        openat(ANY_FD, 0, O_RDWR | O_TMPFILE | O_CLOEXEC),
        open_by_handle_at(-1),
        name_to_handle_at(-1),
        linkat(-1, 0, -1, 0, AT_EMPTY_PATH),
        fchownat(ANY_FD),
        chdir(),
        chroot(),
        // Sockets.
        socket(AF_INET, SOCK_STREAM),
        socket(AF_UNIX, SOCK_DGRAM),
        socketpair(AF_INET, SOCK_STREAM | SOCK_CLOEXEC),
        socketpair(AF_UNIX, SOCK_DGRAM | SOCK_CLOEXEC),
        connect(-1),
        bind(-1),
        listen(-1),
        accept4(-1),
        setsockopt(-1),
        getsockopt(-1),
        sendto(-1, 0, 0, MSG_NOSIGNAL, i64::from(u32::MAX) + 1),
        sendmmsg(-1),
        recvmsg(-1),
        // Namespaces, mounts, identity.
        unshare(CLONE_NEWNS),
        unshare(CLONE_NEWUSER),
        setns(-1),
        mount(),
        umount2(),
        move_mount(-1),
        open_tree(-1),
        fsopen(),
        pivot_root(),
        setuid(-1),
        setgid(-1),
        setresuid(-1, -1, -1),
        setgroups(-1),
        prlimit64(1, -1),
        prctl(PR_SET_DUMPABLE, 1),
        personality(-1),
        // Memory that is code, or others' memory.
        mmap(0, 0, READ_WRITE | PROT_EXEC, ANONYMOUS, -1),
        mmap(0, 0, PROT_READ | PROT_EXEC, MAP_PRIVATE, -1),
        mprotect(0, 0, PROT_READ | PROT_EXEC),
        pkey_mprotect(0, 0, PROT_READ | PROT_EXEC, -1),
        mremap(0, 0, 0, MREMAP_MAYMOVE | MREMAP_FIXED),
        memfd_create(),
        memfd_secret(-1),
        shmget(-1, 0),
        userfaultfd(-1),
        process_madvise(-1),
        // More of the kernel.
        bpf(-1),
        perf_event_open(),
        io_uring_setup(),
        io_uring_enter(-1),
        io_setup(),
        seccomp(SET_MODE_FILTER, 1),
        seccomp(0),
        keyctl(-1),
        add_key(),
        init_module(),
        finit_module(-1),
        kexec_load(0, 0, 0, -1),
        modify_ldt(-1),
        arch_prctl(-1),
        ioperm(0, 0, 0),
        iopl(0),
        fcntl(-1, F_DUPFD),
        fcntl(-1, F_SETFL),
        dup(-1),
        dup3(-1, -1),
        inotify_init1(-1),
        clock_settime(-1),
        ioctl(-1, TIOCSTI),
        // KVM_CREATE_DEVICE and KVM_MEMORY_ENCRYPT_OP.
        ioctl(-1, kvm::<[u32; 3]>(_IOC_READ | _IOC_WRITE, 0xe0)),
        ioctl(-1, kvm::<u64>(_IOC_READ | _IOC_WRITE, 0xba)),
    ]
}

/// What the filters of running threads forbid although the set-up may do some of it.
pub fn never_when_running() -> Vec<Call> {
    calls![
        rt_sigaction(SIGSYS, 0, 0, 8),
        mmap(0, 0, READ_WRITE, ANONYMOUS | MAP_FIXED, -1),
        mmap(0, 0, READ_WRITE, MAP_PRIVATE, ANY_FD),
    ]
}
