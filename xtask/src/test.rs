//! `cargo xtask test`: everything that is checked before a change goes in.

use std::time::Duration;

use anyhow::Result;
use bulkhead_lab::{BUILD_LIMIT, Lab, LabOptions, Step, cargo, run_shown};

use crate::lab::{load_debian_dev, save_logs};
use crate::{build, install};

/// Where the end-to-end tests' program is in the lab.
const E2E: &str = "/usr/local/bin/bulkhead-e2e";

/// Where they find a VMM with attacker code in it.
const OPEN_VMM: &str = "/usr/local/lib/bulkhead-test/bulkhead-vmm";

/// How long all end-to-end tests may take.
const E2E_LIMIT: Duration = Duration::from_secs(60 * 60);

/// Runs all tests, or only the end-to-end tests whose names match `e2e`.
pub fn run(e2e: Option<&str>) -> Result<i32> {
    build::install_packages()?;
    if e2e.is_none() {
        check()?;
    }
    let built = build::build()?;
    let program = build::build_e2e()?;
    let open_vmm = build::build_open_vmm()?;
    let lab = Lab::start(&LabOptions {
        name: format!("test-{}", std::process::id()),
        ..LabOptions::default()
    })?;
    let step = Step::start("Installing Bulkhead and its tests in the lab");
    install::install_in_lab(&built, &lab)?;
    lab.push(&program, E2E)?;
    lab.push(&open_vmm, OPEN_VMM)?;
    step.done();
    load_debian_dev(&lab)?;
    let arguments = std::iter::once(E2E).chain(e2e);
    let result = lab
        .exec(arguments)
        .limit(E2E_LIMIT)
        .stream(&mut std::io::stdout(), &mut std::io::stderr());
    if !matches!(result, Ok(0)) {
        save_logs(&lab, "test");
    }
    Ok(result?)
}

/// Format, lints and unit tests, with cargo-nextest where it is installed.
fn check() -> Result<()> {
    let step = Step::announce("Checking the format");
    run_shown(cargo().args(["fmt", "--all", "--check"]), BUILD_LIMIT)?;
    step.done();
    let step = Step::announce("Checking the lints");
    let lints = [
        "clippy",
        "--workspace",
        "--all-targets",
        "--",
        "--deny",
        "warnings",
    ];
    run_shown(cargo().args(lints), BUILD_LIMIT)?;
    step.done();
    let step = Step::announce("Running the unit tests");
    let nextest = cargo().args(["nextest", "--version"]).output();
    let runner: &[&str] = match nextest {
        Ok(output) if output.status.success() => &["nextest", "run"],
        _ => &["test"],
    };
    run_shown(cargo().args(runner).arg("--workspace"), BUILD_LIMIT)?;
    step.done();
    Ok(())
}
