//! What a user does with a container over its life.

use std::collections::BTreeMap;

use anyhow::{Context, Result, ensure};

use super::events::Listener;
use super::io::asking_for;
use super::{Case, Setting, case};
use crate::command::{Input, Running};
use crate::ctr::{BUSYBOX, Container, ctr, spawn};
use crate::terminal::Terminal;

/// Ends with 5 on TERM, once [`ready`] has returned.
const TRAP: &str = "mkfifo /ready; trap 'exit 5' TERM; echo ready > /ready; \
                    while :; do sleep 1000 & wait $!; done";

/// Waits until a container that runs [`TRAP`] has set its trap.
fn ready(container: &Container) -> Result<()> {
    let script = "until test -p /ready; do :; done; cat /ready";
    container.exec(&[], &["sh", "-c", script])?.succeeds()?;
    Ok(())
}

pub fn cases() -> Vec<Case> {
    vec![
        case(
            "a detached container is listed, signalled, waited for and deleted",
            detached,
        ),
        case(
            "a client attaches to a detached container and talks to it",
            attach,
        ),
        case(
            "exec runs commands with their own exit codes, users and directories",
            exec,
        ),
        case(
            "exec with a terminal has its own size and passes ^C",
            exec_with_terminal,
        ),
        case(
            "exec of a missing command is an error at once and harms nothing",
            exec_missing,
        ),
        case("ten execs at once keep their outputs apart", ten_execs),
        case("an exec'd process is signalled alone", exec_killed),
        case(
            "task ps and task metrics tell of a running container",
            ps_and_metrics,
        ),
        case(
            "a stopped container keeps its files for its next start",
            started_again,
        ),
    ]
}

fn detached(setting: &Setting) -> Result<()> {
    let events = Listener::start()?;
    let container = setting.container().detach(&["sh", "-c", TRAP])?;
    ready(&container)?;
    let task = container.task()?.context("the container has no task")?;
    ensure!(task.status == "RUNNING" && task.pid > 0, "{task:?}");
    ensure!(
        std::path::Path::new(&format!("/proc/{}", task.pid)).exists(),
        "the host has no process {}",
        task.pid
    );
    let refused = ctr(&["task", "delete", container.id()])?;
    ensure!(refused.code() != 0, "a running task was deleted: {refused}");
    container.kill("TERM")?;
    // Of the container itself, not of an exec in it.
    let id = container.id();
    let exit = format!("/tasks/exit {{\"container_id\":\"{id}\",\"id\":\"{id}\"");
    events.expect(&exit)?;
    let task = container
        .task()?
        .context("the task is gone before it was deleted")?;
    ensure!(task.status == "STOPPED", "{task:?}");
    let late = ctr(&["task", "kill", "-s", "TERM", container.id()])?;
    ensure!(
        late.code() != 0 && late.err().contains("not found"),
        "{late}"
    );
    // By its version, ctr exits with the task's code or warns of it.
    let deleted = ctr(&["task", "delete", container.id()])?;
    ensure!(
        deleted.code() == 5 || deleted.err().contains("exit code 5"),
        "{deleted}"
    );
    ensure!(
        container.task()?.is_none(),
        "the task survives its deletion"
    );
    ctr(&["container", "delete", container.id()])?.succeeds()?;
    Ok(())
}

fn attach(setting: &Setting) -> Result<()> {
    let script = "trap 'exit 5' TERM; while read line; do echo \"got $line\"; done";
    // Its input stays open when the first client goes.
    let container = setting
        .container()
        .input(Input::Open)
        .detach(&["sh", "-c", script])?;
    let mut last: Option<Running> = None;
    for word in ["first", "second"] {
        // The one before goes first: two would share the output.
        drop(last.take());
        let mut command = std::process::Command::new("ctr");
        command.args(["task", "attach", container.id()]);
        let mut client = Running::spawn(command, Input::Open)?;
        client.write(format!("{word}\n").as_bytes())?;
        client.expect(&format!("got {word}"))?;
        last = Some(client);
    }
    // A shell runs a trap when it has read a line, and the client's end is the container's.
    let mut client = last.context("no client")?;
    container.kill("TERM")?;
    client.write(b"third\n")?;
    client.finish()?.exits_with(5)?;
    Ok(())
}

fn exec(setting: &Setting) -> Result<()> {
    let container = setting.container().detach(&["sleep", "1000"])?;
    let script = "echo out; echo err >&2; id -u; pwd; exit 9";
    let done = container
        .exec(&["--user", "1234", "--cwd", "/tmp"], &["sh", "-c", script])?
        .exits_with(9)?;
    ensure!(
        done.out() == "out\n1234\n/tmp\n" && done.err() == "err\n",
        "{done}"
    );
    let input = Input::From(Box::new("from the client".as_bytes()));
    let done = container
        .spawn_exec(&[], input, &["cat"])?
        .finish()?
        .exits_with(0)?;
    ensure!(done.out() == "from the client", "{done}");
    container
        .exec(&[], &["sh", "-c", "sh -c 'kill -KILL $$'"])?
        .exits_with(137)?;
    // A process in the background outlives its client and is the container's.
    container
        .exec(&["--detach"], &["sleep", "2000"])?
        .succeeds()?;
    let listed = container.exec(&[], &["ps"])?.succeeds()?;
    ensure!(listed.contains("sleep 2000"), "{listed}");
    Ok(())
}

