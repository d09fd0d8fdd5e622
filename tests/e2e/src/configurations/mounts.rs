//! The root and what is mounted in it.

use anyhow::Result;
use serde_json::{Value, json};

use super::{Configuration, Theme, base};

pub(super) fn all() -> Result<Vec<Configuration>> {
    let base = base::containerd()?;
    let new = |name: &str, changes: Value| Configuration::new(Theme::Mounts, name, &base, &changes);
    let mount = |name: &str, mounts: Value| new(name, json!({ "mounts+": mounts }));
    let mut all = Vec::new();
    for propagation in [
        "private",
        "rprivate",
        "slave",
        "rslave",
        "shared",
        "rshared",
        "unbindable",
        "runbindable",
    ] {
        let root = new(
            &format!("root-{propagation}"),
            json!({ "linux": { "rootfsPropagation": propagation } }),
        );
        all.push(match propagation {
            // It binds what it makes read-only, which is unbindable then.
            "runbindable" => root.refused_by(">=1.3")?,
            _ => root,
        });
        let options = json!(["rbind", propagation]);
        all.push(mount(
            &format!("bind-{propagation}"),
            json!([volume("/volume", options)]),
        ));
    }
    for options in [
        &["bind"][..],
        &["rbind"],
        &["bind", "ro"],
        &["rbind", "ro"],
        &["rbind", "rro"],
        &["bind", "nosuid", "nodev", "noexec"],
        &["bind", "noatime"],
        &["bind", "nodiratime"],
        &["bind", "strictatime"],
        &["bind", "ro", "rw"],
        &["bind", "nosymfollow"],
        &["rbind", "rnosuid", "rnodev", "rnoexec", "rnoatime"],
    ] {
        let name = format!("volume-{}", options.join("-"));
        all.push(mount(&name, json!([volume("/volume", json!(options))])));
    }
    all.extend(temporary(&mount));
    all.extend(special(&mount));
    all.extend(targets(&mount));
    all.extend([
        new("root-read-only", json!({ "root": { "readonly": true } })).exec(&json!({})),
        new(
            "root-read-only-volume-writable",
            json!({ "root": { "readonly": true },
                    "mounts+": [volume("/mnt", json!(["rbind", "rw"])), tmpfs("/tmp", json!([]))] }),
        ),
        new("no-dev", json!({ "mounts": [
            { "destination": "/proc", "type": "proc", "source": "proc" },
            tmpfs("/dev", json!(["mode=755"])),
        ] })),
        new("only-proc", json!({ "mounts": [
            { "destination": "/proc", "type": "proc", "source": "proc" },
            tmpfs("/dev", json!(["mode=755", "nosuid"])),
            { "destination": "/sys", "type": "sysfs", "source": "sysfs" },
        ], "linux": { "maskedPaths": [], "readonlyPaths": [] } })),
    ]);
    Ok(all)
}

fn volume(destination: &str, options: Value) -> Value {
    json!({ "destination": destination, "type": "bind", "source": "@volume@", "options": options })
}

fn tmpfs(destination: &str, options: Value) -> Value {
    json!({ "destination": destination, "type": "tmpfs", "source": "tmpfs", "options": options })
}

fn temporary(mount: &impl Fn(&str, Value) -> Configuration) -> Vec<Configuration> {
    let options = [
        ("plain", json!([])),
        ("size", json!(["size=1m"])),
        ("mode", json!(["mode=1770"])),
        ("inodes", json!(["nr_inodes=100"])),
        ("owner", json!(["uid=1000", "gid=5"])),
        ("read-only", json!(["ro"])),
        (
            "flags",
            json!(["nosuid", "nodev", "noexec", "noatime", "size=2m"]),
        ),
        ("sync", json!(["sync", "dirsync"])),
        ("lazytime", json!(["lazytime"])),
        ("huge", json!(["huge=never"])),
    ];
    options
        .into_iter()
        .map(|(name, options)| mount(&format!("tmpfs-{name}"), json!([tmpfs("/mnt", options)])))
        .collect()
}

