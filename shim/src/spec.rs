//! The parts of the OCI runtime specification that concern the host.
//!
//! The guest gets the bundle's `config.json` byte for byte; this is only what the shim itself
//! must know. <https://github.com/opencontainers/runtime-spec/blob/v1.2.1/config.md>

use std::{collections::HashMap, fs, io, path::Path, path::PathBuf};

use serde::Deserialize;
use thiserror::Error;

/// Annotations that name the pod of a container, the first that is there.
const GROUP_ANNOTATIONS: [&str; 2] = [
    "io.containerd.runc.v2.group",
    "io.kubernetes.cri.sandbox-id",
];

/// A `config.json` that cannot be used.
#[derive(Debug, Error)]
pub enum SpecError {
    /// The file cannot be read.
    #[error("Cannot read {path}")]
    Read {
        /// Its path.
        path: PathBuf,
        /// The system's error.
        #[source]
        source: io::Error,
    },
    /// The file is not what it should be.
    #[error("Cannot parse {path}")]
    Parse {
        /// Its path.
        path: PathBuf,
        /// What is wrong, and where.
        #[source]
        source: serde_json::Error,
    },
    /// The group's name would leave its directory.
    #[error("Annotation {annotation} has the invalid value {value:?}")]
    Group {
        /// The annotation's key.
        annotation: &'static str,
        /// Its value.
        value: String,
    },
}

/// What the host reads of a specification.
#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Spec {
    /// Version of the specification.
    #[serde(default)]
    pub oci_version: String,
    /// Free-form notes to the runtime.
    pub annotations: Option<HashMap<String, String>>,
    /// The root file system.
    pub root: Option<Root>,
    /// The mounts, in order.
    pub mounts: Option<Vec<Mount>>,
    /// The container's process.
    pub process: Option<Process>,
    /// What only Linux has.
    pub linux: Option<Linux>,
    /// Programs to run on the host.
    pub hooks: Option<Hooks>,
}

/// `root`
#[derive(Debug, Deserialize)]
pub struct Root {
    /// Absolute, or relative to the bundle.
    pub path: PathBuf,
}

/// An element of `mounts`
#[derive(Debug, Clone, Deserialize)]
pub struct Mount {
    /// Where in the container.
    pub destination: PathBuf,
    /// Type of the file system.
    #[serde(rename = "type", default)]
    pub kind: String,
    /// What is mounted.
    #[serde(default)]
    pub source: PathBuf,
    /// Options in the style of fstab(5).
    pub options: Option<Vec<String>>,
    /// Users of a mount with mapped ids.
    #[serde(flatten)]
    pub ids: IdMappings,
}

/// `uidMappings` and `gidMappings`, of a mount or of the container's user namespace
#[derive(Debug, Clone, Default, PartialEq, Eq, Hash, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct IdMappings {
    /// Of users.
    #[serde(default)]
    pub uid_mappings: Option<Vec<IdMapping>>,
    /// Of groups.
    #[serde(default)]
    pub gid_mappings: Option<Vec<IdMapping>>,
}

impl IdMappings {
    /// Whether there are any.
    pub fn is_empty(&self) -> bool {
        let empty = |list: &Option<Vec<_>>| list.as_ref().is_none_or(Vec::is_empty);
        empty(&self.uid_mappings) && empty(&self.gid_mappings)
    }
}

/// An element of `uidMappings` or `gidMappings`
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct IdMapping {
    /// The first id inside, or of the mounted file system.
    #[serde(rename = "containerID")]
    pub container: u32,
    /// The first id outside, or by which a mount shows them.
    #[serde(rename = "hostID")]
    pub host: u32,
    /// How many.
    pub size: u32,
}

impl Mount {
    fn has(&self, wanted: &str) -> bool {
        self.options.iter().flatten().any(|option| option == wanted)
    }

    /// Whether the source is a file or directory of the host.
    pub fn is_bind(&self) -> bool {
        // A remount only changes what is there.
        let bound = self.kind == "bind" || self.has("bind") || self.has("rbind");
        bound && !self.has("remount")
    }

    /// Whether mounts below the source come along.
    pub fn is_recursive(&self) -> bool {
        self.has("rbind")
    }

