//! The host as its files show it, below a root that tests may choose.

use std::{
    fs, io,
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
};

use thiserror::Error;

use crate::config::{Config, ConfigError};

/// A file of the host that is there but cannot be read.
#[derive(Debug, Error)]
#[error("Cannot read {path}")]
pub struct Unreadable {
    /// Its path.
    pub path: String,
    /// The system's error.
    #[source]
    pub source: io::Error,
}

/// A host to look at.
#[derive(Debug)]
pub struct Machine {
    root: PathBuf,
    /// Bulkhead's configuration, or why there is none.
    pub config: Result<Config, ConfigError>,
}

impl Machine {
    /// The host that this runs on.
    pub fn this() -> Self {
        Self {
            root: "/".into(),
            config: Config::load(),
        }
    }

    /// Where the file with this absolute path is.
    pub fn path(&self, path: &str) -> PathBuf {
        self.root.join(path.trim_start_matches('/'))
    }

    /// Whether there is a file with this absolute path.
    pub fn has(&self, path: &str) -> bool {
        self.path(path).exists()
    }

    /// What a file says, without the space around it; `None` if it is not there.
    pub fn read(&self, path: &str) -> Result<Option<String>, Unreadable> {
        match fs::read(self.path(path)) {
            Ok(bytes) => Ok(Some(String::from_utf8_lossy(&bytes).trim().to_owned())),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(source) => Err(Unreadable {
                path: path.to_owned(),
                source,
            }),
        }
    }

    /// The names in a directory, in order; none if it is not there.
    pub fn names(&self, path: &str) -> Result<Vec<String>, Unreadable> {
        let unreadable = |source| Unreadable {
            path: path.to_owned(),
            source,
        };
        let entries = match fs::read_dir(self.path(path)) {
            Ok(entries) => entries,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
            Err(error) => return Err(unreadable(error)),
        };
        let mut names = Vec::new();
        for entry in entries {
            let name = entry.map_err(unreadable)?.file_name();
            names.push(name.to_string_lossy().into_owned());
        }
        names.sort();
        Ok(names)
    }

    /// A flag of the first processor, as `/proc/cpuinfo` names it.
    pub fn has_cpu_flag(&self, flag: &str) -> Result<bool, Unreadable> {
        let cpuinfo = self.read("/proc/cpuinfo")?.unwrap_or_default();
        Ok(cpu_flags(&cpuinfo).any(|found| found == flag))
    }
}

fn cpu_flags(cpuinfo: &str) -> impl Iterator<Item = &str> {
    cpuinfo
        .lines()
        .filter_map(|line| line.split_once(':'))
        .find(|(key, _)| key.trim() == "flags")
        .map_or("", |(_, flags)| flags)
        .split_whitespace()
}

/// Whether this is a file that somebody may execute.
pub fn is_program(path: &Path) -> bool {
    fs::metadata(path)
        .is_ok_and(|metadata| metadata.is_file() && metadata.permissions().mode() & 0o111 != 0)
}

/// Major and minor number at the start of a version.
pub fn version(text: &str) -> Option<(u32, u32)> {
    let mut parts = text.splitn(3, '.').map(|part| {
        let end = part.find(|c: char| !c.is_ascii_digit());
        part[..end.unwrap_or(part.len())].parse().ok()
    });
    Some((parts.next()??, parts.next()??))
}

#[cfg(test)]
impl Machine {
    /// A machine of these files, with the default configuration.
    pub fn of(files: &[(&str, &str)]) -> (tempfile::TempDir, Self) {
        let directory = tempfile::tempdir().unwrap();
        let machine = Self {
            root: directory.path().to_owned(),
            config: Ok(Config::default()),
        };
        for (path, text) in files {
            let path = machine.path(path);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, text).unwrap();
        }
        (directory, machine)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_are_read_up_to_their_minor_number() {
        for (text, expected) in [
            ("6.12.43+deb13-cloud-amd64", Some((6, 12))),
            ("5.19-rc1", Some((5, 19))),
            ("1.7.0-beta.1", Some((1, 7))),
            ("6", None),
            ("", None),
            ("containerd.io", None),
        ] {
            assert_eq!(version(text), expected, "{text:?}");
        }
    }

    #[test]
    fn flags_are_whole_words_of_the_flags_line() {
        let cpuinfo = "processor\t: 0\nmodel name\t: vmx\nflags\t\t: fpu svm_lock hypervisor\n\
                       vmx flags\t: vnmi\nbugs\t\t: spectre_v1\n";
        let (_directory, machine) = Machine::of(&[("/proc/cpuinfo", cpuinfo)]);
        assert!(machine.has_cpu_flag("hypervisor").unwrap());
        for absent in ["svm", "vmx", "vnmi"] {
            assert!(!machine.has_cpu_flag(absent).unwrap(), "{absent}");
        }
    }

    #[test]
    fn a_missing_file_is_no_error_but_an_unreadable_one_is() {
        let (_directory, machine) = Machine::of(&[("/proc/sys/kernel/osrelease", "6.12\n")]);
        let read = machine.read("/proc/sys/kernel/osrelease").unwrap();
        assert_eq!(read.as_deref(), Some("6.12"));
        assert_eq!(machine.read("/proc/swaps").unwrap(), None);
        assert_eq!(machine.names("/sys").unwrap(), Vec::<String>::new());
        let error = machine.read("/proc/sys/kernel").unwrap_err();
        assert_eq!(error.to_string(), "Cannot read /proc/sys/kernel");
    }
}
