//! `/etc/bulkhead/config.toml`

use std::{
    collections::{BTreeSet, HashMap},
    env, fs, io,
    num::ParseIntError,
    path::{Path, PathBuf},
};

use bulkhead_vmm_control::VmConfig;
use serde::Deserialize;
use thiserror::Error;

use crate::{ids::IdSpace, options::Options};

/// Where the configuration is, unless [`PATH_VARIABLE`] names another file.
pub const PATH: &str = "/etc/bulkhead/config.toml";

/// Environment variable with another path of the configuration, to try one without touching the
/// machine's. containerd hands its own environment to its shims, so only its owner can set it.
pub const PATH_VARIABLE: &str = "BULKHEAD_CONFIG";

/// Annotations that are for Bulkhead.
pub const ANNOTATION_PREFIX: &str = "io.bulkhead.";

/// What pods can be allowed to set for themselves.
const ANNOTATIONS: [&str; 7] = [
    "vcpus",
    "memory_mib",
    "kernel_args",
    "fs_requests_per_second",
    "fs_bytes_per_second",
    "net_packets_per_second",
    "net_bytes_per_second",
];

/// Guest memory below this cannot hold kernel and initramfs.
const MIN_MEMORY_MIB: u32 = 32;

/// The most vCPUs: one byte of APIC identifier, 255 being broadcast.
pub const MAX_VCPUS: u8 = 254;

/// The settings of a machine. Every key has a default; unknown keys are errors.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Config {
    /// vCPUs of each VM.
    pub vcpus: u8,
    /// Memory of each VM in MiB.
    pub memory_mib: u32,
    /// Seconds for the guest's agent to answer after the pod's start.
    pub boot_timeout: u32,
    /// Added to the guest kernel's command line.
    pub kernel_args: String,
    /// File requests of a guest in a second; 0 is without a limit.
    pub fs_requests_per_second: u32,
    /// Bytes that a guest may read and write of files in a second; 0 is without a limit.
    pub fs_bytes_per_second: u64,
    /// Packets that each network interface of a guest may send, and as many that it may receive, in a
    /// second; 0 is without a limit.
    pub net_packets_per_second: u32,
    /// Bytes, likewise.
    pub net_bytes_per_second: u64,
    /// The keys that a pod may set for itself, by annotations `io.bulkhead.KEY`.
    pub allowed_annotations: BTreeSet<String>,
    /// Write each guest's console to `console.log` in its state directory.
    pub console: bool,
    /// What the shim logs.
    pub log_level: LogLevel,
    /// Directory of `vmlinux`, `initramfs.cpio` and `manifest.json`.
    pub guest_dir: PathBuf,
    /// The VMM's executable; by default `bulkhead-vmm` beside the shim's.
    pub vmm: Option<PathBuf>,
    /// Directory for the state of running pods.
    pub state_dir: PathBuf,
    /// The first host id that is set aside for pods.
    pub id_start: u32,
    /// How many ids are set aside.
    pub id_count: u32,
    /// How many of them each pod gets: its files can belong to the ids below this number.
    pub ids_per_pod: u32,
    /// Refuse to run where the host's cgroups cannot limit a VMM's memory and processes.
    pub cgroup_limits: bool,
    /// While a VMM runs on a core, its other hardware threads run nothing but that VMM.
    pub core_scheduling: bool,
}

/// How much is logged.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum LogLevel {
    /// Failures.
    Error,
    /// And what looks wrong.
    Warn,
    /// And what happens.
    Info,
    /// And how.
    Debug,
    /// And every step.
    Trace,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            vcpus: 1,
            memory_mib: 512,
            boot_timeout: 120,
            kernel_args: String::new(),
            fs_requests_per_second: 0,
            fs_bytes_per_second: 0,
            net_packets_per_second: 0,
            net_bytes_per_second: 0,
            allowed_annotations: BTreeSet::new(),
            console: false,
            log_level: LogLevel::Info,
            guest_dir: "/usr/lib/bulkhead".into(),
            vmm: None,
            state_dir: "/run/bulkhead".into(),
            // Between the ids that systemd gives to containers and those that it calls foreign.
            id_start: 0x7000_0000,
            id_count: 0x0ffe_0000,
            ids_per_pod: 0x4_0000,
            cgroup_limits: true,
            core_scheduling: false,
        }
    }
}