    /// By what ids it shows its files, if not by their own: its own mappings, or those of the
    /// container's user namespace, `users`.
    pub fn mapped_ids<'a>(&'a self, users: &'a IdMappings) -> Option<&'a IdMappings> {
        if !self.ids.is_empty() {
            return Some(&self.ids);
        }
        (self.has("idmap") || self.has("ridmap")).then_some(users)
    }

    /// Whether the container must not write to it.
    pub fn is_read_only(&self) -> bool {
        // The last one counts, as for mount(8).
        self.options
            .iter()
            .flatten()
            .rev()
            .find(|option| *option == "ro" || *option == "rw")
            .is_some_and(|option| option == "ro")
    }
}

/// `process`
#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Process {
    /// Size of the terminal, if there is one.
    pub console_size: Option<ConsoleSize>,
    /// The host's OOM preference.
    pub oom_score_adj: Option<i32>,
    /// Name of an AppArmor profile.
    pub apparmor_profile: Option<String>,
}

/// `process.consoleSize`, in characters
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Deserialize)]
pub struct ConsoleSize {
    /// Lines.
    #[serde(default)]
    pub height: u32,
    /// Columns.
    #[serde(default)]
    pub width: u32,
}

/// `linux`
#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Linux {
    /// Where in the host's cgroup hierarchy.
    #[serde(default)]
    pub cgroups_path: String,
    /// Namespaces to create or join.
    pub namespaces: Option<Vec<Namespace>>,
    /// Limits.
    pub resources: Option<LinuxResources>,
    /// Of the container's user namespace.
    #[serde(flatten)]
    pub ids: IdMappings,
}

/// `linux.resources`
#[derive(Debug, Default, Deserialize)]
pub struct LinuxResources {
    /// Of CPU time.
    pub cpu: Option<Cpu>,
    /// Of memory.
    pub memory: Option<Memory>,
}

/// `linux.resources.memory`
#[derive(Debug, Default, Deserialize)]
pub struct Memory {
    /// In bytes; not positive is without a limit.
    pub limit: Option<i64>,
}

/// `linux.resources.cpu`
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
pub struct Cpu {
    /// Its share of a busy CPU, next to others; 0 is none.
    pub shares: Option<u64>,
    /// Time that it may run in each period, in microseconds; not positive is without a limit.
    pub quota: Option<i64>,
    /// The period, in microseconds.
    pub period: Option<u64>,
    /// The CPUs that it may run on, as a list of their numbers.
    pub cpus: Option<String>,
}

impl Cpu {
    /// Takes over the changes to times and shares; what they do not give, or give as 0, stays.
    pub fn change(&mut self, changes: &Self) {
        self.shares = changes.shares.filter(|new| *new != 0).or(self.shares);
        self.quota = changes.quota.filter(|new| *new != 0).or(self.quota);
        self.period = changes.period.filter(|new| *new != 0).or(self.period);
    }
}

/// An element of `linux.namespaces`
#[derive(Debug, Deserialize)]
pub struct Namespace {
    /// Type of the namespace.
    #[serde(rename = "type")]
    pub kind: String,
    /// An existing namespace to join; empty for a new one.
    #[serde(default)]
    pub path: PathBuf,
}

/// `hooks`
#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Hooks {
    /// Run on the host before the container is set up (deprecated, used by Docker 26).
    #[serde(default)]
    pub prestart: Vec<Hook>,
    /// Run on the host before the container is set up.
    #[serde(default)]
    pub create_runtime: Vec<Hook>,
    /// Run in the guest, in the container's namespaces, before its root is entered.
    #[serde(default)]
    pub create_container: Vec<Hook>,
    /// Run in the guest, in the container, before its process.
    #[serde(default)]
    pub start_container: Vec<Hook>,
    /// Run on the host after the process has started.
    #[serde(default)]
    pub poststart: Vec<Hook>,
    /// Run on the host after the container is deleted.
    #[serde(default)]
    pub poststop: Vec<Hook>,
}

/// A program to run.
#[derive(Debug, Clone, Deserialize)]
pub struct Hook {
    /// Absolute path of the executable.
    pub path: PathBuf,
    /// `argv`, the name first.
    #[serde(default)]
    pub args: Vec<String>,
    /// `KEY=value`.
    #[serde(default)]
    pub env: Vec<String>,
    /// Seconds until it is killed.
    pub timeout: Option<u64>,
}

