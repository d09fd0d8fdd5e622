//! The files that containers of a sandbox find, which CRI makes only for pods with a pause container.
//!
//! containerd 2 leaves mounts out whose source is not there. 1.7 names the files that it would have made
//! for a pause container, and makes a directory in the place of each. Whatever the container, or the
//! kubelet for it, brings itself stays.

use std::{
    fs,
    os::unix::fs::{OpenOptionsExt, PermissionsExt},
    path::Path,
};

use serde_json::{Value, json};

use super::config::{DNSConfig, SandboxError};

/// Name in the bundle for the memory that containers share. There is nothing of that name: the memory
/// is the guest's.
pub const SHARED_MEMORY: &str = "shm";

/// How large it may become, in bytes, as in CRI.
pub const SHARED_MEMORY_SIZE: u64 = 64 << 20;

/// Where containers have it.
const SHARED_MEMORY_POINT: &str = "/dev/shm";

/// Files: their names in the bundle, and where containers have them.
const FILES: [(&str, &str); 3] = [
    ("hostname", "/etc/hostname"),
    ("hosts", "/etc/hosts"),
    ("resolv.conf", "/etc/resolv.conf"),
];

/// Writes the files into the bundle. Without a configuration for names, the host's is the pod's.
pub fn write(bundle: &Path, hostname: &str, dns: Option<&DNSConfig>) -> Result<(), SandboxError> {
    let resolver = match dns {
        Some(dns) => resolver(dns)?,
        None => read("/etc/resolv.conf")?,
    };
    let contents = [
        format!("{hostname}\n").into(),
        read("/etc/hosts")?,
        resolver,
    ];
    for ((name, _), bytes) in FILES.iter().zip(contents) {
        let path = bundle.join(name);
        let written = write_file(&path, &bytes);
        written.map_err(|source| SandboxError::Write { path, source })?;
    }
    Ok(())
}

/// Readable for every user of the pod, whatever the umask.
fn write_file(path: &Path, bytes: &[u8]) -> std::io::Result<()> {
    let mut options = fs::File::options();
    let file = options.write(true).create(true).truncate(true).mode(0o644);
    let mut file = file.open(path)?;
    file.set_permissions(fs::Permissions::from_mode(0o644))?;
    std::io::Write::write_all(&mut file, bytes)
}

fn read(path: &str) -> Result<Vec<u8>, SandboxError> {
    fs::read(path).map_err(|source| SandboxError::Read {
        path: path.into(),
        source,
    })
}

/// The text of a resolv.conf(5).
fn resolver(dns: &DNSConfig) -> Result<Vec<u8>, SandboxError> {
    let mut words = [&dns.servers, &dns.searches, &dns.options].into_iter();
    if let Some(wrong) = words.find_map(|words| {
        let mut words = words.iter();
        words.find(|word| word.contains(|one: char| one.is_whitespace() || one.is_control()))
    }) {
        return Err(SandboxError::invalid(
            "DNS configuration",
            format!("{wrong:?}"),
        ));
    }
    let mut text = String::new();
    if !dns.searches.is_empty() {
        text += &format!("search {}\n", dns.searches.join(" "));
    }
    for server in &dns.servers {
        text += &format!("nameserver {server}\n");
    }
    if !dns.options.is_empty() {
        text += &format!("options {}\n", dns.options.join(" "));
    }
    Ok(text.into())
}

/// Gives the specification of a container what it lacks of these.
pub fn complete(spec: &mut Value, bundle: &Path) {
    let read_only = spec["root"]["readonly"] == true;
    let ids = ["uidMappings", "gidMappings"].map(|key| (key, spec["linux"][key].clone()));
    if !spec["mounts"].is_array() {
        spec["mounts"] = json!([]);
    }
    let Some(mounts) = spec["mounts"].as_array_mut() else {
        return;
    };
    for (name, destination) in FILES {
        let mut mount = json!({
            "destination": destination,
            "type": "bind",
            "source": bundle.join(name),
            "options": ["rbind", "rprivate", if read_only { "ro" } else { "rw" }],
        });
        // As everything else that the host gives to a container with a user namespace.
        for (key, mappings) in &ids {
            if mappings.as_array().is_some_and(|list| !list.is_empty()) {
                mount[*key] = mappings.clone();
            }
        }
        provide(mounts, mount, |there| !is_of_file(there));
    }
    let memory = json!({
        "destination": SHARED_MEMORY_POINT,
        "type": "bind",
        "source": bundle.join(SHARED_MEMORY),
        "options": ["rbind", "rprivate", "rw", "nosuid", "nodev", "noexec"],
    });
    // The memory of a pod with a pause container would be there.
    let id = bundle.file_name().unwrap_or_default();
    let of_pause = Path::new(id).join(SHARED_MEMORY);
    provide(mounts, memory, |there| {
        // A container's own is what the plugin's default is.
        let own = there["type"] == "tmpfs" && there["source"] == "shm";
        own || source(there).is_some_and(|source| source.ends_with(&of_pause))
    });
}

