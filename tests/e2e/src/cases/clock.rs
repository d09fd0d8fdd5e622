//! The wall clock of a container: the host's, whatever happens to that.

use std::process::Command;
use std::time::{Instant, SystemTime, UNIX_EPOCH};

use anyhow::{Context, Result, ensure};

use super::{Case, Setting, bulkhead, case};
use crate::command::{DEADLINE, Input, Running};
use crate::ctr::{Container, Run};

/// Further than any clock is wrong by itself.
const SHIFT: u64 = 300;

pub fn cases() -> Vec<Case> {
    vec![
        case(
            "a container's clock follows when the host's is set",
            follows,
        ),
        bulkhead("a container that sets the clock sets its VM's alone", own),
    ]
}

/// The host's clock is ahead while this is there.
struct Ahead;

impl Ahead {
    fn new() -> Result<Self> {
        shift(&format!("+{SHIFT} seconds"))?;
        Ok(Self)
    }
}

impl Drop for Ahead {
    fn drop(&mut self) {
        if let Err(error) = shift(&format!("-{SHIFT} seconds")) {
            eprintln!("the host's clock stays ahead: {error:#}");
        }
    }
}

fn shift(by: &str) -> Result<()> {
    let mut command = Command::new("date");
    command.args(["--set", by]);
    Running::spawn(command, Input::Null)?.finish()?.succeeds()?;
    Ok(())
}

fn now() -> Result<u64> {
    Ok(SystemTime::now().duration_since(UNIX_EPOCH)?.as_secs())
}

/// Waits until a container has the host's time.
fn is_right(container: &Container) -> Result<()> {
    let begun = Instant::now();
    loop {
        let before = now()?;
        let said = container.exec(&[], &["date", "+%s"])?.succeeds()?;
        let time: u64 = said.trim().parse().context("no time")?;
        if (before.saturating_sub(1)..=now()? + 1).contains(&time) {
            return Ok(());
        }
        ensure!(
            begun.elapsed() < DEADLINE,
            "it is {time}, and {before} on the host"
        );
    }
}

fn follows(setting: &Setting) -> Result<()> {
    let container = setting.container().detach(&["sleep", "100000"])?;
    is_right(&container)?;
    let ahead = Ahead::new()?;
    is_right(&container).context("ahead")?;
    drop(ahead);
    is_right(&container).context("back")
}

fn own(setting: &Setting) -> Result<()> {
    let container = Run::new(&setting.runtime)
        .flags(&["--privileged"])
        .detach(&["sleep", "100000"])?;
    let before = now()?;
    let set = ["date", "-s", "@1000000000"];
    container.exec(&[], &set)?.succeeds()?;
    let after = now()?;
    ensure!(
        (before..before + SHIFT).contains(&after),
        "the host's clock went from {before} to {after}"
    );
    let _ahead = Ahead::new()?;
    is_right(&container)
}
