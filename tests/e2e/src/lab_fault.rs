//! Tells a failure of the lab's emulated processor from a failed test.
//!
//! QEMU's emulation of nested SVM goes wrong once in some millions of exits: the guest is left at an
//! address of the *host's* kernel, and then hangs or resets. It shows: the guest kernel has no
//! modules and no random base, so none of its code lies where the host's kernel and modules do. The
//! host's `kvm_exit` trace event, filtered by that address range, records nothing else.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use nix::mount::{MsFlags, mount};

/// Where the trace file system is.
const TRACING: &str = "/sys/kernel/tracing";

/// Exits from code that no guest kernel of ours has: beyond its image, which begins at
/// 0xffffffff81000000, and below the fixed mappings, which every kernel has.
const NOT_OURS: &str = "guest_rip >= 0xffffffff88000000 && guest_rip < 0xffffffffff000000";

/// Kilobytes of the record, for each CPU.
const SIZE: &str = "64";

/// The record of such exits.
#[derive(Debug)]
pub struct LabFaults {
    instance: PathBuf,
}

impl LabFaults {
    /// Starts an empty record.
    pub fn watch() -> Result<Self> {
        if !Path::new(TRACING).join("instances").exists() {
            let none: Option<&str> = None;
            mount(none, TRACING, Some("tracefs"), MsFlags::empty(), none)
                .with_context(|| format!("mount {TRACING}"))?;
        }
        let instance = Path::new(TRACING).join("instances/lab-faults");
        if !instance.exists() {
            fs::create_dir(&instance).with_context(|| format!("make {}", instance.display()))?;
        }
        let faults = Self { instance };
        faults.write("buffer_size_kb", SIZE)?;
        faults.write("events/kvm/kvm_exit/filter", NOT_OURS)?;
        faults.write("trace", "")?;
        faults.write("events/kvm/kvm_exit/enable", "1")?;
        Ok(faults)
    }

    /// The first such exit since the start.
    pub fn first(&self) -> Result<Option<String>> {
        let path = self.instance.join("trace");
        let trace = fs::read_to_string(&path).context("read the record of the lab's faults")?;
        let first = trace.lines().find(|line| !line.starts_with('#'));
        Ok(first.map(|line| line.trim().to_owned()))
    }

    fn write(&self, file: &str, text: &str) -> Result<()> {
        let path = self.instance.join(file);
        fs::write(&path, text).with_context(|| format!("write {text:?} to {}", path.display()))
    }
}