/// A configuration that cannot be used.
#[derive(Debug, Error)]
pub enum ConfigError {
    /// The file is there but cannot be read.
    #[error("Cannot read {path}")]
    Read {
        /// Its path.
        path: PathBuf,
        /// The system's error.
        #[source]
        source: io::Error,
    },
    /// A key or value is wrong; the text names it and its line.
    #[error("{path} is invalid: {text}")]
    Parse {
        /// Its path.
        path: PathBuf,
        /// Line, key and reason.
        text: String,
    },
    /// A value is out of its range.
    #[error("{path}: {key} = {value} is out of range: {range}")]
    Range {
        /// Its path.
        path: PathBuf,
        /// The key.
        key: &'static str,
        /// Its value.
        value: u32,
        /// What is possible.
        range: &'static str,
    },
    /// A pod wants to set what it may not.
    #[error(
        "The annotation {name} is not allowed on this machine; to allow it, add {key:?} to \
         allowed_annotations in the configuration"
    )]
    NotAllowed {
        /// The annotation.
        name: String,
        /// The key that it would set.
        key: String,
    },
    /// An annotation's value is no number, or too large a one.
    #[error("The annotation {name} = {value:?} is invalid")]
    Annotation {
        /// The annotation.
        name: String,
        /// Its value.
        value: String,
        /// What is wrong with it.
        #[source]
        source: ParseIntError,
    },
    /// The directory of the shim's executable is not known.
    #[error("Cannot find the directory of the shim's executable")]
    Executable(#[source] io::Error),
}

impl Config {
    /// Reads a pod's configuration: the one that its options name, which must be there, or else the
    /// machine's.
    pub fn of_pod(options: &Options) -> Result<Self, ConfigError> {
        match options {
            Options::None => Self::load(),
            Options::Text(text) => Self::parse(text, Path::new("ConfigBody")),
            Options::Path(path) => match fs::read_to_string(path) {
                Ok(text) => Self::parse(&text, path),
                Err(source) => Err(ConfigError::Read {
                    path: path.clone(),
                    source,
                }),
            },
        }
    }

    /// Reads the machine's configuration; a missing file means the defaults.
    pub fn load() -> Result<Self, ConfigError> {
        let path = env::var_os(PATH_VARIABLE).map_or_else(|| PATH.into(), PathBuf::from);
        match fs::read_to_string(&path) {
            Ok(text) => Self::parse(&text, &path),
            Err(source) if source.kind() == io::ErrorKind::NotFound => Ok(Self::default()),
            Err(source) => Err(ConfigError::Read { path, source }),
        }
    }

    fn parse(text: &str, path: &Path) -> Result<Self, ConfigError> {
        let config: Self = toml::from_str(text).map_err(|error| {
            let line = error
                .span()
                .map(|span| text[..span.start].matches('\n').count() + 1);
            let message = error.message().trim();
            ConfigError::Parse {
                path: path.to_owned(),
                text: match line {
                    Some(line) => format!("line {line}: {message}"),
                    None => message.to_owned(),
                },
            }
        })?;
        let unknown = config
            .allowed_annotations
            .iter()
            .find(|key| !ANNOTATIONS.contains(&key.as_str()));
        if let Some(key) = unknown {
            return Err(ConfigError::Parse {
                path: path.to_owned(),
                text: format!(
                    "allowed_annotations has {key:?}, which pods cannot set; they can set {}",
                    ANNOTATIONS.join(", ")
                ),
            });
        }
        config.check(path)?;
        Ok(config)
    }

    /// The configuration for a pod with these annotations.
    pub fn with_annotations(
        mut self,
        annotations: &HashMap<String, String>,
    ) -> Result<Self, ConfigError> {
        for (name, value) in annotations {
            let Some(key) = name.strip_prefix(ANNOTATION_PREFIX) else {
                continue;
            };
            if !self.allowed_annotations.contains(key) {
                return Err(ConfigError::NotAllowed {
                    name: name.clone(),
                    key: key.to_owned(),
                });
            }
            let set = match key {
                "vcpus" => value.parse().map(|value| self.vcpus = value),
                "memory_mib" => value.parse().map(|value| self.memory_mib = value),
                "fs_requests_per_second" => value
                    .parse()
                    .map(|value| self.fs_requests_per_second = value),
                "fs_bytes_per_second" => {
                    value.parse().map(|value| self.fs_bytes_per_second = value)
                }
                "net_packets_per_second" => value
                    .parse()
                    .map(|value| self.net_packets_per_second = value),
                "net_bytes_per_second" => {
                    value.parse().map(|value| self.net_bytes_per_second = value)
                }
                _ => {
                    self.kernel_args = value.clone();
                    Ok(())
                }
            };
            set.map_err(|source| ConfigError::Annotation {
                name: name.clone(),
                value: value.clone(),
                source,
            })?;
        }
        self.check(Path::new("the pod's annotations"))?;
        Ok(self)
    }

    /// Refuses values that are out of their range.
    fn check(&self, path: &Path) -> Result<(), ConfigError> {
        let config = self;
        let range = |key, value, range| ConfigError::Range {
            path: path.to_owned(),
            key,
            value,
            range,
        };
        if config.vcpus == 0 || config.vcpus > MAX_VCPUS {
            return Err(range("vcpus", config.vcpus.into(), "1 to 254"));
        }
        if config.memory_mib < MIN_MEMORY_MIB {
            return Err(range("memory_mib", config.memory_mib, "32 or more"));
        }
        if config.boot_timeout == 0 {
            return Err(range("boot_timeout", 0, "1 or more"));
        }
        if !config.ids().is_valid() {
            let text = "from id_start on, which is 1 or more, there must be ids for one pod \
                        below 4294967295";
            return Err(range("id_count", config.id_count, text));
        }
        Ok(())
    }

