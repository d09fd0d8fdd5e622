//! `process.execCPUAffinity`: the CPUs of a process that joins a container.

use oci_spec::runtime::{ExecCPUAffinity, Process};
use rustix::thread::{CpuSet, sched_setaffinity};

use super::StageError;

/// Applies `initial`, for the set-up before the process is in the container's cgroup.
pub fn before_joining(process: &Process) -> Result<(), StageError> {
    apply(process, "initial", ExecCPUAffinity::initial)
}

/// Applies `final`, once the process is in the container's cgroup.
pub fn after_joining(process: &Process) -> Result<(), StageError> {
    apply(process, "final", ExecCPUAffinity::cpu_affinity_final)
}

fn apply(
    process: &Process,
    name: &str,
    list: fn(&ExecCPUAffinity) -> &Option<String>,
) -> Result<(), StageError> {
    let affinity = process.exec_cpu_affinity().as_ref();
    let list = affinity.and_then(|affinity| list(affinity).as_deref());
    let Some(list) = list.filter(|list| !list.is_empty()) else {
        return Ok(());
    };
    let cpus = parse(list)
        .map_err(|reason| StageError::Invalid(format!("execCPUAffinity.{name}: {reason}")))?;
    let set = sched_setaffinity(None, &cpus);
    set.map_err(StageError::system(format!(
        "set the CPU affinity to {list:?}"
    )))
}

/// Reads a list such as `0-3,7`.
///
/// # Errors
///
/// What is wrong with it.
pub fn parse(list: &str) -> Result<CpuSet, String> {
    let mut cpus = CpuSet::new();
    for range in list.split(',') {
        let (first, last) = range.split_once('-').unwrap_or((range, range));
        let number = |text: &str| {
            let number = text.trim().parse::<usize>().ok();
            let number = number.filter(|number| *number < CpuSet::MAX_CPU);
            number.ok_or_else(|| format!("{text:?} is not the number of a CPU"))
        };
        let (first, last) = (number(first)?, number(last)?);
        if first > last {
            return Err(format!("{range:?} ends before it begins"));
        }
        for cpu in first..=last {
            cpus.set(cpu);
        }
    }
    Ok(cpus)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lists_are_read() {
        let set = |list: &str| {
            let cpus = parse(list).unwrap();
            (0..CpuSet::MAX_CPU)
                .filter(|cpu| cpus.is_set(*cpu))
                .collect::<Vec<_>>()
        };
        assert_eq!(set("0-3,7"), [0, 1, 2, 3, 7]);
        assert_eq!(set("2"), [2]);
        for wrong in ["", "a", "3-1", "0-", "-1", "0,,1", "99999"] {
            assert!(parse(wrong).is_err(), "{wrong:?}");
        }
    }
}
