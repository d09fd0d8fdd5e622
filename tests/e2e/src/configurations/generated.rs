//! Configurations put together by chance, each from a number of its own.

use anyhow::Result;
use serde_json::{Value, json};

use super::{Configuration, Theme, base};

/// How many are made of one seed.
const COUNT: u64 = 20;

/// A sequence of numbers that looks random (splitmix64).
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = self.0;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ (mixed >> 31)
    }

    fn below(&mut self, end: u64) -> u64 {
        self.next() % end
    }

    fn one_in(&mut self, chances: u64) -> bool {
        self.below(chances) == 0
    }

    /// Each with the same chance of being there, in their order.
    fn some<T: Clone>(&mut self, all: &[T], one_in: u64) -> Vec<T> {
        let chosen = all.iter().filter(|_| self.one_in(one_in));
        chosen.cloned().collect()
    }
}

/// Those of a seed.
pub(super) fn all(seed: u64) -> Result<Vec<Configuration>> {
    let containerd = base::containerd()?;
    let docker = super::profiles::docker()?;
    let seccomp = base::seccomp()?;
    let made = (0..COUNT).map(|index| {
        let mut random = Random(seed.wrapping_mul(0x1_0000_0001).wrapping_add(index));
        let base = if random.one_in(2) {
            &containerd
        } else {
            &docker
        };
        let mut changes = json!({});
        for part in [
            process, identity, limits, mounts, paths, devices, resources, namespaces,
        ] {
            // Not all at once: one part may hide what another does.
            if !random.one_in(3) {
                patch_together(&mut changes, &part(&mut random));
            }
        }
        if random.one_in(3) {
            patch_together(&mut changes, &json!({ "linux": { "seccomp": seccomp } }));
        }
        let name = format!("generated-{seed}-{index}");
        let mut made = Configuration::new(Theme::Generated, &name, base, &changes);
        let masked = made.spec["linux"]["maskedPaths"].as_array();
        if masked.is_some_and(|paths| paths.contains(&json!("/proc/sys"))) {
            // It reads a file there at the end.
            made = made.refused_by(">=1.3")?;
        }
        if random.one_in(8) {
            made = made.exec(&json!({}));
        }
        Ok(made)
    });
    made.collect()
}

/// Merges two changes into one; additions to the same array are joined.
fn patch_together(changes: &mut Value, more: &Value) {
    let (Value::Object(target), Value::Object(more)) = (&mut *changes, more) else {
        *changes = more.clone();
        return;
    };
    for (name, value) in more {
        match (target.get_mut(name), value) {
            (Some(Value::Array(array)), Value::Array(more)) if name.ends_with('+') => {
                array.extend(more.iter().cloned());
            }
            (Some(present), value) => patch_together(present, value),
            (None, value) => {
                target.insert(name.clone(), value.clone());
            }
        }
    }
}

fn process(random: &mut Random) -> Value {
    let directories = [
        "/",
        "/tmp",
        "/tree",
        "/var/run",
        "/out",
        "/made/here",
        "/dev",
    ];
    json!({ "process": {
        "cwd": directories[index(random, directories.len())],
        "noNewPrivileges": random.one_in(2),
        "oomScoreAdj": random.below(1000),
        "env": random.some(&["PATH=/bin", "A=b", "EMPTY=", "HOME=/root", "TERM=xterm"], 2),
    } })
}

fn identity(random: &mut Random) -> Value {
    let uids = [0, 0, 1000, 4321];
    let gids = [0, 1000, 5];
    let mut user = json!({
        "uid": uids[index(random, uids.len())],
        "gid": gids[index(random, gids.len())],
        "additionalGids": random.some(&[1, 5, 10, 1000, 70_000], 3),
    });
    if random.one_in(2) {
        user["umask"] = json!(random.below(0o1000) & 0o077);
    }
    let held = random.some(&base::CAPABILITIES, 2);
    let bounding: Vec<_> = base::ALL_CAPABILITIES
        .into_iter()
        .filter(|name| held.contains(name) || random.one_in(4))
        .collect();
    let inheritable = random.some(&held, 2);
    let ambient = random.some(&inheritable, 2);
    json!({ "process": { "user": user, "capabilities": {
        "bounding": bounding, "effective": random.some(&held, 2), "permitted": held,
        "inheritable": inheritable, "ambient": ambient,
    } } })
}

