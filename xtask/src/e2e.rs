//! The end-to-end tests: one after the other in a lab, and in a new lab after one whose emulated
//! processor failed.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use bulkhead_lab::{Error, Lab, LabOptions, Step};

use crate::build::Built;
use crate::install;
use crate::lab::{load_debian_dev, save_logs};

/// Where the tests' program is in the lab.
const E2E: &str = "/usr/local/bin/bulkhead-e2e";

/// How long one test may take; the program has shorter limits for all that it waits for.
const TEST_LIMIT: Duration = Duration::from_secs(20 * 60);

/// The program's exit code when the lab's processor failed during a failed test (`EX_TEMPFAIL`).
const LAB_FAULT: i32 = 75;

/// How often a test is tried that labs have spoiled.
const TRIES: u32 = 3;

/// What a test came to.
enum Verdict {
    Passed,
    Failed,
    /// The lab failed, for this reason.
    Spoiled(String),
}

/// What is installed in each lab.
pub struct Suite<'a> {
    /// Bulkhead.
    pub built: &'a Built,
    /// The tests' program.
    pub program: PathBuf,
}

impl Suite<'_> {
    /// Runs all tests whose names contain `filter`. Returns whether all passed.
    pub fn run(&self, filter: Option<&str>) -> Result<bool> {
        let names = list(&self.program, filter)?;
        let mut lab = None;
        let mut failed = Vec::new();
        for name in &names {
            if !self.passes(name, &mut lab)? {
                failed.push(name);
            }
        }
        for name in &failed {
            println!("failed: {name}");
        }
        println!(
            "{} passed, {} failed",
            names.len() - failed.len(),
            failed.len()
        );
        Ok(failed.is_empty())
    }

    /// Runs one test, in the lab that is there or in a new one.
    fn passes(&self, name: &str, lab: &mut Option<Lab>) -> Result<bool> {
        for _ in 0..TRIES {
            let used = match lab.take() {
                Some(lab) => lab,
                None => self.lab()?,
            };
            match run_in(&used, name)? {
                Verdict::Passed => {
                    *lab = Some(used);
                    return Ok(true);
                }
                Verdict::Failed => {
                    save_logs(&used);
                    return Ok(false);
                }
                // The lab ends here.
                Verdict::Spoiled(why) => {
                    eprintln!(
                        "==> The lab failed, not the test; trying {name:?} in a new one: {why}"
                    );
                }
            }
        }
        bail!("{TRIES} labs failed during {name:?}")
    }

    fn lab(&self) -> Result<Lab> {
        let lab = Lab::start(&LabOptions {
            name: format!("test-{}", std::process::id()),
            ..LabOptions::default()
        })?;
        let step = Step::start("Installing Bulkhead and its tests in the lab");
        install::install_in_lab(self.built, &lab)?;
        lab.push(&self.program, E2E)?;
        step.done();
        load_debian_dev(&lab)?;
        Ok(lab)
    }
}

fn run_in(lab: &Lab, name: &str) -> Result<Verdict> {
    let result = lab
        .exec([E2E, "--exact", name])
        .limit(TEST_LIMIT)
        .stream(&mut std::io::stdout(), &mut std::io::stderr());
    match result {
        Ok(0) => Ok(Verdict::Passed),
        Ok(LAB_FAULT) => Ok(Verdict::Spoiled(
            "its processor left a guest in the host's code".into(),
        )),
        Ok(_) => Ok(Verdict::Failed),
        Err(error @ (Error::Died { .. } | Error::Timeout { .. })) => {
            Ok(Verdict::Spoiled(error.to_string()))
        }
        Err(error) => Err(error.into()),
    }
}

/// The names of the tests.
fn list(program: &Path, filter: Option<&str>) -> Result<Vec<String>> {
    let output = Command::new(program)
        .arg("--list")
        .args(filter)
        .output()
        .with_context(|| format!("run {} --list", program.display()))?;
    let text = String::from_utf8(output.stdout).context("the list of tests")?;
    let names: Vec<String> = text.lines().filter_map(name).collect();
    if names.is_empty() {
        bail!("no test has a name like that");
    }
    Ok(names)
}

/// The name in a line of the list: `[kind] name: test`.
fn name(line: &str) -> Option<String> {
    let name = line.strip_suffix(": test")?;
    let name = match name.strip_prefix('[') {
        Some(rest) => rest.split_once("] ")?.1,
        None => name,
    };
    Some(name.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_listed_without_their_kind() {
        assert_eq!(
            name("exit codes arrive: test").unwrap(),
            "exit codes arrive"
        );
        assert_eq!(name("[Bulkhead only] a b: c: test").unwrap(), "a b: c");
        assert_eq!(name("3 tests"), None);
    }
}
