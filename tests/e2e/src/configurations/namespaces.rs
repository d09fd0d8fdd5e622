//! User and time namespaces, and what else the set-up of a process takes from outside them.

use anyhow::Result;
use serde_json::{Value, json};

use super::{Configuration, Theme, base};

pub(super) fn all() -> Result<Vec<Configuration>> {
    let base = base::containerd()?;
    let new =
        |name: &str, changes: Value| Configuration::new(Theme::Namespaces, name, &base, &changes);
    let mapping = |container: u32, host: u32, size: u32| json!({ "containerID": container, "hostID": host, "size": size });
    let user = |name: &str, uids: Value, gids: Value| {
        new(
            name,
            json!({ "linux": { "namespaces+": [{ "type": "user" }],
                               "uidMappings": uids, "gidMappings": gids } }),
        )
    };
    let copied = |options: Value| {
        json!({ "mounts+": [{ "destination": "/tree", "type": "tmpfs", "source": "tmpfs",
                              "options": options }] })
    };
    let time = json!([{ "type": "time" }]);
    Ok(vec![
        user(
            "user-namespace",
            json!([mapping(0, 0, 65_536)]),
            json!([mapping(0, 0, 65_536)]),
        )
        .exec(&json!({})),
        user(
            "user-namespace-shifted",
            json!([mapping(0, 100_000, 65_536)]),
            json!([mapping(0, 100_000, 65_536)]),
        ),
        user(
            "user-namespace-several",
            json!([mapping(0, 0, 1), mapping(1000, 1000, 1)]),
            json!([mapping(0, 0, 1), mapping(5, 5, 1), mapping(1000, 1000, 1)]),
        ),
        new(
            "time-namespace",
            json!({ "linux": { "namespaces+": time } }),
        )
        .refused_by("<1.2")?,
        new("tmpfs-copied-up", copied(json!(["tmpcopyup"]))),
        new(
            "tmpfs-copied-up-mode",
            copied(json!(["tmpcopyup", "mode=711", "size=1m"])),
        ),
        new(
            "tmpfs-read-only-with-mount-inside",
            json!({ "mounts+": [
                { "destination": "/mnt", "type": "tmpfs", "source": "tmpfs", "options": ["ro"] },
                { "destination": "/mnt/volume", "type": "bind", "source": "@volume@",
                  "options": ["rbind"] },
            ] }),
        ),
        new(
            "personality",
            json!({ "linux": { "personality": { "domain": "LINUX" } } }),
        ),
        new(
            "personality-32",
            json!({ "linux": { "personality": { "domain": "LINUX32" } } }),
        ),
    ])
}
