//! The life of pods and of their containers.

use std::fs;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use serde_json::json;

use super::{Case, Setting, bulkhead, case};
use crate::command::DEADLINE;
use crate::cri::{Cri, Member, Pod, refusal};
use crate::ctr::SANDBOX;
use crate::host::{self, StoppedContainerd};

pub fn cases() -> Vec<Case> {
    vec![
        case("a pod runs two containers by way of CRI", two_containers),
        case(
            "containers of a pod come and go while others run",
            come_and_go,
        ),
        case(
            "containers of a pod may share pids, and be debugged by another",
            shared_pids,
        ),
        case(
            "a pod's containers outlive its first process",
            first_process,
        ),
        case("kubectl logs finds what a container has written", logs),
        case(
            "a command in a container of a pod may take only so long",
            exec_timeout,
        ),
        case("kubectl exec and attach talk to a container", streams),
        case("containerd finds its pods again after a restart", restart),
        bulkhead(
            "a pod whose VM ends has ended, with all of its containers",
            vm_ends,
        ),
    ]
}

/// `DEADLINE_EXCEEDED` of gRPC.
const DEADLINE_EXCEEDED: i32 = 4;

/// A namespace of a container.
fn namespace(member: &Member, kind: &str) -> Result<String> {
    member.says(&format!("readlink /proc/self/ns/{kind}"))
}

pub fn two_containers(setting: &Setting) -> Result<()> {
    let cri = Cri::new(&setting.runtime)?;
    let pod = cri.pod(&json!({}))?;
    ensure!(pod.status()?["state"] == "SANDBOX_READY");
    let first = pod.start("first", &json!({}))?;
    let second = pod.start(
        "second",
        &json!({ "envs": [{ "key": "NAME", "value": "two" }] }),
    )?;
    ensure!(first.status()?["state"] == "CONTAINER_RUNNING");
    let done = first.exec("echo out; echo err >&2; exit 3")?;
    ensure!(
        done.code == 3 && done.out == "out\n" && done.err == "err\n",
        "{done:?}"
    );
    ensure!(second.says("echo $NAME")? == "two");
    for kind in ["net", "ipc", "uts"] {
        let (a, b) = (namespace(&first, kind)?, namespace(&second, kind)?);
        ensure!(a == b, "{kind} is not shared: {a}, {b}");
    }
    for kind in ["pid", "mnt"] {
        let (a, b) = (namespace(&first, kind)?, namespace(&second, kind)?);
        ensure!(a != b, "{kind} is shared");
    }
    ensure!(first.says("hostname")? == "in-pod");
    // What the one keeps in the pod's shared memory, the other finds.
    first.says("echo shared > /dev/shm/file")?;
    ensure!(second.says("cat /dev/shm/file")? == "shared");
    let size = first.says("df -k /dev/shm | tail -n 1 | awk '{ print $2 }'")?;
    ensure!(size == "65536", "/dev/shm has {size} KiB");

    first.stop(60)?;
    let status = first.status()?;
    ensure!(
        status["state"] == "CONTAINER_EXITED" && status["exit_code"] == 0,
        "{status}"
    );
    second.says("true")?;
    first.remove()?;
    pod.stop()?;
    let status = second.ended()?;
    ensure!(status["exit_code"] == 137, "{status}");
    let status = pod.status()?;
    ensure!(status["state"] == "SANDBOX_NOTREADY", "{status}");
    drop((first, second));
    drop(pod);
    cri.end()
}

pub fn come_and_go(setting: &Setting) -> Result<()> {
    let cri = Cri::new(&setting.runtime)?;
    let pod = cri.pod(&json!({}))?;
    let volume = pod.volume("work")?;
    let in_volume = |script: &str| {
        json!({
            "command": ["sh", "-c", script],
            "mounts": [{ "host_path": volume, "container_path": "/volume" }],
        })
    };
    // Init containers, each after the last.
    for number in [1, 2] {
        let script = format!("echo {number} >> /volume/done; exit {number}");
        let member = pod.start(&format!("init-{number}"), &in_volume(&script))?;
        let status = member.ended()?;
        ensure!(status["exit_code"] == number, "{status}");
        member.remove()?;
    }
    ensure!(fs::read_to_string(volume.join("done"))? == "1\n2\n");

    let sidecar = pod.start("sidecar", &json!({}))?;
    for attempt in 0..3 {
        let mut config = in_volume("echo again >> /volume/done; exit 7");
        config["metadata"] = json!({ "name": "main", "attempt": attempt });
        let main = pod.start("main", &config)?;
        ensure!(main.ended()?["exit_code"] == 7);
        sidecar.says("true")?;
        // What has ended keeps its status until it is removed.
        ensure!(main.status()?["reason"] == "Error");
        main.remove()?;
    }
    let done = fs::read_to_string(volume.join("done"))?;
    ensure!(done == "1\n2\nagain\nagain\nagain\n", "{done:?}");

    // A container that is only created, and one whose program is missing.
    let created = pod.create("created", &json!({}))?;
    ensure!(created.status()?["state"] == "CONTAINER_CREATED");
    created.remove()?;
    let missing = pod.create("missing", &json!({ "command": ["/no-such-program"] }))?;
    let refused = refusal(missing.start())?;
    ensure!(refused.message.contains("no-such-program"), "{refused}");
    ensure!(missing.ended()?["exit_code"] == 128);
    sidecar.says("true")?;
    drop((created, missing, sidecar));
    drop(pod);
    cri.end()
}

