//! What a user does with a container over its life.

use std::collections::BTreeMap;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use serde_json::Value;

use super::{Case, Setting, case};
use crate::command::{Input, Running};
use crate::ctr::{BUSYBOX, Container, RUNC, Run, ctr, spawn};
use crate::terminal::Terminal;

/// Says when its traps are set; ends with 5 on TERM and reports USR1.
const TRAPS: &str = "trap 'exit 5' TERM; trap 'echo got-USR1' USR1; echo ready; \
                     while :; do sleep 1000 & wait $!; done";

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
        case("exec with a terminal has its own size", exec_with_terminal),
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
        case(
            "events come in the order and with the contents that runc gives them",
            events,
        ),
    ]
}

fn detached(setting: &Setting) -> Result<()> {
    let container = setting.container().detach(&["sh", "-c", TRAPS])?;
    let task = container.task()?.context("the container has no task")?;
    ensure!(task.status == "RUNNING" && task.pid > 0, "{task:?}");
    ensure!(
        std::path::Path::new(&format!("/proc/{}", task.pid)).exists(),
        "the host has no process {}",
        task.pid
    );
    let waiting: Vec<Running> = (0..3).map(|_| container.attach()).collect::<Result<_>>()?;

    let refused = ctr(&["task", "delete", container.id()])?;
    ensure!(refused.code() != 0, "a running task was deleted: {refused}");
    // Only an attached client shows that the traps are set: its output comes from then on.
    container.kill("USR1")?;
    for client in &waiting {
        // One of them gets the line: they share a pipe.
        if client
            .stdout
            .expect("got-USR1", Duration::from_secs(2))
            .is_ok()
        {
            break;
        }
    }
    container.kill("TERM")?;
    for client in waiting {
        client
            .finish()?
            .exits_with(5)
            .context("an attached client")?;
    }
    let task = container
        .task()?
        .context("the task is gone before it was deleted")?;
    ensure!(task.status == "STOPPED", "{task:?}");
    let late = ctr(&["task", "kill", "-s", "TERM", container.id()])?;
    ensure!(
        late.code() != 0 && late.err().contains("not found"),
        "{late}"
    );
    ctr(&["task", "delete", container.id()])?.exits_with(5)?;
    ensure!(
        container.task()?.is_none(),
        "the task survives its deletion"
    );
    ctr(&["container", "delete", container.id()])?.succeeds()?;
    Ok(())
}

fn attach(setting: &Setting) -> Result<()> {
    let script = "while read line; do echo \"got $line\"; done";
    // Its input stays open when the first client goes.
    let container = setting
        .container()
        .input(Input::Open)
        .detach(&["sh", "-c", script])?;
    for word in ["first", "second"] {
        let mut command = std::process::Command::new("ctr");
        command.args(["task", "attach", container.id()]);
        let mut client = Running::spawn(command, Input::Open)?;
        client.write(format!("{word}\n").as_bytes())?;
        client.expect(&format!("got {word}"))?;
    }
    container.kill("KILL")
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
    terminal.type_in("echo size-$(stty size)-end\n")?;
    terminal.expect("size-20 70-end")?;
    terminal.resize(50, 130)?;
    // The new size travels on its own; the shell is asked until it is there.
    terminal
        .type_in("until [ \"$(stty size)\" = '50 130' ]; do :; done; echo resized-$((1+1))\n")?;
    terminal.expect("resized-2")?;
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

fn events(setting: &Setting) -> Result<()> {
    let expected = events_of(RUNC)?;
    let found = events_of(&setting.runtime)?;
    ensure!(
        found == expected,
        "runc:\n{}\ntested:\n{}",
        expected.join("\n"),
        found.join("\n")
    );
    Ok(())
}

/// The task events of one life: topic and contents, without what differs from run to run.
fn events_of(runtime: &str) -> Result<Vec<String>> {
    let listener = spawn(&["events"])?;
    subscribed(&listener)?;
    let container = Run::new(runtime).detach(&["sh", "-c", TRAPS])?;
    let id = container.id().to_owned();
    let mut exec = std::process::Command::new("ctr");
    exec.args([
        "task",
        "exec",
        "--exec-id",
        "an-exec",
        &id,
        "sh",
        "-c",
        "exit 3",
    ]);
    Running::spawn(exec, Input::Null)?.finish()?.exits_with(3)?;
    let client = container.attach()?;
    container.kill("KILL")?;
    client.finish()?.exits_with(137)?;
    ctr(&["task", "delete", &id])?.exits_with(137)?;
    ctr(&["container", "delete", &id])?.succeeds()?;
    // The last event of its life, after all of the task's.
    let last = format!("/containers/delete {{\"id\":\"{id}\"}}");
    listener.expect(&last)?;
    let text = listener.stdout.text();
    let mut events = Vec::new();
    for line in text
        .lines()
        .filter(|line| line.contains(" /tasks/") && line.contains(&id))
    {
        let (topic, contents) = line
            .split_once(" /tasks/")
            .and_then(|(_, rest)| rest.split_once(' '))
            .with_context(|| format!("an event without contents: {line}"))?;
        let Value::Object(mut fields) = serde_json::from_str(contents)? else {
            bail!("the contents of an event are no object: {line}");
        };
        for varying in ["pid", "exited_at", "bundle", "rootfs", "io"] {
            if let Some(value) = fields.get_mut(varying) {
                *value = Value::String("(varies)".into());
            }
        }
        let contents = Value::Object(fields).to_string().replace(&id, "ID");
        events.push(format!("{topic} {contents}"));
    }
    Ok(events)
}

/// Waits until the listener hears: `ctr events` does not say when it does, so something is made to
/// happen until it is heard.
fn subscribed(listener: &Running) -> Result<()> {
    for attempt in 0..30 {
        ctr(&["namespace", "label", "default", &format!("e2e={attempt}")])?.succeeds()?;
        if listener
            .stdout
            .expect("/namespaces/update", Duration::from_secs(1))
            .is_ok()
        {
            return Ok(());
        }
    }
    bail!("`ctr events` hears nothing")
}
