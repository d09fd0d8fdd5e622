//! Filters of system calls.

use anyhow::Result;
use serde_json::{Value, json};

use super::{Configuration, Theme, base};

const ALLOW: &str = "SCMP_ACT_ALLOW";
const ERRNO: &str = "SCMP_ACT_ERRNO";

/// What the probe passes in every argument when it tries a system call. Rules are about getpriority(2),
/// which nothing else in a container makes.
const MINUS_ONE: u64 = u64::MAX;

pub(super) fn all() -> Result<Vec<Configuration>> {
    let mut base = base::containerd()?;
    // A filter is installed with and without CAP_SYS_ADMIN, at different moments.
    super::patch::apply(
        &mut base,
        &json!({ "process": { "noNewPrivileges": false } }),
    );
    let default = base::seccomp()?;
    let of = |name: &str, seccomp: Value| {
        let changes = json!({ "linux": { "seccomp": seccomp } });
        Configuration::new(Theme::Seccomp, name, &base, &changes)
    };
    let rules = |name: &str, rules: Value| {
        of(
            name,
            json!({ "defaultAction": ALLOW, "architectures": ["SCMP_ARCH_X86_64"], "syscalls": rules }),
        )
    };
    let one = |name: &str, rule: Value| rules(name, json!([rule]));
    let mut all = vec![
        of("seccomp-default", default.clone()).exec(&json!({})),
        of("seccomp-default-more-privileges", {
            let mut more = default.clone();
            super::patch::apply(
                &mut more,
                &json!({ "syscalls+": [
                { "names": ["mount", "umount2", "unshare", "setns", "bpf", "perf_event_open", "clone"],
                  "action": ALLOW },
            ] }),
            );
            more
        }),
        of("seccomp-allow-all", json!({ "defaultAction": ALLOW })),
        of("seccomp-log", json!({ "defaultAction": "SCMP_ACT_LOG" })),
        one(
            "seccomp-errno-default",
            json!({ "names": ["getpriority", "sched_yield"], "action": ERRNO }),
        ),
        one(
            "seccomp-errno-value",
            json!({ "names": ["getpriority"], "action": ERRNO, "errnoRet": 95 }),
        ),
        one(
            "seccomp-errno-zero",
            json!({ "names": ["getpriority", "swapon"], "action": ERRNO, "errnoRet": 0 }),
        ),
        one(
            "seccomp-unknown-name",
            json!({ "names": ["no_such_call", "getpriority"], "action": ERRNO }),
        ),
        one(
            "seccomp-trace",
            json!({ "names": ["getpriority"], "action": "SCMP_ACT_TRACE", "errnoRet": 7 }),
        ),
        of(
            "seccomp-default-errno",
            json!({
                "defaultAction": ERRNO, "defaultErrnoRet": 38,
                "architectures": ["SCMP_ARCH_X86_64"],
                "syscalls": default["syscalls"],
            }),
        ),
    ];
    for (name, action) in [
        ("kill", "SCMP_ACT_KILL"),
        ("kill-process", "SCMP_ACT_KILL_PROCESS"),
        ("kill-thread", "SCMP_ACT_KILL_THREAD"),
        ("trap", "SCMP_ACT_TRAP"),
        ("errno", ERRNO),
        ("log", "SCMP_ACT_LOG"),
    ] {
        let mut one = one(
            &format!("seccomp-action-{name}"),
            json!({ "names": ["mkdir", "mkdirat"], "action": action }),
        );
        let script = "mkdir /tmp/made; echo $?; ls /tmp; mkdir /tmp/again";
        super::patch::apply(&mut one.spec, &super::script(script));
        all.push(one);
    }
    all.extend(arguments(&one));
    all.extend(architectures(&of, &default));
    for flags in [
        &["SECCOMP_FILTER_FLAG_LOG"][..],
        &["SECCOMP_FILTER_FLAG_SPEC_ALLOW"],
        &["SECCOMP_FILTER_FLAG_TSYNC"],
        &["SECCOMP_FILTER_FLAG_LOG", "SECCOMP_FILTER_FLAG_SPEC_ALLOW"],
    ] {
        let short: Vec<_> = flags
            .iter()
            .map(|flag| flag.rsplit('_').next().unwrap_or(flag))
            .collect();
        let name = format!("seccomp-flags-{}", short.join("-").to_lowercase());
        let filter = json!({ "defaultAction": ALLOW, "flags": flags, "syscalls": [
            { "names": ["getpriority"], "action": ERRNO },
        ] });
        all.push(of(&name, filter).refused_by("<1.2")?);
    }
    Ok(all)
}

