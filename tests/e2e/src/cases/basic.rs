//! A container runs, in a virtual machine of its own, and its exit code arrives.

use anyhow::{Context, Result, ensure};

use super::{Case, Setting, bulkhead, case};
use crate::command::Input;
use crate::ctr::Foreground;
use crate::host::{self, Pod};

pub fn cases() -> Vec<Case> {
    vec![
        bulkhead("a container has a kernel of its own", own_kernel),
        case("a container prints and succeeds", prints),
        bulkhead(
            "no process of a container runs on the host",
            no_process_on_the_host,
        ),
        case("exit codes arrive", exit_codes),
        case("an end by a signal is 128 plus its number", signals),
        case("a missing command is named at once", missing_command),
        case(
            "a container over its memory limit is killed",
            over_memory_limit,
        ),
        bulkhead(
            "ten containers run at once, each in a virtual machine of its own",
            ten_at_once,
        ),
    ]
}

fn own_kernel(setting: &Setting) -> Result<()> {
    let guest = setting.container().run(&["uname", "-r"])?.succeeds()?;
    let host = rustix::system::uname();
    let host = host.release().to_string_lossy();
    ensure!(guest.trim_end() != host, "both run {host}");
    ensure!(
        guest.trim_end().ends_with("-bulkhead"),
        "the guest runs {guest}"
    );
    Ok(())
}

fn prints(setting: &Setting) -> Result<()> {
    let done = setting.container().run(&["echo", "hello"])?.exits_with(0)?;
    ensure!(
        done.stdout == b"hello\n" && done.stderr.is_empty(),
        "{done}"
    );
    Ok(())
}

fn no_process_on_the_host(setting: &Setting) -> Result<()> {
    // An argument that no other process has.
    let container = setting.container().detach(&["sleep", "86399"])?;
    let all = host::processes()?;
    let found: Vec<_> = all
        .iter()
        .filter(|process| process.command_line.ends_with("sleep 86399"))
        .filter(|process| !process.command_line.contains(container.id()))
        .collect();
    ensure!(found.is_empty(), "the host runs {found:#?}");
    let listed = container.exec(&[], &["ps"])?.succeeds()?;
    ensure!(
        listed.contains("sleep 86399"),
        "the container lists {listed}"
    );
    Ok(())
}

fn exit_codes(setting: &Setting) -> Result<()> {
    for code in [1, 42] {
        setting
            .container()
            .run(&["sh", "-c", &format!("exit {code}")])?
            .exits_with(code)?;
    }
    // A shell's own answer to a missing command.
    let missing = setting
        .container()
        .run(&["sh", "-c", "no-such-command"])?
        .exits_with(127)?;
    ensure!(missing.err().contains("no-such-command"), "{missing}");
    Ok(())
}

fn signals(setting: &Setting) -> Result<()> {
    // The container's init ignores signals from inside that it has no handler for, so another
    // process of it ends by the signal; its shell counts as we do.
    let script = "sh -c 'kill -SEGV $$'; echo code-$?; exec sleep 1000";
    let started = setting.container().spawn(&["sh", "-c", script])?;
    started.client.expect("code-139")?;
    let exec = ["sh", "-c", "kill -TERM $$"];
    started.container.exec(&[], &exec)?.exits_with(143)?;
    started.container.kill("KILL")?;
    started.finish()?.exits_with(137)?;
    Ok(())
}

fn missing_command(setting: &Setting) -> Result<()> {
    let done = setting
        .container()
        .run(&["/no/such-command", "argument"])?
        .exits_with(1)?;
    let message = done.err();
    ensure!(
        message.contains("/no/such-command"),
        "the command is not named: {done}"
    );
    ensure!(
        message.contains("no such file or directory"),
        "the cause is not named: {done}"
    );
    let done = setting
        .container()
        .run(&["no-such-command"])?
        .exits_with(1)?;
    let message = done.err();
    ensure!(
        message.contains("no-such-command"),
        "the command is not named: {done}"
    );
    ensure!(
        message.contains("not found in $PATH"),
        "the cause is not named: {done}"
    );
    ensure!(
        message.trim_end().lines().count() == 1,
        "more than a line: {done}"
    );
    Ok(())
}

fn over_memory_limit(setting: &Setting) -> Result<()> {
    setting
        .container()
        .flags(&["--memory-limit", "33554432"])
        .run(&["tail", "/dev/zero"])?
        .exits_with(137)?;
    Ok(())
}

/// Waits for the first words of a container of [`ten_at_once`].
fn expect(started: &[Foreground], number: usize) -> Result<()> {
    let one = started
        .get(number)
        .with_context(|| format!("there is no container {number}"))?;
    one.client.expect(&format!("container {number}"))
}

fn ten_at_once(setting: &Setting) -> Result<()> {
    let mut started = Vec::new();
    for number in 0..10_usize {
        let script = format!("echo container {number}; exec sleep 1000");
        started.push(setting.container().spawn(&["sh", "-c", &script])?);
        // Two start at a time: more would only wait for each other's CPU.
        if let Some(before) = number.checked_sub(1) {
            expect(&started, before)?;
        }
    }
    expect(&started, 9)?;
    let mut machines = std::collections::BTreeSet::new();
    for one in &started {
        machines.insert(Pod::of(one.container.id())?.child("bulkhead-vmm")?.pid);
    }
    ensure!(
        machines.len() == 10,
        "there are {} virtual machines",
        machines.len()
    );
    let execs: Vec<_> = started
        .iter()
        .map(|one| one.container.spawn_exec(&[], Input::Null, &["hostname"]))
        .collect::<Result<_>>()?;
    for exec in execs {
        exec.finish()?
            .succeeds()
            .context("an exec in one of ten containers")?;
    }
    for one in &started {
        one.container.kill("KILL")?;
    }
    for one in started {
        one.finish()?.exits_with(137)?;
    }
    Ok(())
}
