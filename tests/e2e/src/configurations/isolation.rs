//! What is hidden, what is given, and what the namespaces hold.

use anyhow::Result;
use serde_json::{Value, json};

use super::{Configuration, Theme, base};

pub(super) fn all() -> Result<Vec<Configuration>> {
    let base = base::containerd()?;
    let new =
        |name: &str, changes: Value| Configuration::new(Theme::Isolation, name, &base, &changes);
    let linux = |name: &str, changes: Value| new(name, json!({ "linux": changes }));
    let masked = |name: &str, paths: Value| linux(name, json!({ "maskedPaths": paths }));
    let readonly = |name: &str, paths: Value| linux(name, json!({ "readonlyPaths": paths }));
    let mut all = vec![
        masked("masked-none", json!(null)),
        masked("masked-file", json!(["/file"])).exec(&json!({})),
        masked("masked-directory", json!(["/tree"])),
        masked("masked-directory-in-directory", json!(["/tree/inner"])),
        masked("masked-missing", json!(["/not/there", "/tree/nor/this"])),
        masked("masked-link-to-file", json!(["/link-to-file"])),
        masked("masked-link-to-directory", json!(["/link-to-tree"])),
        masked(
            "masked-twice",
            json!(["/file", "/file", "/tree", "/tree/inner"]),
        ),
        masked("masked-device", json!(["/dev/zero", "/dev/shm"])),
        readonly("read-only-none", json!(null)),
        readonly("read-only-file", json!(["/file"])),
        readonly("read-only-directory", json!(["/tree", "/tmp"])).exec(&json!({})),
        readonly(
            "read-only-missing",
            json!(["/not/there", "/tree/inner/leaf"]),
        ),
        readonly("read-only-link", json!(["/link-to-tree"])),
        readonly("read-only-mount", json!(["/dev/shm", "/run"])),
        linux(
            "masked-and-read-only",
            json!({ "maskedPaths": ["/tree/inner"], "readonlyPaths": ["/tree"] }),
        ),
        linux(
            "sysctl-ipc",
            json!({ "sysctl": {
            "kernel.msgmax": "4096", "kernel.shmmax": "65536", "kernel.shm_rmid_forced": "1",
            "kernel.sem": "10 20 30 40", "fs.mqueue.msg_max": "20",
        } }),
        ),
        linux(
            "sysctl-net",
            json!({ "sysctl": {
            "net.ipv4.ip_forward": "1", "net.core.somaxconn": "99",
            "net.ipv4.ping_group_range": "0 1000", "net.ipv4.ip_unprivileged_port_start": "0",
            "net.ipv4.ip_local_port_range": "2000 3000",
        } }),
        )
        .exec(&json!({})),
        linux(
            "sysctl-with-slashes",
            json!({ "sysctl": { "net/ipv4/conf/lo/forwarding": "1" } }),
        ),
        linux(
            "cgroup-namespace",
            json!({ "namespaces+": [{ "type": "cgroup" }] }),
        )
        .exec(&json!({})),
    ];
    all.extend(devices(&linux));
    all.extend(device_rules(&linux));
    Ok(all)
}

fn device(path: &str, kind: &str, major: u32, minor: u32) -> Value {
    json!({ "path": path, "type": kind, "major": major, "minor": minor })
}

fn devices(linux: &impl Fn(&str, Value) -> Configuration) -> Vec<Configuration> {
    let with = |mut device: Value, name: &str, value: Value| {
        device[name] = value;
        device
    };
    let devices = |name: &str, devices: Value| linux(name, json!({ "devices": devices }));
    let fuse = || device("/dev/fuse", "c", 10, 229);
    vec![
        devices("device-character", json!([fuse()])),
        devices("device-block", json!([device("/dev/disk", "b", 7, 0)])),
        devices("device-unbuffered", json!([device("/dev/u", "u", 1, 3)])),
        devices(
            "device-fifo",
            json!([with(
                device("/dev/pipe", "p", 0, 0),
                "fileMode",
                json!(0o600)
            )]),
        ),
        devices(
            "device-mode",
            json!([with(fuse(), "fileMode", json!(0o640))]),
        ),
        devices(
            "device-mode-with-type",
            json!([with(fuse(), "fileMode", json!(0o20_640))]),
        ),
        devices(
            "device-owner",
            json!([with(with(fuse(), "uid", json!(1000)), "gid", json!(5))]),
        ),
        devices(
            "device-in-directory",
            json!([device("/dev/net/tun", "c", 10, 200)]),
        ),
        linux(
            "device-replaces-default",
            json!({
                "devices": [with(device("/dev/null", "c", 1, 3), "fileMode", json!(0o600))],
                // runc allows by default only what the specification does not name.
                "resources": { "devices+": [
                    { "allow": true, "type": "c", "major": 1, "minor": 3, "access": "rwm" },
                ] },
            }),
        ),
        devices("device-twice", json!([fuse(), fuse()])),
        devices(
            "device-zero-named",
            json!([device("/dev/other-zero", "c", 1, 5)]),
        ),
    ]
}

fn device_rules(linux: &impl Fn(&str, Value) -> Configuration) -> Vec<Configuration> {
    let rules =
        |name: &str, rules: Value| linux(name, json!({ "resources": { "devices": rules } }));
    let deny = || json!({ "allow": false, "access": "rwm" });
    let allow = |kind: &str, major: u32, access: &str| json!({ "allow": true, "type": kind, "major": major, "access": access });
    vec![
        rules("rules-none", json!(null)),
        rules(
            "rules-allow-all",
            json!([{ "allow": true, "access": "rwm" }]),
        ),
        rules("rules-deny-all", json!([deny()])).exec(&json!({})),
        rules(
            "rules-allow-one",
            json!([deny(), { "allow": true, "type": "c", "major": 10, "minor": 200, "access": "rw" }]),
        ),
        rules(
            "rules-allow-major",
            json!([deny(), allow("c", 10, "rwm"), allow("b", 7, "r")]),
        ),
        rules(
            "rules-make-alone",
            json!([deny(), allow("c", 1, "m"), allow("b", 8, "m")]),
        ),
        rules("rules-read-alone", json!([deny(), allow("c", 1, "rm")])),
        rules(
            "rules-all-characters",
            json!([deny(), { "allow": true, "type": "c", "access": "rwm" }]),
        ),
        rules(
            "rules-deny-after-allow",
            json!([{ "allow": true, "access": "rwm" },
                   { "allow": false, "type": "c", "major": 1, "minor": 1, "access": "rwm" }]),
        ),
        rules(
            "rules-write-denied",
            json!([{ "allow": true, "access": "rwm" },
                   { "allow": false, "type": "c", "major": 10, "minor": 229, "access": "w" }]),
        ),
    ]
}
