//! `bulkhead check` against the VMM that the tests play. What it says of the rest of the machine is
//! the machine's; of interest is its trial of a guest, and what that leaves.

use std::{
    fs::{self, File},
    os::{fd::AsFd, unix::fs::OpenOptionsExt},
    path::Path,
    process::{Child, Command, Output, Stdio},
};

use nix::{
    poll::{PollFd, PollFlags, poll},
    sys::{
        signal::{Signal, kill},
        stat::Mode,
    },
    unistd::{Pid, mkfifo},
};
use serde_json::Value;

use crate::containerd::{Containerd, wait_gone};

const BULKHEAD: &str = env!("CARGO_BIN_EXE_bulkhead");

fn spawn(machine: &Containerd, arguments: &[&str]) -> Child {
    Command::new(BULKHEAD)
        .arg("check")
        .args(arguments)
        .env(
            "BULKHEAD_CONFIG",
            machine.directory.path().join("config.toml"),
        )
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap()
}

/// Waits for the end of a check, which must have left nothing.
fn finish(machine: &Containerd, check: Child) -> Output {
    let pid = check.id();
    wait_gone(pid.try_into().unwrap());
    let output = check.wait_with_output().unwrap();
    let cgroup = format!("/sys/fs/cgroup/bulkhead-check-{pid}");
    assert!(!Path::new(&cgroup).exists(), "{cgroup} is left");
    let state = machine.directory.path().join("state");
    for entry in fs::read_dir(state).into_iter().flatten() {
        let name = entry.unwrap().file_name();
        assert!(["ids", "verified.json"].contains(&name.to_str().unwrap()));
    }
    // No process either.
    machine.assert_nothing_left("c1");
    output
}

/// The item of this name in the report of `bulkhead check --json`.
fn item(output: &Output, name: &str) -> Value {
    let report: Value = serde_json::from_slice(&output.stdout).unwrap();
    let items = report["items"].as_array().unwrap();
    let found = items.iter().find(|item| item["item"] == name);
    found.unwrap().clone()
}

pub async fn boots() {
    let machine = Containerd::new("normal").await;
    let output = finish(&machine, spawn(&machine, &["--json"]));
    let boots = item(&output, "guest boots");
    assert_eq!(boots["result"], "ok", "{boots}");
    assert!(boots.get("fix").is_none(), "{boots}");
    let detail = boots["detail"].as_str().unwrap();
    assert!(detail.starts_with("agent fake ready after "), "{detail}");
    assert!(detail.ends_with(" ms, on Linux 6.12-fake ok"), "{detail}");
    let files = item(&output, "guest files");
    assert_eq!(files["result"], "ok", "{files}");
    assert!(files["detail"].as_str().unwrap().contains("Linux 6.12"));
}

pub async fn failures() {
    for (scenario, failed, wanted) in [
        ("panic", "guest boots", "Unable to mount root fs"),
        ("die", "guest boots", "no luck today"),
        ("corrupt", "guest files", "vmlinux is corrupt"),
        ("misconfigured", "configuration", "line 6: unknown field"),
    ] {
        let machine = Containerd::new(scenario).await;
        let path = machine.directory.path();
        match scenario {
            "corrupt" => fs::write(path.join("guest/vmlinux"), "kermel").unwrap(),
            "misconfigured" => {
                let config = fs::read_to_string(path.join("config.toml")).unwrap();
                fs::write(path.join("config.toml"), config + "colour = 'red'\n").unwrap();
            }
            _ => {}
        }
        let output = finish(&machine, spawn(&machine, &[]));
        assert_eq!(output.status.code(), Some(1), "{output:?}");
        assert!(output.stderr.is_empty(), "{output:?}");
        let text = String::from_utf8(output.stdout).unwrap();
        let mut lines = text.lines();
        let line = lines
            .by_ref()
            .find(|line| line.starts_with("FAILED") && line.contains(failed));
        let line = line.unwrap_or_else(|| panic!("{failed} did not fail:\n{text}"));
        assert!(line.contains(wanted), "{line}");
        let fix = lines.next().unwrap();
        assert!(fix.starts_with("         fix: "), "{fix}");
        // Whatever it is, a guest does not boot, and only what is at fault is told at length.
        let boots = text
            .lines()
            .find(|line| line.starts_with("FAILED") && line.contains("guest boots"))
            .unwrap();
        let not_tried = format!("not tried, because {failed} failed");
        assert_eq!(boots.contains(&not_tried), failed != "guest boots");
    }
}

pub async fn interrupted() {
    let machine = Containerd::new("silent").await;
    let fifo = machine.directory.path().join("up");
    mkfifo(&fifo, Mode::S_IRWXU).unwrap();
    let up = File::options()
        .read(true)
        .custom_flags(libc::O_NONBLOCK)
        .open(&fifo)
        .unwrap();
    let check = spawn(&machine, &["--json"]);
    let mut polled = [PollFd::new(up.as_fd(), PollFlags::POLLIN)];
    assert_eq!(poll(&mut polled, 30_000u16).unwrap(), 1, "no VMM came up");
    let pid = Pid::from_raw(check.id().try_into().unwrap());
    kill(pid, Signal::SIGTERM).unwrap();
    let output = finish(&machine, check);
    assert_eq!(output.status.code(), Some(1), "{output:?}");
    let boots = item(&output, "guest boots");
    assert_eq!(boots["detail"], "the trial was interrupted");
}