pub fn shared_pids(setting: &Setting) -> Result<()> {
    let cri = Cri::new(&setting.runtime)?;
    let options = json!({ "security_context": { "namespace_options": { "pid": "POD" } } });
    let pod = cri.pod(&json!({ "linux": options }))?;
    let first = pod.start("first", &json!({ "command": ["sleep", "111111"] }))?;
    let second = pod.start("second", &json!({}))?;
    let processes = second.says("ps -o pid,args")?;
    // What stands for the pod: the lab's pause image is one of busybox.
    let holder = match &*setting.runtime {
        SANDBOX => "    1 {pause} ",
        _ => "1 /busybox sh",
    };
    ensure!(
        processes.contains("sleep 111111") && processes.contains(holder),
        "{processes}"
    );
    second.says(
        "kill -9 $(pidof sleep | tr ' ' '\\n' | while read pid; do \
                 grep -q 111111 /proc/$pid/cmdline && echo $pid; done)",
    )?;
    let status = first.ended()?;
    ensure!(status["exit_code"] == 137, "{status}");
    second.says("true")?;
    drop((first, second));
    drop(pod);

    // An ephemeral container sees the processes of the one that it is to debug, and no others.
    let pod = cri.pod(&json!({}))?;
    let target = pod.start("target", &json!({ "command": ["sleep", "222222"] }))?;
    let other = pod.start("other", &json!({ "command": ["sleep", "333333"] }))?;
    let options = json!({ "pid": "TARGET", "target_id": target.id });
    let debugger = pod.start(
        "debugger",
        &json!({ "linux": { "security_context": { "namespace_options": options } } }),
    )?;
    let processes = debugger.says("ps -o pid,args")?;
    ensure!(
        processes.contains("1 sleep 222222") && !processes.contains("333333"),
        "{processes}"
    );
    ensure!(
        debugger
            .says("cat /proc/1/root/etc/passwd | head -n 1")?
            .contains("root")
    );
    debugger.stop(60)?;
    debugger.remove()?;
    ensure!(target.status()?["state"] == "CONTAINER_RUNNING");
    drop((target, other, debugger));
    drop(pod);
    cri.end()
}

pub fn first_process(setting: &Setting) -> Result<()> {
    let cri = Cri::new(&setting.runtime)?;
    let pod = cri.pod(&json!({}))?;
    let member = pod.start("member", &json!({}))?;
    let waiting = pod.start("waiting", &json!({ "command": ["sleep", "100000"] }))?;
    host::kill(pod.pid()?)?;
    not_ready(&pod)?;
    // No new containers, but what runs goes on.
    for member in [&member, &waiting] {
        ensure!(member.says("hostname")? == "in-pod");
        ensure!(member.status()?["state"] == "CONTAINER_RUNNING");
    }
    member.stop(60)?;
    ensure!(member.ended()?["exit_code"] == 0);
    waiting.says("true")?;
    pod.stop()?;
    ensure!(waiting.ended()?["exit_code"] == 137);
    drop((member, waiting));
    drop(pod);
    cri.end()
}

fn logs(setting: &Setting) -> Result<()> {
    let cri = Cri::new(&setting.runtime)?;
    let pod = cri.pod(&json!({}))?;
    let script = "echo first; echo error >&2; printf unfinished; \
                  while [ ! -e /go ]; do sleep 0.1; done; echo; echo second; exec sleep 100000";
    let member = pod.start("writer", &json!({ "command": ["sh", "-c", script] }))?;
    member.logs("error")?;
    let old = member.log.with_extension("old");
    fs::rename(&member.log, &old)?;
    member.reopen_log()?;
    member.says("touch /go")?;
    member.logs("second")?;
    let mut lines = Vec::new();
    for log in [&old, &member.log] {
        let log = fs::read_to_string(log).with_context(|| log.display().to_string())?;
        lines.extend(log.lines().map(str::to_owned));
    }
    let mut whole = String::new();
    for line in &lines {
        // A time with nanoseconds and its zone, the stream, whether the line is whole, and the text.
        let [time, stream, tag, text] = line.splitn(4, ' ').collect::<Vec<_>>()[..] else {
            anyhow::bail!("not a log: {line:?}");
        };
        ensure!(time.contains('T') && time.contains('.'), "{line:?}");
        if stream == "stdout" {
            whole.push_str(text);
            whole.push_str(if tag == "F" { "\n" } else { "" });
        }
    }
    let errors = lines
        .iter()
        .filter(|line| line.ends_with(" stderr F error"));
    ensure!(
        whole == "first\nunfinished\nsecond\n" && errors.count() == 1,
        "{lines:#?}"
    );
    drop(member);
    drop(pod);
    cri.end()
}

