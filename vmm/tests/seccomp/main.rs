//! The system call filters, each tried in a process of its own: this program, started once more.
#![allow(missing_docs, reason = "the names of the tests say it")]

mod calls;
mod child;
mod files;
#[path = "../../fs/tests/guest/mod.rs"]
mod guest;

use std::{
    env,
    os::unix::process::ExitStatusExt,
    process::{Command, ExitCode, Output},
};

use bulkhead_vmm::seccomp::violation::EXIT_STATUS;
use libtest_mimic::{Arguments, Failed, Trial};
use serde_json::Value;

use calls::{Call, FILTERS};

type Outcome = Result<(), Failed>;

fn main() -> ExitCode {
    let mut arguments = env::args().skip(1);
    if arguments.next().as_deref() == Some(child::MARK) {
        child::run(&arguments.collect::<Vec<_>>());
    }
    let mut trials = vec![
        Trial::test("setup_allows_no_more_than_it_says", setup),
        Trial::test("every_rule_is_tried", every_rule_is_tried),
        Trial::test("other_ways_into_the_kernel_are_closed", other_ways),
        Trial::test("a_signal_handler_cannot_be_in_the_way", signals),
        Trial::test("a_process_that_fails_by_itself_says_so", own_failures),
        Trial::test("threads_allocate_without_opening_files", threads),
        Trial::test("every_request_for_files_is_served", requests),
    ];
    trials.extend(FILTERS.iter().map(|(name, _)| {
        Trial::test(format!("{name}_does_its_work_and_no_more"), || matrix(name))
    }));
    libtest_mimic::run(&Arguments::from_args(), trials).exit_code()
}

/// Runs this program as a child that does what `words` say.
fn child(words: &[&str]) -> Output {
    Command::new(env::current_exe().unwrap())
        .arg(child::MARK)
        .args(words)
        // A backtrace is made with the help of files.
        .env_remove("RUST_BACKTRACE")
        .output()
        .unwrap()
}

fn check(right: bool, words: &[&str], output: &Output) -> Outcome {
    if right {
        return Ok(());
    }
    let text = String::from_utf8_lossy(&output.stderr);
    Err(format!("{words:?}: {}: {text}", output.status).into())
}

/// The child works to its end.
fn works(words: &[&str]) -> Outcome {
    let output = child(words);
    check(output.status.success(), words, &output)
}

/// The child is ended by the handler, which says what call it was.
fn is_stopped(filter: &str, call: &Call) -> Outcome {
    let call_words = call.words();
    let words: Vec<&str> = ["call", filter]
        .into_iter()
        .chain(call_words.iter().map(String::as_str))
        .collect();
    let output = child(&words);
    let expected = format!(
        "bulkhead-vmm: thread main made the forbidden system call {} ({}); killed\n",
        call.number(),
        call.name
    );
    let right = output.status.code() == Some(EXIT_STATUS) && output.stderr == expected.as_bytes();
    check(right, &words, &output)
}

/// The filter of a thread, with that of the set-up below it.
fn matrix(name: &str) -> Outcome {
    works(&["allowed", name])?;
    let own = calls::of(name);
    let others = FILTERS.iter().flat_map(|(_, calls)| calls());
    let more = [calls::setup(), calls::never(), calls::never_when_running()];
    for call in others.chain(more.concat()) {
        if !own.contains(&call) {
            is_stopped(name, &call)?;
        }
    }
    Ok(())
}

fn setup() -> Outcome {
    works(&["allowed", "setup"])?;
    calls::never()
        .iter()
        .try_for_each(|call| is_stopped("setup", call))
}

/// There is an example for each rule of the policy, and none for what has no rule.
fn every_rule_is_tried() -> Outcome {
    let policy: Value = serde_json::from_str(include_str!("../../seccomp.json")).unwrap();
    let lists = FILTERS.iter().map(|(name, calls)| (*name, calls()));
    for (list, calls) in lists.chain([("common", calls::common()), ("setup", calls::setup())]) {
        let rules = policy[list].as_array().unwrap().iter();
        let ruled: Vec<&str> = rules
            .map(|rule| rule["syscall"].as_str().unwrap())
            // Nothing returns from these.
            .filter(|call| !["rt_sigreturn", "exit", "exit_group"].contains(call))
            .collect();
        let tried: Vec<&str> = calls.iter().map(|call| call.name).collect();
        for name in ruled.iter().chain(&tried) {
            let count = |all: &[&str]| all.iter().filter(|other| *other == name).count();
            if count(&tried) < count(&ruled).max(1) || count(&ruled) == 0 {
                return Err(format!("{list}: {name}").into());
            }
        }
    }
    Ok(())
}

fn other_ways() -> Outcome {
    for (filter, _) in FILTERS {
        // write(2) by the number of the x32 interface.
        let words = ["number", filter, "1073741825"];
        let output = child(&words);
        check(output.status.code() == Some(EXIT_STATUS), &words, &output)?;
        // The 32-bit gate is closed by the filter, or does not exist in this kernel.
        let words = ["gate", filter];
        let output = child(&words);
        let closed = [Some(libc::SIGSYS), Some(libc::SIGSEGV)].contains(&output.status.signal());
        check(closed, &words, &output)?;
    }
    Ok(())
}

fn signals() -> Outcome {
    for how in ["blocked", "ignored", "default"] {
        let words = [how];
        let output = child(&words);
        check(
            output.status.signal() == Some(libc::SIGSYS),
            &words,
            &output,
        )?;
    }
    Ok(())
}

fn own_failures() -> Outcome {
    for (filter, _) in FILTERS {
        for (how, signal, text) in [
            ("abort", libc::SIGABRT, ""),
            ("panic", libc::SIGABRT, "the reason"),
            ("fault", libc::SIGSEGV, ""),
            ("overflow", libc::SIGABRT, "overflowed its stack"),
            ("free", libc::SIGABRT, "double free"),
        ] {
            let words = [how, filter];
            let output = child(&words);
            let said = String::from_utf8_lossy(&output.stderr).contains(text);
            check(
                said && output.status.signal() == Some(signal),
                &words,
                &output,
            )?;
        }
    }
    Ok(())
}

fn threads() -> Outcome {
    works(&["threads"])
}

fn requests() -> Outcome {
    // The child cannot clean up after itself.
    let directory = tempfile::tempdir().unwrap();
    works(&["files", directory.path().to_str().unwrap()])
}
