//! Single settings of a process and of its namespaces.

use std::{ffi::CString, fs, io, os::fd::OwnedFd, path::Path};

use nix::sys::{
    personality::Persona,
    resource::{Resource, getrlimit, setrlimit},
    signal::{SaFlags, SigAction, SigHandler, SigSet, Signal, sigaction},
};
use oci_spec::runtime::{LinuxPersonality, LinuxPersonalityDomain, PosixRlimitType, Process, Spec};
use rustix::fs::{FileType, Gid, Uid};

use super::{FIRST_OWN_FD, StageError, protocol::IdMappings};

/// `KEYCTL_JOIN_SESSION_KEYRING`, keyctl(2).
const JOIN_SESSION_KEYRING: libc::c_int = 1;

/// `KEYCTL_SETPERM`, keyctl(2).
const SETPERM: libc::c_int = 5;

/// Everything for who possesses it; for the user: to view, read and link (keyctl_setperm(3)).
const SESSION_KEYRING_RIGHTS: libc::c_int = 0x3f13_0000;
/// To search it, for the user.
const USER_MAY_SEARCH: libc::c_int = 0x0008_0000;
/// To search it, for everybody: in a user namespace nobody is its user.
const OTHERS_MAY_SEARCH: libc::c_int = 0x0000_0008;

/// The container's session keyring, empty at first and the same for all its processes, so that the
/// agent's keys are not the container's. As runc names it, and with the search that runc grants to
/// the user.
pub fn join_session_keyring(container: &str, has_users: bool) -> Result<(), StageError> {
    let failed = StageError::system::<io::Error>("join the session keyring");
    let Ok(name) = CString::new(format!("_ses.{container}")) else {
        return Err(failed(io::ErrorKind::InvalidInput.into()));
    };
    // SAFETY: the name is a string that outlives the call.
    let keyring = unsafe { libc::syscall(libc::SYS_keyctl, JOIN_SESSION_KEYRING, name.as_ptr()) };
    if keyring < 0 {
        let error = io::Error::last_os_error();
        // A kernel without keys has none to keep apart.
        return if error.raw_os_error() == Some(libc::ENOSYS) {
            Ok(())
        } else {
            Err(failed(error))
        };
    }
    let search = if has_users {
        OTHERS_MAY_SEARCH
    } else {
        USER_MAY_SEARCH
    };
    let rights = SESSION_KEYRING_RIGHTS | search;
    // SAFETY: takes numbers alone.
    let granted = unsafe { libc::syscall(libc::SYS_keyctl, SETPERM, keyring, rights) };
    if granted < 0 {
        return Err(failed(io::Error::last_os_error()));
    }
    Ok(())
}

/// Brings the loopback device of the (new) network namespace up.
pub fn loopback_up() -> Result<(), StageError> {
    crate::boot::loopback_up().map_err(StageError::system("bring lo up"))
}

/// Host and domain name.
pub fn names(spec: &Spec) -> Result<(), StageError> {
    if let Some(name) = spec.hostname().as_ref().filter(|name| !name.is_empty()) {
        rustix::system::sethostname(name.as_bytes())
            .map_err(StageError::system(format!("set the host name {name:?}")))?;
    }
    if let Some(name) = spec.domainname().as_ref().filter(|name| !name.is_empty()) {
        rustix::system::setdomainname(name.as_bytes())
            .map_err(StageError::system(format!("set the domain name {name:?}")))?;
    }
    Ok(())
}

/// sysctls of the new namespaces, through the guest's own /proc: they belong to whoever writes.
pub fn sysctls(spec: &Spec) -> Result<(), StageError> {
    let sysctls = spec
        .linux()
        .as_ref()
        .and_then(|linux| linux.sysctl().as_ref());
    for (name, value) in sysctls.into_iter().flatten() {
        let path = sysctl_path(name);
        match fs::write(Path::new("/proc/sys").join(&path), value) {
            // It is set when the interface comes.
            Err(error)
                if error.kind() == io::ErrorKind::NotFound && sysctl_interface(&path).is_some() => {
            }
            result => result.map_err(StageError::system(format!(
                "set sysctl {name} to {value:?}"
            )))?,
        }
    }
    Ok(())
}