/// Adds a mount, in the place of one that is no good.
fn provide(mounts: &mut Vec<Value>, mount: Value, is_replaced: impl Fn(&Value) -> bool) {
    let destination = &mount["destination"];
    let mut all = mounts.iter_mut();
    match all.find(|there| there["destination"] == *destination) {
        Some(there) if is_replaced(there) => *there = mount,
        Some(_) => {}
        None => mounts.push(mount),
    }
}

/// What a bind mount shows.
fn source(mount: &Value) -> Option<&Path> {
    let source = mount["source"].as_str().filter(|_| mount["type"] == "bind");
    source.map(Path::new)
}

/// Whether a mount is of something that can be a file of /etc.
fn is_of_file(mount: &Value) -> bool {
    source(mount).is_none_or(Path::is_file)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn files_say_what_the_pod_says() {
        let bundle = tempfile::tempdir().unwrap();
        let mut dns = DNSConfig {
            servers: vec!["10.0.0.10".into(), "10.0.0.11".into()],
            searches: vec!["a.local".into(), "local".into()],
            options: vec!["ndots:5".into()],
            ..DNSConfig::default()
        };
        write(bundle.path(), "web", Some(&dns)).unwrap();
        let text = |name| fs::read_to_string(bundle.path().join(name)).unwrap();
        assert_eq!(text("hostname"), "web\n");
        assert_eq!(text("hosts"), fs::read_to_string("/etc/hosts").unwrap());
        assert_eq!(
            text("resolv.conf"),
            "search a.local local\nnameserver 10.0.0.10\nnameserver 10.0.0.11\noptions ndots:5\n"
        );
        write(bundle.path(), "web", None).unwrap();
        assert_eq!(
            text("resolv.conf"),
            fs::read_to_string("/etc/resolv.conf").unwrap()
        );
        dns.searches.push("x\nnameserver 6.6.6.6".into());
        assert!(write(bundle.path(), "web", Some(&dns)).is_err());
    }

    #[test]
    fn a_container_keeps_its_own() {
        let bundle = tempfile::tempdir().unwrap();
        fs::write(bundle.path().join("kubelets"), "").unwrap();
        let id = bundle.path().file_name().unwrap();
        let shm_of_1_7 = Path::new("/run/sandboxes").join(id).join("shm");
        let kubelets = bundle.path().join("kubelets");
        let mut spec = json!({
            "root": { "readonly": true },
            "mounts": [
                { "destination": "/dev", "type": "tmpfs" },
                { "destination": "/dev/shm", "type": "tmpfs", "source": "shm" },
                { "destination": "/etc/hosts", "type": "bind", "source": kubelets },
                { "destination": "/etc/hostname", "type": "bind", "source": "/none/of/1.7" },
            ],
            "linux": { "uidMappings": [1], "gidMappings": [2] },
        });
        let mut old = spec.clone();
        old["mounts"][1] =
            json!({ "destination": "/dev/shm", "type": "bind", "source": shm_of_1_7 });
        // A directory, which 1.7 makes of it.
        old["mounts"][3]["source"] = json!(bundle.path());
        complete(&mut spec, bundle.path());
        complete(&mut old, bundle.path());
        assert_eq!(spec, old);
        let mut volume = json!({ "mounts": [
            { "destination": "/dev/shm", "type": "bind", "source": "/volumes/shm" },
        ] });
        complete(&mut volume, bundle.path());
        assert_eq!(volume["mounts"][0]["source"], "/volumes/shm");
        let source = |name: &str| json!(bundle.path().join(name));
        let mounts = spec["mounts"].as_array().unwrap();
        assert_eq!(mounts.len(), 5);
        assert_eq!(mounts[1]["source"], source("shm"));
        assert_eq!(mounts[2]["source"], source("kubelets"));
        assert_eq!(mounts[3]["source"], source("hostname"));
        assert_eq!(mounts[3]["options"][2], "ro");
        assert_eq!(mounts[4]["destination"], "/etc/resolv.conf");
        assert_eq!(
            (&mounts[4]["uidMappings"], &mounts[4]["gidMappings"]),
            (&json!([1]), &json!([2]))
        );
    }

    #[test]
    fn a_container_without_any_gets_all() {
        let bundle = tempfile::tempdir().unwrap();
        let mut spec = json!({});
        complete(&mut spec, bundle.path());
        let mounts = spec["mounts"].as_array().unwrap().iter();
        let points: Vec<_> = mounts
            .map(|it| it["destination"].as_str().unwrap())
            .collect();
        assert_eq!(
            points,
            [
                "/etc/hostname",
                "/etc/hosts",
                "/etc/resolv.conf",
                "/dev/shm"
            ]
        );
    }
}
