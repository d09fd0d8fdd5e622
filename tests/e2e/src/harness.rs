//! From a list of cases to a test run: one after the other, each timed, each followed by a look at
//! what it left behind.

use std::process::ExitCode;
use std::time::Instant;

use anyhow::{Context, Result};
use libtest_mimic::{Arguments, Trial};
use serde_json::json;

use crate::cases::{self, Case, Setting};
use crate::cri;
use crate::ctr::{BULKHEAD, SANDBOX};
use crate::host::Log;
use crate::residue::Snapshot;

/// How much of containerd's log a failure shows, in bytes.
const LOG_SHOWN: u64 = 8 * 1024;

/// Runs the cases that the arguments select.
pub fn run(runtime: &str, mut arguments: Arguments) -> ExitCode {
    // One at a time: what is left on the host must be one test's alone.
    arguments.test_threads = Some(1);
    let sandboxes = cri::has_sandbox_api();
    let possible = selected(runtime).filter(|case| !case.sandbox_api || sandboxes);
    let trials = possible.map(|case| trial(case, runtime.to_owned()));
    let trials: Vec<_> = trials.collect();
    libtest_mimic::run(&arguments, trials).exit_code()
}

/// Prints what there is to run, one JSON object a line.
pub fn list(runtime: &str) {
    for case in selected(runtime) {
        println!(
            "{}",
            json!({
                "name": case.name, "image": case.image, "long": case.long, "soak": case.soak,
                "sandbox_api": case.sandbox_api,
            })
        );
    }
}

fn selected(runtime: &str) -> impl Iterator<Item = Case> {
    let all = cases::all().into_iter();
    all.filter(move |case| !case.bulkhead_only || runtime == BULKHEAD)
}

fn trial(case: Case, runtime: String) -> Trial {
    let kind = if case.bulkhead_only {
        "Bulkhead only"
    } else {
        ""
    };
    let soak = case.soak;
    Trial::test(case.name, move || {
        let setting = Setting {
            runtime: match case.sandbox_api {
                true => SANDBOX.to_owned(),
                false => runtime,
            },
        };
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
            format!("{error:#}").into()
        })
    })
    .with_kind(kind)
    .with_ignored_flag(soak)
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