/// Where a sysctl is below /proc/sys.
pub fn sysctl_path(name: &str) -> String {
    // With a slash in it the name is a path already, in which dots are dots.
    if name.contains('/') {
        name.to_owned()
    } else {
        name.replace('.', "/")
    }
}

/// The network interface that a sysctl belongs to, by its path.
pub fn sysctl_interface(path: &str) -> Option<&str> {
    let mut parts = path.split('/');
    let is_one = parts.next() == Some("net")
        && matches!(parts.next(), Some("ipv4" | "ipv6" | "mpls"))
        && matches!(parts.next(), Some("conf" | "neigh"));
    let interface = parts.next().filter(|_| is_one)?;
    (!matches!(interface, "all" | "default" | "lo")).then_some(interface)
}

/// How soon the kernel kills the process for its memory.
pub fn oom_score_adj(process: &Process) -> Result<(), StageError> {
    match process.oom_score_adj() {
        Some(score) => fs::write("/proc/self/oom_score_adj", score.to_string())
            .map_err(StageError::system(format!("set oom_score_adj to {score}"))),
        None => Ok(()),
    }
}

/// Gives the pipes that the agent sent to root of a user namespace, which can give them on.
pub fn own_streams(streams: &[OwnedFd; 3], users: &IdMappings) -> Result<(), StageError> {
    // A container's root need not be there; then nothing in it can be.
    let owner = (users.user(0), users.group(0));
    let (Some(uid), Some(gid)) = owner else {
        return Ok(());
    };
    for stream in streams.iter().filter(|stream| is_pipe(stream)) {
        let (uid, gid) = (Uid::from_raw(uid), Gid::from_raw(gid));
        rustix::fs::fchown(stream, Some(uid), Some(gid))
            .map_err(StageError::system("give a stream to the user namespace"))?;
    }
    Ok(())
}

fn is_pipe(stream: &OwnedFd) -> bool {
    rustix::fs::fstat(stream).is_ok_and(|stat| FileType::from_raw_mode(stat.st_mode).is_fifo())
}

/// Makes the pipes that the agent sent the process's streams.
pub fn stdio(streams: [OwnedFd; 3], uid: u32) -> Result<(), StageError> {
    for stream in streams.iter().filter(|stream| is_pipe(stream)) {
        // So that the process may open /dev/stdout and the like again.
        let keep_group: Option<Gid> = None;
        rustix::fs::fchown(stream, Some(Uid::from_raw(uid)), keep_group)
            .map_err(StageError::system("give a stream to the user"))?;
    }
    let [input, output, error] = streams;
    rustix::stdio::dup2_stdin(input).map_err(StageError::system("connect stdin"))?;
    rustix::stdio::dup2_stdout(output).map_err(StageError::system("connect stdout"))?;
    rustix::stdio::dup2_stderr(error).map_err(StageError::system("connect stderr"))
}

/// Raises hard limits to what the process is to have, as far as that is a raise: later, in a user
/// namespace, nobody may.
pub fn raise_hard_limits(process: &Process) -> Result<(), StageError> {
    for limit in process.rlimits().iter().flatten() {
        let kind = resource(limit.typ());
        let raised = getrlimit(kind).and_then(|(soft, hard)| match limit.hard() > hard {
            true => setrlimit(kind, soft, limit.hard()),
            false => Ok(()),
        });
        raised.map_err(StageError::system(format!("raise {:?}", limit.typ())))?;
    }
    Ok(())
}

/// The execution domain, personality(2).
pub fn personality(personality: &LinuxPersonality) -> Result<(), StageError> {
    // include/uapi/linux/personality.h
    let domain = match personality.domain() {
        LinuxPersonalityDomain::PerLinux => 0x0000,
        LinuxPersonalityDomain::PerLinux32 => 0x0008,
    };
    let set = nix::sys::personality::set(Persona::from_bits_retain(domain));
    set.map(drop)
        .map_err(StageError::system("set the personality"))
}

