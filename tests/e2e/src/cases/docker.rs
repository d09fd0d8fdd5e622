//! Docker, which mounts root file systems itself and reads them while containers run.

use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use serde_json::Value;

use super::io::asking_for;
use super::{Case, Setting, case};
use crate::command::{DEADLINE, Finished, Input};
use crate::docker::Docker;
use crate::terminal::Terminal;

/// Echoes lines of its input, and ends with 5 on TERM once it has said `begun`.
const TALK: &str = "trap 'exit 5' TERM; exec 3<&0; \
                    while read line <&3; do echo \"got $line\"; done & \
                    echo begun; while :; do sleep 1000 & wait $!; done";

pub fn cases() -> Vec<Case> {
    vec![
        case("docker run passes on what it was told", run).long(),
        case("docker's commands work on a container over its life", life).long(),
        case(
            "docker sees a running container's files, and the container sees docker's",
            files,
        )
        .long(),
        case(
            "a container outlives docker's daemon, which finds it again",
            live_restore,
        )
        .long(),
        case(
            "docker pauses and limits a container, and tells that it ran out of memory",
            limits,
        )
        .long(),
    ]
}

fn run(setting: &Setting) -> Result<()> {
    let docker = Docker::start(&setting.runtime, &[])?;
    let script = "cat; echo err >&2; exit 3";
    let input = Input::From(Box::new("from the client".as_bytes()));
    let done = docker
        .spawn(&docker.run(&["--rm", "-i"], &["sh", "-c", script]), input)?
        .finish()?
        .exits_with(3)?;
    ensure!(
        done.out() == "from the client" && done.err() == "err\n",
        "{done}"
    );
    let missing = docker.docker(&docker.run(&["--rm"], &["no-such-command"]))?;
    ensure!(
        missing.code() == 127 && missing.err().contains("no-such-command"),
        "{missing}"
    );
    options(&docker)?;

    let command = docker.command(&docker.run(&["--rm", "-it"], &["sh"]));
    let mut terminal = Terminal::spawn(command, 20, 70)?;
    terminal.type_in(&asking_for("20 70"))?;
    terminal.expect("20 70-found")?;
    terminal.type_in(&asking_for("50 130"))?;
    // Docker does not say from when on it hears of a new size.
    for attempt in 1..=30 {
        terminal.resize(50, 130)?;
        let found = terminal
            .screen
            .expect("50 130-found", Duration::from_secs(3));
        if attempt == 30 || found.is_ok() {
            found?;
            break;
        }
    }
    terminal.type_in("exit 4\n")?;
    let code = terminal.finish()?;
    ensure!(code == 4, "exit code {code}");

    let left = docker.docker(&["ps", "-aq"])?.succeeds()?;
    ensure!(left.is_empty(), "--rm has left {left}");
    docker.end()
}

/// The options that say what a process has.
fn options(docker: &Docker) -> Result<()> {
    let shared = docker.file("shared");
    fs::create_dir(&shared)?;
    fs::set_permissions(&shared, fs::Permissions::from_mode(0o777))?;
    let volume = format!("{shared}:/volume");
    let script = "id -u; id -g; pwd; hostname; echo $WORD; cat /proc/1/comm; \
                  grep -E 'CapBnd|NoNewPrivs' /proc/self/status; \
                  ulimit -Sn; ulimit -Hn; cat /sys/fs/cgroup/pids.max; \
                  touch /file 2>&1; df -k /scratch | tail -n 1 | tr -s ' ' | cut -d ' ' -f 1,2,6; \
                  echo written > /volume/file";
    let flags = [
        "--rm",
        "--volume",
        &volume,
        "--tmpfs",
        "/scratch:size=1m",
        "--read-only",
        "--user",
        "1234:4321",
        "--cap-drop",
        "ALL",
        "--cap-add",
        "KILL",
        "--cap-add",
        "SYS_TIME",
        "--pids-limit",
        "50",
        "--ulimit",
        "nofile=100:200",
        "--init",
        "--security-opt",
        "no-new-privileges",
        "--hostname",
        "named",
        "--env",
        "WORD=told",
        "--workdir",
        "/tmp",
    ];
    let said = docker
        .docker(&docker.run(&flags, &["sh", "-c", script]))?
        .succeeds()?;
    let expected = "1234\n4321\n/tmp\nnamed\ntold\ndocker-init\n\
                    CapBnd:\t0000000002000020\nNoNewPrivs:\t1\n100\n200\n50\n\
                    touch: /file: Read-only file system\ntmpfs 1024 /scratch\n";
    ensure!(said == expected, "{expected}expected:\n{said}");
    let file = fs::metadata(format!("{shared}/file"))?;
    ensure!((file.uid(), file.gid()) == (1234, 4321), "{file:?}");
    Ok(())
}

