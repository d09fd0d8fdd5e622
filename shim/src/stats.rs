//! The agent's statistics as containerd's metrics.

use bulkhead_agent_api::messages::StatsResponse;
use containerd_shim_protos::cgroups_v2::metrics::{
    CPUStat, IOEntry, IOStat, MemoryEvents, MemoryStat, Metrics, PidsStat,
};
use protobuf::MessageField;

/// Type of [`Metrics`]: the bare name, because CRI compares it.
pub const TYPE_URL: &str = "io.containerd.cgroups.v2.Metrics";

/// Fills containerd's message. What the guest did not tell is zero.
pub fn metrics(stats: &StatsResponse) -> Metrics {
    let (cpu, memory, pids) = (&stats.cpu, &stats.memory, &stats.pids);
    let stat = |key: &str| memory.stat.get(key).copied().unwrap_or(0);
    let event = |key: &str| memory.events.get(key).copied().unwrap_or(0);
    Metrics {
        pids: MessageField::some(PidsStat {
            current: pids.current,
            limit: unlimited_is_zero(pids.limit),
            ..PidsStat::default()
        }),
        cpu: MessageField::some(CPUStat {
            usage_usec: cpu.usage_usec,
            user_usec: cpu.user_usec,
            system_usec: cpu.system_usec,
            nr_periods: cpu.nr_periods,
            nr_throttled: cpu.nr_throttled,
            throttled_usec: cpu.throttled_usec,
            ..CPUStat::default()
        }),
        memory: MessageField::some(MemoryStat {
            anon: stat("anon"),
            file: stat("file"),
            kernel_stack: stat("kernel_stack"),
            slab: stat("slab"),
            sock: stat("sock"),
            shmem: stat("shmem"),
            file_mapped: stat("file_mapped"),
            file_dirty: stat("file_dirty"),
            file_writeback: stat("file_writeback"),
            anon_thp: stat("anon_thp"),
            inactive_anon: stat("inactive_anon"),
            active_anon: stat("active_anon"),
            inactive_file: stat("inactive_file"),
            active_file: stat("active_file"),
            unevictable: stat("unevictable"),
            slab_reclaimable: stat("slab_reclaimable"),
            slab_unreclaimable: stat("slab_unreclaimable"),
            pgfault: stat("pgfault"),
            pgmajfault: stat("pgmajfault"),
            workingset_refault: stat("workingset_refault_anon")
                .saturating_add(stat("workingset_refault_file")),
            workingset_activate: stat("workingset_activate_anon")
                .saturating_add(stat("workingset_activate_file")),
            workingset_nodereclaim: stat("workingset_nodereclaim"),
            pgrefill: stat("pgrefill"),
            pgscan: stat("pgscan"),
            pgsteal: stat("pgsteal"),
            pgactivate: stat("pgactivate"),
            pgdeactivate: stat("pgdeactivate"),
            pglazyfree: stat("pglazyfree"),
            pglazyfreed: stat("pglazyfreed"),
            thp_fault_alloc: stat("thp_fault_alloc"),
            thp_collapse_alloc: stat("thp_collapse_alloc"),
            usage: memory.usage,
            usage_limit: memory.usage_limit,
            swap_usage: memory.swap_usage,
            swap_limit: memory.swap_limit,
            max_usage: memory.max_usage,
            ..MemoryStat::default()
        }),
        memory_events: MessageField::some(MemoryEvents {
            low: event("low"),
            high: event("high"),
            max: event("max"),
            oom: event("oom"),
            oom_kill: event("oom_kill"),
            oom_group_kill: event("oom_group_kill"),
            ..MemoryEvents::default()
        }),
        io: MessageField::some(IOStat {
            usage: stats
                .io
                .iter()
                .map(|entry| IOEntry {
                    major: entry.major,
                    minor: entry.minor,
                    rbytes: entry.rbytes,
                    wbytes: entry.wbytes,
                    rios: entry.rios,
                    wios: entry.wios,
                    ..IOEntry::default()
                })
                .collect(),
            ..IOStat::default()
        }),
        ..Metrics::default()
    }
}

/// containerd has zero for no limit of processes, where it has the largest number for memory.
fn unlimited_is_zero(limit: u64) -> u64 {
    if limit == u64::MAX { 0 } else { limit }
}

#[cfg(test)]
mod tests {
    use bulkhead_agent_api::messages;
    use protobuf::Message;

    use super::*;

    #[test]
    fn values_find_their_places() {
        let mut stats = StatsResponse::default();
        stats.cpu.mut_or_insert_default().usage_usec = 5;
        let memory: &mut messages::MemoryStat = stats.memory.mut_or_insert_default();
        memory.usage = 7;
        memory.usage_limit = u64::MAX;
        memory.stat.insert("anon".into(), 11);
        memory.events.insert("oom_kill".into(), 1);
        stats.pids.mut_or_insert_default().limit = u64::MAX;
        let metrics = metrics(&stats);
        assert_eq!(metrics.cpu.usage_usec, 5);
        assert_eq!(metrics.memory.usage, 7);
        assert_eq!(metrics.memory.usage_limit, u64::MAX);
        assert_eq!(metrics.memory.anon, 11);
        assert_eq!(metrics.memory_events.oom_kill, 1);
        assert_eq!(metrics.pids.limit, 0);
        assert!(metrics.write_to_bytes().is_ok());
    }
}
