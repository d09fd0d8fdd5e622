//! The cgroup.

use anyhow::Result;
use serde_json::{Value, json};

use super::{Configuration, Theme, base};

pub(super) fn all() -> Result<Vec<Configuration>> {
    let mut base = base::containerd()?;
    // With its own cgroup in sight.
    super::patch::apply(
        &mut base,
        &json!({
            "mounts+": [{ "destination": "/sys/fs/cgroup", "type": "cgroup", "source": "cgroup",
                          "options": ["ro", "nosuid", "noexec", "nodev"] }],
            "linux": { "namespaces+": [{ "type": "cgroup" }] },
        }),
    );
    let of = |name: &str, resources: Value| {
        let changes = json!({ "linux": { "resources": resources } });
        Configuration::new(Theme::Resources, name, &base, &changes)
    };
    let memory = |name: &str, memory: Value| of(name, json!({ "memory": memory }));
    let cpu = |name: &str, cpu: Value| of(name, json!({ "cpu": cpu }));
    let unified = |name: &str, unified: Value| of(name, json!({ "unified": unified }));
    const MIB: u64 = 1 << 20;
    Ok(vec![
        of("resources-none", json!({})).exec(&json!({})),
        memory("memory-limit", json!({ "limit": 64 * MIB })).exec(&json!({})),
        memory(
            "memory-limit-and-swap",
            json!({ "limit": 64 * MIB, "swap": 96 * MIB }),
        ),
        memory(
            "memory-no-swap",
            json!({ "limit": 64 * MIB, "swap": 64 * MIB }),
        ),
        memory("memory-unlimited", json!({ "limit": -1, "swap": -1 })),
        memory(
            "memory-unlimited-swap",
            json!({ "limit": 64 * MIB, "swap": -1 }),
        ),
        memory(
            "memory-reservation",
            json!({ "limit": 64 * MIB, "reservation": 32 * MIB }),
        ),
        memory("memory-odd", json!({ "limit": 64 * MIB + 12_345 })),
        cpu("cpu-shares", json!({ "shares": 512 })),
        cpu("cpu-shares-least", json!({ "shares": 2 })),
        cpu("cpu-shares-most", json!({ "shares": 262_144 })),
        cpu("cpu-shares-odd", json!({ "shares": 1000 })),
        cpu("cpu-quota", json!({ "quota": 50_000, "period": 100_000 })),
        cpu("cpu-quota-alone", json!({ "quota": 50_000 })),
        cpu("cpu-period-alone", json!({ "period": 50_000 })),
        cpu("cpu-no-quota", json!({ "quota": -1, "period": 50_000 })),
        cpu(
            "cpu-burst",
            json!({ "quota": 50_000, "period": 100_000, "burst": 20_000 }),
        ),
        cpu("cpu-idle", json!({ "idle": 1 })),
        cpu("cpu-set", json!({ "cpus": "0" })).exec(&json!({})),
        cpu("cpu-set-and-memory", json!({ "cpus": "0", "mems": "0" })),
        of("pids", json!({ "pids": { "limit": 20 } })).exec(&json!({})),
        of("pids-unlimited", json!({ "pids": { "limit": -1 } })),
        of("pids-zero", json!({ "pids": { "limit": 0 } })),
        of("block-weight", json!({ "blockIO": { "weight": 200 } })),
        of(
            "huge-pages",
            json!({ "hugepageLimits": [{ "pageSize": "2MB", "limit": 4 * MIB }] }),
        ),
        unified(
            "unified-memory",
            json!({
                "memory.high": "50331648", "memory.low": "1048576", "memory.min": "524288",
                "memory.oom.group": "1",
            }),
        ),
        unified(
            "unified-cpu",
            json!({ "cpu.weight": "77", "cpu.max": "30000 100000" }),
        ),
        unified("unified-pids", json!({ "pids.max": "33" })),
        unified("unified-after-limit", json!({ "memory.max": "max" })),
        unified(
            "unified-freezer-off",
            json!({ "cgroup.max.descendants": "3", "cgroup.max.depth": "2" }),
        ),
        of(
            "everything",
            json!({
                "memory": { "limit": 64 * MIB, "swap": 64 * MIB, "reservation": 16 * MIB },
                "cpu": { "shares": 300, "quota": 30_000, "period": 60_000, "cpus": "0" },
                "pids": { "limit": 50 },
                "unified": { "memory.oom.group": "1" },
            }),
        ),
    ])
}