fn exec_with_terminal(setting: &Setting) -> Result<()> {
    let container = setting.container().detach(&["sleep", "1000"])?;
    let command = container.exec_command(&["--tty"], &["sh"]);
    let mut terminal = Terminal::spawn(command, 20, 70)?;
    terminal.type_in(&asking_for("20 70"))?;
    terminal.expect("20 70-found")?;
    terminal.resize(50, 130)?;
    terminal.type_in(&asking_for("50 130"))?;
    terminal.expect("50 130-found")?;
    // ^C ends what runs in the foreground and not the shell.
    terminal.type_in("echo sleep-$((1+1)); sleep 1000\n")?;
    terminal.expect("sleep-2")?;
    terminal.type_in("\u{3}")?;
    terminal.type_in("echo code-$?\n")?;
    terminal.expect("code-130")?;
    terminal.type_in("exit 4\n")?;
    let code = terminal.finish()?;
    ensure!(code == 4, "exit code {code}");
    Ok(())
}

fn exec_missing(setting: &Setting) -> Result<()> {
    let container = setting.container().detach(&["sleep", "1000"])?;
    for command in ["/no/such-command", "no-such-command"] {
        let done = container.exec(&[], &[command])?;
        ensure!(done.code() != 0, "{done}");
        ensure!(
            done.err().contains(command),
            "the command is not named: {done}"
        );
    }
    container.exec(&[], &["true"])?.succeeds()?;
    Ok(())
}

fn ten_execs(setting: &Setting) -> Result<()> {
    let container = setting.container().detach(&["sleep", "1000"])?;
    let execs: Vec<_> = (0..10)
        .map(|number| {
            let script = format!("seq {number}000 {number}999; exit {number}");
            container.spawn_exec(&[], Input::Null, &["sh", "-c", &script])
        })
        .collect::<Result<_>>()?;
    for (number, exec) in execs.into_iter().enumerate() {
        let done = exec.finish()?.exits_with(i32::try_from(number)?)?;
        let expected: String = (0..1000)
            .map(|line| format!("{}\n", number * 1000 + line))
            .collect();
        // `seq 0000 0999` counts from 0 as well.
        ensure!(done.out() == expected, "exec {number}: {done}");
    }
    Ok(())
}

fn exec_killed(setting: &Setting) -> Result<()> {
    let container = setting.container().detach(&["sleep", "1000"])?;
    let script = "trap 'exit 6' TERM; echo ready; while :; do sleep 1000 & wait $!; done";
    let mut command = std::process::Command::new("ctr");
    command.args([
        "task",
        "exec",
        "--exec-id",
        "named",
        container.id(),
        "sh",
        "-c",
        script,
    ]);
    let exec = Running::spawn(command, Input::Null)?;
    exec.expect("ready")?;
    ctr(&[
        "task",
        "kill",
        "-s",
        "TERM",
        "--exec-id",
        "named",
        container.id(),
    ])?
    .succeeds()?;
    exec.finish()?.exits_with(6)?;
    container.exec(&[], &["true"])?.succeeds()?;
    Ok(())
}

fn ps_and_metrics(setting: &Setting) -> Result<()> {
    let container = setting
        .container()
        .flags(&["--memory-limit", "67108864"])
        .detach(&["sleep", "1000"])?;
    let pid = container.pid()?;
    let listed = ctr(&["task", "ps", container.id()])?.succeeds()?;
    ensure!(
        listed
            .lines()
            .skip(1)
            .any(|line| line.split_whitespace().next() == Some(&pid.to_string())),
        "process {pid} is not in {listed}"
    );
    let table = ctr(&["task", "metrics", container.id()])?.succeeds()?;
    let metrics: BTreeMap<&str, &str> = table
        .lines()
        .filter_map(|line| line.split_once(char::is_whitespace))
        .map(|(name, value)| (name, value.trim()))
        .collect();
    let metric = |name: &str| -> Result<u64> {
        let value = metrics
            .get(name)
            .with_context(|| format!("no {name} in {table}"))?;
        value.parse().with_context(|| format!("{name} is {value}"))
    };
    ensure!(metric("pids.current")? == 1, "{table}");
    ensure!(metric("memory.usage_limit")? == 67_108_864, "{table}");
    let usage = metric("memory.usage")?;
    ensure!((4096..67_108_864).contains(&usage), "{table}");
    ensure!(metric("cpu.usage_usec")? > 0, "{table}");
    Ok(())
}

fn started_again(setting: &Setting) -> Result<()> {
    let id = format!("e2e-again-{}", std::process::id());
    let script = "cat /root/file; echo x$(cat /root/file) > /root/file";
    ctr(&[
        "container",
        "create",
        "--runtime",
        &setting.runtime,
        BUSYBOX,
        &id,
        "sh",
        "-c",
        script,
    ])?
    .succeeds()?;
    let container = Container::existing(id);
    for expected in ["", "x\n", "xx\n"] {
        let done = spawn(&["task", "start", container.id()])?
            .finish()?
            .exits_with(0)?;
        ensure!(done.out() == expected, "{expected:?} expected: {done}");
    }
    Ok(())
}
