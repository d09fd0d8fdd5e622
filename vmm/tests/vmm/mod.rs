//! `bulkhead-vmm` as a process, and the other end of its control socket.
#![allow(dead_code, reason = "no test uses all of it")]

use std::{
    fs::File,
    io::Write,
    os::{
        fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd},
        unix::process::CommandExt,
    },
    process::{Child, Command, ExitStatus, Stdio},
    time::{Duration, Instant},
};

use bulkhead_vmm_control::{CONTROL_FD, Channel, FromVmm, Packet, Reply, Request, VmConfig};
use rustix::{
    event::{PollFd, PollFlags, Timespec, poll},
    process::{Pid, PidfdFlags, pidfd_open},
};

/// How long a VMM may take to answer, or to end.
pub const LIMIT: Duration = Duration::from_secs(60);

pub struct Vmm {
    pub process: Child,
    pub channel: Channel,
}

impl Vmm {
    pub fn start() -> Self {
        Self::start_with(Stdio::inherit())
    }

    /// Starts one whose standard error goes there.
    pub fn start_with(stderr: Stdio) -> Self {
        let (channel, theirs) = Channel::pair().unwrap();
        let theirs = OwnedFd::from(theirs);
        let raw = theirs.as_raw_fd();
        let mut command = Command::new(env!("CARGO_BIN_EXE_bulkhead-vmm"));
        command.stderr(stderr);
        // SAFETY: dup2(2) is async-signal-safe, and the socket lives until the child has its copy.
        unsafe {
            command.pre_exec(move || match libc::dup2(raw, CONTROL_FD) {
                -1 => Err(std::io::Error::last_os_error()),
                _ => Ok(()),
            });
        }
        // The copy must not be the original, which closes itself.
        assert_ne!(raw, CONTROL_FD);
        let process = command.spawn().unwrap();
        Self { process, channel }
    }

    pub fn ask(&self, request: &Request, files: &[impl AsFd]) -> Reply {
        let fds: Vec<BorrowedFd<'_>> = files.iter().map(AsFd::as_fd).collect();
        self.channel.send(request, &fds).unwrap();
        match self.next() {
            Some(FromVmm::Reply(reply)) => reply,
            other => panic!("{other:?} instead of a reply"),
        }
    }

    pub fn boot(&self, config: &VmConfig, files: &[File]) -> Reply {
        self.ask(&Request::Boot(config.clone()), files)
    }

    pub fn next(&self) -> Option<FromVmm> {
        self.next_packet().map(|Packet { message, .. }| message)
    }

    /// The next message with its descriptors, or nothing at the end.
    pub fn next_packet(&self) -> Option<Packet<FromVmm>> {
        let channel = self.channel.as_fd();
        let ready = wait(&mut [PollFd::new(&channel, PollFlags::IN)], LIMIT);
        assert!(ready, "no message within {LIMIT:?}");
        self.channel.receive().unwrap()
    }

    /// Waits for the end of the process.
    pub fn exit(&mut self) -> ExitStatus {
        let pid = Pid::from_child(&self.process);
        let process = pidfd_open(pid, PidfdFlags::empty()).unwrap();
        let ended = wait(&mut [PollFd::new(&process, PollFlags::IN)], LIMIT);
        assert!(ended, "the VMM has not ended within {LIMIT:?}");
        self.process.wait().unwrap()
    }
}

impl Drop for Vmm {
    fn drop(&mut self) {
        // It may have ended.
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

/// Waits until something has happened, and returns whether it has.
pub fn wait(polled: &mut [PollFd<'_>], limit: Duration) -> bool {
    let end = Instant::now() + limit;
    loop {
        let left = end.saturating_duration_since(Instant::now());
        let timeout = Timespec::try_from(left).unwrap();
        match poll(polled, Some(&timeout)) {
            Ok(count) => return count > 0,
            Err(rustix::io::Errno::INTR) => {}
            Err(errno) => panic!("{errno}"),
        }
    }
}

pub fn file(bytes: &[u8]) -> File {
    let mut file = tempfile::tempfile().unwrap();
    file.write_all(bytes).unwrap();
    file
}

pub fn kvm() -> File {
    let mut options = File::options();
    options.read(true).write(true).open("/dev/kvm").unwrap()
}
