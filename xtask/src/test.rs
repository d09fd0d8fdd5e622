//! `cargo xtask test`: everything that is checked before a change goes in.

use std::io::{self, Write};
use std::path::PathBuf;
use std::thread;
use std::time::Duration;

use anyhow::Result;
use bulkhead_lab::{BUILD_LIMIT, Lab, LabOptions, Step, cargo, run_shown};

use crate::build::{self, Built};
use crate::install;
use crate::lab::{load_debian_dev, save_logs};

/// Where the end-to-end tests' program is in the lab.
const E2E: &str = "/usr/local/bin/bulkhead-e2e";

/// How long all end-to-end tests may take.
const E2E_LIMIT: Duration = Duration::from_secs(40 * 60);

/// The test that takes as long as all others; it gets a lab of its own beside theirs.
const LONG: &str = "tar unpacks 20,000 files";

/// Runs all tests, or only the end-to-end tests whose names match `e2e`.
pub fn run(e2e: Option<&str>) -> Result<i32> {
    build::install_packages()?;
    if e2e.is_none() {
        check()?;
    }
    let suite = Suite {
        built: build::build()?,
        program: build::build_e2e()?,
    };
    let Some(e2e) = e2e else {
        return suite.run_all();
    };
    suite.run("test", &[e2e], &mut io::stdout(), &mut io::stderr())
}

/// What is installed in a lab.
struct Suite {
    built: Built,
    program: PathBuf,
}

impl Suite {
    /// Runs every test. What the long one says comes at the end.
    fn run_all(&self) -> Result<i32> {
        thread::scope(|scope| {
            let beside = scope.spawn(|| {
                let (mut stdout, mut stderr) = (Vec::new(), Vec::new());
                let code = self.run("long", &[LONG], &mut stdout, &mut stderr);
                (code, stdout, stderr)
            });
            let arguments = ["--skip", LONG];
            let code = self.run("test", &arguments, &mut io::stdout(), &mut io::stderr());
            let (long, stdout, stderr) = beside.join().expect("the long test's thread panicked");
            io::stdout().write_all(&stdout)?;
            io::stderr().write_all(&stderr)?;
            Ok(code?.max(long?))
        })
    }

    /// Runs what the arguments select in a new lab; returns the tests' exit code.
    fn run(
        &self,
        name: &str,
        arguments: &[&str],
        stdout: &mut dyn Write,
        stderr: &mut dyn Write,
    ) -> Result<i32> {
        let lab = Lab::start(&LabOptions {
            name: format!("{name}-{}", std::process::id()),
            ..LabOptions::default()
        })?;
        let step = Step::start("Installing Bulkhead and its tests in the lab");
        install::install_in_lab(&self.built, &lab)?;
        lab.push(&self.program, E2E)?;
        step.done();
        load_debian_dev(&lab)?;
        let result = lab
            .exec([E2E].iter().chain(arguments).copied())
            .limit(E2E_LIMIT)
            .stream(stdout, stderr);
        if !matches!(result, Ok(0)) {
            save_logs(&lab, name);
        }
        Ok(result?)
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
