//! What runc applies on a host, or ignores, and no VM can do: refused by name.

use anyhow::Result;
use serde_json::{Value, json};

use super::{Configuration, Theme, base};

pub(super) fn all() -> Result<Vec<Configuration>> {
    let base = base::containerd()?;
    let new = |name: &str, changes: Value, cause: &str| {
        let name = format!("unsupported-{name}");
        Configuration::new(Theme::Unsupported, &name, &base, &changes).refused(&[cause])
    };
    let linux =
        |name: &str, changes: Value, cause: &str| new(name, json!({ "linux": changes }), cause);
    let resources = |name: &str, changes: Value, cause: &str| {
        linux(name, json!({ "resources": changes }), cause)
    };
    let throttle = json!([{ "major": 8, "minor": 0, "rate": 1000 }]);
    let mut all = vec![
        new(
            "selinux-label",
            json!({ "process": { "selinuxLabel": "system_u:system_r:x_t:s0" } }),
            "process.selinuxLabel",
        ),
        linux(
            "mount-label",
            json!({ "mountLabel": "x" }),
            "linux.mountLabel",
        ),
        linux(
            "rdt",
            json!({ "intelRdt": { "closID": "x" } }),
            "linux.intelRdt",
        ),
        linux(
            "seccomp-notify",
            json!({ "seccomp": { "defaultAction": "SCMP_ACT_NOTIFY" } }),
            "SCMP_ACT_NOTIFY",
        ),
        linux(
            "seccomp-listener",
            json!({ "seccomp": { "defaultAction": "SCMP_ACT_ALLOW", "listenerPath": "/run/x" } }),
            "linux.seccomp.listenerPath",
        ),
        linux(
            "personality-flags",
            json!({ "personality": { "domain": "LINUX", "flags": ["x"] } }),
            "linux.personality.flags",
        ),
        linux(
            "mount-namespace-by-path",
            json!({ "namespaces": [{ "type": "mount", "path": "/proc/1/ns/mnt" }] }),
            "/proc/1/ns/mnt",
        ),
        resources(
            "throttle",
            json!({ "blockIO": { "throttleReadBpsDevice": throttle } }),
            "blockIO",
        ),
        resources(
            "network-class",
            json!({ "network": { "classID": 7 } }),
            "network.classID",
        ),
        resources(
            "rdma",
            json!({ "rdma": { "mlx5_1": { "hcaHandles": 3 } } }),
            "rdma",
        ),
        resources(
            "real-time",
            json!({ "cpu": { "realtimeRuntime": 5 } }),
            "cpu.realtimeRuntime",
        ),
        resources(
            "kernel-memory",
            json!({ "memory": { "kernel": 1_000_000 } }),
            "memory.kernel",
        ),
        resources(
            "swappiness",
            json!({ "memory": { "swappiness": 5 } }),
            "memory.swappiness",
        ),
    ];
    let usual = ["pid", "network", "ipc", "uts", "mount"];
    for left_out in usual {
        let others = usual.into_iter().filter(|kind| *kind != left_out);
        let others: Vec<_> = others.map(|kind| json!({ "type": kind })).collect();
        all.push(linux(
            &format!("host-{left_out}"),
            json!({ "namespaces": others }),
            &format!("host {left_out} namespace cannot be honoured"),
        ));
        if left_out == "network" || left_out == "mount" {
            continue;
        }
        // PID 1's are the host's own.
        let path = format!("/proc/1/ns/{left_out}");
        let mut joined = json!({ "namespaces": others });
        if let Some(list) = joined["namespaces"].as_array_mut() {
            list.push(json!({ "type": left_out, "path": path }));
        }
        all.push(linux(&format!("{left_out}-by-path"), joined, &path));
    }
    Ok(all)
}
