//! The spec's resources as the files of cgroup v2
//! (Documentation/admin-guide/cgroup-v2.rst), converted as runc does.

use bulkhead_agent_api::cpu_weight;
use oci_spec::runtime::{LinuxBlockIo, LinuxCpu, LinuxMemory, LinuxResources};

use crate::spec::SpecError;

/// Refuses what cgroup v2 in a guest has no place for.
pub fn check(resources: &LinuxResources) -> Result<(), SpecError> {
    let refuse = |name: &str, present: bool, reason: &str| match present {
        true => Err(SpecError::unsupported(
            format!("linux.resources.{name}"),
            reason,
        )),
        false => Ok(()),
    };
    if let Some(memory) = resources.memory() {
        check_memory(memory)?;
    }
    if let Some(cpu) = resources.cpu() {
        let no_realtime = "cgroup v2 has no realtime limits";
        let realtime = cpu.realtime_runtime().is_some_and(|value| value != 0);
        refuse("cpu.realtimeRuntime", realtime, no_realtime)?;
        let realtime = cpu.realtime_period().is_some_and(|value| value != 0);
        refuse("cpu.realtimePeriod", realtime, no_realtime)?;
    }
    if let Some(io) = resources.block_io() {
        let no_devices = "block devices of the host do not exist in the guest";
        refuse(
            "blockIO.leafWeight",
            io.leaf_weight().is_some_and(|weight| weight != 0),
            "cgroup v2 has none",
        )?;
        refuse(
            "blockIO.weightDevice",
            listed(io.weight_device()),
            no_devices,
        )?;
        let throttles = listed(io.throttle_read_bps_device())
            || listed(io.throttle_write_bps_device())
            || listed(io.throttle_read_iops_device())
            || listed(io.throttle_write_iops_device());
        refuse("blockIO.throttle*Device", throttles, no_devices)?;
    }
    if let Some(network) = resources.network() {
        let no_net = "cgroup v2 has no network classes";
        refuse(
            "network.classID",
            network.class_id().is_some_and(|id| id != 0),
            no_net,
        )?;
        refuse("network.priorities", listed(network.priorities()), no_net)?;
    }
    let rdma = resources
        .rdma()
        .as_ref()
        .is_some_and(|rdma| !rdma.is_empty());
    refuse("rdma", rdma, "the guest has no RDMA devices")?;
    for limit in resources.hugepage_limits().iter().flatten() {
        file_name("hugepageLimits", limit.page_size())?;
    }
    for (file, _) in resources.unified().iter().flatten() {
        file_name("unified", file)?;
    }
    Ok(())
}

fn check_memory(memory: &LinuxMemory) -> Result<(), SpecError> {
    let refuse = |name: &str, present: bool, reason: &str| match present {
        true => Err(SpecError::unsupported(
            format!("linux.resources.memory.{name}"),
            reason,
        )),
        false => Ok(()),
    };
    let no_v2 = "cgroup v2 has no such limit";
    let kernel = memory.kernel();
    refuse("kernel", kernel.is_some_and(|value| value != 0), no_v2)?;
    refuse(
        "kernelTCP",
        memory.kernel_tcp().is_some_and(|value| value != 0),
        no_v2,
    )?;
    refuse("swappiness", memory.swappiness().is_some(), no_v2)?;
    refuse(
        "disableOOMKiller",
        memory.disable_oom_killer() == Some(true),
        no_v2,
    )?;
    let limit = memory.limit().unwrap_or(0);
    let swap = memory.swap().unwrap_or(0);
    if swap > 0 && limit > 0 && swap < limit {
        return Err(SpecError::invalid(
            "linux.resources.memory.swap",
            "less than the memory limit, which it includes",
        ));
    }
    if swap > 0 && limit <= 0 {
        return Err(SpecError::invalid(
            "linux.resources.memory.swap",
            "needs a memory limit, which it includes",
        ));
    }
    Ok(())
}

fn listed<T>(list: &Option<Vec<T>>) -> bool {
    list.as_ref().is_some_and(|list| !list.is_empty())
}

/// Keeps names from the spec inside the cgroup's own directory.
fn file_name(field: &str, name: &str) -> Result<(), SpecError> {
    if name.is_empty() || name.contains(['/', '\0']) || name.starts_with('.') {
        return Err(SpecError::invalid(
            format!("linux.resources.{field}"),
            format!("{name:?}"),
        ));
    }
    Ok(())
}

/// The files to write, in order, and their values.
pub fn files(resources: &LinuxResources) -> Vec<(String, String)> {
    let mut files = Files(Vec::new());
    if let Some(memory) = resources.memory() {
        memory_files(memory, &mut files);
    }
    if let Some(cpu) = resources.cpu() {
        cpu_files(cpu, &mut files);
    }
    if let Some(limit) = resources.pids().map(|pids| pids.limit())
        && limit != 0
    {
        files.add("pids.max", max_or(limit));
    }
    if let Some(io) = resources.block_io() {
        io_files(io, &mut files);
    }
    // Pages in use, and pages promised to mappings.
    for limit in resources.hugepage_limits().iter().flatten() {
        for kind in ["", "rsvd."] {
            let file = format!("hugetlb.{}.{kind}max", limit.page_size());
            files.add(file, max_or(limit.limit()));
        }
    }
    for (file, value) in resources.unified().iter().flatten() {
        files.add(file, value);
    }
    files.0
}

