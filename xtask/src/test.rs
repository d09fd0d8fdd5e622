//! `cargo xtask test`: everything that is checked before a change goes in.

use std::thread::{self, ScopedJoinHandle};

use anyhow::Result;
use bulkhead_lab::{BUILD_LIMIT, Step, cargo, prepare_images, run_shown};

use crate::{
    build,
    e2e::{self, Selection},
};

/// Runs all tests, or only the end-to-end tests that are selected by a word.
pub fn run(selection: &Selection) -> Result<i32> {
    build::install_packages()?;
    // Whatever fails, nothing of it runs on when this returns.
    let programs = thread::scope(|scope| {
        // Both beside the rest: one waits for packages, and the kernel's compiler fills what a linker
        // leaves idle.
        let images = scope.spawn(prepare_images);
        let kernel = scope.spawn(build::prepare_kernel);
        if selection.e2e.is_none() {
            check()?;
        }
        let programs = e2e::Programs {
            built: build::build()?,
            tests: build::build_e2e()?,
            open_vmm: build::build_open_vmm()?,
            held_shim: build::build_held_shim()?,
        };
        finish(kernel)?;
        finish(images)?;
        anyhow::Ok(programs)
    })?;
    e2e::run(&programs, selection)
}

fn finish<E: Into<anyhow::Error>>(work: ScopedJoinHandle<'_, Result<(), E>>) -> Result<()> {
    match work.join() {
        Ok(result) => result.map_err(Into::into),
        Err(panic) => std::panic::resume_unwind(panic),
    }
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
