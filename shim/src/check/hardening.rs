//! Settings of the host that weaken what separates pods from each other and from the host.

use std::{io, os::unix::fs::PermissionsExt};

use super::{
    machine::{Machine, Unreadable},
    report::Outcome,
};

/// Where the kernel tells how it handles the processor's vulnerabilities.
const VULNERABILITIES: &str = "/sys/devices/system/cpu/vulnerabilities";

/// Only root and a group may use KVM.
pub fn device_access(machine: &Machine) -> Result<Outcome, Unreadable> {
    let metadata = match machine.path("/dev/kvm").metadata() {
        Ok(metadata) => metadata,
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            return Ok(Outcome::ok("nobody: there is none"));
        }
        Err(source) => {
            return Err(Unreadable {
                path: "/dev/kvm".to_owned(),
                source,
            });
        }
    };
    let mode = metadata.permissions().mode() & 0o7777;
    Ok(if mode & 0o006 == 0 {
        Outcome::ok(format!("mode {mode:04o}"))
    } else {
        Outcome::warning(
            format!("mode {mode:04o}: every user reaches KVM's code in the kernel"),
            "chmod o-rw /dev/kvm, and KERNEL==\"kvm\", GROUP=\"kvm\", MODE=\"0660\" in a file of \
             /etc/udev/rules.d",
        )
    })
}

/// Whether KVM would run virtual machines inside of guests. Guests are not told of it (CPUID shows
/// them neither VMX nor SVM), so either is fine.
pub fn nested_kvm(machine: &Machine) -> Result<Outcome, Unreadable> {
    for module in ["kvm_intel", "kvm_amd"] {
        let path = format!("/sys/module/{module}/parameters/nested");
        if let Some("1" | "Y") = machine.read(&path)?.as_deref() {
            return Ok(Outcome::ok(format!(
                "on in {module}; guests are not offered it"
            )));
        }
    }
    Ok(Outcome::ok("off"))
}

/// The kernel mitigates what the processor gets wrong.
pub fn vulnerabilities(machine: &Machine) -> Result<Outcome, Unreadable> {
    let mut open = Vec::new();
    let known = machine.names(VULNERABILITIES)?;
    for name in &known {
        let state = machine.read(&format!("{VULNERABILITIES}/{name}"))?;
        if is_open(&state.unwrap_or_default()) {
            open.push(name.as_str());
        }
    }
    let command_line = machine.read("/proc/cmdline")?.unwrap_or_default();
    let off = command_line
        .split_whitespace()
        .any(|word| word == "mitigations=off");
    let named = if open.is_empty() {
        "no vulnerability is left open".to_owned()
    } else {
        format!("vulnerable: {}", open.join(", "))
    };
    Ok(if off {
        Outcome::warning(
            format!("mitigations=off is on the kernel's command line; {named}"),
            "remove mitigations=off from the kernel's command line and reboot",
        )
    } else if !open.is_empty() {
        Outcome::warning(
            named,
            format!(
                "install the newest kernel and microcode (Debian: apt install intel-microcode or \
                 amd64-microcode) and reboot; grep . {VULNERABILITIES}/* says what is missing"
            ),
        )
    } else if known.is_empty() {
        Outcome::warning(
            format!("nobody can tell: {VULNERABILITIES} is not there"),
            "mount -t sysfs sysfs /sys",
        )
    } else {
        Outcome::ok("all mitigated")
    })
}

/// Whether one of the clauses says that it is vulnerable, such as `Vulnerable: No microcode` or
/// `Mitigation: PTE Inversion; VMX: vulnerable`. What only threads of one core can do to each other
/// is the matter of [`smt`].
fn is_open(state: &str) -> bool {
    state
        .split([';', ','])
        .map(|clause| clause.trim().to_ascii_lowercase())
        .any(|clause| clause.contains("vulnerable") && clause != "smt vulnerable")
}

/// No two pods share a core.
pub fn smt(machine: &Machine) -> Result<Outcome, Unreadable> {
    let active = machine.read("/sys/devices/system/cpu/smt/active")?;
    let config = machine.config.as_ref();
    let keeps_cores = config.is_ok_and(|config| config.core_scheduling);
    Ok(match active.as_deref() {
        Some("1") if keeps_cores => Outcome::ok("on; each pod has its cores to itself"),
        Some("1") => Outcome::warning(
            "on: neighbours on sibling threads of a core can observe each other",
            "echo off > /sys/devices/system/cpu/smt/control, and nosmt on the kernel's command \
             line; or, if the kernel has CONFIG_SCHED_CORE (Debian's has not), set \
             core_scheduling = true in the configuration",
        ),
        _ => Outcome::ok("off"),
    })
}

