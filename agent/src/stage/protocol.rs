//! What the agent and a stage say to each other over a SOCK_SEQPACKET pair.
//!
//! The agent sends one packet with the request in a memory file and the descriptors that belong
//! to it. The stage and the process that it makes answer with [`Reply`] packets. The descriptor
//! of the channel is close-on-exec, so its end without a [`Reply::Failed`] is the execve.

use std::{
    collections::HashMap,
    io::{self, IoSlice, IoSliceMut, Read, Seek, Write},
    os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd},
    path::PathBuf,
    time::Duration,
};

use nix::sys::socket::{
    ControlMessage, MsgFlags, SockFlag, SockType, UnixAddr, sendmsg, socketpair,
};
use oci_spec::runtime::{Hook, LinuxIdMapping, LinuxPersonality, LinuxSeccomp, Process, Spec};
use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, recvmsg};
use serde::{Deserialize, Serialize};

/// Largest reply; the texts in it are shortened to fit.
const REPLY_MAX: usize = 16 * 1024;

/// Most descriptors that come with one packet.
const FDS_MAX: usize = 16;

/// What a stage is to do.
#[derive(Debug, Serialize, Deserialize)]
pub struct Request {
    /// The container's id.
    pub container: String,
    /// A new container or another process in one.
    pub task: Task,
    /// The process to run at the end.
    pub process: Process,
    /// The container's filter.
    pub seccomp: Option<LinuxSeccomp>,
    /// The container's execution domain.
    pub personality: Option<LinuxPersonality>,
    /// Ids of the container's user namespace, if it has one.
    pub users: Option<IdMappings>,
    /// Columns and rows, if the process gets a terminal.
    pub terminal: Option<(u16, u16)>,
}

/// The two kinds of set-up.
#[derive(Debug, Serialize, Deserialize)]
pub enum Task {
    /// Make a container and wait for [`START`] before the execve.
    Create(Box<CreateTask>),
    /// Join the container whose process's pidfd came with the request.
    Join,
}

/// What a new container is made of.
#[derive(Debug, Serialize, Deserialize)]
pub struct CreateTask {
    /// Its whole spec.
    pub spec: Spec,
    /// Where the guest sees its root file system. Without one it is empty, and its process only
    /// holds namespaces.
    pub rootfs: Option<PathBuf>,
    /// Where the guest sees the sources of its bind mounts, by index in the spec.
    pub binds: HashMap<usize, PathBuf>,
    /// Its bundle on the host, which hooks are told.
    pub bundle: PathBuf,
    /// Where the guest sees the programs of `createContainer`'s hooks, by index in the spec.
    pub hook_programs: HashMap<usize, PathBuf>,
    /// What the descriptors in [`RequestFds::joined`] are of: flags of setns(2).
    pub joined: Vec<NamespaceFlags>,
}

impl CreateTask {
    /// How long the hooks that run here may take.
    pub fn hooks_time(&self) -> Duration {
        let hooks = self.spec.hooks().iter();
        let hooks = hooks.flat_map(|hooks| [hooks.create_container(), hooks.start_container()]);
        hooks.flatten().flatten().map(hook_time).sum()
    }
}

/// How long a hook may take.
pub fn hook_time(hook: &Hook) -> Duration {
    let own = hook.timeout().map(u64::try_from);
    bulkhead_agent_api::hook_time(own.and_then(Result::ok))
}

/// `CLONE_NEW*` flags, as bits.
pub type NamespaceFlags = u32;

/// How the ids of a user namespace are found outside it, user_namespaces(7).
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct IdMappings {
    /// Of users.
    pub uids: Vec<LinuxIdMapping>,
    /// Of groups.
    pub gids: Vec<LinuxIdMapping>,
}

impl IdMappings {
    /// The id outside for a user inside.
    pub fn user(&self, id: u32) -> Option<u32> {
        outside(&self.uids, id)
    }

    /// The id outside for a group inside.
    pub fn group(&self, id: u32) -> Option<u32> {
        outside(&self.gids, id)
    }
}

fn outside(ranges: &[LinuxIdMapping], id: u32) -> Option<u32> {
    let mut found = ranges.iter().filter_map(|range| {
        let offset = id.checked_sub(range.container_id())?;
        (offset < range.size()).then(|| range.host_id().checked_add(offset))?
    });
    found.next()
}

