//! `cargo xtask test`: everything that is checked before a change goes in.

use anyhow::Result;
use bulkhead_lab::{BUILD_LIMIT, Step, cargo, run_shown};

use crate::build;
use crate::e2e::Suite;

/// Runs all tests, or only the end-to-end tests whose names match `e2e`.
pub fn run(e2e: Option<&str>) -> Result<i32> {
    build::install_packages()?;
    if e2e.is_none() {
        check()?;
    }
    let built = build::build()?;
    let suite = Suite {
        built: &built,
        program: build::build_e2e()?,
    };
    Ok(i32::from(!suite.run(e2e)?))
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
