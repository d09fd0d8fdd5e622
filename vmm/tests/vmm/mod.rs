//! `bulkhead-vmm` as a process, and the other end of its control socket.
#![allow(dead_code, reason = "no test uses all of it")]

use std::{
    fs::File,
    io::{self, PipeReader, Read, Write},
    os::fd::{AsFd, BorrowedFd},
    path::Path,
    process::ExitStatus,
    time::{Duration, Instant},
};

use bulkhead_vmm_control::{
    Channel, FromVmm, Packet, Reply, Request, Spawned, VmConfig, spawn_alone_after,
};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use seccompiler::{BpfProgram, apply_filter};

/// How long a VMM may take to answer, or to end.
pub const LIMIT: Duration = Duration::from_secs(60);

pub struct Vmm {
    pub process: Spawned,
    pub channel: Channel,
    /// Where its standard error arrives, unless that goes elsewhere.
    stderr: Option<PipeReader>,
}

impl Vmm {
    pub fn start() -> Self {
        Self::start_under(Vec::new())
    }

    /// Starts one whose standard error goes there.
    pub fn start_with(stderr: &File) -> Self {
        Self::launch(stderr, Vec::new())
    }

    /// Starts one under system call filters of the test's.
    pub fn start_under(filters: Vec<BpfProgram>) -> Self {
        let (stderr, theirs) = io::pipe().unwrap();
        let mut vmm = Self::launch(&theirs, filters);
        vmm.stderr = Some(stderr);
        vmm
    }

    fn launch(stderr: &impl AsFd, filters: Vec<BpfProgram>) -> Self {
        let (channel, theirs) = Channel::pair().unwrap();
        let program = Path::new(env!("CARGO_BIN_EXE_bulkhead-vmm"));
        let filter = || {
            filters
                .iter()
                .try_for_each(|filter| apply_filter(filter))
                .map_err(|_| io::Error::last_os_error())
        };
        // SAFETY: prctl(2) and seccomp(2) are async-signal-safe.
        let process = unsafe { spawn_alone_after(program, &theirs, stderr.as_fd(), filter) };
        Self {
            process: process.unwrap(),
            channel,
            stderr: None,
        }
    }

    /// What it has said on its standard error, once it has ended.
    pub fn last_words(&mut self) -> String {
        let mut text = String::new();
        if let Some(mut stderr) = self.stderr.take() {
            stderr.read_to_string(&mut text).unwrap();
        }
        text
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
        let process = &self.process.pidfd;
        let ended = wait(&mut [PollFd::new(process, PollFlags::IN)], LIMIT);
        assert!(ended, "the VMM has not ended within {LIMIT:?}");
        self.process.wait().unwrap()
    }
}

impl Drop for Vmm {
    fn drop(&mut self) {
        // It may have ended.
        let _ = self.process.kill();
        let _ = self.process.wait();
        eprint!("{}", self.last_words());
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
