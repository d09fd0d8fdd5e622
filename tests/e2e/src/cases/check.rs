//! `bulkhead check`, on a host that is as it should be and on one that is not.

use std::process::Command;

use anyhow::{Context, Result, ensure};
use bulkhead_rootfs_builder::VMLINUX;
use serde_json::Value;

use super::failures::Guest;
use super::{Case, Setting, bulkhead};
use crate::command::{Finished, Input, Running};

pub fn cases() -> Vec<Case> {
    vec![
        bulkhead("bulkhead check boots a guest and finds no fault", healthy),
        bulkhead(
            "bulkhead check names a corrupt kernel and the fix",
            corrupt_kernel,
        ),
    ]
}

fn check(arguments: &[&str]) -> Result<Finished> {
    let mut command = Command::new("bulkhead");
    command.arg("check").args(arguments);
    Running::spawn(command, Input::Null)?.finish()
}

fn healthy(_: &Setting) -> Result<()> {
    let done = check(&["--json"])?.exits_with(0)?;
    let report: Value = serde_json::from_slice(&done.stdout)
        .with_context(|| format!("the report is no JSON: {done}"))?;
    let items = report["items"].as_array().context("there are no items")?;
    let boots = items
        .iter()
        .find(|item| item["item"] == "guest boots")
        .with_context(|| format!("no guest was tried: {done}"))?;
    let detail = boots["detail"].as_str().unwrap_or_default();
    ensure!(
        boots["result"] == "ok" && detail.ends_with("-bulkhead"),
        "the guest is {boots}"
    );
    for item in items {
        let fix = item["fix"].as_str().unwrap_or_default();
        ensure!(
            (item["result"] == "ok") == fix.is_empty(),
            "a fix is missing or too many: {item}"
        );
    }
    let text = check(&[])?.succeeds()?;
    let line = text.lines().find(|line| line.contains("guest boots"));
    ensure!(
        line.is_some_and(|line| line.starts_with("ok ")),
        "the report says\n{text}"
    );
    Ok(())
}

fn corrupt_kernel(_: &Setting) -> Result<()> {
    let guest = Guest::copy()?;
    // Once as it is: what was checked then must not be believed after.
    check(&[])?.exits_with(0)?;
    guest.damage(VMLINUX)?;
    let done = check(&[])?.exits_with(1)?;
    let report = done.out();
    let mut lines = report.lines();
    let line = lines
        .by_ref()
        .find(|line| line.starts_with("FAILED") && line.contains("guest files"))
        .with_context(|| format!("the files did not fail: {done}"))?;
    let path = guest.path(VMLINUX);
    for word in [&*path.to_string_lossy(), "sha256"] {
        ensure!(line.contains(word), "the line does not say {word}: {line}");
    }
    let fix = lines.next().unwrap_or_default();
    ensure!(
        fix.starts_with(' ') && fix.contains("fix: "),
        "no fix follows: {done}"
    );
    ensure!(
        report
            .lines()
            .any(|line| line.starts_with("FAILED") && line.contains("guest boots")),
        "a guest booted from a corrupt kernel: {done}"
    );
    Ok(())
}
