//! `bulkhead check`: whether Bulkhead works on this host, and what of the host weakens it.
//!
//! docs/check.md explains every item.

mod guest;
mod hardening;
mod host;
mod installation;
mod kvm;
mod machine;
mod report;

use std::{
    io::{self, Write},
    process::ExitCode,
};

use tokio::runtime;

use crate::{child::Reaper, text};
use machine::{Machine, Unreadable};
use report::{Outcome, Report, Verdict};

/// One item of the report.
struct Check {
    /// As in docs/check.md.
    name: &'static str,
    /// Items before this one without which there is nothing to look at.
    needs: &'static [&'static str],
    run: fn(&Machine) -> Result<Outcome, Unreadable>,
}

const fn check(
    name: &'static str,
    needs: &'static [&'static str],
    run: fn(&Machine) -> Result<Outcome, Unreadable>,
) -> Check {
    Check { name, needs, run }
}

/// All items, in the order of the report.
const CHECKS: [Check; 25] = [
    check("root", &[], host::root),
    check("configuration", &[], installation::configuration),
    check("shim", &[], installation::shim),
    check("VMM", &["configuration"], installation::vmm),
    check("guest files", &["configuration"], installation::guest_files),
    check("Linux", &[], host::linux),
    check("cgroup v2", &[], host::cgroup),
    check("user namespaces", &[], host::user_namespaces),
    check("seccomp", &[], host::seccomp),
    check("Landlock", &[], host::landlock),
    check("/dev/net/tun", &[], host::tun),
    check("containerd", &[], host::containerd),
    check("machine", &[], host::hardware),
    check("/dev/kvm", &[], kvm::device),
    check("KVM", &["/dev/kvm"], kvm::capabilities),
    check(
        "guest boots",
        &["root", "configuration", "VMM", "guest files", "/dev/kvm"],
        guest::boots,
    ),
    check("KVM's users", &[], hardening::device_access),
    check("nested KVM", &[], hardening::nested_kvm),
    check("CPU vulnerabilities", &[], hardening::vulnerabilities),
    check("SMT", &[], hardening::smt),
    check("KSM", &[], hardening::ksm),
    check("swap", &[], hardening::swap),
    check("kernel addresses", &[], hardening::kernel_addresses),
    check("kernel log", &[], hardening::kernel_log),
    check("huge pages", &[], hardening::huge_pages),
];

/// Looks at everything and prints the report. Success means that nothing failed.
pub fn run(json: bool) -> ExitCode {
    let report = look(&CHECKS, &Machine::this());
    let printed = if json {
        report.to_json().map_err(io::Error::from)
    } else {
        Ok(report.to_string())
    }
    .and_then(|text| writeln!(io::stdout(), "{}", text.trim_end()));
    if let Err(error) = printed {
        let _ = writeln!(io::stderr(), "Cannot write the report: {error}");
        return ExitCode::FAILURE;
    }
    match report.count(Verdict::Failed) {
        0 => ExitCode::SUCCESS,
        _ => ExitCode::FAILURE,
    }
}

fn look(checks: &[Check], machine: &Machine) -> Report {
    let mut report = Report::default();
    for check in checks {
        let unmet = check
            .needs
            .iter()
            .find(|need| report.verdict(need) == Some(Verdict::Failed));
        let outcome = match unmet {
            Some(need) => Outcome::failed(
                format!("not tried, because {need} failed"),
                format!("see {need}"),
            ),
            None => (check.run)(machine).unwrap_or_else(|error| {
                Outcome::warning(
                    text::chain(&error),
                    "run this as root, on the host itself rather than in a container",
                )
            }),
        };
        report.add(check.name, outcome);
    }
    report
}

/// Runs `task` on a runtime of its own, with a reaper for its children.
fn with_runtime<T>(task: impl AsyncFnOnce(Reaper) -> T) -> io::Result<T> {
    let runtime = runtime::Builder::new_current_thread()
        .enable_all()
        .build()?;
    let result = runtime.block_on(async { Ok(task(Reaper::start()?).await) });
    // A thread that still hashes a file is waited for by no one.
    runtime.shutdown_background();
    result
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn needs_are_items_that_come_before() {
        for (index, check) in CHECKS.iter().enumerate() {
            for need in check.needs {
                assert!(
                    CHECKS[..index].iter().any(|before| before.name == *need),
                    "{} needs {need}",
                    check.name
                );
            }
        }
    }

    #[test]
    fn the_documentation_explains_every_item_in_order() {
        let documentation = include_str!("../../../docs/check.md");
        let explained: Vec<&str> = documentation
            .lines()
            .filter_map(|line| line.strip_prefix("| `")?.split_once('`'))
            .map(|(name, _)| name)
            .collect();
        let checked: Vec<&str> = CHECKS.iter().map(|check| check.name).collect();
        assert_eq!(explained, checked);
    }

    #[test]
    fn what_needs_a_failed_item_is_not_tried() {
        let (_directory, machine) = Machine::of(&[("/proc/cpuinfo/flags", "")]);
        let checks = [
            check("first", &[], |_| Ok(Outcome::failed("broken", "mend it"))),
            check("second", &["first"], |_| unreachable!("it was tried")),
            check("third", &["second"], |_| unreachable!("it was tried")),
            check("fourth", &[], |machine| {
                machine.read("/proc/cpuinfo").map(|_| Outcome::ok(""))
            }),
        ];
        let report = look(&checks, &machine);
        assert_eq!(report.verdict("second"), Some(Verdict::Failed));
        assert_eq!(report.count(Verdict::Failed), 3);
        // A file that cannot be read is no proof that something is wrong.
        assert_eq!(report.verdict("fourth"), Some(Verdict::Warning));
    }
}
