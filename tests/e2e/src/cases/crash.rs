//! Whatever dies, and when: every client gets its end, and nothing is left behind (which is looked
//! for after each test).

use std::thread;

use anyhow::{Context, Result, anyhow, ensure};

use super::{Case, Setting, bulkhead, case};
use crate::command::Input;
use crate::ctr::{Container, RUNC, Run};
use crate::host::{self, Log, Pod, StoppedContainerd};

pub fn cases() -> Vec<Case> {
    vec![
        bulkhead(
            "when the VMM is killed, every client gets an end",
            vmm_killed,
        ),
        case(
            "when the shim is killed, every client gets an end",
            shim_killed,
        ),
        case(
            "when the process that containerd knows is killed, every client gets an end",
            init_killed,
        ),
        case(
            "when a container's init is killed, every client gets an end",
            signalled,
        ),
        case(
            "a client that goes away leaves its container running",
            client_gone,
        ),
        case(
            "containers survive a restart of containerd and stay reachable",
            containerd_restarted,
        ),
        case("24 containers come and go", |setting| cycles(setting, 24)),
        case("100 containers come and go", |setting| cycles(setting, 100)).soak(),
    ]
}

fn vmm_killed(setting: &Setting) -> Result<()> {
    all_clients_end(setting, |container| {
        host::kill(Pod::of(container.id())?.child("bulkhead-vmm")?.pid)
    })
}

fn shim_killed(setting: &Setting) -> Result<()> {
    all_clients_end(setting, |container| {
        host::kill(Pod::of(container.id())?.shim.pid)
    })
}

fn init_killed(setting: &Setting) -> Result<()> {
    all_clients_end(setting, |container| host::kill(container.pid()?))
}

fn signalled(setting: &Setting) -> Result<()> {
    all_clients_end(setting, |container| container.kill("KILL"))
}

/// Three clients wait for a container: its `ctr run`, an attached one and an exec. After `kill`
/// all end, none with success.
fn all_clients_end(setting: &Setting, kill: impl FnOnce(&Container) -> Result<()>) -> Result<()> {
    let script = "echo ready; while :; do sleep 1000; done";
    let started = setting.container().spawn(&["sh", "-c", script])?;
    started.client.expect("ready")?;
    let exec = started
        .container
        .spawn_exec(&[], Input::Null, &["sh", "-c", script])?;
    exec.expect("ready")?;
    let attached = started.container.attach()?;
    kill(&started.container)?;
    for (who, client) in [
        ("ctr run", started.client),
        ("attach", attached),
        ("exec", exec),
    ] {
        let done = client
            .finish()
            .with_context(|| format!("the client {who}"))?;
        ensure!(done.code() != 0, "{who} succeeded: {done}");
    }
    Ok(())
}

fn client_gone(setting: &Setting) -> Result<()> {
    let started = setting
        .container()
        .spawn(&["sh", "-c", "echo ready; exec sleep 1000"])?;
    started.client.expect("ready")?;
    drop(started.client);
    started.container.exec(&[], &["true"])?.succeeds()?;
    Ok(())
}

fn containerd_restarted(setting: &Setting) -> Result<()> {
    let script = "trap 'exit 8' TERM; while :; do sleep 1000 & wait $!; done";
    let survivor = setting.container().detach(&["sh", "-c", script])?;
    // Ends while nobody listens.
    let victim = setting.container().detach(&["sleep", "1000"])?;
    let pid = survivor.pid()?;
    let victim_pid = victim.pid()?;

    let stopped = StoppedContainerd::stop()?;
    host::kill(victim_pid)?;
    stopped.start()?;

    let task = survivor
        .task()?
        .context("containerd has lost the running container")?;
    ensure!(task.status == "RUNNING" && task.pid == pid, "{task:?}");
    let done = survivor.exec(&[], &["echo", "reached"])?.exits_with(0)?;
    ensure!(done.out() == "reached\n", "{done}");
    match victim.task()? {
        Some(task) => ensure!(task.status == "STOPPED", "{task:?}"),
        // runc does not keep its exit code.
        None => ensure!(setting.runtime == RUNC, "containerd has lost the end"),
    }
    let log = Log::start();
    let waiting = survivor.attach()?;
    survivor.kill("TERM")?;
    waiting.finish()?.exits_with(8)?;
    // The shim's log is read again.
    let said = log.tail(1 << 20)?;
    ensure!(
        setting.runtime == RUNC || said.contains("The pod has ended"),
        "{said}"
    );
    Ok(())
}

/// As many containers, four at a time.
fn cycles(setting: &Setting, count: u32) -> Result<()> {
    let runtime = &setting.runtime;
    thread::scope(|scope| {
        let workers: Vec<_> = (0..4)
            .map(|worker| {
                scope.spawn(move || -> Result<()> {
                    for cycle in 0..count / 4 {
                        let text = format!("{worker} {cycle}");
                        let done = Run::new(runtime).run(&["echo", &text])?.exits_with(0)?;
                        ensure!(done.out().trim_end() == text, "{done}");
                    }
                    Ok(())
                })
            })
            .collect();
        for worker in workers {
            worker.join().map_err(|_| anyhow!("a worker panicked"))??;
        }
        Ok(())
    })
}
