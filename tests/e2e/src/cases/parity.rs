//! The same container of `ctr run` under runc and under the runtime under test: whatever a process
//! finds different must be in the list of known differences. What a specification sets up is compared
//! by the [configurations](super::configurations).

use anyhow::{Context, Result};

use super::{Case, Setting, case};
use crate::ctr::{Foreground, PROBE, RUNC, Run};
use crate::differences::Known;
use crate::probe::Report;
use crate::terminal::Terminal;

pub fn cases() -> Vec<Case> {
    let probed = [
        case(
            "on a terminal a process finds what it finds under runc",
            on_a_terminal,
        ),
        case("files behave as they do under runc", files),
    ];
    probed.into_iter().map(Case::in_debian).collect()
}

const SPEC: [&str; 3] = [PROBE, "probe", "spec"];

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
    let runc = finish(runc).context("under runc")?;
    Known::read()?.compare(what, &runc, &finish(tested)?)
}

/// Reads a report; the container's id reads the same in all.
fn report(text: &str, id: &str) -> Result<Report> {
    serde_json::from_str(&text.replace(id, "ID")).with_context(|| format!("not a report: {text}"))
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
    Known::read()?.compare("on a terminal", &look(RUNC)?, &look(&setting.runtime)?)
}