fn life(setting: &Setting) -> Result<()> {
    let docker = Docker::start(&setting.runtime, &[])?;
    let format = "{{.Action}} {{.Actor.Attributes.exitCode}}.";
    let events = docker.spawn(&["events", "--format", format], Input::Null)?;
    let flags = [
        "-d",
        "-i",
        "--name",
        "box",
        "--health-cmd",
        "test -e /healthy",
        "--health-interval",
        "3s",
        "--health-retries",
        "1",
    ];
    docker
        .docker(&docker.run(&flags, &["sh", "-c", TALK]))?
        .succeeds()?;
    let follower = docker.spawn(&["logs", "-f", "box"], Input::Null)?;
    follower.expect("begun\n")?;
    let mut client = docker.spawn(&["attach", "box"], Input::Open)?;
    client.write(b"first\n")?;
    client.expect("got first\n")?;
    follower.expect("got first\n")?;
    drop(client);

    let script = "echo out; echo err >&2; id -u; pwd; exit 9";
    let exec = ["exec", "-u", "12", "-w", "/tmp", "box", "sh", "-c", script];
    let done = docker.docker(&exec)?.exits_with(9)?;
    ensure!(
        done.out() == "out\n12\n/tmp\n" && done.err() == "err\n",
        "{done}"
    );
    docker
        .docker(&["exec", "box", "touch", "/healthy"])?
        .succeeds()?;
    events.stdout.expect("health_status: healthy", DEADLINE)?;

    let pid = docker.inspect("box", "{{.State.Pid}}")?;
    let table = docker.docker(&["top", "box", "-o", "pid"])?.succeeds()?;
    ensure!(
        table.lines().any(|line| line.trim() == pid),
        "{pid}: {table}"
    );
    let format = "{{.PIDs}} {{.MemUsage}}";
    let said = docker
        .docker(&["stats", "--no-stream", "--format", format, "box"])?
        .succeeds()?;
    let pids = said.split(' ').next().unwrap_or_default();
    ensure!(
        pids.parse::<u32>().is_ok_and(|pids| pids >= 2) && !said.contains(" 0B / "),
        "{said}"
    );

    docker.docker(&["stop", "box"])?.succeeds()?;
    let logged = follower.finish()?.succeeds()?;
    ensure!(logged == "begun\ngot first\n", "{logged}");
    let state: Value = serde_json::from_str(&docker.inspect("box", "{{json .State}}")?)?;
    for (field, expected) in [
        ("Status", Value::from("exited")),
        ("Running", false.into()),
        ("OOMKilled", false.into()),
        ("Dead", false.into()),
        ("Pid", 0.into()),
        ("ExitCode", 5.into()),
        ("Error", "".into()),
    ] {
        ensure!(state[field] == expected, "{field} in {state}");
    }
    docker.docker(&["restart", "box"])?.succeeds()?;
    // What it had written is there again.
    docker
        .docker(&["exec", "box", "test", "-e", "/healthy"])?
        .succeeds()?;
    let waiting = docker.spawn(&["wait", "box"], Input::Null)?;
    docker.docker(&["kill", "box"])?.succeeds()?;
    let code = waiting.finish()?.succeeds()?;
    ensure!(code == "137\n", "{code}");

    let flags = ["-d", "--name", "again", "--restart", "on-failure:1"];
    let events = docker.spawn(
        &[
            "events",
            "--filter",
            "event=die",
            "--format",
            format_of_ends(),
        ],
        Input::Null,
    )?;
    docker
        .docker(&docker.run(&flags, &["sh", "-c", "echo try; exit 6"]))?
        .succeeds()?;
    events.stdout.expect("again 6.\nagain 6.\n", DEADLINE)?;
    let format = "{{.RestartCount}} {{.State.Status}} {{.State.ExitCode}}";
    let state = docker.inspect("again", format)?;
    ensure!(state == "1 exited 6", "{state}");
    let logged = docker.docker(&["logs", "again"])?.succeeds()?;
    ensure!(logged == "try\ntry\n", "{logged}");
    docker.end()
}

