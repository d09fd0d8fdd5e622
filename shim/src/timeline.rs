//! When each phase of a pod's start was reached, kept for people and benchmarks.

use std::{
    collections::BTreeMap,
    fs, io,
    path::Path,
    sync::{Mutex, MutexGuard, PoisonError},
};

use nix::time::{ClockId, clock_gettime};
use serde::Serialize;

/// Name of the file in a pod's state directory.
pub const FILE: &str = "timeline.json";

/// `CLOCK_MONOTONIC` in nanoseconds.
pub fn now_ns() -> u64 {
    let Ok(time) = clock_gettime(ClockId::CLOCK_MONOTONIC) else {
        // clock_gettime(2) cannot fail for this clock.
        return 0;
    };
    let seconds = u64::try_from(time.tv_sec()).unwrap_or(0);
    let nanoseconds = u64::try_from(time.tv_nsec()).unwrap_or(0);
    seconds * 1_000_000_000 + nanoseconds
}

/// A step of a start.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Phase {
    /// containerd's `start` command began to run.
    ShimStart,
    /// The daemon began to run.
    ShimDaemon,
    /// The pod has ids, a user namespace and a cgroup.
    PodIdentified,
    /// The VMM's process was started.
    VmmSpawned,
    /// It began to run.
    VmmStarted,
    /// Its resource limits were set.
    VmmLimited,
    /// It was in namespaces of its own.
    VmmSeparated,
    /// It was in its empty root.
    VmmRooted,
    /// It had joined the pod's user namespace.
    VmmJoined,
    /// It had nothing left to give up.
    VmmJailed,
    /// The VMM has built the VM.
    VmmBooted,
    /// Just before the first instruction of the guest.
    KernelEntered,
    /// The agent has connected.
    AgentReady,
    /// The first container was created.
    ContainerCreated,
    /// The first container's process was started.
    ContainerStarted,
}

/// What the guest says of its own start.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct GuestTimes {
    /// `CLOCK_BOOTTIME` of the guest in nanoseconds when the agent began to run.
    pub agent_started_ns: u64,
    /// The same clock when the agent was about to connect.
    pub agent_ready_ns: u64,
}

#[derive(Debug, Serialize)]
struct Entry {
    phase: Phase,
    at_ns: u64,
}

#[derive(Debug, Serialize)]
struct Document<'a> {
    /// In order of time.
    phases: Vec<Entry>,
    /// VM exits up to agent-ready, as KVM counts them.
    vm_exits: Option<u64>,
    guest: Option<&'a GuestTimes>,
}

#[derive(Debug, Default)]
struct Record {
    phases: BTreeMap<Phase, u64>,
    vm_exits: Option<u64>,
    guest: Option<GuestTimes>,
}

/// The record of one pod's start.
#[derive(Debug, Default)]
pub struct Timeline {
    record: Mutex<Record>,
}

impl Timeline {
    fn record(&self) -> MutexGuard<'_, Record> {
        self.record.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Notes that `phase` is reached now. Only the first time counts. Returns whether it did.
    pub fn reached(&self, phase: Phase) -> bool {
        self.reached_at(phase, now_ns())
    }

    /// [`Timeline::reached`] with a time of `CLOCK_MONOTONIC`, in nanoseconds.
    pub fn reached_at(&self, phase: Phase, at_ns: u64) -> bool {
        let mut record = self.record();
        let first = !record.phases.contains_key(&phase);
        record.phases.entry(phase).or_insert(at_ns);
        first
    }

    /// Notes what the VMM has counted and the guest has told.
    pub fn set_guest(&self, vm_exits: Option<u64>, guest: Option<GuestTimes>) {
        let mut record = self.record();
        record.vm_exits = vm_exits;
        record.guest = guest;
    }

    fn to_json(&self) -> Result<Vec<u8>, serde_json::Error> {
        let record = self.record();
        let mut phases: Vec<Entry> = record
            .phases
            .iter()
            .map(|(phase, at_ns)| Entry {
                phase: *phase,
                at_ns: *at_ns,
            })
            .collect();
        phases.sort_by_key(|entry| entry.at_ns);
        serde_json::to_vec(&Document {
            phases,
            vm_exits: record.vm_exits,
            guest: record.guest.as_ref(),
        })
    }

    /// Writes the record into `directory`; the file is replaced as a whole.
    pub fn write(&self, directory: &Path) -> io::Result<()> {
        let draft = directory.join(".timeline");
        fs::write(&draft, self.to_json()?)?;
        fs::rename(draft, directory.join(FILE))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_time_counts() {
        let timeline = Timeline::default();
        assert!(timeline.reached_at(Phase::ShimStart, 5));
        assert!(timeline.reached_at(Phase::AgentReady, 9));
        assert!(!timeline.reached_at(Phase::AgentReady, 11));
        timeline.set_guest(Some(3), None);
        assert_eq!(
            String::from_utf8(timeline.to_json().unwrap()).unwrap(),
            r#"{"phases":[{"phase":"shim_start","at_ns":5},{"phase":"agent_ready","at_ns":9}],"vm_exits":3,"guest":null}"#
        );
    }
}
