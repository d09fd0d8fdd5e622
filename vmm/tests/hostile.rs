//! The hostile guest under the real VMM, on this machine's `/dev/kvm`, and beside it a guest that
//! keeps to the rules. Needs root, for file systems of its own.
//!
//! However the guest behaves, the VMM goes on until the guest resets itself, which it does after its
//! last round: a signal, a panic or any other end fails the test. Memory outside the guest's is out
//! of reach as long as every access goes through checked slices; where one did not, it would most
//! likely run past the guest's first or last byte, into pages that are not there, and be a signal.
//!
//! `BULKHEAD_HOSTILE_SEED` and `BULKHEAD_HOSTILE_ROUNDS` change what is tried and for how long.

mod vmm;

use std::{
    env,
    ffi::OsString,
    fs::File,
    io::{Read, Seek, Write},
    os::{
        fd::{AsFd, OwnedFd},
        unix::net::{UnixDatagram, UnixStream},
    },
    time::{Duration, Instant},
};

use bulkhead_hostile::{
    GUEST, MEMORY_MIB,
    calm::{self, command},
    options::Role,
};
use bulkhead_vmm_control::{
    ChannelError, Event, FromVmm, IDS_ALONE, Packet, Reply, Request, StopReason, VmConfig,
};
use rustix::{
    event::{PollFd, PollFlags},
    fs::{AtFlags, Dir, Gid, Mode, OFlags, Uid, chownat, mkdirat, openat},
    mount::{
        FsMountFlags, FsOpenFlags, MountAttrFlags, fsconfig_create, fsconfig_set_string, fsmount,
        fsopen,
    },
};
use vmm::{LIMIT, Vmm, file, kvm, wait};

/// Rounds of each attack.
const ROUNDS: u64 = 250;
/// What one round may take; the slowest wait for a device that will not answer.
const ROUND_LIMIT: Duration = Duration::from_millis(500);
/// How often the host has something to say.
const TICK: Duration = Duration::from_millis(200);
/// Connections that the host keeps; the oldest go first.
const MAX_CONNECTIONS: usize = 64;
/// What nobody may change.
const CANARY: &[u8] = b"outside of every share";

#[test]
fn vsock_survives() {
    attack(Role::Vsock);
}

#[test]
fn fs_survives() {
    attack(Role::Fs);
}

#[test]
fn rng_survives() {
    attack(Role::Rng);
}

#[test]
fn console_survives() {
    attack(Role::Console);
}

#[test]
fn net_survives() {
    attack(Role::Net);
}

#[test]
fn ioapic_ports_and_holes_survive() {
    attack(Role::Platform);
}

fn attack(role: Role) {
    let seed = variable("BULKHEAD_HOSTILE_SEED").unwrap_or(1);
    let rounds = variable("BULKHEAD_HOSTILE_ROUNDS").unwrap_or(ROUNDS);
    let mut neighbour = Neighbour::start();
    neighbour.check();
    let mut host = Host::start(role, seed, rounds);
    let limit = u32::try_from(rounds).unwrap() * ROUND_LIMIT + LIMIT;
    let (reason, console) = host.serve(&mut neighbour, limit);
    let status = host.vmm.exit();
    neighbour.check();
    neighbour.end();

    let errors = text(&mut host.stderr);
    let context = format!("{role:?} with seed {seed}: {reason:?}\n{console}\n{errors}");
    assert!(status.success(), "{status}: {context}");
    assert!(!errors.contains("panicked"), "{context}");
    assert_eq!(reason, StopReason::Reset, "{context}");
    let name = role.name();
    let told = format!("hostile guest: role={name} seed={seed} rounds={rounds} answers=");
    let (_, told) = console.rsplit_once(&told).expect(&context);
    let (answers, processors) = told.trim().split_once(" processors=").expect(&context);
    // Attacks alone would not lead far into a device.
    assert!(answers.parse::<u64>().unwrap() >= rounds / 10, "{context}");
    assert_eq!(processors == "2", role != Role::Platform, "{context}");
    host.files.check();
    println!("{context}");
}