/// Descriptors that go with a request, in this order.
#[derive(Debug)]
pub struct RequestFds {
    /// The cgroup to be born in.
    pub cgroup: OwnedFd,
    /// stdin, stdout, stderr; none with a terminal.
    pub stdio: Option<[OwnedFd; 3]>,
    /// pidfd of the container's own process, for [`Task::Join`].
    pub init: Option<OwnedFd>,
    /// Existing namespaces for a new container, or pidfds of processes that are in them.
    pub joined: Vec<OwnedFd>,
}

/// Packet that lets a created container's process execve.
pub const START: &[u8] = b"start";

/// What a stage reports.
#[derive(Debug, Serialize, Deserialize)]
pub enum Reply {
    /// The process exists; its pidfd comes along.
    Spawned {
        /// In the guest's own pid namespace.
        pid: i32,
    },
    /// The master of the process's terminal comes along.
    Terminal,
    /// Everything up to the execve is done, the process waits for [`START`].
    Ready,
    /// Nothing further will come.
    Failed(Failure),
}

/// Why a set-up failed.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Failure {
    /// What kind of status it makes.
    pub kind: FailureKind,
    /// The whole chain of messages.
    pub message: String,
}

/// Kinds of failure that the host can tell apart.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum FailureKind {
    /// The request cannot be honoured.
    Invalid,
    /// Something else.
    Internal,
}

/// One end of the pair.
#[derive(Debug)]
pub struct Channel(OwnedFd);

impl Channel {
    /// Both ends, close-on-exec: the agent's and the stage's.
    pub fn pair() -> io::Result<(Self, OwnedFd)> {
        let (agent, stage) = socketpair(
            nix::sys::socket::AddressFamily::Unix,
            SockType::SeqPacket,
            None,
            SockFlag::SOCK_CLOEXEC,
        )?;
        Ok((Self(agent), stage))
    }

    /// Wraps an end that was inherited.
    pub fn new(fd: OwnedFd) -> Self {
        Self(fd)
    }

    /// The descriptor.
    pub fn into_fd(self) -> OwnedFd {
        self.0
    }

    /// Sends the request to a stage that is starting.
    pub fn send_request(&self, request: &Request, fds: &RequestFds) -> io::Result<()> {
        let memory = nix::sys::memfd::memfd_create(
            c"stage-request",
            nix::sys::memfd::MFdFlags::MFD_CLOEXEC,
        )?;
        let mut file = std::fs::File::from(memory);
        serde_json::to_writer(io::BufWriter::new(&mut file), request)?;
        file.flush()?;
        let mut all = vec![file.as_fd(), fds.cgroup.as_fd()];
        all.extend(fds.init.iter().map(AsFd::as_fd));
        all.extend(fds.stdio.iter().flatten().map(AsFd::as_fd));
        all.extend(fds.joined.iter().map(AsFd::as_fd));
        self.send(b"request", &all)
    }

    /// Waits for the request, in the stage.
    pub fn receive_request(&self) -> io::Result<(Request, RequestFds)> {
        let mut buffer = [0; 16];
        let (length, fds) = receive(self.0.as_fd(), &mut buffer)?;
        let mut fds = fds.into_iter();
        if &buffer[..length] != b"request" {
            return Err(io::Error::other("not a request"));
        }
        let mut next = || {
            fds.next()
                .ok_or_else(|| io::Error::other("a descriptor is missing"))
        };
        let mut file = std::fs::File::from(next()?);
        file.rewind()?;
        let mut json = Vec::new();
        file.read_to_end(&mut json)?;
        let request: Request = serde_json::from_slice(&json)?;
        let cgroup = next()?;
        let init = match request.task {
            Task::Create(_) => None,
            Task::Join => Some(next()?),
        };
        let stdio = match request.terminal {
            Some(_) => None,
            None => Some([next()?, next()?, next()?]),
        };
        Ok((
            request,
            RequestFds {
                cgroup,
                stdio,
                init,
                joined: fds.collect(),
            },
        ))
    }

    /// Sends a reply, with a descriptor for those that have one.
    pub fn reply(&self, reply: &Reply, fd: Option<BorrowedFd<'_>>) -> io::Result<()> {
        let bytes = serde_json::to_vec(reply)?;
        self.send(&bytes, fd.as_slice())
    }

    /// Sends a failure, shortened if it must be.
    pub fn fail(&self, kind: FailureKind, mut message: String) -> io::Result<()> {
        // JSON may need up to six bytes for one of the message.
        let mut end = message.len().min(REPLY_MAX / 6 - 64);
        while !message.is_char_boundary(end) {
            end -= 1;
        }
        message.truncate(end);
        self.reply(&Reply::Failed(Failure { kind, message }), None)
    }