const fn format_of_ends() -> &'static str {
    "{{.Actor.Attributes.name}} {{.Actor.Attributes.exitCode}}."
}

fn files(setting: &Setting) -> Result<()> {
    let docker = Docker::start(&setting.runtime, &[])?;
    docker
        .docker(&docker.run(&["-d", "--name", "box"], &["sleep", "1000"]))?
        .succeeds()?;
    let exec = |script: &str| {
        docker
            .docker(&["exec", "box", "sh", "-c", script])?
            .succeeds()
    };

    // A name that Docker has looked for in vain, then a file, then another in its place.
    let copy = docker.file("copy");
    let missing = docker.docker(&["cp", "box:/made", &copy])?;
    ensure!(missing.code() == 1, "{missing}");
    for content in ["first", "second"] {
        exec(&format!(
            "echo {content} > /new && chown 7:8 /new && mv /new /made"
        ))?;
        let archive = docker.docker(&["cp", "box:/made", "-"])?.exits_with(0)?;
        let mut archive = tar::Archive::new(archive.stdout.as_slice());
        let mut entry = archive.entries()?.next().context("an empty archive")??;
        let owner = (entry.header().uid()?, entry.header().gid()?);
        let found = std::io::read_to_string(&mut entry)?;
        ensure!(
            found == format!("{content}\n") && owner == (7, 8),
            "{owner:?} {found}"
        );
    }

    // The other way, new and over a file of the image that the container has read.
    exec("test ! -e /given; cat /etc/group > /dev/null")?;
    let given = docker.write("given", "from the host\n")?;
    docker.docker(&["cp", &given, "box:/given"])?.succeeds()?;
    docker
        .docker(&["cp", &given, "box:/etc/group"])?
        .succeeds()?;
    let seen = exec("cat /given /etc/group; stat -c '%u %g' /given")?;
    ensure!(seen == "from the host\nfrom the host\n0 0\n", "{seen}");

    // A user that Docker did not find when the container started.
    exec("echo joe:x:77:78::/:/bin/sh >> /etc/passwd")?;
    let user = docker.docker(&["exec", "-u", "joe", "box", "id", "-u"])?;
    let user = user.succeeds()?;
    ensure!(user == "77\n", "{user}");

    let difference = docker.docker(&["diff", "box"])?.succeeds()?;
    let mut lines: Vec<&str> = difference.lines().collect();
    lines.sort_unstable();
    let expected = [
        "A /given",
        "A /made",
        "C /etc",
        "C /etc/group",
        "C /etc/passwd",
    ];
    ensure!(lines == expected, "{difference}");
    docker.docker(&["commit", "box", "committed"])?.succeeds()?;
    docker.docker(&["rm", "-f", "box"])?.succeeds()?;
    let mut again = docker.run(&["--rm"], &[]);
    again.pop();
    again.extend(["committed", "cat", "/made", "/given"]);
    let said = docker.docker(&again)?.succeeds()?;
    ensure!(said == "second\nfrom the host\n", "{said}");
    let mounts = docker.roots()?;
    ensure!(mounts.is_empty(), "{mounts:#?}");
    docker.end()
}

