//! The process: its command, identity, limits and switches.

use anyhow::Result;
use serde_json::{Value, json};

use super::{Configuration, Theme, base, script};

/// Kinds of limits with a soft and a hard value that a probe can live with.
const LIMITS: [(&str, u64, u64); 16] = [
    ("RLIMIT_AS", 1 << 40, 1 << 41),
    ("RLIMIT_CORE", 0, 1000),
    ("RLIMIT_CPU", 1000, 2000),
    ("RLIMIT_DATA", 1 << 36, 1 << 37),
    ("RLIMIT_FSIZE", 1 << 30, u64::MAX),
    ("RLIMIT_LOCKS", 10, 20),
    ("RLIMIT_MEMLOCK", 65_536, 131_072),
    ("RLIMIT_MSGQUEUE", 1000, 819_200),
    ("RLIMIT_NICE", 5, 10),
    ("RLIMIT_NOFILE", 100, 200),
    ("RLIMIT_NPROC", 1000, 2000),
    ("RLIMIT_RSS", 1 << 30, 1 << 31),
    ("RLIMIT_RTPRIO", 1, 2),
    ("RLIMIT_RTTIME", 1_000_000, 2_000_000),
    ("RLIMIT_SIGPENDING", 100, 200),
    ("RLIMIT_STACK", 1 << 20, 1 << 24),
];

pub(super) fn all() -> Result<Vec<Configuration>> {
    let base = base::containerd()?;
    let new =
        |name: &str, changes: Value| Configuration::new(Theme::Process, name, &base, &changes);
    let process = |name: &str, changes: Value| new(name, json!({ "process": changes }));
    let mut all = identities(&process);
    all.extend(capabilities(&process));
    all.extend([
        process(
            "environment",
            json!({ "env": ["PATH=/bin", "EMPTY=", "SPACE=a b", "TWICE=1", "TWICE=2"] }),
        )
        .exec(&json!({})),
        process("no-environment", json!({ "env": [] })),
        process("environment-missing", json!({ "env": null })),
        new("argument-zero", script("echo $0; cat /proc/1/cmdline")),
        process(
            "arguments",
            json!({ "args": ["echo", "a b", "", "c\nd", "é", "--"], "env": ["PATH=/bin"] }),
        ),
        process(
            "found-in-path",
            json!({ "args": ["probe", "probe", "spec"], "env": ["PATH=/nowhere:/"] }),
        ),
        process(
            "relative-command",
            json!({ "args": ["bin/id"], "cwd": "/" }),
        ),
        new("exit-code", script("exit 42")),
        new("killed-by-itself", script("kill -KILL $$; sleep 100")),
        new("error-output", script("echo out; echo error >&2; exit 3")),
        process("cwd", json!({ "cwd": "/tree/inner" })).exec(&json!({ "cwd": "/var/lib" })),
        process("cwd-missing", json!({ "cwd": "/made/by/runtime" })),
        process("cwd-behind-link", json!({ "cwd": "/var/run" })),
        process(
            "cwd-behind-relative-link",
            json!({ "cwd": "/var/relative/inner" }),
        ),
        process("cwd-behind-link-to-root", json!({ "cwd": "/out" })),
        process("cwd-with-dots", json!({ "cwd": "/tree/../tree/./inner/" })),
        process("cwd-in-mount", json!({ "cwd": "/dev/shm" })),
        process(
            "cwd-of-another",
            json!({ "cwd": "/home/user", "user": { "uid": 2000, "gid": 2000 },
                    "capabilities": base::capabilities(&[]) }),
        ),
        process(
            "cwd-of-user",
            json!({ "cwd": "/home/user", "user": { "uid": 1000, "gid": 1000 } }),
        ),
        process("no-new-privileges", json!({ "noNewPrivileges": true })).exec(&json!({})),
        process("new-privileges", json!({ "noNewPrivileges": false })).exec(&json!({})),
        process(
            "scheduler",
            json!({ "scheduler": { "policy": "SCHED_BATCH", "nice": 7 } }),
        )
        .exec(&json!({})),
        process(
            "io-priority",
            json!({ "ioPriority": { "class": "IOPRIO_CLASS_BE", "priority": 6 } }),
        )
        .exec(&json!({})),
        // Of the state without its first field, the version of the OCI specification that the runtime knows.
        new(
            "hook-start-container",
            json!({
                "hooks": { "startContainer": [
                    hook("/bin/sh", "id > /tmp/1; grep -E 'Cap|NoNew|Seccomp:' /proc/self/status >> /tmp/1"),
                    hook("/bin/sh", "pwd > /tmp/2; read -r state; echo \"${state#*,}\" >> /tmp/2; echo $A >> /tmp/2"),
                ] },
                "process": { "args": ["/bin/sh", "-c", "cat /tmp/1 /tmp/2"], "cwd": "/tree" },
                "annotations": { "an.annotation": "its value" },
            }),
        ),
        new(
            "hook-create-container",
            json!({
                "hooks": { "createContainer": [
                    hook("@volume@/sh", "read -r state; echo \"${state#*,}\" > 1; echo $A; pwd > 2"),
                ] },
                "process": { "args": ["/bin/sh", "-c", "cat /1 /2"] },
            }),
        ),
        process("oom-score", json!({ "oomScoreAdj": 500 })).exec(&json!({})),
        process("oom-score-lowest", json!({ "oomScoreAdj": -1000 })),
        process("all-limits", json!({ "rlimits": LIMITS.map(limit) })).exec(&json!({})),
        process("no-limits", json!({ "rlimits": null })),
        process(
            "limit-infinite",
            json!({ "rlimits": [
            { "type": "RLIMIT_CORE", "soft": u64::MAX, "hard": u64::MAX },
            { "type": "RLIMIT_MEMLOCK", "soft": u64::MAX, "hard": u64::MAX },
        ] }),
        ),
        new(
            "names",
            json!({ "hostname": "a-host.example", "domainname": "a-domain" }),
        ),
        new("no-hostname", json!({ "hostname": null })),
        new(
            "umask-in-use",
            json!({ "process": {
            "user": { "uid": 0, "gid": 0, "umask": 0o077 },
            "args": ["/bin/sh", "-c", "umask; touch /tmp/a; mkdir /tmp/b; ls -ln /tmp"],
        } }),
        ),
    ]);
    Ok(all)
}