impl Spec {
    /// The limits of CPU time.
    pub fn cpu(&self) -> Cpu {
        let cpu = self.resources().and_then(|resources| resources.cpu.clone());
        cpu.unwrap_or_default()
    }

    /// The CPUs that the container may run on.
    pub fn cpuset(&self) -> Option<&str> {
        self.resources()?.cpu.as_ref()?.cpus.as_deref()
    }

    /// The limit of memory in bytes.
    pub fn memory_limit(&self) -> Option<i64> {
        self.resources()?.memory.as_ref()?.limit
    }

    fn resources(&self) -> Option<&LinuxResources> {
        self.linux.as_ref()?.resources.as_ref()
    }

    /// Hooks of a kind.
    pub fn hooks_of(&self, kind: fn(&Hooks) -> &Vec<Hook>) -> &[Hook] {
        self.hooks.as_ref().map(kind).map_or(&[], Vec::as_slice)
    }

    /// Whether there are hooks that run before the container is set up.
    pub fn has_early_hooks(&self) -> bool {
        self.hooks
            .as_ref()
            .is_some_and(|hooks| !hooks.prestart.is_empty() || !hooks.create_runtime.is_empty())
    }

    /// Parses a `config.json`; `path` is for the error.
    pub fn parse(bytes: &[u8], path: &Path) -> Result<Self, SpecError> {
        serde_json::from_slice(bytes).map_err(|source| SpecError::Parse {
            path: path.to_owned(),
            source,
        })
    }

    /// Reads the `config.json` of a bundle, with its bytes.
    pub fn read(bundle: &Path) -> Result<(Self, Vec<u8>), SpecError> {
        let path = bundle.join("config.json");
        let bytes = fs::read(&path).map_err(|source| SpecError::Read {
            path: path.clone(),
            source,
        })?;
        Ok((Self::parse(&bytes, &path)?, bytes))
    }

    /// Like [`Spec::read`], but the file may be missing: containerd's sandbox API starts shims without
    /// one.
    pub fn read_if_there(bundle: &Path) -> Result<Option<Self>, SpecError> {
        match Self::read(bundle) {
            Ok((spec, _)) => Ok(Some(spec)),
            Err(SpecError::Read { source, .. }) if source.kind() == io::ErrorKind::NotFound => {
                Ok(None)
            }
            Err(error) => Err(error),
        }
    }

    /// Name of the pod: `id` itself unless an annotation names another container's.
    pub fn group(&self, id: &str) -> Result<String, SpecError> {
        let Some(annotations) = &self.annotations else {
            return Ok(id.to_owned());
        };
        for annotation in GROUP_ANNOTATIONS {
            if let Some(value) = annotations.get(annotation) {
                // It becomes the name of a directory.
                if value.is_empty() || value.contains('/') || value == "." || value == ".." {
                    return Err(SpecError::Group {
                        annotation,
                        value: value.clone(),
                    });
                }
                return Ok(value.clone());
            }
        }
        Ok(id.to_owned())
    }

    /// Ids of the container's user namespace; empty when it has none.
    pub fn user_ids(&self) -> IdMappings {
        let linux = self.linux.as_ref();
        linux.map(|linux| linux.ids.clone()).unwrap_or_default()
    }

    /// `linux.cgroupsPath`, empty when not given.
    pub fn cgroups_path(&self) -> &str {
        self.linux
            .as_ref()
            .map_or("", |linux| linux.cgroups_path.as_str())
    }

    /// The network namespace: `None` for the host's, an empty path for a new one.
    pub fn network_namespace(&self) -> Option<&Path> {
        self.linux
            .iter()
            .flat_map(|linux| linux.namespaces.iter().flatten())
            .find(|namespace| namespace.kind == "network")
            .map(|namespace| namespace.path.as_path())
    }

    /// The namespaces that are named by a process which is in them: type and pid.
    pub fn namespaces_of_processes(&self) -> impl Iterator<Item = (&str, u32)> {
        let linux = self.linux.iter();
        let namespaces = linux.flat_map(|linux| linux.namespaces.iter().flatten());
        namespaces.filter_map(|namespace| {
            let (pid, name) = namespace
                .path
                .to_str()?
                .strip_prefix("/proc/")?
                .split_once("/ns/")?;
            let kind = if name == "net" { "network" } else { name };
            (kind == namespace.kind).then_some((kind, pid.parse().ok()?))
        })
    }