fn variable(name: &str) -> Option<u64> {
    let value = env::var(name).ok()?;
    Some(value.parse().expect(name))
}

fn text(file: &mut File) -> String {
    let mut bytes = Vec::new();
    file.rewind().unwrap();
    file.read_to_end(&mut bytes).unwrap();
    String::from_utf8_lossy(&bytes).into_owned()
}

/// A file system in memory, nowhere mounted: two directories to share, and beside them a file that
/// is in neither.
struct Files(OwnedFd);

impl Files {
    fn new() -> Self {
        let context = fsopen("tmpfs", FsOpenFlags::FSOPEN_CLOEXEC).unwrap();
        for (key, value) in [("size", "16m"), ("nr_inodes", "4096")] {
            fsconfig_set_string(context.as_fd(), key, value).unwrap();
        }
        fsconfig_create(context.as_fd()).unwrap();
        let attributes = MountAttrFlags::MOUNT_ATTR_NODEV;
        let flags = FsMountFlags::FSMOUNT_CLOEXEC;
        let files = Self(fsmount(context.as_fd(), flags, attributes).unwrap());
        for name in ["share", "other"] {
            mkdirat(&files.0, name, Mode::RWXU).unwrap();
            files.give(name);
        }
        files.write("share/file", calm::CONTENT);
        files.give("share/file");
        files.write("outside", CANARY);
        files
    }

    fn write(&self, path: &str, content: &[u8]) {
        let flags = OFlags::CREATE | OFlags::WRONLY | OFlags::CLOEXEC;
        let fd = openat(&self.0, path, flags, Mode::RUSR | Mode::WUSR).unwrap();
        File::from(fd).write_all(content).unwrap();
    }

    /// Makes the VMM its owner.
    fn give(&self, path: &str) {
        let (user, group) = (
            Uid::from_raw(IDS_ALONE.first),
            Gid::from_raw(IDS_ALONE.first),
        );
        chownat(&self.0, path, Some(user), Some(group), AtFlags::empty()).unwrap();
    }

    fn directory(&self, name: &str) -> OwnedFd {
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        openat(&self.0, name, flags, Mode::empty()).unwrap()
    }

    /// What is outside the shared directories is as it was.
    fn check(&self) {
        let flags = OFlags::RDONLY | OFlags::CLOEXEC;
        let open = |name| openat(&self.0, name, flags, Mode::empty()).unwrap();
        let mut names: Vec<OsString> = Dir::new(open("."))
            .unwrap()
            .map(|entry| entry.unwrap().file_name().to_string_lossy().into_owned())
            .map(OsString::from)
            .collect();
        names.sort();
        assert_eq!(names, [".", "..", "other", "outside", "share"]);
        let mut content = Vec::new();
        File::from(open("outside"))
            .read_to_end(&mut content)
            .unwrap();
        assert_eq!(content, CANARY);
    }
}

fn share(name: &str) -> Request {
    Request::Share {
        name: name.to_owned(),
        read_only: false,
        exclusive: false,
    }
}

fn attach_nic() -> Request {
    Request::AttachNic {
        slot: 0,
        mac: [2, 0, 0, 0, 0, 1],
        mtu: 1500,
    }
}

/// A VMM with a guest, its files and its console.
fn boot(vmm: &Vmm, vcpus: u8, kernel_args: String, console: &File) {
    let config = VmConfig {
        vcpus,
        memory_mib: MEMORY_MIB,
        kernel_args,
        fs_requests_per_second: 0,
        fs_bytes_per_second: 0,
        net_packets_per_second: 0,
        net_bytes_per_second: 0,
        console: true,
    };
    let console = console.try_clone().unwrap();
    let files = [kvm(), file(GUEST), file(b"initramfs"), console];
    assert_eq!(vmm.boot(&config, &files), Reply::Done);
}

/// The host's side of a hostile guest.
struct Host {
    vmm: Vmm,
    stderr: File,
    files: Files,
    connections: Vec<Connection>,
    /// The far ends of the network interface's taps.
    taps: Vec<UnixDatagram>,
    role: Role,
    /// The request that was not answered yet.
    asked: Option<Request>,
    turn: usize,
}

