//! Each process of a pod is killed, and containerd restarted, in the middle of each call of
//! containerd's. Every client gets its end, and after each time the host holds what it held before.

use std::fmt;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};

use super::failures::Config;
use super::{Case, bulkhead};
use crate::command::{Finished, Input, Running};
use crate::ctr::{self, Container, Run};
use crate::host::{self, Pod, StoppedContainerd};
use crate::network::Namespace;
use crate::residue::Snapshot;
use crate::steps::{self, Step};

/// More than any client takes when something has died.
const LIMIT: Duration = Duration::from_secs(100);

/// The VMM of the shim that can be held, beside which there is another one.
const VMM: &str = "/usr/local/bin/bulkhead-vmm";

pub fn cases() -> Vec<Case> {
    vec![
        bulkhead("a VMM that is killed in the middle of a call leaves nothing behind", |_| {
            some(Victim::Vmm)
        }),
        bulkhead("an anchor that is killed in the middle of a call leaves nothing behind", |_| {
            some(Victim::Anchor)
        }),
        bulkhead("a shim that is killed in the middle of a call leaves nothing behind", |_| {
            some(Victim::Shim)
        }),
        bulkhead("a restart of containerd in the middle of a call leaves nothing behind", |_| {
            some(Victim::Containerd)
        }),
        bulkhead(
            "a VMM that is killed before and after each step of each call leaves nothing behind",
            |_| all(&[Victim::Vmm]),
        )
        .soak(),
        bulkhead(
            "an anchor that is killed before and after each step of each call leaves nothing behind",
            |_| all(&[Victim::Anchor, Victim::ExecAnchor]),
        )
        .soak(),
        bulkhead(
            "a shim that is killed before and after each step of each call leaves nothing behind",
            |_| all(&[Victim::Shim]),
        )
        .soak(),
        bulkhead(
            "a restart of containerd before and after each step of each call leaves nothing behind",
            |_| all(&[Victim::Containerd]),
        )
        .soak(),
    ]
}

/// The call during which it happens.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Call {
    Create,
    Start,
    Exec,
    Kill,
    Delete,
}

/// What is killed.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Victim {
    Vmm,
    Anchor,
    ExecAnchor,
    Shim,
    /// It is stopped and started again while the shim is held.
    Containerd,
}

/// One of the combinations.
#[derive(Clone, Copy)]
struct Fault {
    victim: Victim,
    call: Call,
    /// The request to the VMM or the call of the agent.
    step: &'static str,
    answered: bool,
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self {
            victim,
            call,
            step,
            answered,
        } = self;
        let when = if *answered { "after" } else { "before" };
        write!(f, "{victim:?} at {call:?}, {when} {step}")
    }
}

/// The steps of the calls, in their order.
const STEPS: [(Call, &str); 11] = [
    (Call::Create, "Boot"),
    (Call::Create, "Share"),
    (Call::Create, "CreateContainer"),
    (Call::Start, "AttachNic"),
    (Call::Start, "SetNetwork"),
    (Call::Start, "StartContainer"),
    (Call::Exec, "Exec"),
    (Call::Kill, "Signal"),
    (Call::Delete, "DetachNic"),
    (Call::Delete, "Delete"),
    (Call::Delete, "Unshare"),
];

/// One moment of each call, which are tried each time.
const SAMPLE: [(&str, bool); 6] = [
    ("CreateContainer", false),
    ("AttachNic", true),
    ("StartContainer", true),
    ("Exec", false),
    ("Signal", false),
    ("Delete", true),
];

/// All combinations in which the victim is there.
fn matrix(victims: &[Victim]) -> impl Iterator<Item = Fault> {
    victims.iter().flat_map(|&victim| {
        let there = move |call, step| match victim {
            Victim::Vmm | Victim::Shim | Victim::Containerd => true,
            // It is started beside the boot, and ends with its process.
            Victim::Anchor => step != "Boot" && call != Call::Delete,
            Victim::ExecAnchor => call == Call::Exec,
        };
        let steps = STEPS
            .into_iter()
            .filter(move |&(call, step)| there(call, step));
        steps.flat_map(move |(call, step)| {
            [false, true].map(|answered| Fault {
                victim,
                call,
                step,
                answered,
            })
        })
    })
}

fn all(victims: &[Victim]) -> Result<()> {
    survive_all(matrix(victims))
}

fn some(victim: Victim) -> Result<()> {
    let sampled = |fault: &Fault| SAMPLE.contains(&(fault.step, fault.answered));
    let victims = [victim];
    survive_all(matrix(&victims).filter(sampled))
}

