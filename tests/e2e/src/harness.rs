//! From a list of cases to a test run: one after the other, each timed, each followed by a look at
//! what it left behind.

use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
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

/// The exit code when the lab's processor failed during a failed test (`EX_TEMPFAIL`, sysexits.h):
/// the test says nothing, and this lab must not be used any more.
const LAB_FAULT: u8 = 75;

/// Runs the cases that the arguments select.
pub fn run(runtime: &str, mut arguments: Arguments) -> ExitCode {
    // One at a time: what is left on the host must be one test's alone.
    arguments.test_threads = Some(1);
    let spoiled = Arc::new(AtomicBool::new(false));
    let trials: Vec<_> = cases::all()
        .into_iter()
        .filter(|case| !case.bulkhead_only || runtime == BULKHEAD)
        .map(|case| trial(case, runtime.to_owned(), Arc::clone(&spoiled)))
        .collect();
    let conclusion = libtest_mimic::run(&arguments, trials);
    if spoiled.load(Ordering::Relaxed) {
        return ExitCode::from(LAB_FAULT);
    }
    conclusion.exit_code()
}

fn trial(case: Case, runtime: String, spoiled: Arc<AtomicBool>) -> Trial {
    let kind = if case.bulkhead_only {
        "Bulkhead only"
    } else {
        ""
    };
    Trial::test(case.name, move || {
        let setting = Setting { runtime };
        let faults = LabFaults::watch().map_err(|error| format!("{error:?}"))?;
        let log = Log::start();
        let started = Instant::now();
        let result = checked(&case, &setting);
        eprintln!("    {:.1} s", started.elapsed().as_secs_f32());
        result.map_err(|error| {
            let log = log
                .tail(LOG_SHOWN)
                .unwrap_or_else(|error| format!("{error:#}"));
            // At once, not only in the summary at the end of a long run.
            eprintln!("{error:?}\n\ncontainerd's log since the test began (its end):\n{log}");
            match faults.first() {
                Ok(None) => {}
                Ok(Some(fault)) => {
                    eprintln!("The lab's processor has left a guest in the host's code: {fault}");
                    spoiled.store(true, Ordering::Relaxed);
                }
                Err(error) => eprintln!("{error:#}"),
            }
            format!("{error:#}").into()
        })
    })
    .with_kind(kind)
}

fn checked(case: &Case, setting: &Setting) -> Result<()> {
    let kept_before = Snapshot::of_containerd()?;
    let before = Snapshot::take()?;
    let result = (case.run)(setting);
    let left = before
        .nothing_new(Snapshot::take)
        .and_then(|()| kept_before.nothing_new(Snapshot::of_containerd));
    match (result, left) {
        (Err(error), Err(left)) => Err(error.context(format!("(and then: {left:#})"))),
        (result, left) => result.and(left.context("after the test")),
    }
}