struct Connection {
    socket: UnixStream,
    echoes: bool,
}

impl Host {
    fn start(role: Role, seed: u64, rounds: u64) -> Self {
        let stderr = tempfile::tempfile().unwrap();
        let vmm = Vmm::start_with(&stderr);
        let name = role.name();
        let arguments = format!("hostile={name} seed={seed} rounds={rounds}");
        let vcpus = if role == Role::Platform { 1 } else { 2 };
        boot(&vmm, vcpus, arguments, &tempfile::tempfile().unwrap());
        let first = if role == Role::Net {
            attach_nic()
        } else {
            share("share")
        };
        let mut host = Self {
            vmm,
            stderr,
            files: Files::new(),
            connections: Vec::new(),
            taps: Vec::new(),
            role,
            asked: None,
            turn: 0,
        };
        host.ask(first);
        host
    }

    /// Does what a shim does, and some things that it does not, until the VM stops.
    fn serve(&mut self, neighbour: &mut Neighbour, limit: Duration) -> (StopReason, String) {
        let end = Instant::now() + limit;
        let mut tick = Instant::now();
        loop {
            assert!(Instant::now() < end, "still running after {limit:?}");
            if tick.elapsed() >= TICK {
                neighbour.check();
                self.ask_next();
                tick = Instant::now();
            }
            if !self.wait() {
                continue;
            }
            let Some(Packet { message, fds }) = self.vmm.next_packet() else {
                let (status, errors) = (self.vmm.exit(), text(&mut self.stderr));
                panic!("the VMM has gone without a word: {status}: {errors}");
            };
            match message {
                FromVmm::Reply(reply) => self.answered(reply),
                FromVmm::Event(Event::Stopped { reason, console }) => return (reason, console),
                FromVmm::Event(Event::Connection { port }) => {
                    fds.into_iter().for_each(|fd| self.connect(port, fd.into()));
                }
            }
        }
    }

    /// Lets connections echo until there is a message of the VMM, or for a while.
    fn wait(&mut self) -> bool {
        let channel = self.vmm.channel.as_fd();
        let mut polled = vec![PollFd::new(&channel, PollFlags::IN)];
        for connection in &self.connections {
            let events = if connection.echoes {
                PollFlags::IN
            } else {
                PollFlags::empty()
            };
            polled.push(PollFd::new(&connection.socket, events));
        }
        for tap in &self.taps {
            polled.push(PollFd::new(tap, PollFlags::IN));
        }
        wait(&mut polled, TICK);
        let mut ready: Vec<_> = polled.iter().map(PollFd::revents).collect();
        let message = !ready.remove(0).is_empty();
        self.taps.iter().for_each(echo);
        let mut ready = ready.into_iter();
        self.connections.retain_mut(|connection| {
            let events = ready.next().unwrap_or(PollFlags::empty());
            if events.intersects(PollFlags::HUP | PollFlags::ERR) {
                return false;
            }
            events.is_empty() || connection.echo()
        });
        message
    }

    /// Treats each port in its own bad way.
    fn connect(&mut self, port: u32, mut socket: UnixStream) {
        socket.set_nonblocking(true).unwrap();
        match port % 4 {
            0 => return,
            // As much as it takes, for a guest that may not want it.
            1 => while socket.write(&[1; 4096]).is_ok() {},
            _ => {}
        }
        if self.connections.len() == MAX_CONNECTIONS {
            self.connections.remove(0);
        }
        let echoes = port % 4 == 2;
        self.connections.push(Connection { socket, echoes });
    }

    fn ask(&mut self, request: Request) {
        let files: Vec<OwnedFd> = match &request {
            Request::Share { name, .. } => vec![self.files.directory(name)],
            Request::AttachNic { .. } => {
                let pairs = (0..2).map(|_| UnixDatagram::pair().unwrap());
                let (theirs, ours): (Vec<_>, Vec<_>) = pairs.unzip();
                for socket in theirs.iter().chain(&ours) {
                    socket.set_nonblocking(true).unwrap();
                }
                self.taps = ours;
                theirs.into_iter().map(OwnedFd::from).collect()
            }
            _ => Vec::new(),
        };
        let fds: Vec<_> = files.iter().map(AsFd::as_fd).collect();
        match self.vmm.channel.send(&request, &fds) {
            // The VM may have stopped, and its last message be on the way.
            Err(ChannelError::Send(errno)) if errno as i32 == libc::EPIPE => {}
            sent => sent.unwrap(),
        }
        self.asked = Some(request);
    }