struct Files(Vec<(String, String)>);

impl Files {
    fn add(&mut self, file: impl Into<String>, value: impl ToString) {
        self.0.push((file.into(), value.to_string()));
    }
}

/// Negative numbers in a spec mean no limit.
fn max_or(limit: i64) -> String {
    if limit < 0 {
        "max".to_owned()
    } else {
        limit.to_string()
    }
}

fn memory_files(memory: &LinuxMemory, files: &mut Files) {
    let limit = memory.limit().unwrap_or(0);
    // The spec's `swap` is memory and swap together.
    match memory.swap() {
        Some(swap) if swap > 0 => files.add("memory.swap.max", swap - limit),
        Some(swap) if swap < 0 => files.add("memory.swap.max", "max"),
        _ if limit < 0 => files.add("memory.swap.max", "max"),
        _ => {}
    }
    if limit != 0 {
        files.add("memory.max", max_or(limit));
    }
    if let Some(reservation) = memory.reservation()
        && reservation != 0
    {
        files.add("memory.low", max_or(reservation));
    }
}

fn cpu_files(cpu: &LinuxCpu, files: &mut Files) {
    if let Some(idle) = cpu.idle() {
        files.add("cpu.idle", idle);
    }
    // An idle cgroup takes no weight.
    if let Some(shares) = cpu.shares()
        && shares != 0
        && cpu.idle() != Some(1)
    {
        files.add("cpu.weight", cpu_weight(shares));
    }
    let quota = cpu.quota().unwrap_or(0);
    let period = cpu.period().unwrap_or(0);
    if quota != 0 || period != 0 {
        let max = if quota > 0 {
            quota.to_string()
        } else {
            "max".to_owned()
        };
        let period = if period == 0 { 100_000 } else { period };
        files.add("cpu.max", format!("{max} {period}"));
    }
    if let Some(burst) = cpu.burst() {
        files.add("cpu.max.burst", burst);
    }
    for (file, list) in [("cpuset.cpus", cpu.cpus()), ("cpuset.mems", cpu.mems())] {
        if let Some(list) = list.as_ref().filter(|list| !list.is_empty()) {
            files.add(file, list);
        }
    }
}

fn io_files(io: &LinuxBlockIo, files: &mut Files) {
    // 10 to 1000 in the spec, 1 to 10000 in cgroup v2.
    if let Some(weight) = io.weight()
        && weight != 0
    {
        let weight = u64::from(weight.clamp(10, 1_000));
        files.add("io.weight", 1 + (weight - 10) * 9_999 / 990);
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn written(resources: serde_json::Value) -> Vec<(String, String)> {
        let resources: LinuxResources = serde_json::from_value(resources).unwrap();
        check(&resources).unwrap();
        files(&resources)
    }

    fn pairs(list: &[(&str, &str)]) -> Vec<(String, String)> {
        let own = |text: &str| text.to_owned();
        list.iter()
            .map(|(file, value)| (own(file), own(value)))
            .collect()
    }

    #[test]
    fn memory_and_swap_are_separated() {
        assert_eq!(
            written(json!({"memory": {"limit": 100, "swap": 150, "reservation": 50}})),
            pairs(&[
                ("memory.swap.max", "50"),
                ("memory.max", "100"),
                ("memory.low", "50")
            ])
        );
        assert_eq!(
            written(json!({"memory": {"limit": 100, "swap": -1}})),
            pairs(&[("memory.swap.max", "max"), ("memory.max", "100")])
        );
        assert_eq!(written(json!({"memory": {}})), []);
    }

    #[test]
    fn cpu_time_is_a_quota_of_a_period() {
        assert_eq!(
            written(json!({"cpu": {"quota": 50_000}})),
            pairs(&[("cpu.max", "50000 100000")])
        );
        assert_eq!(
            written(json!({"cpu": {"quota": -1, "period": 200_000, "cpus": "0"}})),
            pairs(&[("cpu.max", "max 200000"), ("cpuset.cpus", "0")])
        );
    }

    #[test]
    fn limits_without_a_place_are_refused() {
        for resources in [
            json!({"memory": {"kernel": 1}}),
            json!({"memory": {"swap": 5}}),
            json!({"memory": {"limit": 5, "swap": 4}}),
            json!({"cpu": {"realtimePeriod": 5}}),
            json!({"unified": {"../escape": "1"}}),
            json!({"rdma": {"mlx": {"hcaHandles": 1}}}),
            json!({"blockIO": {"throttleReadBpsDevice": [{"major": 8, "minor": 0, "rate": 5}]}}),
        ] {
            let parsed: LinuxResources = serde_json::from_value(resources.clone()).unwrap();
            assert!(check(&parsed).is_err(), "{resources}");
        }
    }
}