/// No page of memory belongs to two tenants.
pub fn ksm(machine: &Machine) -> Result<Outcome, Unreadable> {
    let run = machine.read("/sys/kernel/mm/ksm/run")?;
    Ok(match run.as_deref() {
        Some("1") => Outcome::warning(
            "on: a tenant can tell from a shared page's timing what another one's memory holds",
            "echo 2 > /sys/kernel/mm/ksm/run, and disable what turned it on (ksmtuned)",
        ),
        _ => Outcome::ok("off"),
    })
}

/// Guest memory reaches no disk.
pub fn swap(machine: &Machine) -> Result<Outcome, Unreadable> {
    let areas = machine.read("/proc/swaps")?.unwrap_or_default();
    let mut plain = Vec::new();
    let mut any = false;
    for (path, kind) in swap_areas(&areas) {
        any = true;
        let name = path.rsplit('/').next().unwrap_or(path);
        if kind != "partition" || !is_secret(machine, name)? {
            plain.push(path);
        }
    }
    Ok(if !any {
        Outcome::ok("off")
    } else if plain.is_empty() {
        Outcome::ok("encrypted or in memory")
    } else {
        Outcome::warning(
            format!(
                "memory of guests can reach a disk in clear text: {}",
                plain.join(", ")
            ),
            "swapoff -a and no swap in /etc/fstab; or swap on dm-crypt with a random key \
             (crypttab(5), option swap)",
        )
    })
}

/// Path and type of each area in `/proc/swaps`.
fn swap_areas(text: &str) -> impl Iterator<Item = (&str, &str)> {
    text.lines().skip(1).filter_map(|line| {
        let mut words = line.split_whitespace();
        Some((words.next()?, words.next()?))
    })
}

/// Whether a block device keeps nothing readable on a disk: dm-crypt, what lies on that alone, or
/// memory.
fn is_secret(machine: &Machine, name: &str) -> Result<bool, Unreadable> {
    let device = format!("/sys/class/block/{name}");
    if name.starts_with("zram") {
        let backing = machine.read(&format!("{device}/backing_dev"))?;
        return Ok(matches!(backing.as_deref(), None | Some("none")));
    }
    let uuid = machine.read(&format!("{device}/dm/uuid"))?;
    if uuid.is_some_and(|uuid| uuid.starts_with("CRYPT-")) {
        return Ok(true);
    }
    let below = machine.names(&format!("{device}/slaves"))?;
    for name in &below {
        if !is_secret(machine, name)? {
            return Ok(false);
        }
    }
    Ok(!below.is_empty())
}

/// The kernel does not tell its addresses.
pub fn kernel_addresses(machine: &Machine) -> Result<Outcome, Unreadable> {
    restricted(
        machine,
        "kptr_restrict",
        "/proc shows addresses of the kernel, which help an attack on it",
    )
}

/// The kernel's log is for root.
pub fn kernel_log(machine: &Machine) -> Result<Outcome, Unreadable> {
    restricted(
        machine,
        "dmesg_restrict",
        "every user can read the kernel's log, and with it addresses and names of devices",
    )
}

fn restricted(machine: &Machine, name: &str, why: &str) -> Result<Outcome, Unreadable> {
    let value = machine.read(&format!("/proc/sys/kernel/{name}"))?;
    Ok(match value.as_deref() {
        None => Outcome::warning(
            format!("nobody can tell: the kernel has no kernel.{name}"),
            "mount -t proc proc /proc",
        ),
        Some("0") => Outcome::warning(
            format!("kernel.{name} is 0: {why}"),
            format!("sysctl -w kernel.{name}=1, and the same in a file of /etc/sysctl.d"),
        ),
        Some(value) => Outcome::ok(format!("kernel.{name} is {value}")),
    })
}

/// Guests can have huge pages, which halve the time that memory costs them.
pub fn huge_pages(machine: &Machine) -> Result<Outcome, Unreadable> {
    const PATH: &str = "/sys/kernel/mm/transparent_hugepage/enabled";
    let choices = machine.read(PATH)?;
    Ok(match choices.as_deref().and_then(selected) {
        Some("never") => Outcome::warning(
            "never: pods start and run slower; a matter of speed, not of safety",
            format!("echo madvise > {PATH}"),
        ),
        Some(choice) => Outcome::ok(choice),
        None => Outcome::warning(
            "the kernel has none: pods start and run slower; a matter of speed, not of safety",
            "use a kernel with CONFIG_TRANSPARENT_HUGEPAGE=y, as distributions' are",
        ),
    })
}

