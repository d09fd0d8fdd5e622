//! What engines and orchestrators set up unless told otherwise.

use anyhow::Result;
use serde_json::{Value, json};

use super::{Configuration, Theme, base, patch};

pub(super) fn all() -> Result<Vec<Configuration>> {
    let containerd = base::containerd()?;
    let docker = docker()?;
    let pod = pod()?;
    let new =
        |name, base: &Value, changes| Configuration::new(Theme::Profiles, name, base, &changes);
    let filter = base::seccomp()?;
    let filtered = json!({ "linux": { "seccomp": filter } });
    let as_user = json!({ "user": { "uid": 1000, "gid": 1000, "additionalGids": [1000] },
                          "cwd": "/tmp" });
    Ok(vec![
        new("containerd", &containerd, json!({}))
            .exec(&json!({}))
            .exec(&as_user),
        new("containerd-seccomp", &containerd, filtered).exec(&json!({})),
        new("docker", &docker, json!({}))
            .exec(&json!({}))
            .exec(&as_user),
        new(
            "docker-seccomp",
            &docker,
            json!({ "linux": { "seccomp": base::docker_seccomp()? } }),
        )
        .exec(&json!({})),
        new("docker-privileged", &docker, privileged()).exec(&json!({})),
        new("kubernetes-restricted", &pod, restricted(&filter)).exec(&json!({})),
        new(
            "kubernetes-restricted-read-only",
            &{
                let mut spec = pod.clone();
                patch::apply(&mut spec, &restricted(&filter));
                spec
            },
            json!({ "root": { "readonly": true } }),
        ),
        new("kubernetes-baseline", &pod, json!({})).exec(&as_user),
        new("kubernetes-privileged", &pod, privileged()).exec(&json!({})),
    ])
}

/// Docker's default container (26.1), without AppArmor and seccomp.
pub(super) fn docker() -> Result<Value> {
    let mut spec = base::containerd()?;
    let allow = |kind: &str, major: u32, minor: Option<u32>, access: &str| json!({ "allow": true, "type": kind, "major": major, "minor": minor, "access": access });
    patch::apply(
        &mut spec,
        &json!({
            "process": { "noNewPrivileges": null, "oomScoreAdj": 0, "rlimits": null },
            "mounts": [
                { "destination": "/proc", "type": "proc", "source": "proc",
                  "options": ["nosuid", "noexec", "nodev"] },
                { "destination": "/dev", "type": "tmpfs", "source": "tmpfs",
                  "options": ["nosuid", "strictatime", "mode=755", "size=65536k"] },
                { "destination": "/dev/pts", "type": "devpts", "source": "devpts",
                  "options": ["nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620", "gid=5"] },
                { "destination": "/sys", "type": "sysfs", "source": "sysfs",
                  "options": ["nosuid", "noexec", "nodev", "ro"] },
                { "destination": "/sys/fs/cgroup", "type": "cgroup", "source": "cgroup",
                  "options": ["ro", "nosuid", "noexec", "nodev"] },
                { "destination": "/dev/mqueue", "type": "mqueue", "source": "mqueue",
                  "options": ["nosuid", "noexec", "nodev"] },
                { "destination": "/dev/shm", "type": "tmpfs", "source": "shm",
                  "options": ["nosuid", "noexec", "nodev", "mode=1777", "size=67108864"] },
                { "destination": "/etc/volume-hosts", "type": "bind", "source": "@volume@/file",
                  "options": ["rbind", "rprivate"] },
            ],
            "linux": {
                "resources": {
                    "devices": [
                        { "allow": false, "access": "rwm" },
                        allow("c", 1, Some(5), "rwm"),
                        allow("c", 1, Some(3), "rwm"),
                        allow("c", 1, Some(9), "rwm"),
                        allow("c", 1, Some(8), "rwm"),
                        allow("c", 5, Some(0), "rwm"),
                        allow("c", 5, Some(1), "rwm"),
                        { "allow": false, "type": "c", "major": 10, "minor": 229, "access": "rwm" },
                    ],
                    "memory": { "swappiness": null },
                    "cpu": { "shares": 0 },
                    "pids": { "limit": 0 },
                    "blockIO": { "weight": 0 },
                },
                "namespaces+": [{ "type": "cgroup" }],
            },
        }),
    );
    Ok(spec)
}

/// A container of containerd's CRI: the baseline of the pod security standards.
fn pod() -> Result<Value> {
    let mut spec = docker()?;
    patch::apply(
        &mut spec,
        &json!({
            "process": { "oomScoreAdj": 1000, "rlimits": null },
            "mounts+": [
                { "destination": "/dev/termination-volume", "type": "bind", "source": "@volume@/file",
                  "options": ["rbind", "rprivate", "rw"] },
                { "destination": "/var/run/secrets/volume", "type": "bind", "source": "@volume@",
                  "options": ["rbind", "rprivate", "ro"] },
            ],
            "linux": {
                "resources": {
                    "memory": { "limit": 67_108_864, "swap": 67_108_864 },
                    "cpu": { "shares": 102, "quota": 20_000, "period": 100_000 },
                    "pids": null,
                    "blockIO": null,
                    "unified": { "memory.oom.group": "1", "memory.swap.max": "0" },
                },
            },
        }),
    );
    Ok(spec)
}

fn restricted(filter: &Value) -> Value {
    json!({
        "process": {
            "user": { "uid": 1000, "gid": 3000, "additionalGids": [3000, 2000] },
            "capabilities": base::capabilities(&[]),
            "noNewPrivileges": true,
        },
        "linux": { "seccomp": filter },
    })
}

/// Everything is allowed, nothing masked.
fn privileged() -> Value {
    json!({
        "process": {
            "capabilities": base::capabilities(&base::ALL_CAPABILITIES),
            "noNewPrivileges": false,
        },
        "mounts": [
            { "destination": "/proc", "type": "proc", "source": "proc",
              "options": ["nosuid", "noexec", "nodev"] },
            { "destination": "/dev", "type": "tmpfs", "source": "tmpfs",
              "options": ["nosuid", "strictatime", "mode=755", "size=65536k"] },
            { "destination": "/dev/pts", "type": "devpts", "source": "devpts",
              "options": ["nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620", "gid=5"] },
            { "destination": "/sys", "type": "sysfs", "source": "sysfs",
              "options": ["nosuid", "noexec", "nodev"] },
            { "destination": "/sys/fs/cgroup", "type": "cgroup", "source": "cgroup",
              "options": ["nosuid", "noexec", "nodev"] },
            { "destination": "/dev/shm", "type": "tmpfs", "source": "shm",
              "options": ["nosuid", "noexec", "nodev", "mode=1777", "size=67108864"] },
        ],
        "linux": {
            "maskedPaths": null,
            "readonlyPaths": null,
            "resources": { "devices": [{ "allow": true, "access": "rwm" }] },
        },
    })
}
