//! How large a pod's VM is.

use std::collections::HashMap;

use nix::unistd::{SysconfVar, sysconf};

use crate::{config::Config, spec::Spec};

/// What a VM needs beside what its containers may use, in MiB: its kernel with the tables for all
/// its memory, the agent, and what is in flight between guest and host.
const OVERHEAD_MIB: u64 = 128;

/// The limits of a whole pod, which CRI knows before any of its containers: memory in bytes, and CPU
/// time in microseconds of each period.
pub const SANDBOX_MEMORY: &str = "io.kubernetes.cri.sandbox-memory";
pub const SANDBOX_QUOTA: &str = "io.kubernetes.cri.sandbox-cpu-quota";
pub const SANDBOX_PERIOD: &str = "io.kubernetes.cri.sandbox-cpu-period";

/// What a machine has.
#[derive(Debug, Clone, Copy)]
pub struct Machine {
    /// CPUs that are online.
    pub cpus: u64,
    /// In MiB.
    pub memory_mib: u64,
}

impl Machine {
    /// This one. What cannot be found out does not bound anything.
    pub fn this() -> Self {
        let ask = |variable| {
            let value = sysconf(variable).ok().flatten();
            value.and_then(|value| u64::try_from(value).ok())
        };
        let pages = ask(SysconfVar::_PHYS_PAGES).unwrap_or(u64::MAX);
        let page_size = ask(SysconfVar::PAGE_SIZE).unwrap_or(1);
        Self {
            cpus: ask(SysconfVar::_NPROCESSORS_ONLN).unwrap_or(u64::MAX),
            memory_mib: pages.saturating_mul(page_size) >> 20,
        }
    }
}

/// The configuration with a VM in which the pod's first container, or all that CRI has announced,
/// can use what their limits allow. It is never smaller than configured, and has no more CPUs and
/// memory than the machine unless the configuration says so.
pub fn fit(mut config: Config, spec: &Spec, machine: &Machine) -> Config {
    let demand = Demand::of(spec);
    if let Some(memory) = demand.memory {
        let wanted = memory.div_ceil(1 << 20).saturating_add(OVERHEAD_MIB);
        let possible = u32::try_from(wanted.min(machine.memory_mib)).unwrap_or(u32::MAX);
        config.memory_mib = config.memory_mib.max(possible);
    }
    let possible = u8::try_from(demand.cpus.min(machine.cpus)).unwrap_or(u8::MAX);
    config.vcpus = config.vcpus.max(possible.min(crate::config::MAX_VCPUS));
    config
}

/// What limits allow.
#[derive(Debug, PartialEq, Eq)]
struct Demand {
    /// In bytes; none without a limit.
    memory: Option<u64>,
    /// The fewest that can use the CPU time; 0 without a limit.
    cpus: u64,
}

impl Demand {
    fn of(spec: &Spec) -> Self {
        let none = HashMap::default();
        let annotations = spec.annotations.as_ref().unwrap_or(&none);
        let pod = |name| -> Option<i64> { annotations.get(name)?.parse().ok() };
        let limited = |value: Option<i64>| value.and_then(|value| u64::try_from(value).ok());
        let positive = |value: &u64| *value > 0;
        let memory = limited(pod(SANDBOX_MEMORY)).filter(positive);
        let memory = memory.or_else(|| limited(spec.memory_limit()).filter(positive));
        let cpu = spec.cpu();
        let quota = limited(pod(SANDBOX_QUOTA)).filter(positive);
        let cpus = match quota {
            Some(quota) => whole_cpus(quota, limited(pod(SANDBOX_PERIOD))),
            None => limited(cpu.quota).map_or(0, |quota| whole_cpus(quota, cpu.period)),
        };
        Self {
            memory,
            // Those of a list are told by their numbers.
            cpus: cpus.max(spec.cpuset().map_or(0, cpus_up_to)),
        }
    }
}

fn whole_cpus(quota: u64, period: Option<u64>) -> u64 {
    let period = period.filter(|period| *period > 0);
    quota.div_ceil(period.unwrap_or(crate::cgroup::DEFAULT_PERIOD))
}

/// How many CPUs there must be for the highest in a list like `0-2,5` (cpuset(7), "List format").
fn cpus_up_to(list: &str) -> u64 {
    let numbers = list.split([',', '-']).map(|number| number.trim().parse());
    let highest = numbers.filter_map(Result::<u64, _>::ok).max();
    highest.map_or(0, |highest| highest.saturating_add(1))
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use serde_json::{Value, json};

    use super::*;

    /// vCPUs and memory in MiB.
    fn size(spec: &Value) -> (u8, u32) {
        let spec = Spec::parse(spec.to_string().as_bytes(), Path::new("c.json")).unwrap();
        let machine = Machine {
            cpus: 4,
            memory_mib: 8192,
        };
        let config = fit(Config::default(), &spec, &machine);
        (config.vcpus, config.memory_mib)
    }

    fn limits(resources: &Value) -> (u8, u32) {
        size(&json!({ "linux": { "resources": resources } }))
    }

    #[test]
    fn without_limits_it_is_as_configured() {
        assert_eq!(size(&json!({})), (1, 512));
        assert_eq!(
            limits(&json!({"memory": {"limit": -1}, "cpu": {"quota": -1}})),
            (1, 512)
        );
    }

    #[test]
    fn a_container_can_use_what_it_may() {
        let gib: i64 = 1 << 30;
        assert_eq!(limits(&json!({"memory": {"limit": gib}})), (1, 1152));
        assert_eq!(limits(&json!({"memory": {"limit": gib / 8}})), (1, 512));
        assert_eq!(limits(&json!({"cpu": {"quota": 150_000}})), (2, 512));
        assert_eq!(
            limits(&json!({"cpu": {"quota": 30_000, "period": 10_000}})),
            (3, 512)
        );
        assert_eq!(limits(&json!({"cpu": {"cpus": "0,2"}})), (3, 512));
        assert_eq!(cpus_up_to("0-1,7"), 8);
        assert_eq!(cpus_up_to(""), 0);
    }

    #[test]
    fn the_machine_bounds_it() {
        assert_eq!(
            limits(&json!({"memory": {"limit": 1_i64 << 40}, "cpu": {"quota": 10_000_000}})),
            (4, 8192)
        );
    }

    #[test]
    fn a_pods_own_limits_come_first() {
        let spec = json!({
            "annotations": {
                SANDBOX_MEMORY: "2147483648", SANDBOX_QUOTA: "200000", SANDBOX_PERIOD: "100000",
            },
            "linux": {"resources": {"memory": {"limit": 1 << 20}, "cpu": {"quota": 1000}}},
        });
        assert_eq!(size(&spec), (2, 2176));
        let spec = json!({"annotations": {SANDBOX_MEMORY: "0", SANDBOX_QUOTA: "many"}});
        assert_eq!(size(&spec), (1, 512));
    }
}
