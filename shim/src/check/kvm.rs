//! KVM, as far as asking it goes; [`super::guest`] tries it.

use std::{ffi::CString, fs::OpenOptions, io, os::unix::ffi::OsStrExt};

use bulkhead_vmm_control::NEEDED_CAPABILITIES;
use kvm_bindings::KVM_API_VERSION;
use kvm_ioctls::Kvm;

use super::{
    machine::{Machine, Unreadable},
    report::Outcome,
};

/// Where KVM is.
const DEVICE: &str = "/dev/kvm";

/// The device is there and may be used.
pub fn device(machine: &Machine) -> Result<Outcome, Unreadable> {
    let opened = OpenOptions::new()
        .read(true)
        .write(true)
        .open(machine.path(DEVICE));
    let Err(error) = opened else {
        return Ok(Outcome::ok("it opens"));
    };
    let detail = format!("Cannot open {DEVICE}: {error}");
    if error.kind() == io::ErrorKind::PermissionDenied {
        return Ok(Outcome::failed(detail, "sudo bulkhead check"));
    }
    Ok(Outcome::failed(detail, how_to_get_kvm(machine)?))
}

fn how_to_get_kvm(machine: &Machine) -> Result<&'static str, Unreadable> {
    Ok(if machine.has_cpu_flag("vmx")? {
        "modprobe kvm_intel"
    } else if machine.has_cpu_flag("svm")? {
        "modprobe kvm_amd"
    } else if machine.has_cpu_flag("hypervisor")? {
        "enable nested virtualisation for this virtual machine on its own host"
    } else {
        "enable virtualisation (VT-x or AMD-V) in the firmware's settings"
    })
}

/// KVM's API is the one that the VMM uses, with all that it needs.
pub fn capabilities(machine: &Machine) -> Result<Outcome, Unreadable> {
    let opened = CString::new(machine.path(DEVICE).as_os_str().as_bytes())
        .map_err(io::Error::from)
        .and_then(|path| Kvm::new_with_path(path).map_err(io::Error::from));
    Ok(match opened {
        Ok(kvm) => judge(kvm.get_api_version(), |capability| {
            kvm.check_extension_raw(capability.into()) > 0
        }),
        Err(error) => Outcome::failed(
            format!("Cannot open {DEVICE}: {error}"),
            how_to_get_kvm(machine)?,
        ),
    })
}

fn judge(version: i32, has: impl Fn(u32) -> bool) -> Outcome {
    if u32::try_from(version) != Ok(KVM_API_VERSION) {
        return Outcome::failed(
            format!("its API has version {version} instead of {KVM_API_VERSION}"),
            "load the kernel's own kvm_intel or kvm_amd",
        );
    }
    let missing: Vec<&str> = NEEDED_CAPABILITIES
        .iter()
        .filter(|(number, _)| !has(*number))
        .map(|(_, name)| *name)
        .collect();
    if missing.is_empty() {
        Outcome::ok(format!(
            "API {version}, all {} capabilities",
            NEEDED_CAPABILITIES.len()
        ))
    } else {
        Outcome::failed(
            format!("it lacks {}", missing.join(", ")),
            "install a newer kernel and reboot",
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::check::report::Verdict;

    #[test]
    fn a_missing_device_is_explained_by_the_processor() {
        for (flags, expected) in [
            ("fpu vmx hypervisor", "modprobe kvm_intel"),
            ("fpu svm", "modprobe kvm_amd"),
            ("fpu hypervisor", "nested virtualisation"),
            ("fpu", "firmware"),
        ] {
            let cpuinfo = format!("flags\t\t: {flags}\n");
            let (_directory, machine) = Machine::of(&[("/proc/cpuinfo", &cpuinfo)]);
            let outcome = device(&machine).unwrap();
            assert_eq!(outcome.verdict, Verdict::Failed);
            assert!(outcome.detail.contains("No such file"), "{outcome:?}");
            assert!(outcome.fix.unwrap().contains(expected), "{flags}");
        }
        let (_directory, machine) = Machine::of(&[("/dev/kvm", "")]);
        assert_eq!(device(&machine).unwrap().verdict, Verdict::Ok);
    }

    #[test]
    fn every_missing_capability_is_named() {
        assert_eq!(judge(12, |_| true).verdict, Verdict::Ok);
        let (absent, name) = NEEDED_CAPABILITIES[1];
        let outcome = judge(12, |number| number != absent);
        assert_eq!(outcome.detail, format!("it lacks {name}"));
        assert_eq!(outcome.verdict, Verdict::Failed);
        assert_eq!(judge(11, |_| true).verdict, Verdict::Failed);
        // What an ioctl on something else says.
        assert_eq!(judge(-1, |_| true).verdict, Verdict::Failed);
    }
}
