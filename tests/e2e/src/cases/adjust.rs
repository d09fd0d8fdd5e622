//! What changes about a container while it runs.

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};

use super::{Case, Setting, bulkhead, case};
use crate::command::Finished;
use crate::ctr::{Container, RUNC, Run, ctr};
use crate::shim::Shim;

pub fn cases() -> Vec<Case> {
    vec![
        case(
            "a paused container stands still, goes on, and can be killed",
            paused,
        ),
        case("limits change as under runc", updated),
        bulkhead("a pod is as large as its limits", sized),
    ]
}

fn task(verb: &str, container: &Container) -> Result<Finished> {
    ctr(&["task", verb, container.id()])
}

/// CPU time that it has used, in microseconds.
fn usage(container: &Container) -> Result<u64> {
    let metrics = ctr(&["task", "metrics", "--format", "json", container.id()])?.succeeds()?;
    let metrics: Value = serde_json::from_str(&metrics).context("read the metrics")?;
    let usage = metrics["cpu"]["usage_usec"].as_u64();
    usage.with_context(|| format!("no CPU time in {metrics}"))
}

fn paused(setting: &Setting) -> Result<()> {
    let container = setting
        .container()
        .detach(&["sh", "-c", "while :; do :; done"])?;
    let status = || -> Result<String> {
        let task = container.task()?.context("the task is gone")?;
        Ok(task.status)
    };
    task("pause", &container)?.succeeds()?;
    ensure!(status()? == "PAUSED");
    let before = usage(&container)?;
    let refused = container.exec(&[], &["true"])?;
    ensure!(
        refused.code() == 1 && refused.err().contains("paused"),
        "{refused}"
    );
    let refused = task("pause", &container)?;
    ensure!(refused.code() == 1, "paused twice: {refused}");
    ensure!(usage(&container)? == before, "it has not stood still");
    task("resume", &container)?.succeeds()?;
    ensure!(status()? == "RUNNING");
    container.exec(&[], &["true"])?.succeeds()?;
    ensure!(usage(&container)? > before, "it does not go on");
    let refused = task("resume", &container)?;
    ensure!(refused.code() == 1, "resumed twice: {refused}");

    let client = container.attach()?;
    task("pause", &container)?.succeeds()?;
    container.kill("KILL")?;
    client.finish()?.exits_with(137)?;
    Ok(())
}

/// What a container says of its limits after each change, and whether the change was taken.
fn limits(runtime: &str) -> Result<Vec<String>> {
    let cgroup = "type=cgroup,src=cgroup,dst=/sys/fs/cgroup,options=ro";
    let container = Run::new(runtime)
        .flags(&["--mount", cgroup, "--memory-limit", "134217728"])
        .detach(&["sleep", "1000"])?;
    let shim = Shim::of(&container)?;
    // Of the most shares each runc makes the most weight; others have had other weights before 1.3.2.
    let changes = [
        json!({ "pids": { "limit": 50 }, "cpu": { "shares": 262_144, "quota": 50_000, "period": 200_000 } }),
        json!({ "memory": { "limit": 100_000_000, "swap": 150_000_000 }, "cpu": { "quota": 60_000 } }),
        json!({
            "cpu": { "quota": -1, "cpus": "0" },
            "pids": { "limit": -1 },
            "memory": { "reservation": 50_000_000, "limit": 120_000_000 },
            "blockIO": { "weight": 100 },
            "unified": { "memory.high": "90000000" },
            "devices": [{ "allow": false, "access": "rwm" }],
        }),
        json!({ "memory": { "limit": 100_000_000, "swap": 50_000_000 } }),
        json!({ "cpu": { "cpus": "7000" } }),
    ];
    let look = "cd /sys/fs/cgroup
        for file in memory.max memory.low memory.high memory.swap.max pids.max cpu.max cpu.weight \
            cpuset.cpus io.weight; do echo $file $(cat $file); done; : < /dev/null && echo null";
    let mut found = Vec::new();
    for change in changes {
        let taken = shim.update(container.id(), &change).is_ok();
        let limits = container.exec(&[], &["sh", "-c", look])?.succeeds()?;
        found.push(format!("{change}: {taken}\n{limits}"));
    }
    Ok(found)
}

fn updated(setting: &Setting) -> Result<()> {
    for (runc, tested) in limits(RUNC)?.iter().zip(limits(&setting.runtime)?) {
        ensure!(*runc == tested, "runc: {runc}\ntested: {tested}");
    }
    Ok(())
}

fn sized(setting: &Setting) -> Result<()> {
    let look = ["sh", "-c", "nproc; free -m | grep Mem"];
    // Total memory in MiB, beside what the kernel keeps for itself.
    let memory = |flags: &[&str]| -> Result<u64> {
        let found = setting.container().flags(flags).run(&look)?.succeeds()?;
        let mut words = found.split_whitespace();
        ensure!(words.next() == Some("1"), "{found}");
        let total = words.nth(1).and_then(|total| total.parse().ok());
        total.with_context(|| format!("no total in {found}"))
    };
    let usual = memory(&[])?;
    ensure!((400..512).contains(&usual), "{usual}");
    let large = memory(&["--memory-limit", "1073741824"])?;
    ensure!((1024..1152).contains(&large), "{large}");
    Ok(())
}