    /// `process.consoleSize`, zero when not given.
    pub fn console_size(&self) -> ConsoleSize {
        self.process
            .as_ref()
            .and_then(|process| process.console_size)
            .unwrap_or_default()
    }

    /// `process.apparmorProfile`
    pub fn apparmor_profile(&self) -> Option<&str> {
        let process = self.process.as_ref()?;
        process.apparmor_profile.as_deref()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn spec(text: &str) -> Spec {
        Spec::parse(text.as_bytes(), Path::new("config.json")).unwrap()
    }

    #[test]
    fn the_pod_is_named_by_the_first_annotation() {
        let both = spec(
            r#"{"annotations":{"io.kubernetes.cri.sandbox-id":"b","io.containerd.runc.v2.group":"a"}}"#,
        );
        assert_eq!(both.group("c").unwrap(), "a");
        let one = spec(r#"{"annotations":{"io.kubernetes.cri.sandbox-id":"b"}}"#);
        assert_eq!(one.group("c").unwrap(), "b");
        assert_eq!(spec("{}").group("c").unwrap(), "c");
        let evil = spec(r#"{"annotations":{"io.kubernetes.cri.sandbox-id":"../b"}}"#);
        assert!(matches!(evil.group("c"), Err(SpecError::Group { .. })));
    }

    #[test]
    fn binds_are_told_by_type_or_option() {
        let mounts = spec(
            r#"{"mounts":[
                {"destination":"/a","type":"bind","source":"/x","options":["rbind","ro"]},
                {"destination":"/b","type":"none","source":"/y","options":["bind","ro","rw"]},
                {"destination":"/proc","type":"proc","source":"proc"}]}"#,
        )
        .mounts
        .unwrap();
        assert!(mounts[0].is_bind() && mounts[0].is_recursive() && mounts[0].is_read_only());
        assert!(mounts[1].is_bind() && !mounts[1].is_recursive() && !mounts[1].is_read_only());
        assert!(!mounts[2].is_bind());
    }

    #[test]
    fn namespaces_may_be_named_by_processes() {
        let spec = spec(
            r#"{"linux":{"namespaces":[
                {"type":"pid","path":"/proc/12/ns/pid"},{"type":"ipc","path":"/proc/13/ns/uts"},
                {"type":"uts","path":"/run/uts"},{"type":"user","path":"/proc/self/ns/user"},
                {"type":"mount"},{"type":"network","path":"/proc/14/ns/net"}]}}"#,
        );
        let found: Vec<_> = spec.namespaces_of_processes().collect();
        assert_eq!(found, [("pid", 12), ("network", 14)]);
    }

    #[test]
    fn mounts_have_ids_of_their_own_or_of_the_user_namespace() {
        let spec = spec(
            r#"{"mounts":[
                {"destination":"/a","type":"bind","source":"/a","options":["ridmap"]},
                {"destination":"/b","type":"bind","source":"/b",
                 "uidMappings":[{"containerID":0,"hostID":7,"size":1}]},
                {"destination":"/c","type":"bind","source":"/c"}],
                "linux":{"uidMappings":[{"containerID":0,"hostID":9,"size":1}]}}"#,
        );
        let users = spec.user_ids();
        let first = |mount: &Mount| {
            let ids = mount.mapped_ids(&users)?.uid_mappings.clone()?;
            Some(ids[0].host)
        };
        let found: Vec<_> = spec.mounts.as_ref().unwrap().iter().map(first).collect();
        assert_eq!(found, [Some(9), Some(7), None]);
    }

    #[test]
    fn the_network_namespace_is_new_joined_or_the_hosts() {
        assert_eq!(spec("{}").network_namespace(), None);
        assert_eq!(
            spec(r#"{"linux":{"namespaces":[{"type":"pid"},{"type":"network"}]}}"#)
                .network_namespace(),
            Some(Path::new(""))
        );
        assert_eq!(
            spec(r#"{"linux":{"namespaces":[{"type":"network","path":"/run/netns/x"}]}}"#)
                .network_namespace(),
            Some(Path::new("/run/netns/x"))
        );
    }
}
