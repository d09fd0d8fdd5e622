//! `bulkhead-vmm` as a process, over its control socket, on this machine's `/dev/kvm`. The guest is
//! a few instructions long.

mod vmm;

use std::{
    fs::{self, File},
    os::{
        fd::{AsFd, BorrowedFd},
        unix::{fs::OpenOptionsExt, net::UnixDatagram},
    },
};

use bulkhead_vmm_control::{Channel, Event, FromVmm, NICS, Reply, Request, StopReason, VmConfig};
use seccompiler::{BpfProgram, SeccompAction, SeccompFilter, TargetArch};
use vmm::{Vmm, file, kvm};

/// None come with the request.
const NO_FILES: &[File] = &[];

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

fn config() -> VmConfig {
    VmConfig {
        vcpus: 1,
        memory_mib: 64,
        kernel_args: String::new(),
        fs_requests_per_second: 0,
        fs_bytes_per_second: 0,
        net_packets_per_second: 0,
        net_bytes_per_second: 0,
        console: false,
    }
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
    assert!(vmm.exit().success());
}

#[test]
fn a_running_vm_counts_and_ends_with_its_control_socket() {
    let mut vmm = Vmm::start();
    let config = VmConfig {
        vcpus: 2,
        ..config()
    };
    assert_eq!(vmm.boot(&config, &files(SPINS)), Reply::Done);
    let Reply::Counters(counters) = vmm.ask(&Request::Counters, NO_FILES) else {
        panic!("no counters");
    };
    let names: Vec<_> = counters.devices.keys().cloned().collect();
    let nics = (0..NICS).map(|slot| format!("net{slot}"));
    let others = ["fs", "rng", "vsock"].map(str::to_owned);
    let mut expected: Vec<_> = nics.chain(others).collect();
    expected.sort();
    assert_eq!(names, expected);
    let twice = failure(vmm.boot(&config, &files(SPINS)));
    assert_eq!(twice, "The VM has been booted already");
    let (unconnected, _) = Channel::pair().unwrap();
    vmm.channel = unconnected;
    assert!(vmm.exit().success());
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
    let line = failure(vmm.ask(&Request::Counters, NO_FILES));
    assert_eq!(line, "The VM has not been booted");
    assert_eq!(vmm.boot(&config(), &files(SAYS_HI)), Reply::Done);
}

#[test]
fn shares_come_and_go_while_the_vm_runs() {
    let vmm = Vmm::start();
    assert_eq!(vmm.boot(&config(), &files(SPINS)), Reply::Done);
    let directory = tempfile::tempdir().unwrap();
    let share = || {
        let root = File::options()
            .read(true)
            .custom_flags(libc::O_PATH)
            .open(directory.path())
            .unwrap();
        let request = Request::Share {
            name: "share".to_owned(),
            read_only: true,
            exclusive: false,
        };
        vmm.ask(&request, &[root])
    };
    assert_eq!(share(), Reply::Done);
    assert!(failure(share()).contains("the name is taken"));
    let name = "share".to_owned();
    let unshare = Request::Unshare { name };
    assert_eq!(vmm.ask(&unshare, NO_FILES), Reply::Done);
    assert!(failure(vmm.ask(&unshare, NO_FILES)).contains("no such share"));
    assert_eq!(share(), Reply::Done);
}

#[test]
fn network_interfaces_come_and_go_while_the_vm_runs() {
    let vmm = Vmm::start();
    assert_eq!(vmm.boot(&config(), &files(SPINS)), Reply::Done);
    let attach = |slot, taps: usize| {
        let (taps, peers): (Vec<_>, Vec<_>) =
            (0..taps).map(|_| UnixDatagram::pair().unwrap()).unzip();
        for socket in taps.iter().chain(&peers) {
            socket.set_nonblocking(true).unwrap();
        }
        let request = Request::AttachNic {
            slot,
            mac: [2, 0, 0, 0, 0, 1],
            mtu: 1500,
        };
        (vmm.ask(&request, &taps), peers)
    };
    let detach = |slot| vmm.ask(&Request::DetachNic { slot }, NO_FILES);
    // Nothing of a tap is left open: a message to it would be refused.
    let closed = |peer: &UnixDatagram| peer.send(b"packet").is_err();
    for slot in [0, NICS - 1] {
        for _ in 0..2 {
            let (reply, peers) = attach(slot, 1);
            assert_eq!(reply, Reply::Done);
            assert!(!closed(&peers[0]));
            let (reply, others) = attach(slot, 1);
            assert!(failure(reply).contains("has an interface already"));
            assert!(closed(&others[0]));
            assert_eq!(detach(slot), Reply::Done);
            assert!(closed(&peers[0]));
            assert!(failure(detach(slot)).contains("has no interface"));
        }
    }
    assert!(failure(attach(NICS, 1).0).contains("There is no network device 8"));
    for (count, text) in [(0, "0 queues"), (2, "2 queues")] {
        assert!(failure(attach(0, count).0).contains(text));
    }
}

