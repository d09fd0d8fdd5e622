//! The anchor's own process. It has one thread, and allocates next to nothing.

use std::{
    ffi::{OsStr, OsString},
    io::{self, Read, Write},
    os::{fd::AsFd, unix::net::UnixStream},
    process::ExitCode,
};

use nix::{
    fcntl::{OFlag, open},
    mount::{MntFlags, MsFlags, mount, umount2},
    poll::{PollFd, PollFlags, PollTimeout, poll},
    sched::{CloneFlags, setns, unshare},
    sys::{
        prctl,
        signal::{SigSet, SigmaskHow, Signal, sigprocmask},
        signalfd::{SfdFlags, SignalFd},
        stat::Mode,
    },
    unistd::{chdir, pivot_root},
};

use super::{FAILED, READY};
use crate::{child::KILLED, privileges};

/// What `ps` shows; the kernel keeps 15 bytes.
const NAME: &std::ffi::CStr = c"bulkhead-anchor";

/// Runs an anchor. The argument is its network namespace: `host`, `new`, or `path:` and its path.
pub fn main(mut arguments: impl Iterator<Item = OsString>) -> ExitCode {
    let Some(network) = arguments.next() else {
        return ExitCode::FAILURE;
    };
    let mut socket = inherited_socket();
    match set_up(&network) {
        Ok(signals) => {
            if socket.write_all(&[READY]).is_err() {
                return ExitCode::from(KILLED);
            }
            ExitCode::from(serve(&socket, &signals))
        }
        Err((step, error)) => {
            let _ = socket.write_all(&[FAILED]);
            let _ = write!(socket, "{step}: {error}");
            ExitCode::FAILURE
        }
    }
}

fn inherited_socket() -> UnixStream {
    use std::os::fd::FromRawFd;
    // SAFETY: the shim starts an anchor with its socket as this descriptor, and nothing else in
    // this process knows it.
    unsafe { UnixStream::from_raw_fd(super::SOCKET_FD) }
}

fn set_up(network: &OsStr) -> Result<SignalFd, (&'static str, io::Error)> {
    fn at<E: Into<io::Error>>(step: &'static str) -> impl Fn(E) -> (&'static str, io::Error) {
        move |error| (step, error.into())
    }
    let _ = prctl::set_name(NAME);
    prctl::set_pdeathsig(Signal::SIGKILL).map_err(at("cannot bind to the shim's life"))?;

    if network == "new" {
        unshare(CloneFlags::CLONE_NEWNET).map_err(at("cannot create a network namespace"))?;
    } else if let Some(path) = network.as_encoded_bytes().strip_prefix(b"path:") {
        let step = "cannot join the network namespace";
        let namespace =
            open(path, OFlag::O_RDONLY | OFlag::O_CLOEXEC, Mode::empty()).map_err(at(step))?;
        setns(namespace, CloneFlags::CLONE_NEWNET).map_err(at(step))?;
    }
    empty_root().map_err(at("cannot set up an empty root"))?;
    // Nothing is left but the user id, by which `ps` and others tell whose a container is.
    privileges::renounce().map_err(at("cannot drop privileges"))?;

    let all = SigSet::all();
    sigprocmask(SigmaskHow::SIG_SETMASK, Some(&all), None).map_err(at("cannot block signals"))?;
    SignalFd::with_flags(&all, SfdFlags::SFD_CLOEXEC | SfdFlags::SFD_NONBLOCK)
        .map_err(at("cannot receive signals"))
}

/// Replaces everything that can be seen by an empty, read-only directory. Nothing of the host
/// stays in use by this.
pub(crate) fn empty_root() -> nix::Result<()> {
    const NONE: Option<&str> = None;
    unshare(CloneFlags::CLONE_NEWNS)?;
    mount(NONE, "/", NONE, MsFlags::MS_REC | MsFlags::MS_PRIVATE, NONE)?;
    let flags = MsFlags::MS_RDONLY | MsFlags::MS_NOSUID | MsFlags::MS_NODEV | MsFlags::MS_NOEXEC;
    // Any directory does as the place of the mount; this one is on every host.
    mount(
        Some("bulkhead"),
        "/proc",
        Some("tmpfs"),
        flags,
        Some("size=4k,mode=555"),
    )?;
    chdir("/proc")?;
    // The old root goes on top of the new one, and away (pivot_root(2), "pivot_root(".", ".")").
    pivot_root(".", ".")?;
    umount2(".", MntFlags::MNT_DETACH)?;
    chdir("/")
}

/// Passes signals on until the shim tells the exit code, or is gone.
fn serve(socket: &UnixStream, signals: &SignalFd) -> u8 {
    loop {
        let mut polled = [
            PollFd::new(socket.as_fd(), PollFlags::POLLIN),
            PollFd::new(signals.as_fd(), PollFlags::POLLIN),
        ];
        match poll(&mut polled, PollTimeout::NONE) {
            Ok(_) | Err(nix::errno::Errno::EINTR) => {}
            Err(_) => return KILLED,
        }
        if polled[0].any().unwrap_or(true) {
            let mut code = [0];
            return match (&*socket).read(&mut code) {
                Ok(1) => code[0],
                _ => KILLED,
            };
        }
        while let Ok(Some(signal)) = signals.read_signal() {
            if let Ok(number) = u8::try_from(signal.ssi_signo)
                && (&*socket).write_all(&[number]).is_err()
            {
                return KILLED;
            }
        }
    }
}