/// All operators, where they hold and where they do not. The probe passes -1 in every argument.
fn arguments(one: &impl Fn(&str, Value) -> Configuration) -> Vec<Configuration> {
    let rule = |arguments: Value| json!({ "names": ["getpriority"], "action": ERRNO, "errnoRet": 100, "args": arguments });
    let argument = |index: u32, operator: &str, value: u64, second: u64| json!({ "index": index, "op": format!("SCMP_CMP_{operator}"), "value": value, "valueTwo": second });
    let mut all = Vec::new();
    for (operator, value, second) in [
        ("EQ", MINUS_ONE, 0),
        ("EQ", 1, 0),
        ("NE", MINUS_ONE, 0),
        ("NE", 1, 0),
        ("LT", MINUS_ONE, 0),
        ("LE", MINUS_ONE, 0),
        ("GE", MINUS_ONE, 0),
        ("GT", 5, 0),
        ("GT", MINUS_ONE, 0),
        ("MASKED_EQ", 0xff00, 0xff00),
        ("MASKED_EQ", 0xff00, 0x0f00),
    ] {
        let name = format!(
            "seccomp-operator-{}-{value:x}-{second:x}",
            operator.to_lowercase()
        );
        all.push(one(
            &name,
            rule(json!([argument(0, operator, value, second)])),
        ));
    }
    all.extend([
        one(
            "seccomp-arguments-all",
            rule(json!([argument(0, "GT", 5, 0), argument(1, "NE", 5, 0)])),
        ),
        one(
            "seccomp-arguments-not-all",
            rule(json!([argument(0, "GT", 5, 0), argument(1, "EQ", 5, 0)])),
        ),
        one(
            "seccomp-arguments-same-index",
            rule(json!([
                argument(0, "EQ", 5, 0),
                argument(0, "EQ", MINUS_ONE, 0)
            ])),
        ),
        one(
            "seccomp-argument-last",
            rule(json!([argument(5, "EQ", MINUS_ONE, 0)])),
        ),
    ]);
    all
}

fn architectures(
    of: &impl Fn(&str, Value) -> Configuration,
    default: &Value,
) -> Vec<Configuration> {
    let with = |name: &str, architectures: Value| {
        of(
            name,
            json!({ "defaultAction": ALLOW, "architectures": architectures,
                    "syscalls": [{ "names": ["getpid"], "action": ERRNO, "errnoRet": 99 }] }),
        )
    };
    vec![
        with("seccomp-architecture-own", json!(["SCMP_ARCH_X86_64"])),
        with("seccomp-architectures-none", json!(null)),
        with(
            "seccomp-architecture-x32",
            json!(["SCMP_ARCH_X86_64", "SCMP_ARCH_X32"]),
        ),
        with(
            "seccomp-architecture-x86",
            json!(["SCMP_ARCH_X86_64", "SCMP_ARCH_X86"]),
        ),
        with(
            "seccomp-architectures-all",
            json!(["SCMP_ARCH_X86_64", "SCMP_ARCH_X86", "SCMP_ARCH_X32"]),
        ),
        of("seccomp-default-architectures-none", {
            let mut filter = default.clone();
            super::patch::apply(&mut filter, &json!({ "architectures": null }));
            filter
        }),
    ]
}