/// The lines of a status file in /proc that are about system call filters.
fn filters_in(status: &str) -> Vec<&str> {
    let about = |line: &&str| line.starts_with("Seccomp") || line.starts_with("NoNewPrivs");
    status.lines().filter(about).collect()
}

#[test]
fn every_thread_is_restricted_before_the_guest_runs() {
    let vmm = Vmm::start();
    let two = VmConfig {
        vcpus: 2,
        ..config()
    };
    assert_eq!(vmm.boot(&two, &files(SPINS)), Reply::Done);
    let mut names = Vec::new();
    for task in fs::read_dir(format!("/proc/{}/task", vmm.process.pid.as_raw_nonzero())).unwrap() {
        let task = task.unwrap().path();
        let name = fs::read_to_string(task.join("comm")).unwrap();
        if name.starts_with("kvm-") {
            // KVM's own, which never leaves the kernel.
            continue;
        }
        let status = fs::read_to_string(task.join("status")).unwrap();
        let expected = ["NoNewPrivs:\t1", "Seccomp:\t2", "Seccomp_filters:\t2"];
        assert_eq!(filters_in(&status), expected, "{name}");
        names.push(name.trim().to_owned());
    }
    names.sort();
    assert_eq!(
        names,
        [
            "bulkhead-vmm",
            "devices",
            "fs",
            "fs",
            "fs",
            "net",
            "net",
            "vcpu0",
            "vcpu1"
        ]
    );
}

#[test]
fn a_vmm_that_cannot_restrict_itself_does_not_start() {
    let refuse = SeccompFilter::new(
        [(libc::SYS_seccomp, vec![])].into(),
        SeccompAction::Allow,
        SeccompAction::Errno(libc::EACCES.unsigned_abs()),
        TargetArch::x86_64,
    );
    let refuse = BpfProgram::try_from(refuse.unwrap()).unwrap();
    let mut vmm = Vmm::start_under(vec![refuse]);
    assert!(!vmm.process.wait().unwrap().success());
    let words = vmm.last_words();
    assert!(
        words.starts_with("bulkhead-vmm: Cannot restrict the system calls of Setup"),
        "{words}"
    );
}

#[test]
fn a_vm_with_a_thread_that_cannot_be_restricted_does_not_run() {
    // The kernel bounds the instructions of all filters of a thread together (MAX_INSNS_PER_PATH).
    // Filters of ours leave room for one more, and a little.
    let allow = |length: usize| {
        let allow = seccompiler::sock_filter {
            code: 6, // BPF_RET
            jt: 0,
            jf: 0,
            k: libc::SECCOMP_RET_ALLOW,
        };
        vec![allow; length]
    };
    const LONGEST: usize = 4096;
    let started = (1..LONGEST / 64).rev().map(|blocks| {
        let filler = allow(LONGEST - 1);
        let filters = vec![filler.clone(), filler.clone(), filler, allow(blocks * 64)];
        let vmm = Vmm::start_under(filters);
        // It answers, or has ended.
        let request = Request::Boot(config());
        let files = files(SPINS);
        let fds: Vec<BorrowedFd<'_>> = files.iter().map(AsFd::as_fd).collect();
        let reply = match vmm.channel.send(&request, &fds) {
            Ok(()) => vmm.next(),
            Err(_) => None,
        };
        (vmm, reply)
    });
    let (vmm, reply) = started
        .into_iter()
        .find(|(_, reply)| reply.is_some())
        .unwrap();
    let Some(FromVmm::Reply(reply)) = reply else {
        panic!("{reply:?} instead of a reply");
    };
    let line = failure(reply);
    assert!(
        line.starts_with("Cannot confine the thread fs: Cannot restrict the system calls of Fs"),
        "{line}"
    );
    assert_eq!(
        failure(vmm.ask(&Request::Counters, NO_FILES)),
        "The VM has not been booted"
    );
}
