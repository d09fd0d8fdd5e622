//! `bulkhead-vmm` as a process, over its control socket, on this machine's `/dev/kvm`. The guest is
//! a few instructions long.

use std::{
    fs::File,
    io::Write,
    os::fd::{AsFd, BorrowedFd},
    process::{Child, Command, Stdio},
};

use bulkhead_vmm_control::{
    Channel, Event, FromVmm, IdRange, Launch, Packet, Reply, Request, StopReason, UserNamespace,
    VmConfig, in_new_pid_namespace,
};

/// Writes "hi" to the serial port, and then meets an exception without an interrupt table: a triple
/// fault.
const SAYS_HI: &[u8] = &[
    0x66, 0xba, 0xf8, 0x03, // mov dx, 0x3f8
    0xb0, b'h', 0xee, // mov al, 'h'; out dx, al
    0xb0, b'i', 0xee, // mov al, 'i'; out dx, al
    0x0f, 0x0b, // ud2
];
/// Jumps to itself.
const SPINS: &[u8] = &[0xeb, 0xfe];

struct Vmm {
    process: Child,
    channel: Channel,
}

impl Vmm {
    fn start() -> Self {
        let (channel, theirs) = Channel::pair().unwrap();
        let range = IdRange {
            first: 0x7000_0000,
            count: 65_536,
        };
        let namespace = UserNamespace::create(range).unwrap();
        let launch = Launch {
            control: theirs,
            user_namespace: namespace.as_fd().try_clone_to_owned().unwrap(),
            cgroup: None,
            oom_score_adj: None,
        };
        let mut command = Command::new(env!("CARGO_BIN_EXE_bulkhead-vmm"));
        launch.prepare(&mut command, Stdio::inherit());
        let process = in_new_pid_namespace(|| command.spawn()).unwrap();
        Self { process, channel }
    }

    fn ask(&self, request: &Request, files: &[File]) -> Reply {
        let fds: Vec<BorrowedFd<'_>> = files.iter().map(AsFd::as_fd).collect();
        self.channel.send(request, &fds).unwrap();
        match self.next() {
            Some(FromVmm::Reply(reply)) => reply,
            other => panic!("{other:?} instead of a reply"),
        }
    }

    fn next(&self) -> Option<FromVmm> {
        let packet = self.channel.receive::<FromVmm>().unwrap();
        packet.map(|Packet { message, .. }| message)
    }

    fn boot(&self, config: &VmConfig, files: &[File]) -> Reply {
        self.ask(&Request::Boot(config.clone()), files)
    }
}

impl Drop for Vmm {
    fn drop(&mut self) {
        // It may have ended.
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

fn config() -> VmConfig {
    VmConfig {
        vcpus: 1,
        memory_mib: 64,
        kernel_args: String::new(),
        console: false,
    }
}

fn file(bytes: &[u8]) -> File {
    let mut file = tempfile::tempfile().unwrap();
    file.write_all(bytes).unwrap();
    file
}

fn kvm() -> File {
    let mut options = File::options();
    options.read(true).write(true).open("/dev/kvm").unwrap()
}

/// `/dev/kvm`, a kernel with this code at 16 MiB, and an initramfs.
fn files(code: &[u8]) -> Vec<File> {
    let mut elf = vec![0; 120];
    elf[..6].copy_from_slice(b"\x7fELF\x02\x01");
    elf[24..32].copy_from_slice(&0x100_0000u64.to_le_bytes());
    elf[32..40].copy_from_slice(&64u64.to_le_bytes());
    elf[54..58].copy_from_slice(&[56, 0, 1, 0]);
    elf[64..68].copy_from_slice(&1u32.to_le_bytes());
    elf[72..80].copy_from_slice(&120u64.to_le_bytes());
    elf[88..96].copy_from_slice(&0x100_0000u64.to_le_bytes());
    for size in [96, 104] {
        elf[size..size + 8].copy_from_slice(&(code.len() as u64).to_le_bytes());
    }
    elf.extend(code);
    vec![kvm(), file(&elf), file(b"initramfs")]
}

fn failure(reply: Reply) -> String {
    match reply {
        Reply::Failed(line) => line,
        other => panic!("{other:?} instead of a failure"),
    }
}

#[test]
fn a_guests_last_words_come_with_its_end() {
    let mut vmm = Vmm::start();
    assert_eq!(vmm.boot(&config(), &files(SAYS_HI)), Reply::Done);
    let stopped = Event::Stopped {
        reason: StopReason::Reset,
        console: "hi".to_owned(),
    };
    assert_eq!(vmm.next(), Some(FromVmm::Event(stopped)));
    assert_eq!(vmm.next(), None);
    assert!(vmm.process.wait().unwrap().success());
}

#[test]
fn a_running_vm_counts_and_ends_with_its_control_socket() {
    let mut vmm = Vmm::start();
    let config = VmConfig {
        vcpus: 2,
        ..config()
    };
    assert_eq!(vmm.boot(&config, &files(SPINS)), Reply::Done);
    let Reply::Counters(counters) = vmm.ask(&Request::Counters, &[]) else {
        panic!("no counters");
    };
    let names: Vec<&str> = counters.devices.keys().map(String::as_str).collect();
    assert_eq!(names, ["fs", "rng", "vsock"]);
    let twice = failure(vmm.boot(&config, &files(SPINS)));
    assert_eq!(twice, "The VM has been booted already");
    let (unconnected, _) = Channel::pair().unwrap();
    vmm.channel = unconnected;
    assert!(vmm.process.wait().unwrap().success());
}

#[test]
fn what_cannot_boot_says_why_and_may_be_tried_again() {
    let vmm = Vmm::start();
    let with = |change: &dyn Fn(&mut VmConfig, &mut Vec<File>)| {
        let (mut config, mut files) = (config(), files(SAYS_HI));
        change(&mut config, &mut files);
        failure(vmm.boot(&config, &files))
    };
    let line = with(&|_, files| files[1] = file(b"#!/bin/sh"));
    assert!(line.starts_with("Cannot load the guest kernel"), "{line}");
    let line = with(&|_, files| files[2] = file(b""));
    assert_eq!(line, "The initramfs is empty");
    let line = with(&|config, _| config.memory_mib = u32::MAX);
    assert!(line.starts_with("Cannot allocate 4294967295 MiB"), "{line}");
    let line = with(&|config, _| config.memory_mib = 20);
    assert!(line.contains("memory_mib must be at least"), "{line}");
    let line = with(&|config, _| config.vcpus = 0);
    assert!(line.starts_with("Cannot run 0 vCPUs"), "{line}");
    let line = with(&|config, _| config.kernel_args = "x".repeat(4000));
    assert!(line.contains("shorten kernel_args"), "{line}");
    let line = with(&|_, files| files[0] = File::open("/dev/null").unwrap());
    assert!(line.starts_with("Cannot use KVM"), "{line}");
    let line = with(&|_, files| drop(files.pop()));
    assert_eq!(line, "2 descriptors came with the request instead of 3");
    let line = failure(vmm.ask(&Request::Counters, &[]));
    assert_eq!(line, "The VM has not been booted");
    assert_eq!(vmm.boot(&config(), &files(SAYS_HI)), Reply::Done);
}