/// File systems of the kernel.
fn special(mount: &impl Fn(&str, Value) -> Configuration) -> Vec<Configuration> {
    let kinds = [
        (
            "cgroup-read-only",
            "/sys/fs/cgroup",
            "cgroup",
            json!(["ro", "nosuid", "noexec", "nodev"]),
        ),
        (
            "cgroup-writable",
            "/sys/fs/cgroup",
            "cgroup",
            json!(["rw", "nosuid", "noexec", "nodev"]),
        ),
        (
            "cgroup2-by-name",
            "/sys/fs/cgroup",
            "cgroup2",
            json!(["ro"]),
        ),
        (
            "sysfs-writable",
            "/mnt",
            "sysfs",
            json!(["rw", "nosuid", "noexec", "nodev"]),
        ),
        (
            "proc-hidepid",
            "/mnt",
            "proc",
            json!(["hidepid=2", "gid=5"]),
        ),
        ("proc-subset", "/mnt", "proc", json!(["subset=pid"])),
        ("proc-read-only", "/mnt", "proc", json!(["ro"])),
        (
            "mqueue",
            "/mnt",
            "mqueue",
            json!(["nosuid", "noexec", "nodev"]),
        ),
        (
            "devpts",
            "/mnt",
            "devpts",
            json!(["newinstance", "ptmxmode=0600", "mode=0600", "gid=7"]),
        ),
        (
            "devpts-limit",
            "/mnt",
            "devpts",
            json!(["newinstance", "max=10", "uid=5"]),
        ),
    ];
    kinds
        .into_iter()
        .map(|(name, destination, kind, options)| {
            let one = json!([{ "destination": destination, "type": kind, "source": kind,
                               "options": options }]);
            mount(name, one)
        })
        .collect()
}

/// Where mounts go.
fn targets(mount: &impl Fn(&str, Value) -> Configuration) -> Vec<Configuration> {
    let rbind = json!(["rbind"]);
    let file = |destination: &str| {
        json!({ "destination": destination, "type": "bind", "source": "@volume@/file",
                "options": ["bind"] })
    };
    vec![
        mount(
            "target-missing",
            json!([volume("/volume/a/b", rbind.clone())]),
        ),
        mount(
            "target-behind-link",
            json!([volume("/var/run/volume", rbind.clone())]),
        ),
        mount(
            "target-is-link",
            json!([volume("/link-to-tree", rbind.clone())]),
        ),
        mount(
            "target-is-link-out",
            json!([volume("/out/volume", rbind.clone())]),
        ),
        mount("target-is-dangling", json!([tmpfs("/dangling", json!([]))])),
        mount("target-file", json!([file("/etc/volume-file")])),
        mount("target-file-exists", json!([file("/etc/hosts")])),
        mount("target-file-is-link", json!([file("/link-to-file")])),
        mount("target-file-in-missing", json!([file("/volume/x/y")])),
        mount(
            "target-with-dots",
            json!([volume("/mnt/../volume/./x/", rbind.clone())]),
        ),
        mount(
            "target-private",
            json!([volume("/etc/private/volume", rbind.clone())]),
        ),
        mount(
            "targets-nested",
            json!([
                tmpfs("/mnt", json!(["mode=711"])),
                volume("/mnt/volume", rbind.clone()),
                tmpfs("/mnt/volume/below", json!(["size=64k"])),
                file("/mnt/volume-file"),
            ]),
        ),
        mount(
            "targets-stacked",
            json!([
                tmpfs("/mnt", json!(["mode=711"])),
                tmpfs("/mnt", json!(["mode=700"]))
            ]),
        ),
        mount("target-in-dev", json!([volume("/dev/volume", rbind)])),
        mount(
            "target-shadows-bin",
            json!([
                tmpfs("/usr", json!(["mode=700"])),
                tmpfs("/home", json!([]))
            ]),
        ),
    ]
}