fn exec_timeout(setting: &Setting) -> Result<()> {
    let cri = Cri::new(&setting.runtime)?;
    let pod = cri.pod(&json!({}))?;
    let member = pod.start("member", &json!({}))?;
    let refused = refusal(member.exec_within(2, &["sleep", "444444"]))?;
    ensure!(refused.code == DEADLINE_EXCEEDED, "{refused}");
    let processes = member.says("ps -o args")?;
    ensure!(!processes.contains("sleep 444444"), "{processes}");
    let done = member.exec_within(60, &["/no-such-program"]);
    let refused = refusal(done)?;
    ensure!(refused.message.contains("no-such-program"), "{refused}");
    // All that was written is there when the answer is.
    let long = member.says("head -c 1000000 /dev/zero | tr '\\0' x")?;
    ensure!(long.len() == 1_000_000, "{} bytes", long.len());
    drop(member);
    drop(pod);
    cri.end()
}

pub fn streams(setting: &Setting) -> Result<()> {
    let cri = Cri::new(&setting.runtime)?;
    let pod = cri.pod(&json!({}))?;
    let script = "while read line; do echo \"got $line\"; done";
    let member = pod.start(
        "member",
        &json!({ "command": ["sh", "-c", script], "stdin": true }),
    )?;
    let script = "read line; echo \"read $line\"; echo error >&2; exit 7";
    let mut exec = member.spawn(&["sh", "-c", script], false)?;
    exec.write("a line\n")?;
    let (code, out, err) = exec.finish()?;
    ensure!(
        code == 7 && out == "read a line\n" && err == "error\n",
        "{code}, {out:?}, {err:?}"
    );

    let mut shell = member.spawn(&["sh"], true)?;
    shell.resize(123, 45)?;
    let script = "until [ \"$(stty size)\" = '45 123' ]; do sleep 0.1; done; echo of-that-size\n";
    shell.write(script)?;
    shell.expect("\nof-that-size")?;
    shell.write("exit 5\n")?;
    let (code, out, _) = shell.finish()?;
    ensure!(code == 5, "{code}, {out:?}");

    let mut attached = member.attach()?;
    attached.write("one\n")?;
    attached.expect("got one\n")?;
    drop(attached);
    // Whoever leaves does not end it.
    let mut attached = member.attach()?;
    attached.write("two\n")?;
    attached.expect("got two\n")?;
    ensure!(member.status()?["state"] == "CONTAINER_RUNNING");
    drop((attached, member));
    drop(pod);
    cri.end()
}

pub fn restart(setting: &Setting) -> Result<()> {
    let cri = Cri::new(&setting.runtime)?;
    let pod = cri.pod(&json!({}))?;
    let member = pod.start("member", &json!({}))?;
    let ending = pod.start(
        "ending",
        &json!({ "command": ["sh", "-c", "sleep 5; exit 6"] }),
    )?;
    StoppedContainerd::stop()?.start()?;
    cri.ready()?;
    ensure!(pod.status()?["state"] == "SANDBOX_READY");
    ensure!(member.says("hostname")? == "in-pod");
    ensure!(ending.ended()?["exit_code"] == 6);
    let added = pod.start("added", &json!({}))?;
    ensure!(namespace(&added, "net")? == namespace(&member, "net")?);
    member.stop(60)?;
    ensure!(member.ended()?["exit_code"] == 0);
    drop((member, ending, added));
    drop(pod);
    cri.end()
}

pub fn vm_ends(setting: &Setting) -> Result<()> {
    let cri = Cri::new(&setting.runtime)?;
    let pod = cri.pod(&json!({}))?;
    let members = ["first", "second"].map(|name| pod.start(name, &json!({})));
    let vmm = host::Pod::of(&pod.id)?.child("bulkhead-vmm")?.pid;
    host::kill(vmm)?;
    for member in members {
        let status = member?.ended()?;
        ensure!(status["exit_code"] == 137, "{status}");
    }
    not_ready(&pod)?;
    drop(pod);
    cri.end()
}

/// Waits until no container can be added to a pod any more.
fn not_ready(pod: &Pod) -> Result<()> {
    let begun = Instant::now();
    while pod.status()?["state"] == "SANDBOX_READY" {
        ensure!(begun.elapsed() < DEADLINE, "the pod stays ready");
        std::thread::sleep(Duration::from_millis(100));
    }
    Ok(())
}
