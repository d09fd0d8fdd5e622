//! What configurations are changes of.

use anyhow::{Context, Result};
use serde_json::{Value, json};

use super::patch;

/// `ctr oci spec` of containerd 1.7.
const CONTAINERD: &str = include_str!("../../data/containerd-spec.json");

/// `linux.seccomp` of a container that `ctr run --seccomp` made, with containerd 1.7.
const SECCOMP: &str = include_str!("../../data/containerd-seccomp.json");
/// Docker's profile, resolved for its default capabilities on x86-64.
const DOCKER_SECCOMP: &str = include_str!("../../data/docker-seccomp.json");

/// The capabilities that containerd and Docker leave a container.
pub(super) const CAPABILITIES: [&str; 14] = [
    "CAP_AUDIT_WRITE",
    "CAP_CHOWN",
    "CAP_DAC_OVERRIDE",
    "CAP_FOWNER",
    "CAP_FSETID",
    "CAP_KILL",
    "CAP_MKNOD",
    "CAP_NET_BIND_SERVICE",
    "CAP_NET_RAW",
    "CAP_SETFCAP",
    "CAP_SETGID",
    "CAP_SETPCAP",
    "CAP_SETUID",
    "CAP_SYS_CHROOT",
];

/// Every capability, in the order of their numbers.
pub(super) const ALL_CAPABILITIES: [&str; 41] = [
    "CAP_CHOWN",
    "CAP_DAC_OVERRIDE",
    "CAP_DAC_READ_SEARCH",
    "CAP_FOWNER",
    "CAP_FSETID",
    "CAP_KILL",
    "CAP_SETGID",
    "CAP_SETUID",
    "CAP_SETPCAP",
    "CAP_LINUX_IMMUTABLE",
    "CAP_NET_BIND_SERVICE",
    "CAP_NET_BROADCAST",
    "CAP_NET_ADMIN",
    "CAP_NET_RAW",
    "CAP_IPC_LOCK",
    "CAP_IPC_OWNER",
    "CAP_SYS_MODULE",
    "CAP_SYS_RAWIO",
    "CAP_SYS_CHROOT",
    "CAP_SYS_PTRACE",
    "CAP_SYS_PACCT",
    "CAP_SYS_ADMIN",
    "CAP_SYS_BOOT",
    "CAP_SYS_NICE",
    "CAP_SYS_RESOURCE",
    "CAP_SYS_TIME",
    "CAP_SYS_TTY_CONFIG",
    "CAP_MKNOD",
    "CAP_LEASE",
    "CAP_AUDIT_WRITE",
    "CAP_AUDIT_CONTROL",
    "CAP_SETFCAP",
    "CAP_MAC_OVERRIDE",
    "CAP_MAC_ADMIN",
    "CAP_SYSLOG",
    "CAP_WAKE_ALARM",
    "CAP_BLOCK_SUSPEND",
    "CAP_AUDIT_READ",
    "CAP_PERFMON",
    "CAP_BPF",
    "CAP_CHECKPOINT_RESTORE",
];

/// containerd's default, with the probe as its process.
pub(super) fn containerd() -> Result<Value> {
    let mut spec: Value = serde_json::from_str(CONTAINERD).context("containerd-spec.json")?;
    patch::apply(
        &mut spec,
        &json!({
            "process": {
                "args": ["/probe", "probe", "spec"],
                "terminal": null,
                // From the image, or containerd's own.
                "env": ["PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"],
            },
            "hostname": "container",
        }),
    );
    Ok(spec)
}

/// The filter that Docker (20.10, as in Debian 12) installs by default.
pub(super) fn docker_seccomp() -> Result<Value> {
    serde_json::from_str(DOCKER_SECCOMP).context("docker-seccomp.json")
}

/// The filter that containerd installs by default.
pub(super) fn seccomp() -> Result<Value> {
    serde_json::from_str(SECCOMP).context("containerd-seccomp.json")
}

/// The same capabilities in the sets that count for a program of root's.
pub(super) fn capabilities(names: &[&str]) -> Value {
    json!({
        "bounding": names,
        "effective": names,
        "permitted": names,
        "inheritable": null,
        "ambient": null,
    })
}