    /// Waits for [`START`]. False if the agent went away instead.
    pub fn wait_for_start(&self) -> io::Result<bool> {
        let mut buffer = [0; 16];
        let (length, _) = receive(self.0.as_fd(), &mut buffer)?;
        Ok(&buffer[..length] == START)
    }

    fn send(&self, bytes: &[u8], fds: &[BorrowedFd<'_>]) -> io::Result<()> {
        let raw: Vec<i32> = fds.iter().map(|fd| fd.as_raw_fd()).collect();
        let rights = [ControlMessage::ScmRights(&raw)];
        let messages = if raw.is_empty() { &[][..] } else { &rights[..] };
        let flags = MsgFlags::MSG_NOSIGNAL;
        sendmsg::<UnixAddr>(
            self.0.as_raw_fd(),
            &[IoSlice::new(bytes)],
            messages,
            flags,
            None,
        )?;
        Ok(())
    }
}

/// Reads a reply and its descriptor off a channel; `None` is the end of the channel.
pub fn receive_reply(channel: BorrowedFd<'_>) -> io::Result<Option<(Reply, Option<OwnedFd>)>> {
    let mut buffer = vec![0; REPLY_MAX];
    let (length, fds) = receive(channel, &mut buffer)?;
    if length == 0 {
        return Ok(None);
    }
    let reply = serde_json::from_slice(&buffer[..length])?;
    Ok(Some((reply, fds.into_iter().next())))
}

fn receive(socket: BorrowedFd<'_>, buffer: &mut [u8]) -> io::Result<(usize, Vec<OwnedFd>)> {
    let mut space = [std::mem::MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(FDS_MAX))];
    let mut ancillary = RecvAncillaryBuffer::new(&mut space);
    let received = loop {
        let mut slices = [IoSliceMut::new(buffer)];
        match recvmsg(socket, &mut slices, &mut ancillary, RecvFlags::CMSG_CLOEXEC) {
            Err(rustix::io::Errno::INTR) => {}
            result => break result?,
        }
    };
    let mut fds = Vec::new();
    for message in ancillary.drain() {
        if let RecvAncillaryMessage::ScmRights(rights) = message {
            fds.extend(rights);
        }
    }
    Ok((received.bytes, fds))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_request_and_its_descriptors_arrive() {
        let (agent, stage) = Channel::pair().unwrap();
        let stage = Channel::new(stage);
        let null = || OwnedFd::from(std::fs::File::open("/dev/null").unwrap());
        let request = Request {
            container: "c".into(),
            task: Task::Join,
            process: Process::default(),
            seccomp: None,
            personality: None,
            users: None,
            terminal: None,
        };
        let fds = RequestFds {
            cgroup: null(),
            stdio: Some([null(), null(), null()]),
            init: Some(null()),
            joined: vec![null(), null()],
        };
        agent.send_request(&request, &fds).unwrap();
        let (received, fds) = stage.receive_request().unwrap();
        assert_eq!(received.process, request.process);
        assert!(fds.init.is_some() && fds.stdio.is_some());
        assert_eq!(fds.joined.len(), 2);
    }

    #[test]
    fn ids_are_found_outside() {
        let range = |json| serde_json::from_value::<Vec<LinuxIdMapping>>(json).unwrap();
        let mappings = IdMappings {
            uids: range(serde_json::json!([
                {"containerID": 0, "hostID": 1000, "size": 10},
                {"containerID": 20, "hostID": 4_294_967_290u32, "size": 100},
            ])),
            gids: vec![],
        };
        assert_eq!(mappings.user(9), Some(1009));
        assert_eq!(mappings.user(10), None);
        assert_eq!(mappings.user(20), Some(4_294_967_290));
        assert_eq!(mappings.user(30), None, "no such id");
    }

    #[test]
    fn long_failures_fit_into_a_packet() {
        let (agent, stage) = Channel::pair().unwrap();
        let message = "\u{1}ü".repeat(REPLY_MAX);
        Channel::new(stage)
            .fail(FailureKind::Invalid, message)
            .unwrap();
        let reply = receive_reply(agent.into_fd().as_fd()).unwrap();
        assert!(
            matches!(reply, Some((Reply::Failed(failure), None)) if failure.message.len() > 100)
        );
    }
}
