//! Known ways out of a container, tried inside the guest: out of the container's isolation there,
//! which is as strong as without a VM around it.

use std::fs;

use anyhow::{Context, Result, ensure};

use super::{Case, Setting, bulkhead, case};
use crate::command::Input;
use crate::ctr::{BULKHEAD, Foreground, PROBE, Run};
use crate::probe::Report;

pub fn cases() -> Vec<Case> {
    vec![
        bulkhead(
            "a process on its way into a container cannot be got at from inside",
            joining,
        ),
        case(
            "a working directory that leads to an open descriptor is refused",
            leaked_directory,
        ),
        bulkhead(
            "mounts stay inside while links on their way change",
            changing_links,
        ),
    ]
}

/// Outcomes of an attempt that has got nothing: denied, or too late.
const DENIED: [&str; 8] = [
    "EACCES", "EPERM", "ENOENT", "ESRCH", "EROFS", "ETXTBSY", "ELOOP", "ENOTDIR",
];

/// A container that runs a hostile program until its input ends.
fn intruder(runtime: &str, flags: &[&str], command: &[&str]) -> Result<Foreground> {
    Run::new(runtime)
        .with_probe()?
        .flags(flags)
        .input(Input::Open)
        .spawn(&[&[PROBE, "probe"], command].concat())
}

/// A descriptor or a directory of the agent that is left open (as in CVE-2024-21626), the agent's
/// binary through /proc (CVE-2019-5736): tried while processes join the container.
fn joining(_: &Setting) -> Result<()> {
    let mut watching = intruder(BULKHEAD, &[], &["watch"])?;
    watching.client.expect("watching")?;
    let container = &watching.container;
    for _ in 0..8 {
        container.exec(&[], &["true"])?.exits_with(0)?;
    }
    // The process becomes what /proc says it is while it still is the agent's.
    for _ in 0..2 {
        let own = container.exec(&[], &["/proc/self/exe"])?;
        ensure!(own.code() != 0, "the agent's binary ran to its end");
    }
    container.exec(&[], &["true"])?.exits_with(0)?;
    watching.client.close_stdin();
    let text = watching.finish()?.succeeds()?;
    let report = text.trim_start_matches("watching\n");
    let mut report: Report =
        serde_json::from_str(report).with_context(|| format!("not a report: {report}"))?;
    let strangers = report.remove("strangers").unwrap_or_default();
    ensure!(
        strangers != "0",
        "no process was seen on its way in, so nothing was tried"
    );
    for (attempt, outcomes) in &report {
        let denied = outcomes.split(' ').all(|one| DENIED.contains(&one));
        ensure!(denied, "{attempt}: {outcomes}");
    }
    Ok(())
}

/// CVE-2024-21626.
fn leaked_directory(setting: &Setting) -> Result<()> {
    let container = setting.container().detach(&["sleep", "1000"])?;
    for number in 3..12 {
        let cwd = format!("/proc/self/fd/{number}");
        let done = container.exec(&["--cwd", &cwd], &["ls", "-a"])?;
        ensure!(
            done.code() != 0,
            "descriptor {number} led to {}",
            done.out()
        );
    }
    container.kill("KILL")
}

/// CVE-2021-30465: a directory that a mount leads through becomes a link to the root and back.
fn changing_links(_: &Setting) -> Result<()> {
    let volume = tempfile::tempdir()?;
    fs::create_dir_all(volume.path().join("x/in"))?;
    std::os::unix::fs::symlink("/", volume.path().join("y"))?;
    let source = volume.path().display();
    let bind = format!("type=bind,src={source},dst=/v,options=rbind:rw");
    let mut swapping = intruder(
        BULKHEAD,
        &["--mount", &bind, "--cwd", "/v"],
        &["swap", "x", "y"],
    )?;
    swapping.client.expect("swapping")?;
    let group = format!("io.containerd.runc.v2.group={}", swapping.container.id());
    let flags = [
        "--annotation",
        &group,
        "--mount",
        &bind,
        "--mount",
        "type=tmpfs,dst=/v/x/in,options=size=77k",
    ];
    for _ in 0..6 {
        let victim = Run::new(BULKHEAD).flags(&flags);
        let done = victim.run(&["grep", "size=77k\\|size=80k", "/proc/self/mountinfo"])?;
        if done.code() != 0 {
            // It may find a link where it was about to make a directory.
            continue;
        }
        let line = done.succeeds()?;
        let target = line.split(' ').nth(4).context("a mount without target")?;
        ensure!(
            ["/v/x/in", "/in", "/v/y/in"].contains(&target),
            "mounted at {target}"
        );
    }
    swapping.client.close_stdin();
    swapping.finish()?.succeeds()?;
    let mut names: Vec<_> = fs::read_dir(volume.path())?
        .map(|entry| Ok(entry?.file_name()))
        .collect::<Result<_>>()?;
    names.sort();
    ensure!(names == ["x", "y"], "the volume has {names:?}");
    Ok(())
}