fn limits(random: &mut Random) -> Value {
    let kinds = [
        "CORE",
        "MEMLOCK",
        "NOFILE",
        "NPROC",
        "MSGQUEUE",
        "SIGPENDING",
        "NICE",
        "RTPRIO",
        "STACK",
    ];
    let kinds = random.some(&kinds, 3);
    let limits: Vec<_> = kinds
        .into_iter()
        .map(|kind| {
            let soft = match kind {
                "NICE" | "RTPRIO" => random.below(20),
                "STACK" | "MEMLOCK" => (1 << 20) + random.below(1 << 22),
                _ => 100 + random.below(1000),
            };
            json!({ "type": format!("RLIMIT_{kind}"), "soft": soft, "hard": soft + random.below(20) })
        })
        .collect();
    json!({ "process": { "rlimits": limits } })
}

fn mounts(random: &mut Random) -> Value {
    let flags = ["ro", "nosuid", "nodev", "noexec", "noatime"];
    let mut mounts = Vec::new();
    for target in ["/mnt", "/opt/new", "/var/run/below"] {
        if random.one_in(2) {
            let mut options: Vec<String> = owned(&random.some(&flags, 3));
            options.extend(owned(
                &random.some(&["size=1m", "mode=751", "nr_inodes=500"], 2),
            ));
            mounts.push(
                json!({ "destination": target, "type": "tmpfs", "source": "tmpfs",
                                "options": options }),
            );
        }
    }
    for target in ["/volume", "/out/volume", "/tree/volume"] {
        if random.one_in(3) {
            let mut options = vec![["bind", "rbind"][index(random, 2)].to_owned()];
            options.extend(owned(&random.some(&flags, 3)));
            let kinds = ["private", "rprivate", "rslave", "rshared"];
            options.extend(owned(&random.some(&kinds, 6)));
            mounts.push(
                json!({ "destination": target, "type": "bind", "source": "@volume@",
                                "options": options }),
            );
        }
    }
    let propagation = ["private", "slave", "rslave", "rprivate"];
    json!({
        "mounts+": mounts,
        "root": { "readonly": random.one_in(3) },
        "linux": { "rootfsPropagation": propagation[index(random, propagation.len())] },
    })
}

fn paths(random: &mut Random) -> Value {
    let paths = [
        "/file",
        "/tree",
        "/tree/inner",
        "/link-to-file",
        "/etc/passwd",
        "/proc/keys",
        "/proc/irq",
        "/proc/sys",
        "/sys/firmware",
        "/tmp",
        "/not/there",
    ];
    json!({ "linux": {
        "maskedPaths": random.some(&paths, 3),
        "readonlyPaths": random.some(&paths, 3),
    } })
}

fn devices(random: &mut Random) -> Value {
    let numbers = [
        ("fuse", 10, 229),
        ("tun", 10, 200),
        ("zero", 1, 5),
        ("memory", 1, 1),
    ];
    let chosen = random.some(&numbers, 2);
    let nodes: Vec<_> = chosen
        .iter()
        .map(|(name, major, minor)| {
            json!({ "path": format!("/dev/some/{name}"), "type": "c", "major": major, "minor": minor,
                    "fileMode": random.below(0o1000), "uid": random.below(2000), "gid": 5 })
        })
        .collect();
    let mut rules = vec![json!({ "allow": false, "access": "rwm" })];
    rules.extend(random.some(&numbers, 2).into_iter().map(|(_, major, minor)| {
        let access: String = random.some(&["r", "w", "m"], 2).concat();
        let access = if access.is_empty() { "rwm".into() } else { access };
        json!({ "allow": true, "type": "c", "major": major, "minor": minor, "access": access })
    }));
    json!({ "linux": { "devices": nodes, "resources": { "devices": rules } } })
}

fn resources(random: &mut Random) -> Value {
    let mut resources = json!({});
    if random.one_in(2) {
        let limit = (64 + random.below(64)) << 20;
        resources["memory"] = json!({ "limit": limit, "swap": limit, "reservation": limit / 2 });
    }
    if random.one_in(2) {
        resources["cpu"] = json!({ "shares": 2 + random.below(5000),
                                   "quota": 20_000 + random.below(80_000), "period": 100_000 });
    }
    if random.one_in(2) {
        resources["pids"] = json!({ "limit": 10 + random.below(100) });
    }
    json!({ "linux": { "resources": resources } })
}

fn namespaces(random: &mut Random) -> Value {
    json!({
        "hostname": format!("host-{}", random.below(100)),
        "domainname": format!("domain-{}", random.below(100)),
        "linux": { "sysctl": {
            "net.core.somaxconn": (100 + random.below(1000)).to_string(),
            "kernel.shmmni": (100 + random.below(1000)).to_string(),
        } },
    })
}

fn index(random: &mut Random, length: usize) -> usize {
    usize::try_from(random.next() % 1_000_000).unwrap_or_default() % length
}

fn owned(words: &[&str]) -> Vec<String> {
    words.iter().map(|&word| word.to_owned()).collect()
}