    /// The VM that the configuration describes.
    pub fn vm(&self) -> VmConfig {
        VmConfig {
            vcpus: self.vcpus,
            memory_mib: self.memory_mib,
            kernel_args: self.kernel_args.clone(),
            fs_requests_per_second: self.fs_requests_per_second,
            fs_bytes_per_second: self.fs_bytes_per_second,
            net_packets_per_second: self.net_packets_per_second,
            net_bytes_per_second: self.net_bytes_per_second,
            console: self.console,
        }
    }

    /// The host ids for pods.
    pub fn ids(&self) -> IdSpace {
        IdSpace {
            first: self.id_start,
            count: self.id_count,
            per_pod: self.ids_per_pod,
        }
    }

    /// The VMM's executable.
    pub fn vmm_path(&self) -> Result<PathBuf, ConfigError> {
        match &self.vmm {
            Some(path) => Ok(path.clone()),
            None => Ok(env::current_exe()
                .map_err(ConfigError::Executable)?
                .with_file_name("bulkhead-vmm")),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(text: &str) -> Result<Config, String> {
        Config::parse(text, Path::new("c.toml")).map_err(|error| error.to_string())
    }

    #[test]
    fn nothing_means_the_defaults() {
        assert_eq!(parse(""), Ok(Config::default()));
    }

    #[test]
    fn a_pod_may_have_another() {
        let text = |text: &str| Config::of_pod(&Options::Text(text.to_owned()));
        assert_eq!(text("vcpus = 2").unwrap().vcpus, 2);
        let error = text("cpus = 2").unwrap_err().to_string();
        assert!(error.contains("ConfigBody is invalid: line 1"), "{error}");
        let missing = Options::Path("/no/such/file".into());
        assert!(matches!(
            Config::of_pod(&missing),
            Err(ConfigError::Read { .. })
        ));
    }

    #[test]
    fn values_are_taken() {
        let config = parse("vcpus = 2\nmemory_mib = 256\nconsole = true\nlog_level = 'debug'\n");
        let config = config.unwrap();
        assert_eq!(config.vm().vcpus, 2);
        assert_eq!(config.vm().memory_mib, 256);
        assert!(config.console);
        assert_eq!(config.log_level, LogLevel::Debug);
    }

    #[test]
    fn errors_name_key_and_line() {
        let error = parse("vcpus = 1\nmemory = 5\n").unwrap_err();
        assert!(
            error.contains("line 2") && error.contains("`memory`"),
            "{error}"
        );
        let error = parse("vcpus = 1\n\nlog_level = 'loud'\n").unwrap_err();
        assert!(
            error.contains("line 3") && error.contains("`loud`"),
            "{error}"
        );
        for wrong in [
            "vcpus = 0",
            "memory_mib = 31",
            "boot_timeout = 0",
            "id_count = 9",
        ] {
            let error = parse(wrong).unwrap_err();
            assert!(error.contains(wrong), "{error}");
        }
    }

    #[test]
    fn pods_set_only_what_they_may() {
        let config = |text: &str| Config::parse(text, Path::new("c.toml")).unwrap();
        let annotate = |text: &str, name: &str, value: &str| {
            let annotations = HashMap::from([
                ("other.io/vcpus".to_owned(), "7".to_owned()),
                (name.to_owned(), value.to_owned()),
            ]);
            config(text)
                .with_annotations(&annotations)
                .map_err(|error| error.to_string())
        };
        let allowed = "allowed_annotations = ['vcpus', 'kernel_args']";
        let changed = annotate(allowed, "io.bulkhead.vcpus", "3").unwrap();
        assert_eq!((changed.vcpus, changed.memory_mib), (3, 512));
        let changed = annotate(allowed, "io.bulkhead.kernel_args", "a=b").unwrap();
        assert_eq!(changed.kernel_args, "a=b");
        for (text, name, value, wanted) in [
            (
                "",
                "io.bulkhead.kernel_args",
                "a=b",
                "add \"kernel_args\" to",
            ),
            (allowed, "io.bulkhead.memory_mib", "64", "not allowed"),
            (allowed, "io.bulkhead.vcpus", "many", "is invalid"),
            (allowed, "io.bulkhead.vcpus", "0", "out of range"),
            (allowed, "io.bulkhead.id_start", "0", "not allowed"),
        ] {
            let error = annotate(text, name, value).unwrap_err();
            assert!(error.contains(wanted), "{error}");
        }
        let error = parse("allowed_annotations = ['id_start']").unwrap_err();
        assert!(error.contains("pods cannot set"), "{error}");
    }
}