/// Resource limits.
pub fn rlimits(process: &Process) -> Result<(), StageError> {
    for limit in process.rlimits().iter().flatten() {
        setrlimit(resource(limit.typ()), limit.soft(), limit.hard())
            .map_err(StageError::system(format!("set {:?}", limit.typ())))?;
    }
    Ok(())
}

fn resource(kind: PosixRlimitType) -> Resource {
    match kind {
        PosixRlimitType::RlimitCpu => Resource::RLIMIT_CPU,
        PosixRlimitType::RlimitFsize => Resource::RLIMIT_FSIZE,
        PosixRlimitType::RlimitData => Resource::RLIMIT_DATA,
        PosixRlimitType::RlimitStack => Resource::RLIMIT_STACK,
        PosixRlimitType::RlimitCore => Resource::RLIMIT_CORE,
        PosixRlimitType::RlimitRss => Resource::RLIMIT_RSS,
        PosixRlimitType::RlimitNproc => Resource::RLIMIT_NPROC,
        PosixRlimitType::RlimitNofile => Resource::RLIMIT_NOFILE,
        PosixRlimitType::RlimitMemlock => Resource::RLIMIT_MEMLOCK,
        PosixRlimitType::RlimitAs => Resource::RLIMIT_AS,
        PosixRlimitType::RlimitLocks => Resource::RLIMIT_LOCKS,
        PosixRlimitType::RlimitSigpending => Resource::RLIMIT_SIGPENDING,
        PosixRlimitType::RlimitMsgqueue => Resource::RLIMIT_MSGQUEUE,
        PosixRlimitType::RlimitNice => Resource::RLIMIT_NICE,
        PosixRlimitType::RlimitRtprio => Resource::RLIMIT_RTPRIO,
        PosixRlimitType::RlimitRttime => Resource::RLIMIT_RTTIME,
    }
}

/// The process and its children can no longer gain privileges by an execve.
pub fn no_new_privileges(process: &Process) -> Result<(), StageError> {
    if process.no_new_privileges() == Some(true) {
        nix::sys::prctl::set_no_new_privs().map_err(StageError::system("set no_new_privs"))?;
    }
    Ok(())
}

/// An ignored signal stays ignored over an execve: SIGPIPE, as in every Rust program, and whatever
/// else was ignored when the agent was started.
pub fn default_signals() -> Result<(), StageError> {
    let default = SigAction::new(SigHandler::SigDfl, SaFlags::empty(), SigSet::empty());
    let fixed = [Signal::SIGKILL, Signal::SIGSTOP];
    for signal in Signal::iterator().filter(|signal| !fixed.contains(signal)) {
        // SAFETY: the default action replaces a handler; no code of ours runs in it.
        unsafe { sigaction(signal, &default) }.map_err(StageError::system("reset a signal"))?;
    }
    SigSet::empty()
        .thread_set_mask()
        .map_err(StageError::system("unblock all signals"))
}

/// Lets no descriptor but the three streams into the process.
pub fn close_on_exec() -> Result<(), StageError> {
    // SAFETY: only sets a flag on descriptors, closing none.
    let result = unsafe {
        libc::syscall(
            libc::SYS_close_range,
            FIRST_OWN_FD,
            libc::c_uint::MAX,
            libc::CLOSE_RANGE_CLOEXEC,
        )
    };
    if result < 0 {
        return Err(StageError::system("mark all descriptors close-on-exec")(
            io::Error::last_os_error(),
        ));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sysctls_of_interfaces_are_known() {
        let of = |name: &str| sysctl_interface(&sysctl_path(name)).map(str::to_owned);
        assert_eq!(of("net.ipv4.conf.eth0.rp_filter").as_deref(), Some("eth0"));
        assert_eq!(
            of("net/ipv6/neigh/eth0.7/mcast_solicit").as_deref(),
            Some("eth0.7")
        );
        for name in [
            "net.ipv4.conf.all.rp_filter",
            "net.ipv4.ip_forward",
            "net.ipv6.conf.lo.mtu",
            "kernel.x",
        ] {
            assert_eq!(of(name), None, "{name}");
        }
    }
}
