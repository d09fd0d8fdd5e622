//! Whatever a spec says, it is applied or refused: nothing is lost, and nothing breaks the reader.

use bulkhead_agent::{
    cgroup::{devices_bpf, limits},
    spec::{Supplied, read_spec},
    stage::seccomp::Filter,
};
use proptest::{prelude::*, sample::select};
use serde_json::{Value, json};

/// Objects whose keys are data: any name is as good as another.
const FREE: [&str; 5] = [
    "/annotations",
    "/linux/sysctl",
    "/linux/resources/unified",
    "/linux/resources/rdma",
    "/linux/timeOffsets",
];

fn supplied() -> Supplied {
    Supplied {
        shares: (0..100).collect(),
        ..Supplied::default()
    }
}

fn capabilities() -> impl Strategy<Value = Value> {
    let names = [
        "CAP_CHOWN",
        "CAP_SYS_ADMIN",
        "CAP_NET_RAW",
        "CAP_BPF",
        "CAP_NOPE",
        "x",
    ];
    prop::collection::vec(select(names.to_vec()), 0..4).prop_map(|names| json!(names))
}

fn process() -> impl Strategy<Value = Value> {
    let limit = select(vec![
        "RLIMIT_NOFILE",
        "RLIMIT_CORE",
        "RLIMIT_AS",
        "RLIMIT_X",
    ]);
    let policy = select(vec![
        "SCHED_OTHER",
        "SCHED_FIFO",
        "SCHED_DEADLINE",
        "SCHED_ISO",
    ]);
    (
        prop::collection::vec(".{0,8}", 0..3),
        any::<[u32; 2]>(),
        capabilities(),
        (limit, any::<u64>()),
        (policy, -30..30i32, -2..120i32),
        select(vec!["/", "/a/b", "relative", ""]),
        any::<i32>(),
    )
        .prop_map(|(args, [uid, gid], caps, limit, scheduler, cwd, oom)| {
            let (limit, value) = limit;
            let (policy, nice, priority) = scheduler;
            json!({
                "args": args, "cwd": cwd, "env": ["A=b"],
                "user": {"uid": uid, "gid": gid, "umask": uid % 0o1000},
                "capabilities": {"bounding": caps, "ambient": caps},
                "rlimits": [{"type": limit, "soft": value, "hard": value}],
                "scheduler": {"policy": policy, "nice": nice, "priority": priority},
                "oomScoreAdj": oom,
            })
        })
}

fn mount() -> impl Strategy<Value = Value> {
    let options = vec![
        "ro",
        "rbind",
        "bind",
        "rro",
        "nosuid",
        "rprivate",
        "idmap",
        "tmpcopyup",
        "size=1m",
        "remount",
        "mode=",
        "=",
        "rnoatime",
        "x-y",
    ];
    (
        select(vec!["tmpfs", "proc", "bind", "none", "mqueue", ""]),
        select(vec!["/a", "/a/../..", "/", "b", "/proc/x"]),
        prop::collection::vec(select(options), 0..4),
    )
        .prop_map(|(kind, destination, options)| {
            json!({"type": kind, "destination": destination, "source": "s", "options": options})
        })
}

fn seccomp() -> impl Strategy<Value = Value> {
    let actions = vec![
        "SCMP_ACT_ALLOW",
        "SCMP_ACT_ERRNO",
        "SCMP_ACT_KILL",
        "SCMP_ACT_TRACE",
        "SCMP_ACT_NOTIFY",
        "SCMP_ACT_LOG",
    ];
    let operators = vec![
        "SCMP_CMP_NE",
        "SCMP_CMP_LT",
        "SCMP_CMP_LE",
        "SCMP_CMP_EQ",
        "SCMP_CMP_GE",
        "SCMP_CMP_GT",
        "SCMP_CMP_MASKED_EQ",
    ];
    let argument = (0..8usize, any::<[u64; 2]>(), select(operators)).prop_map(
        |(index, [value, second], op)| {
            json!({"index": index, "value": value, "valueTwo": second, "op": op})
        },
    );
    let rule = (
        select(vec![
            "read",
            "openat",
            "clone3",
            "personality",
            "no_such_call",
        ]),
        select(actions.clone()),
        prop::collection::vec(argument, 0..3),
        prop::option::of(0..5000u32),
    )
        .prop_map(|(name, action, args, errno)| {
            let mut rule = json!({"names": [name], "action": action, "args": args});
            if let Some(errno) = errno {
                rule["errnoRet"] = json!(errno);
            }
            rule
        });
    (select(actions), prop::collection::vec(rule, 0..4)).prop_map(|(default, syscalls)| {
        json!({
            "defaultAction": default, "syscalls": syscalls,
            "architectures": ["SCMP_ARCH_X86_64", "SCMP_ARCH_X86"],
        })
    })
}