/// The word in brackets, by which files of sysfs mark what is chosen.
fn selected(choices: &str) -> Option<&str> {
    let (choice, _) = choices.split_once('[')?.1.split_once(']')?;
    Some(choice)
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;
    use crate::check::report::Verdict;

    type Check = fn(&Machine) -> Result<Outcome, Unreadable>;

    fn found(check: Check, files: &[(&str, &str)]) -> Outcome {
        let (_directory, machine) = Machine::of(files);
        let outcome = check(&machine).unwrap();
        assert_eq!(outcome.fix.is_none(), outcome.verdict == Verdict::Ok);
        outcome
    }

    fn warns(check: Check, files: &[(&str, &str)]) -> bool {
        found(check, files).verdict == Verdict::Warning
    }

    #[test]
    fn what_is_left_open_is_told_from_what_is_mitigated() {
        for state in [
            "Not affected",
            "Mitigation: Clear CPU buffers; SMT vulnerable",
            "Mitigation: PTE Inversion; VMX: conditional cache flushes, SMT vulnerable",
            "Mitigation: Retpolines; IBPB: conditional; STIBP: always-on; BHI: Not affected",
            "KVM: Mitigation: Split huge pages",
            "Unknown: Dependent on hypervisor status",
        ] {
            assert!(!is_open(state), "{state}");
        }
        for state in [
            "Vulnerable",
            "Vulnerable: Safe RET, no microcode",
            "Vulnerable: Clear CPU buffers attempted, no microcode; SMT Host state unknown",
            "KVM: Vulnerable",
            "Mitigation: Retpolines; RSB filling; BHI: Vulnerable",
            "Mitigation: PTE Inversion; VMX: vulnerable",
        ] {
            assert!(is_open(state), "{state}");
        }
    }

    #[test]
    fn open_vulnerabilities_and_switched_off_mitigations_are_named() {
        let meltdown = (
            "/sys/devices/system/cpu/vulnerabilities/meltdown",
            "Not affected\n",
        );
        let mds = (
            "/sys/devices/system/cpu/vulnerabilities/mds",
            "Vulnerable\n",
        );
        let srbds = (
            "/sys/devices/system/cpu/vulnerabilities/srbds",
            "Vulnerable\n",
        );
        let off = ("/proc/cmdline", "root=/dev/vda1 mitigations=off quiet\n");
        let on = ("/proc/cmdline", "root=/dev/vda1 quiet\n");

        assert!(!warns(vulnerabilities, &[meltdown, on]));
        let open = found(vulnerabilities, &[srbds, meltdown, mds, on]);
        assert_eq!(open.detail, "vulnerable: mds, srbds");
        assert!(open.fix.unwrap().contains("microcode"));
        let switched_off = found(vulnerabilities, &[mds, off]);
        assert!(switched_off.detail.contains("mds"), "{switched_off:?}");
        assert!(
            switched_off
                .fix
                .unwrap()
                .starts_with("remove mitigations=off")
        );
        assert!(warns(vulnerabilities, &[meltdown, off]));
        assert!(warns(vulnerabilities, &[on]));
    }

    #[test]
    fn sharing_between_neighbours_is_warned_of() {
        let active = "/sys/devices/system/cpu/smt/active";
        assert!(warns(smt, &[(active, "1\n")]));
        assert!(!warns(smt, &[(active, "0\n")]));
        assert!(!warns(smt, &[]));
        let (_root, mut machine) = Machine::of(&[(active, "1\n")]);
        if let Ok(config) = &mut machine.config {
            config.core_scheduling = true;
        }
        assert_eq!(smt(&machine).unwrap().verdict, Verdict::Ok);
        let run = "/sys/kernel/mm/ksm/run";
        assert!(warns(ksm, &[(run, "1\n")]));
        for quiet in ["0\n", "2\n"] {
            assert!(!warns(ksm, &[(run, quiet)]));
        }
        assert!(!warns(ksm, &[]));
    }

    const HEADER: &str = "Filename\t\t\t\tType\t\tSize\t\tUsed\t\tPriority\n";

    fn swaps(areas: &[&str], devices: &[(&str, &str)]) -> Outcome {
        let mut text = HEADER.to_owned();
        for area in areas {
            text.push_str(area);
            text.push_str("\t\t1048572\t\t0\t\t-2\n");
        }
        let mut files = vec![("/proc/swaps", text.as_str())];
        files.extend(devices);
        found(swap, &files)
    }

    #[test]
    fn swap_in_clear_text_is_warned_of() {
        assert_eq!(swaps(&[], &[]), Outcome::ok("off"));
        assert_eq!(found(swap, &[]), Outcome::ok("off"));
        let both = swaps(&["/dev/vda2 partition", "/swap.img file"], &[]);
        assert!(both.detail.ends_with(": /dev/vda2, /swap.img"), "{both:?}");
    }

    #[test]
    fn swap_that_nobody_can_read_is_fine() {
        let encrypted = ("/sys/class/block/dm-0/dm/uuid", "CRYPT-PLAIN-swap\n");
        let logical = ("/sys/class/block/dm-1/dm/uuid", "LVM-abc\n");
        let on_encrypted = ("/sys/class/block/dm-1/slaves/dm-0/dev", "254:0\n");
        let on_disk = ("/sys/class/block/dm-1/slaves/sda3/dev", "8:3\n");
        let secret = Outcome::ok("encrypted or in memory");

        assert_eq!(swaps(&["/dev/dm-0 partition"], &[encrypted]), secret);
        let stacked = [encrypted, logical, on_encrypted];
        assert_eq!(swaps(&["/dev/dm-1 partition"], &stacked), secret);
        let mixed = [encrypted, logical, on_encrypted, on_disk];
        let outcome = swaps(&["/dev/dm-1 partition"], &mixed);
        assert_eq!(outcome.verdict, Verdict::Warning);

        let backing = "/sys/class/block/zram0/backing_dev";
        let zram = ["/dev/zram0 partition"];
        assert_eq!(swaps(&zram, &[(backing, "none\n")]), secret);
        let backed = swaps(&zram, &[(backing, "/dev/sda4\n")]);
        assert_eq!(backed.verdict, Verdict::Warning);
    }

    #[test]
    fn low_restrictions_are_warned_of() {
        let path = "/proc/sys/kernel/kptr_restrict";
        assert!(warns(kernel_addresses, &[(path, "0\n")]));
        assert!(!warns(kernel_addresses, &[(path, "1\n")]));
        assert!(warns(kernel_addresses, &[]));
        let path = "/proc/sys/kernel/dmesg_restrict";
        let outcome = found(kernel_log, &[(path, "0\n")]);
        assert!(
            outcome
                .fix
                .unwrap()
                .starts_with("sysctl -w kernel.dmesg_restrict=1")
        );
        assert!(!warns(kernel_log, &[(path, "1\n")]));
    }

    #[test]
    fn the_chosen_huge_pages_are_in_brackets() {
        let path = "/sys/kernel/mm/transparent_hugepage/enabled";
        let outcome = found(huge_pages, &[(path, "always [madvise] never\n")]);
        assert_eq!(outcome, Outcome::ok("madvise"));
        assert!(warns(huge_pages, &[(path, "always madvise [never]\n")]));
        assert!(warns(huge_pages, &[]));
    }

    #[test]
    fn a_device_for_everybody_is_warned_of() {
        assert!(!warns(device_access, &[]));
        let (_directory, machine) = Machine::of(&[("/dev/kvm", "")]);
        let device = machine.path("/dev/kvm");
        for (mode, expected) in [
            (0o660, Verdict::Ok),
            (0o600, Verdict::Ok),
            (0o666, Verdict::Warning),
            (0o664, Verdict::Warning),
        ] {
            fs::set_permissions(&device, fs::Permissions::from_mode(mode)).unwrap();
            let outcome = device_access(&machine).unwrap();
            assert_eq!(outcome.verdict, expected, "{mode:o}");
        }
    }

    #[test]
    fn nested_virtualisation_is_told_but_no_fault() {
        let amd = "/sys/module/kvm_amd/parameters/nested";
        let outcome = found(nested_kvm, &[(amd, "1\n")]);
        assert!(outcome.detail.starts_with("on in kvm_amd"), "{outcome:?}");
        let intel = "/sys/module/kvm_intel/parameters/nested";
        assert_eq!(found(nested_kvm, &[(intel, "N\n")]), Outcome::ok("off"));
    }
}