    /// Counts, shows the guest one more directory, and takes it away from under it; or the network.
    fn ask_next(&mut self) {
        if self.asked.is_some() {
            return;
        }
        let name = "other".to_owned();
        let request = match (self.turn % 3, self.role) {
            (0, _) => Request::Counters,
            (1, Role::Net) => Request::DetachNic { slot: 0 },
            (_, Role::Net) => attach_nic(),
            (1, _) => share(&name),
            _ => Request::Unshare { name },
        };
        self.turn += 1;
        self.ask(request);
    }

    fn answered(&mut self, reply: Reply) {
        match (self.asked.take(), reply) {
            (Some(Request::Counters), Reply::Counters(_)) | (Some(_), Reply::Done) => {}
            (request, reply) => panic!("{reply:?} to {request:?}"),
        }
    }
}

/// Sends back what has come by a tap, as far as there is room, and more than was asked for.
fn echo(tap: &UnixDatagram) {
    let mut packet = [1; 0x1_2000];
    while let Ok(length) = tap.recv(&mut packet) {
        for length in [length, 60, 0x1_000c] {
            let _ = tap.send(&packet[..length]);
        }
    }
}

impl Connection {
    /// Sends back what has come. False when there is nothing more to come.
    fn echo(&mut self) -> bool {
        let mut bytes = [0; 4096];
        match self.socket.read(&mut bytes) {
            Ok(0) => false,
            Ok(count) => {
                // What does not fit is lost.
                let _ = self.socket.write(&bytes[..count]);
                true
            }
            Err(error) => error.kind() == std::io::ErrorKind::WouldBlock,
        }
    }
}

/// A guest that keeps to the rules, and checks that its devices work whenever it is asked.
struct Neighbour {
    vmm: Vmm,
    console: File,
    connection: UnixStream,
    checks: usize,
}

impl Neighbour {
    fn start() -> Self {
        let vmm = Vmm::start();
        let console = tempfile::tempfile().unwrap();
        boot(&vmm, 1, "hostile=calm".to_owned(), &console);
        let connection = match vmm.next_packet() {
            Some(Packet {
                message: FromVmm::Event(Event::Connection { port: calm::PORT }),
                mut fds,
            }) => UnixStream::from(fds.remove(0)),
            other => panic!("{other:?} instead of a connection"),
        };
        connection.set_read_timeout(Some(LIMIT)).unwrap();
        let files = Files::new();
        let root = files.directory("share");
        assert_eq!(vmm.ask(&share("share"), &[root]), Reply::Done);
        Self {
            vmm,
            console,
            connection,
            checks: 0,
        }
    }

    fn check(&mut self) {
        self.connection.write_all(&[command::CHECK]).unwrap();
        let mut answer = [0];
        if let Err(error) = self.connection.read_exact(&mut answer) {
            panic!(
                "the neighbour does not answer: {error}, {:?}",
                self.vmm.next()
            );
        }
        assert_eq!(answer, [command::CHECK]);
        self.checks += 1;
    }

    fn end(mut self) {
        self.connection.write_all(&[command::END]).unwrap();
        let Some(FromVmm::Event(Event::Stopped { reason, console })) = self.vmm.next() else {
            panic!("the neighbour does not stop");
        };
        assert_eq!(reason, StopReason::Reset, "{console}");
        let told = format!("calm guest: {} checks", self.checks);
        assert!(console.ends_with(&told), "{console}");
        assert!(self.vmm.exit().success());
        let lines = text(&mut self.console);
        assert_eq!(lines.as_bytes(), calm::LINE.repeat(self.checks));
    }
}