fn resources() -> impl Strategy<Value = Value> {
    let device = (
        any::<bool>(),
        select(vec!["a", "b", "c"]),
        prop::option::of(-1..300i64),
        select(vec!["rwm", "r", "", "x"]),
    )
        .prop_map(|(allow, kind, major, access)| {
            json!({"allow": allow, "type": kind, "major": major, "access": access})
        });
    (
        any::<[i64; 3]>(),
        any::<[u64; 2]>(),
        prop::collection::vec(device, 0..4),
        select(vec!["pids.max", "../x", "a/b", ""]),
    )
        .prop_map(|([limit, swap, quota], [shares, period], devices, file)| {
            json!({
                "memory": {"limit": limit, "swap": swap},
                "cpu": {"shares": shares, "quota": quota, "period": period},
                "devices": devices,
                "unified": {file: "1"},
            })
        })
}

/// Specs of which a good part is sound.
fn specs() -> impl Strategy<Value = Value> {
    let kinds = select(vec!["user", "time", "cgroup"]);
    (
        process(),
        prop::collection::vec(mount(), 0..3),
        prop::option::of(seccomp()),
        prop::option::of(resources()),
        prop::option::of(kinds),
        any::<[u32; 3]>(),
    )
        .prop_map(
            |(process, mounts, seccomp, resources, kind, [inside, outside, size])| {
                let mut namespaces: Vec<_> = ["pid", "ipc", "uts", "mount", "network"]
                    .map(|kind| json!({"type": kind}))
                    .to_vec();
                namespaces.extend(kind.map(|kind| json!({"type": kind})));
                let ids = json!([{"containerID": inside, "hostID": outside, "size": size}]);
                let mut spec = json!({
                    "ociVersion": "1.2.0",
                    "root": {"path": "rootfs"},
                    "process": process,
                    "mounts": mounts,
                    "annotations": {"a": "b"},
                    "linux": {"namespaces": namespaces, "sysctl": {"net.core.somaxconn": "1"}},
                });
                let linux = spec["linux"].as_object_mut().unwrap();
                if kind == Some("user") {
                    linux.insert("uidMappings".into(), ids.clone());
                    linux.insert("gidMappings".into(), ids);
                }
                linux.extend(seccomp.map(|seccomp| ("seccomp".into(), seccomp)));
                linux.extend(resources.map(|resources| ("resources".into(), resources)));
                spec
            },
        )
}

/// The places of all objects whose keys have a meaning.
fn objects(value: &Value, place: String, found: &mut Vec<String>) {
    match value {
        Value::Object(fields) if !FREE.contains(&place.as_str()) => {
            for (name, field) in fields {
                objects(field, format!("{place}/{name}"), found);
            }
            found.push(place);
        }
        Value::Array(elements) => {
            for (index, element) in elements.iter().enumerate() {
                objects(element, format!("{place}/{index}"), found);
            }
        }
        _ => {}
    }
}

