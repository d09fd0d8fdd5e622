//! From a list of cases to a test run: one after the other, each timed, each followed by a look at
//! what it left behind.

use std::process::ExitCode;
use std::sync::{Arc, OnceLock};
use std::time::Instant;

use anyhow::{Context, Result};
use libtest_mimic::{Arguments, Trial};

use crate::cases::{self, Case, Setting};
use crate::ctr::BULKHEAD;
use crate::host::Log;
use crate::lab_fault::LabFaults;
use crate::residue::Snapshot;

/// How much of containerd's log a failure shows, in bytes.
const LOG_SHOWN: u64 = 8 * 1024;

/// How often a test is tried that the lab's processor has spoiled.
const TRIES: u32 = 3;

/// Runs the cases that the arguments select.
pub fn run(runtime: &str, mut arguments: Arguments) -> ExitCode {
    // One at a time: what is left on the host must be one test's alone.
    arguments.test_threads = Some(1);
    let at_first = Arc::new(OnceLock::new());
    let mut trials: Vec<_> = cases::all()
        .into_iter()
        .filter(|case| !case.bulkhead_only || runtime == BULKHEAD)
        .map(|case| trial(case, runtime.to_owned(), Arc::clone(&at_first)))
        .collect();
    trials.push(Trial::test(
        "containerd has kept nothing of all that ran before",
        move || {
            let before = at_first.get().ok_or("no test ran before")?;
            before
                .nothing_new(Snapshot::of_containerd)
                .map_err(|error| format!("{error:?}").into())
        },
    ));
    libtest_mimic::run(&arguments, trials).exit_code()
}

fn trial(case: Case, runtime: String, at_first: Arc<OnceLock<Snapshot>>) -> Trial {
    let kind = if case.bulkhead_only {
        "Bulkhead only"
    } else {
        ""
    };
    Trial::test(case.name, move || {
        let setting = Setting { runtime };
        if at_first.get().is_none() {
            let _ = at_first.set(Snapshot::of_containerd().map_err(|error| format!("{error:?}"))?);
        }
        let log = Log::start();
        let started = Instant::now();
        let result = tried(&case, &setting);
        eprintln!("    {:.1} s", started.elapsed().as_secs_f32());
        result.map_err(|error| {
            let log = log
                .tail(LOG_SHOWN)
                .unwrap_or_else(|error| format!("{error:#}"));
            // At once, not only in the summary at the end of a long run.
            eprintln!("{error:?}\n\ncontainerd's log since the test began (its end):\n{log}");
            format!("{error:#}").into()
        })
    })
    .with_kind(kind)
}

/// Runs a test, and again when it failed and the lab's processor is known to have failed during it.
fn tried(case: &Case, setting: &Setting) -> Result<()> {
    let faults = LabFaults::watch()?;
    let mut tries = 1;
    loop {
        faults.take()?;
        let result = checked(case, setting);
        match (result, faults.take()?) {
            (Err(error), Some(fault)) if tries < TRIES => {
                eprintln!(
                    "\n    the lab's emulated processor has failed (a guest was left in the host's \
                     code: {fault}), so this says nothing: {error:#}; trying again"
                );
                tries += 1;
            }
            (result, _) => return result,
        }
    }
}

fn checked(case: &Case, setting: &Setting) -> Result<()> {
    let before = Snapshot::take()?;
    let result = (case.run)(setting);
    let left = before.nothing_new(Snapshot::take);
    match (result, left) {
        (Err(error), Err(left)) => Err(error.context(format!("(and then: {left:#})"))),
        (result, left) => result.and(left.context("after the test")),
    }
}
