//! The same container under runc and under the runtime under test: whatever a process finds
//! different must be in the list of known differences.

use anyhow::{Context, Result};

use super::{Case, Setting, case};
use crate::ctr::{Foreground, PROBE, RUNC, Run};
use crate::differences::compare;
use crate::probe::Report;
use crate::terminal::Terminal;

/// The options of `ctr run`, as many as go together.
const OPTIONS: [&str; 24] = [
    "--user",
    "1234:4321",
    "--cwd",
    "/tmp",
    "--env",
    "GREETING=hello world",
    "--env",
    "EMPTY=",
    "--read-only",
    "--mount",
    "type=tmpfs,dst=/scratch,options=size=1m:mode=1770:nosuid",
    "--memory-limit",
    "134217728",
    "--cpus",
    "0.5",
    "--cap-add",
    "CAP_SYS_PTRACE",
    "--cap-drop",
    "CAP_CHOWN",
    "--hostname",
    "a-name",
    "--allow-new-privs",
    "--cpu-shares",
    "512",
];

pub fn cases() -> Vec<Case> {
    let probed = [
        case(
            "by default a process finds what it finds under runc",
            by_default,
        ),
        case(
            "with options of ctr a process finds what it finds under runc",
            with_options,
        ),
        case(
            "under containerd's seccomp profile the same calls are refused as under runc",
            with_seccomp,
        ),
        case(
            "privileged, a process finds what it finds under runc",
            privileged,
        ),
        case(
            "on a terminal a process finds what it finds under runc",
            on_a_terminal,
        ),
        case("files behave as they do under runc", files),
    ];
    probed.into_iter().map(Case::in_debian).collect()
}

const SPEC: [&str; 3] = [PROBE, "probe", "spec"];

fn by_default(setting: &Setting) -> Result<()> {
    same("by default", setting, &[], &SPEC)
}

fn with_seccomp(setting: &Setting) -> Result<()> {
    same(
        "with seccomp",
        setting,
        &["--seccomp", "--cap-add", "CAP_SYS_ADMIN"],
        &SPEC,
    )
}

fn privileged(setting: &Setting) -> Result<()> {
    same("privileged", setting, &["--privileged"], &SPEC)
}

fn files(setting: &Setting) -> Result<()> {
    // The probe checks that a set-user-id program changes its user.
    let command = [PROBE, "probe", "files", "/var/lib/probed"];
    same("files", setting, &["--allow-new-privs"], &command)
}

/// Runs the probe under both runtimes at once and compares its reports.
fn same(what: &str, setting: &Setting, flags: &[&str], command: &[&str]) -> Result<()> {
    let start = |runtime: &str| Run::new(runtime).probe()?.flags(flags).spawn(command);
    let finish = |started: Foreground| -> Result<Report> {
        let id = started.container.id().to_owned();
        report(&started.finish()?.succeeds()?, &id)
    };
    let (runc, tested) = (start(RUNC)?, start(&setting.runtime)?);
    compare(what, &finish(runc).context("under runc")?, &finish(tested)?)
}

/// Reads a report; the container's id reads the same in all.
fn report(text: &str, id: &str) -> Result<Report> {
    serde_json::from_str(&text.replace(id, "ID")).with_context(|| format!("not a report: {text}"))
}

/// The container's own process and, in the same container, an exec'd one.
fn with_options(setting: &Setting) -> Result<()> {
    let look = |runtime: &str| -> Result<(Report, Report)> {
        let script = "/probe probe spec; exec sleep 1000";
        let started = Run::new(runtime)
            .probe()?
            .flags(&OPTIONS)
            .spawn(&["sh", "-c", script])?;
        started.client.expect("\n}\n")?;
        let id = started.container.id();
        let own = report(&started.client.stdout.text(), id)?;
        let exec = report(&started.container.exec(&[], &SPEC)?.succeeds()?, id)?;
        started.container.kill("KILL")?;
        started.finish()?.exits_with(137)?;
        Ok((own, exec))
    };
    let (runc, tested) = (look(RUNC)?, look(&setting.runtime)?);
    compare("the container's process", &runc.0, &tested.0)?;
    compare("an exec'd process", &runc.1, &tested.1)
}

fn on_a_terminal(setting: &Setting) -> Result<()> {
    let look = |runtime: &str| -> Result<Report> {
        let (command, container) = Run::new(runtime)
            .probe()?
            .flags(&["-t"])
            .into_command(&SPEC);
        let terminal = Terminal::spawn(command, 24, 80)?;
        terminal.expect("\r\n}\r\n")?;
        let screen = terminal.screen.clone();
        let code = terminal.finish()?;
        anyhow::ensure!(code == 0, "exit code {code}");
        report(&screen.text(), container.id())
    };
    compare("on a terminal", &look(RUNC)?, &look(&setting.runtime)?)
}