/// A hook that runs this script in a shell.
fn hook(path: &str, script: &str) -> Value {
    json!({ "path": path, "args": ["sh", "-c", script], "env": ["A=b", "PATH=/bin"], "timeout": 30 })
}

fn limit((kind, soft, hard): (&str, u64, u64)) -> Value {
    json!({ "type": kind, "soft": soft, "hard": hard })
}

fn identities(process: &impl Fn(&str, Value) -> Configuration) -> Vec<Configuration> {
    let user = |name: &str, user: Value| process(name, json!({ "user": user }));
    vec![
        user("user", json!({ "uid": 1000, "gid": 1000 })).exec(&json!({})),
        user("user-without-entry", json!({ "uid": 4321, "gid": 1234 })),
        user("user-of-roots-group", json!({ "uid": 1000, "gid": 0 })),
        user("root-of-other-group", json!({ "uid": 0, "gid": 1000 })),
        user(
            "groups",
            json!({ "uid": 1000, "gid": 1000, "additionalGids": [1, 5, 1000, 4444] }),
        )
        .exec(&json!({})),
        user(
            "many-groups",
            json!({ "uid": 0, "gid": 0, "additionalGids": (1..200).collect::<Vec<_>>() }),
        ),
        user("umask", json!({ "uid": 0, "gid": 0, "umask": 0o027 })).exec(&json!({})),
        user(
            "umask-none",
            json!({ "uid": 1000, "gid": 1000, "umask": 0o000 }),
        ),
    ]
}

fn capabilities(process: &impl Fn(&str, Value) -> Configuration) -> Vec<Configuration> {
    let default = &base::CAPABILITIES[..];
    let few = &["CAP_NET_BIND_SERVICE", "CAP_KILL"][..];
    let all = &base::ALL_CAPABILITIES[..];
    let root = |name: &str, sets: Value| {
        process(
            name,
            json!({ "capabilities": sets, "noNewPrivileges": false }),
        )
    };
    let user = |name: &str, sets: Value| {
        process(
            name,
            json!({
                "capabilities": sets,
                "user": { "uid": 1000, "gid": 1000 },
                "noNewPrivileges": false,
            }),
        )
    };
    vec![
        root("capabilities-none", base::capabilities(&[])).exec(&json!({})),
        root("capabilities-all", base::capabilities(all)),
        root("capabilities-few", base::capabilities(few)).exec(&json!({})),
        root(
            "capabilities-bounding-alone",
            json!({ "bounding": default, "effective": null, "permitted": null }),
        ),
        root(
            "capabilities-inheritable",
            json!({ "bounding": default, "effective": few, "permitted": default, "inheritable": few }),
        ),
        root(
            "capabilities-not-effective",
            json!({ "bounding": default, "effective": null, "permitted": default }),
        ),
        root(
            "capabilities-not-bounded",
            json!({ "bounding": null, "effective": few, "permitted": few }),
        ),
        user("capabilities-of-user", base::capabilities(default)).exec(&json!({})),
        user(
            "capabilities-ambient",
            json!({ "bounding": few, "effective": few, "permitted": few, "inheritable": few, "ambient": few }),
        )
        .exec(&json!({})),
        user(
            "capabilities-ambient-one-of-two",
            json!({ "bounding": default, "effective": few, "permitted": few, "inheritable": few,
                    "ambient": ["CAP_KILL"] }),
        ),
        user("capabilities-of-user-none", base::capabilities(&[])),
        user("capabilities-missing", json!(null)).exec(&json!({})),
        user(
            "capabilities-inheritable-of-user",
            json!({ "bounding": few, "effective": few, "permitted": few, "inheritable": few }),
        ),
    ]
}
