//! Whole pods against a VMM without a VM: life-cycles, failures, crashes, and that nothing is
//! left after any of them. Needs root, but neither KVM nor containerd.

mod check;
mod containerd;
mod crashes;
mod fake_vmm;
mod lifecycle;
mod machine;
mod mounted;

use std::{future::Future, process::ExitCode};

use libtest_mimic::{Arguments, Trial};

fn main() -> ExitCode {
    let executable = std::env::args().next().unwrap_or_default();
    if executable.ends_with("/bulkhead-vmm") {
        fake_vmm::main(&executable);
        return ExitCode::SUCCESS;
    }
    machine::prepare();
    let mut arguments = Arguments::from_args();
    // The machine is one: its processes are looked through.
    arguments.test_threads = Some(1);
    libtest_mimic::run(&arguments, trials()).exit_code()
}

fn trials() -> Vec<Trial> {
    vec![
        trial("a_container_runs_to_its_exit", lifecycle::run_to_exit),
        trial("output_and_input_are_byte_exact", lifecycle::byte_exact),
        trial("execs_live_and_end", lifecycle::execs),
        trial("errors_have_their_codes", lifecycle::error_codes),
        trial("pods_are_shared_by_annotation", lifecycle::groups),
        trial("a_refused_container_leaves_nothing", lifecycle::refused),
        trial("early_hooks_find_the_root", lifecycle::hooks),
        trial("a_mounted_root_shows_the_container", mounted::shown),
        trial(
            "a_mounted_root_is_uncovered_after_a_killed_shim",
            mounted::shim_killed,
        ),
        trial("a_killed_vmm_releases_everybody", crashes::vmm_killed),
        trial("a_stuck_guest_is_killed_from_outside", crashes::guest_stuck),
        trial("a_killed_anchor_kills_its_process", crashes::anchor_killed),
        trial(
            "signals_to_an_anchor_are_passed_on",
            crashes::anchor_signalled,
        ),
        trial("a_killed_shim_is_cleaned_up_after", crashes::shim_killed),
        trial("sigterm_ends_the_pod", crashes::shim_terminated),
        trial("an_abandoned_creation_ends_the_pod", crashes::abandoned),
        trial("boot_failures_are_told", crashes::boot_failures),
        trial("a_host_without_kvm_is_told", crashes::no_kvm),
        trial("a_check_tries_a_guest_and_leaves_nothing", check::boots),
        trial("a_check_tells_what_failed_and_the_fix", check::failures),
        trial("an_interrupted_check_leaves_nothing", check::interrupted),
    ]
}

fn trial<F: Future<Output = ()> + 'static>(name: &str, test: fn() -> F) -> Trial {
    Trial::test(name, move || {
        tokio::runtime::Builder::new_multi_thread()
            .worker_threads(1)
            .enable_all()
            .build()?
            .block_on(test());
        Ok(())
    })
}