fn sound() -> Value {
    let namespaces =
        ["pid", "ipc", "uts", "mount", "network", "user"].map(|kind| json!({"type": kind}));
    json!({
        "ociVersion": "1.2.0",
        "root": {"path": "rootfs", "readonly": true},
        "process": {
            "args": ["true"], "cwd": "/", "user": {"uid": 0, "gid": 0},
            "rlimits": [{"type": "RLIMIT_CORE", "soft": 0, "hard": 0}],
            "capabilities": {"bounding": ["CAP_KILL"]},
            "scheduler": {"policy": "SCHED_BATCH"},
            "ioPriority": {"class": "IOPRIO_CLASS_IDLE"},
            "consoleSize": {"height": 1, "width": 2},
        },
        "mounts": [
            {"type": "tmpfs", "destination": "/t", "source": "t"},
            {"type": "bind", "destination": "/b", "source": "/b", "options": ["idmap"],
             "uidMappings": [{"containerID": 0, "hostID": 1, "size": 1}],
             "gidMappings": [{"containerID": 0, "hostID": 1, "size": 1}]},
        ],
        "linux": {
            "namespaces": namespaces,
            "devices": [{"path": "/dev/x", "type": "c", "major": 1, "minor": 3}],
            "personality": {"domain": "LINUX"},
            "uidMappings": [{"containerID": 0, "hostID": 1, "size": 1}],
            "gidMappings": [{"containerID": 0, "hostID": 1, "size": 1}],
            "seccomp": {
                "defaultAction": "SCMP_ACT_ERRNO",
                "syscalls": [{
                    "names": ["read"], "action": "SCMP_ACT_ALLOW",
                    "args": [{"index": 0, "value": 1, "op": "SCMP_CMP_EQ"}],
                }],
            },
            "resources": {
                "memory": {"limit": 1}, "cpu": {"shares": 2}, "pids": {"limit": 3},
                "blockIO": {"weight": 10}, "devices": [{"allow": false, "access": "rwm"}],
                "hugepageLimits": [{"pageSize": "2MB", "limit": 1}],
            },
        },
    })
}

#[test]
fn the_sound_spec_is_taken() {
    read_spec(sound().to_string().as_bytes(), &supplied()).unwrap();
}

/// containerd 2 keeps the user namespace of a pod by a path of the host.
#[test]
fn a_user_namespace_with_a_path_is_another_containers_or_has_ids() {
    let mut spec = sound();
    let namespaces = spec["linux"]["namespaces"].as_array_mut().unwrap();
    namespaces.retain(|namespace| namespace["type"] != "user");
    namespaces.push(json!({"type": "user", "path": "/run/pod/user"}));
    read_spec(spec.to_string().as_bytes(), &supplied()).unwrap();
    let linux = spec["linux"].as_object_mut().unwrap();
    linux.remove("uidMappings");
    linux.remove("gidMappings");
    let error = read_spec(spec.to_string().as_bytes(), &supplied()).unwrap_err();
    let text = error.to_string();
    assert!(text.contains("no namespace of another"), "{text}");
}

proptest! {
    /// No field is ignored in silence, wherever it is.
    #[test]
    fn a_field_that_nobody_knows_is_refused(choice in any::<prop::sample::Index>()) {
        let mut spec = sound();
        let mut places = Vec::new();
        objects(&spec, String::new(), &mut places);
        let place = choice.get(&places);
        spec.pointer_mut(place).unwrap()["unheardOf"] = json!("value");
        let error = read_spec(spec.to_string().as_bytes(), &supplied()).unwrap_err();
        let text = format!("{error} {:?}", std::error::Error::source(&error));
        prop_assert!(text.contains("unheardOf"), "{} at {:?}", text, place);
    }

    /// What is accepted can be translated for the kernel, or is refused by then.
    #[test]
    fn any_spec_is_translated_or_refused(spec in specs()) {
        let Ok(spec) = read_spec(spec.to_string().as_bytes(), &supplied()) else {
            return Ok(());
        };
        let linux = spec.linux().as_ref().unwrap();
        if let Some(resources) = linux.resources() {
            for (file, value) in limits::files(resources) {
                prop_assert!(!file.contains('/') && !file.is_empty(), "{}", file);
                prop_assert!(!value.contains('\n'), "{}", value);
            }
            let rules = resources.devices().as_deref().unwrap_or_default();
            prop_assert!(!devices_bpf::program(rules).code().is_empty());
        }
        if let Some(seccomp) = linux.seccomp() {
            let _ = Filter::compile(seccomp);
        }
    }

    /// No bytes break the reader.
    #[test]
    fn any_bytes_are_read_or_refused(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
        let _ = read_spec(&bytes, &supplied());
    }
}