fn survive_all(faults: impl Iterator<Item = Fault>) -> Result<()> {
    let _config = Config::replace(&format!("vmm = {VMM:?}\n"))?;
    for fault in faults {
        let started = Instant::now();
        survive(fault).with_context(|| fault.to_string())?;
        eprintln!("    {fault} {:.1} s", started.elapsed().as_secs_f32());
    }
    // The host still does its work.
    let done = Run::new(steps::SHIM)
        .run(&["echo", "hello"])?
        .exits_with(0)?;
    ensure!(done.out() == "hello\n", "{done}");
    Ok(())
}

fn survive(fault: Fault) -> Result<()> {
    let before = Snapshot::take()?;
    let Fault { victim, call, .. } = fault;
    let namespace = Namespace::new()?;
    namespace.add_interface(0)?;
    let outside = namespace.look()?;
    let step = Step::hold(&format!(
        "{}{}",
        fault.step,
        if fault.answered { "-answered" } else { "" }
    ))?;
    let started = Run::new(steps::SHIM)
        .flags(&["--with-ns", &namespace.flag()])
        .spawn(&["sh", "-c", "echo ready; exec sleep 100000"])?;
    let container = started.container;
    let mut clients = vec![("ctr run", started.client)];
    clients.extend(begin(call, &container, &clients[0].1)?);
    let held = step
        .reached()
        .with_context(|| format!("so far: {}", clients[0].1.stderr.text()))?;
    let shim = held.shim()?;
    match victim {
        Victim::Vmm => host::kill(Pod::served_by(shim)?.child("bulkhead-vmm")?.pid)?,
        Victim::Anchor => host::kill(anchor(shim, container.id())?)?,
        Victim::ExecAnchor => host::kill(anchor(shim, &format!("{}/exec-", container.id()))?)?,
        Victim::Shim => host::kill(shim)?,
        Victim::Containerd => StoppedContainerd::stop()?.start()?,
    }
    drop(held);
    // The one that has started the container last.
    for (name, client) in clients.into_iter().rev() {
        if victim == Victim::ExecAnchor && name == "ctr run" {
            // The container itself goes on.
            container.exec(&[], &["true"])?.succeeds()?;
            container.kill("KILL")?;
        }
        let done = client.finish_within(LIMIT).context(name)?;
        check_end(fault, name, &done)?;
    }
    drop(container);
    let left = namespace.look()?;
    ensure!(left == outside, "left: {left}\nbefore: {outside}");
    drop(namespace);
    before.nothing_new(Snapshot::take)
}

/// Brings a container to the call, which a client waits for. `run` is the client that started it.
fn begin(
    call: Call,
    container: &Container,
    run: &Running,
) -> Result<Option<(&'static str, Running)>> {
    if matches!(call, Call::Create | Call::Start) {
        return Ok(None);
    }
    run.expect("ready")?;
    let client = match call {
        Call::Exec => {
            let sleep = ["sleep", "100000"];
            ("exec", container.spawn_exec(&[], Input::Null, &sleep)?)
        }
        Call::Kill => {
            let arguments = ["task", "kill", "-s", "KILL", container.id()];
            ("kill", ctr::spawn(&arguments)?)
        }
        // The one that has started it deletes it.
        _ => {
            container.kill("KILL")?;
            return Ok(None);
        }
    };
    Ok(Some(client))
}

/// The process that stands for the process of this name, or of a name that begins so with a slash.
fn anchor(shim: i32, name: &str) -> Result<i32> {
    let pod = Pod::served_by(shim)?;
    let named = |last: &str| last == name || name.contains('/') && last.starts_with(name);
    let found = pod.children.iter().find(|process| {
        process.command_line.starts_with("bulkhead-anchor ")
            && process.command_line.rsplit(' ').next().is_some_and(named)
    });
    let found = found.with_context(|| format!("no anchor of {name} in {pod:#?}"))?;
    Ok(found.pid)
}

/// Nobody is told of success when there was none, nor of failure without a reason.
fn check_end(fault: Fault, name: &str, done: &Finished) -> Result<()> {
    let Fault { victim, call, .. } = fault;
    // What was asked for may be done all the same.
    let may_succeed = name == "kill";
    ensure!(may_succeed || done.code() != 0, "{name} succeeded: {done}");
    let ends_as_killed = matches!(victim, Victim::Vmm | Victim::Anchor)
        && matches!(call, Call::Exec | Call::Kill | Call::Delete)
        && name == "ctr run";
    ensure!(
        !ends_as_killed || done.code() == 137,
        "{name} has another exit code than 137: {done}"
    );
    let explained = matches!(done.code(), 0 | 137) || !done.stderr.is_empty();
    ensure!(explained, "{name} failed without a word: {done}");
    Ok(())
}