fn live_restore(setting: &Setting) -> Result<()> {
    let mut docker = Docker::start_deep(&setting.runtime, &["--live-restore"])?;
    docker
        .docker(&docker.run(&["-d", "--name", "box"], &["sh", "-c", TALK]))?
        .succeeds()?;
    let relative = docker.roots()?;
    ensure!(
        relative.iter().any(|mount| mount.contains("lowerdir=l/")),
        "the layers are not relative: {relative:#?}"
    );
    docker
        .docker(&["exec", "box", "sh", "-c", "echo before > /file"])?
        .succeeds()?;
    let pid = docker.inspect("box", "{{.State.Pid}}")?;
    docker.kill()?;
    docker.resume()?;
    let state = docker.inspect("box", "{{.State.Status}} {{.State.Pid}}")?;
    ensure!(state == format!("running {pid}"), "{state}");
    let script = "cat /file; rm /file; echo new > /new; cat /new";
    let said = docker
        .docker(&["exec", "box", "sh", "-c", script])?
        .succeeds()?;
    ensure!(said == "before\nnew\n", "{said}");
    // Right, or refused.
    let copied = docker.docker(&["cp", "box:/new", "-"])?;
    ensure!(
        copied.code() == 0 && copied.out().contains("new\n") || is_refused(&copied),
        "{copied}"
    );
    // Refused, or seen inside; and nothing breaks that the container does to the same directory.
    let given = docker.write("given", "given\n")?;
    let copied = docker.docker(&["cp", &given, "box:/etc/given"])?;
    let script = "echo more >> /etc/passwd && cat /etc/given";
    let seen = docker.docker(&["exec", "box", "sh", "-c", script])?;
    ensure!(
        (copied.code(), seen.code(), &*seen.out()) == (0, 0, "given\n")
            || (is_refused(&copied) && seen.err().contains("/etc/given")),
        "{copied}\n{seen}"
    );
    let script = "tail -n 1 /etc/passwd";
    let said = docker
        .docker(&["exec", "box", "sh", "-c", script])?
        .succeeds()?;
    ensure!(said == "more\n", "{said}");
    let stopping = docker.spawn(&["stop", "box"], Input::Null)?;
    stopping
        .finish_within(Duration::from_secs(60))?
        .succeeds()?;
    let state = docker.inspect("box", "{{.State.Status}} {{.State.ExitCode}}")?;
    ensure!(state == "exited 5", "{state}");
    docker.end()
}

/// Whether Docker could not change a container's files because they are mounted read-only for it.
fn is_refused(copied: &Finished) -> bool {
    copied.code() == 1 && copied.err().contains("read-only file system")
}

fn limits(setting: &Setting) -> Result<()> {
    let docker = Docker::start(&setting.runtime, &[])?;
    let script = "while :; do i=$((i+1)); echo $i > /new; mv /new /count; done";
    let flags = ["-d", "--name", "box", "--memory", "64m"];
    docker
        .docker(&docker.run(&flags, &["sh", "-c", script]))?
        .succeeds()?;
    let exec = |script: &str| {
        docker
            .docker(&["exec", "box", "sh", "-c", script])?
            .succeeds()
    };
    let counts = "until test -e /count; do :; done; old=$(cat /count); \
                  until test $(cat /count) -gt $old; do :; done";
    exec(counts)?;
    docker.docker(&["pause", "box"])?.succeeds()?;
    let status = docker.inspect("box", "{{.State.Status}} {{.State.Paused}}")?;
    ensure!(status == "paused true", "{status}");
    let count = || docker.docker(&["cp", "box:/count", "-"])?.succeeds();
    let (first, second) = (count()?, count()?);
    ensure!(first == second, "it runs: {first} {second}");
    docker.docker(&["unpause", "box"])?.succeeds()?;
    exec(counts)?;

    let update = [
        "update",
        "--memory",
        "32m",
        "--memory-swap",
        "32m",
        "--pids-limit",
        "40",
        "box",
    ];
    docker.docker(&update)?.succeeds()?;
    let limits = exec("cat /sys/fs/cgroup/memory.max /sys/fs/cgroup/pids.max")?;
    ensure!(limits == "33554432\n40\n", "{limits}");
    docker.docker(&["rm", "-f", "box"])?.succeeds()?;

    let flags = ["--name", "eater", "--memory", "16m"];
    docker
        .docker(&docker.run(&flags, &["tail", "/dev/zero"]))?
        .exits_with(137)?;
    let state = docker.inspect("eater", "{{.State.OOMKilled}} {{.State.ExitCode}}")?;
    ensure!(state == "true 137", "{state}");
    docker.end()
}
