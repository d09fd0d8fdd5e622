//! What the runtime is, for containerd 2 (`-info`) and people (`-v`).

use std::io::{self, Write};

use containerd_shim_protos::types::introspection::{RuntimeInfo, RuntimeVersion};
use protobuf::{Message, MessageField, well_known_types::any::Any};
use serde_json::{Value, json};
use thiserror::Error;

/// The runtime's name in containerd's configuration.
pub const RUNTIME_NAME: &str = "io.containerd.bulkhead.v2";

/// As what containerd knows the features, which are JSON.
const FEATURES: &str = "types.containerd.io/opencontainers/runtime-spec/1/features/Features";

/// Mount options that have an effect on all mounts below as well, with `r` before them.
const RECURSIVE: [&str; 18] = [
    "ro",
    "rw",
    "nosuid",
    "suid",
    "nodev",
    "dev",
    "noexec",
    "exec",
    "relatime",
    "norelatime",
    "noatime",
    "atime",
    "strictatime",
    "nostrictatime",
    "nodiratime",
    "diratime",
    "nosymfollow",
    "symfollow",
];

/// Those that have not.
const OTHERS: [&str; 14] = [
    "bind",
    "rbind",
    "private",
    "rprivate",
    "shared",
    "rshared",
    "slave",
    "rslave",
    "unbindable",
    "runbindable",
    "remount",
    "idmap",
    "ridmap",
    "tmpcopyup",
];

/// What of the OCI specification there is, for containerd and, by way of it, for the kubelet.
/// <https://github.com/opencontainers/runtime-spec/blob/v1.2.1/features.md>
fn features() -> Value {
    let recursive = RECURSIVE.iter().map(|option| format!("r{option}"));
    let plain = RECURSIVE.iter().chain(&OTHERS).map(|it| (*it).to_owned());
    let mount_options: Vec<String> = plain.chain(recursive).collect();
    json!({
        "ociVersionMin": "1.0.0",
        "ociVersionMax": "1.2.1",
        "hooks": [
            "prestart", "createRuntime", "createContainer", "startContainer", "poststart",
            "poststop",
        ],
        "mountOptions": mount_options,
        "linux": {
            "namespaces": [
                "cgroup", "ipc", "mount", "network", "pid", "time", "user", "uts",
            ],
            "cgroup": { "v1": false, "v2": true, "systemd": false, "rdma": false },
            "seccomp": { "enabled": true },
            "apparmor": { "enabled": true },
            "selinux": { "enabled": false },
            "intelRdt": { "enabled": false },
            "mountExtensions": { "idmap": { "enabled": true } },
        },
    })
}

/// Why nothing could be told.
#[derive(Debug, Error)]
pub enum InfoError {
    /// The message cannot be encoded.
    #[error("Cannot encode the runtime's description")]
    Encode(#[source] protobuf::Error),
    /// Standard output is closed.
    #[error("Cannot write the runtime's description")]
    Write(#[source] io::Error),
}

/// Writes a bare `RuntimeInfo` to standard output.
pub fn run() -> Result<(), InfoError> {
    let info = RuntimeInfo {
        name: RUNTIME_NAME.to_owned(),
        version: MessageField::some(RuntimeVersion {
            version: env!("CARGO_PKG_VERSION").to_owned(),
            ..RuntimeVersion::default()
        }),
        features: MessageField::some(Any {
            type_url: FEATURES.to_owned(),
            value: features().to_string().into_bytes(),
            ..Any::default()
        }),
        ..RuntimeInfo::default()
    };
    let bytes = info.write_to_bytes().map_err(InfoError::Encode)?;
    io::stdout().write_all(&bytes).map_err(InfoError::Write)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kubernetes_finds_what_it_asks_for() {
        let features = features();
        let options = features["mountOptions"].as_array().unwrap();
        for needed in ["rro", "rbind", "idmap", "ro"] {
            assert!(options.contains(&json!(needed)), "{needed}");
        }
        assert_eq!(
            features["linux"]["mountExtensions"]["idmap"]["enabled"],
            true
        );
    }
}
