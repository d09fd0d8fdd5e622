//! Whole pods against a VMM without a VM: life-cycles, failures, crashes, and that nothing is
//! left after any of them. Needs root, but neither KVM nor containerd.

mod adjust;
mod check;
mod containerd;
mod contract;
mod crashes;
mod fake_agent;
mod fake_vmm;
mod faults;
mod lifecycle;
mod machine;
mod mounted;
mod net;
mod network;
mod sandbox;
mod stuck;

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
    let faults = faults::matrix().map(|fault| {
        let name = format!("survived: {fault}");
        trial(&name, move || faults::survive(fault))
    });
    let stuck = stuck::STUCK.iter().map(|stuck| {
        let name = format!("never_answered: {}", stuck.step);
        // Other builds have their deadlines in full.
        trial(&name, || stuck::never_answered(stuck)).with_ignored_flag(!cfg!(debug_assertions))
    });
    single().into_iter().chain(stuck).chain(faults).collect()
}

fn single() -> Vec<Trial> {
    vec![
        trial("a_container_runs_to_its_exit", lifecycle::run_to_exit),
        trial("output_and_input_are_byte_exact", lifecycle::byte_exact),
        trial("execs_live_and_end", lifecycle::execs),
        trial("errors_have_their_codes", lifecycle::error_codes),
        trial("it_says_what_it_is", contract::described),
        trial("a_daemon_has_left_its_caller", contract::daemon),
        trial("strangers_are_not_heard", contract::strangers),
        trial("a_created_container_is_killed", contract::killed_early),
        trial("every_waiter_is_answered", contract::waiters),
        trial(
            "a_container_has_a_process_until_it_is_deleted",
            contract::pids,
        ),
        trial(
            "terminals_have_the_size_that_was_told_first",
            contract::sizes,
        ),
        trial("options_of_any_type_are_taken", contract::options),
        trial("events_wait_for_containerd", contract::events),
        trial("a_pod_that_containerd_forgets_ends", contract::forgotten),
        trial("pods_are_shared_by_annotation", lifecycle::groups),
        trial("a_refused_container_leaves_nothing", lifecycle::refused),
        trial("a_paused_container_can_be_killed", adjust::paused),
        trial("limits_change_while_it_runs", adjust::updated),
        trial(
            "lack_of_memory_is_told_before_the_end",
            adjust::out_of_memory,
        ),
        trial("early_hooks_find_the_root", lifecycle::hooks),
        trial("a_mounted_root_shows_the_container", mounted::shown),
        trial(
            "a_mounted_root_is_uncovered_after_a_killed_shim",
            mounted::shim_killed,
        ),
        trial("a_network_is_what_the_namespace_has", network::follows),
        trial(
            "interfaces_that_come_before_the_start_are_there",
            network::before_the_start,
        ),
        trial(
            "a_network_that_is_refused_fails_the_start",
            network::refused,
        ),
        trial(
            "what_a_guest_cannot_have_fails_the_start",
            network::unsupported,
        ),
        trial("a_killed_shims_filters_are_removed", network::shim_killed),
        trial("containers_of_a_namespace_share_a_network", network::shared),
        trial(
            "a_shim_killed_before_its_vm_has_the_interface_is_cleaned_up_after",
            network::killed_half_way,
        ),
        trial("ports_are_forwarded_from_localhost", network::ports),
        trial("names_are_asked_for_on_the_host", network::names),
        trial(
            "the_hosts_own_packets_stay_the_hosts",
            network::hosts_sockets,
        ),
        trial("a_killed_vmm_releases_everybody", crashes::vmm_killed),
        trial("a_killed_anchor_kills_its_process", crashes::anchor_killed),
        trial(
            "signals_to_an_anchor_are_passed_on",
            crashes::anchor_signalled,
        ),
        trial("a_killed_shim_is_cleaned_up_after", crashes::shim_killed),
        trial("sigterm_ends_the_pod", crashes::shim_terminated),
        trial("an_abandoned_creation_ends_the_pod", crashes::abandoned),
        trial("boot_failures_are_told", crashes::boot_failures),
        trial("sigkill_is_not_refused", stuck::disobedient),
        trial(
            "what_does_not_die_is_deleted",
            stuck::undead_and_never_started,
        ),
        trial("a_lost_exec_ends_with_its_container", stuck::lost_exec),
        trial("a_log_that_nobody_reads_stops_nobody", stuck::unread_log),
        trial("a_host_without_kvm_is_told", crashes::no_kvm),
        trial("a_sandbox_lives_until_it_is_shut_down", sandbox::life),
        trial("a_container_gets_what_its_sandbox_has", sandbox::member),
        trial(
            "a_stopped_sandbox_ends_its_containers",
            sandbox::stopped_with_containers,
        ),
        trial(
            "a_sandbox_can_be_shut_down_at_once",
            sandbox::shut_down_at_once,
        ),
        trial("a_sandbox_ends_with_its_vm", sandbox::vmm_killed),
        trial(
            "a_sandbox_ends_with_its_anchor_alone",
            sandbox::anchor_killed,
        ),
        trial("a_killed_sandbox_is_cleaned_up_after", sandbox::shim_killed),
        trial("a_sandbox_that_cannot_be_is_refused", sandbox::refused),
        trial("a_sandbox_tells_why_it_has_no_vm", sandbox::boot_failure),
        trial(
            "a_sandbox_may_end_while_it_starts",
            sandbox::shut_down_while_starting,
        ),
        trial("a_sandbox_that_nobody_describes_ends", sandbox::forgotten)
            // Other builds have their deadlines in full.
            .with_ignored_flag(!cfg!(debug_assertions)),
        trial("a_check_tries_a_guest_and_leaves_nothing", check::boots),
        trial("a_check_tells_what_failed_and_the_fix", check::failures),
        trial("an_interrupted_check_leaves_nothing", check::interrupted),
    ]
}

fn trial<F: Future<Output = ()>>(name: &str, test: impl FnOnce() -> F + Send + 'static) -> Trial {
    Trial::test(name, move || {
        tokio::runtime::Builder::new_multi_thread()
            .worker_threads(1)
            .enable_all()
            .build()?
            .block_on(test());
        Ok(())
    })
}
