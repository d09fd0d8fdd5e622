//! What cannot be run: both runtimes must say why.

use anyhow::Result;
use serde_json::{Value, json};

use super::{Configuration, Theme, base};

pub(super) fn all() -> Result<Vec<Configuration>> {
    let base = base::containerd()?;
    let new = |name: &str, changes: Value, cause: &[&str]| {
        Configuration::new(Theme::Refused, name, &base, &changes).refused(cause)
    };
    let process = |name: &str, changes: Value, cause: &[&str]| {
        new(name, json!({ "process": changes }), cause)
    };
    let mount =
        |name: &str, mount: Value, cause: &[&str]| new(name, json!({ "mounts+": [mount] }), cause);
    Ok(vec![
        process(
            "refused-command-missing",
            json!({ "args": ["/no/such/command"] }),
            &["no such file"],
        ),
        process(
            "refused-command-not-in-path",
            json!({ "args": ["no-such-command"], "env": ["PATH=/bin"] }),
            &["not found"],
        ),
        process(
            "refused-command-directory",
            json!({ "args": ["/tree"] }),
            &["permission denied", "is a directory"],
        ),
        process(
            "refused-command-not-executable",
            json!({ "args": ["/file"] }),
            &["permission denied"],
        ),
        process(
            "refused-variable-without-value",
            json!({ "env": ["PATH=/bin", "NAME"] }),
            &["environment", "process.env"],
        ),
        process(
            "refused-variable-without-name",
            json!({ "env": ["PATH=/bin", "=value"] }),
            &["environment", "process.env"],
        ),
        process("refused-no-arguments", json!({ "args": [] }), &["args"]),
        process("refused-cwd-relative", json!({ "cwd": "tmp" }), &["cwd"]),
        process(
            "refused-cwd-file",
            json!({ "cwd": "/file" }),
            &["not a directory"],
        ),
        process(
            "refused-limit-above-hard",
            json!({ "rlimits": [{ "type": "RLIMIT_NOFILE", "soft": 20, "hard": 10 }] }),
            &["rlimit", "nofile", "invalid argument"],
        ),
        new(
            "refused-by-hook",
            json!({ "hooks": { "createContainer": [
                { "path": "@volume@/sh", "args": ["sh", "-c", "exit 3"] },
            ] } }),
            &["hook"],
        ),
        mount(
            "refused-source-missing",
            json!({ "destination": "/mnt", "type": "bind", "source": "/no/such/source",
                    "options": ["rbind"] }),
            &["no such file"],
        ),
        mount(
            "refused-file-on-directory",
            json!({ "destination": "/tree", "type": "bind", "source": "@volume@/file",
                    "options": ["bind"] }),
            &["not a directory", "/tree"],
        ),
        mount(
            "refused-file-system-unknown",
            json!({ "destination": "/mnt", "type": "nosuchfs", "source": "x" }),
            &["no such device", "nosuchfs"],
        ),
        mount(
            "refused-tmpfs-option",
            json!({ "destination": "/mnt", "type": "tmpfs", "source": "x", "options": ["nonsense=1"] }),
            &["nonsense", "invalid argument"],
        ),
        mount(
            "refused-target-loop",
            json!({ "destination": "/loop/x", "type": "tmpfs", "source": "x" }),
            &["/loop", "too many"],
        ),
        mount(
            "refused-target-in-proc",
            json!({ "destination": "/proc/sys/kernel", "type": "tmpfs", "source": "x" }),
            &["inside /proc"],
        ),
        mount(
            "refused-target-is-proc",
            json!({ "destination": "/proc", "type": "tmpfs", "source": "x" }),
            &["inside /proc", "not of type proc"],
        ),
        new(
            "refused-masked-below-file",
            json!({ "linux": { "maskedPaths": ["/file/below"] } }),
            &["not a directory"],
        ),
        new(
            "refused-read-only-below-file",
            json!({ "linux": { "readonlyPaths": ["/file/below"] } }),
            &["not a directory"],
        ),
        new(
            "refused-sysctl-of-host",
            json!({ "linux": { "sysctl": { "kernel.panic": "1" } } }),
            &["kernel.panic"],
        ),
        new(
            "refused-sysctl-value",
            json!({ "linux": { "sysctl": { "net.core.somaxconn": "many" } } }),
            &["somaxconn"],
        ),
        new(
            "refused-unified-value",
            json!({ "linux": { "resources": { "unified": { "memory.max": "much" } } } }),
            &["memory.max"],
        ),
        new(
            "refused-unified-unknown",
            json!({ "linux": { "resources": { "unified": { "no.such": "1" } } } }),
            &["no.such"],
        ),
        new(
            "refused-cpus-missing",
            json!({ "linux": { "resources": { "cpu": { "cpus": "500" } } } }),
            &["cpuset", "numerical result", "invalid argument"],
        ),
        new(
            "refused-quota-too-small",
            json!({ "linux": { "resources": { "cpu": { "quota": 10, "period": 100_000 } } } }),
            &["cpu"],
        ),
        new(
            "refused-propagation",
            json!({ "linux": { "rootfsPropagation": "sideways" } }),
            &["propagation"],
        ),
        new(
            "refused-seccomp-action",
            json!({ "linux": { "seccomp": { "defaultAction": "SCMP_ACT_SHRUG" } } }),
            &["seccomp", "SCMP_ACT_SHRUG", "action"],
        ),
        new(
            "refused-domain-name-without-namespace",
            json!({ "domainname": "x", "linux": { "namespaces": [
                { "type": "pid" }, { "type": "ipc" }, { "type": "mount" }, { "type": "network" },
            ] } }),
            &["uts", "hostname", "domainname"],
        ),
    ])
}
