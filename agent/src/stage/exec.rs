//! The command of a process: how it is found, what it is given, and how it is run.

use std::{
    collections::HashSet,
    convert::Infallible,
    ffi::CString,
    os::unix::ffi::OsStrExt,
    path::{Path, PathBuf},
};

use nix::errno::Errno;
use oci_spec::runtime::Process;
use rustix::fs::{Access, AtFlags, FileType};
use thiserror::Error;

use super::{StageError, users};

/// Why a command cannot be run. Scripts and Docker know these texts.
#[derive(Debug, Error, PartialEq, Eq)]
pub enum ExecError {
    /// A bare name that no directory of `$PATH` has.
    #[error("exec: {0:?}: executable file not found in $PATH")]
    NotInPath(String),
    /// A path that does not exist.
    #[error("exec: {0:?}: stat {0}: no such file or directory")]
    Missing(String),
    /// A path that cannot be run.
    #[error("exec: {path:?}: {}", reason(*errno))]
    Refused {
        /// As the spec has it.
        path: String,
        /// Why.
        errno: Errno,
    },
    /// The execve itself failed.
    #[error("exec {path}: {}", reason(*errno))]
    Failed {
        /// What was found.
        path: String,
        /// The kernel's answer.
        errno: Errno,
    },
}

/// The system's words for an error, as they are written everywhere but in Rust.
fn reason(errno: Errno) -> String {
    errno.desc().to_lowercase()
}

/// A command that is ready to run.
#[derive(Debug)]
pub struct Program {
    path: PathBuf,
    arguments: Vec<CString>,
    environment: Vec<CString>,
}

impl Program {
    /// Finds the command of a process as the present user in the present directory.
    pub fn find(process: &Process, uid: u32) -> Result<Self, StageError> {
        let arguments = process.args().as_deref().unwrap_or_default();
        let name = arguments.first().map(String::as_str).unwrap_or_default();
        let given = process.env().as_deref().unwrap_or_default();
        let environment = environment(given, || users::home(uid));
        let path = look_up(name, value(&environment, "PATH").unwrap_or_default())?;
        let c_strings = |strings: &[String]| -> Result<Vec<CString>, StageError> {
            let strings = strings.iter().map(|string| CString::new(string.as_str()));
            strings
                .collect::<Result<_, _>>()
                .map_err(|_| StageError::Invalid("a NUL byte in args or env".into()))
        };
        Ok(Self {
            path,
            arguments: c_strings(arguments)?,
            environment: c_strings(&environment)?,
        })
    }

    /// Becomes the command. Returns only why not.
    pub fn execute(&self) -> ExecError {
        let failed = |errno| ExecError::Failed {
            path: self.path.display().to_string(),
            errno,
        };
        let Ok(path) = CString::new(self.path.as_os_str().as_bytes()) else {
            return failed(Errno::EINVAL);
        };
        let result: Result<Infallible, Errno> =
            nix::unistd::execve(&path, &self.arguments, &self.environment);
        match result {
            Err(errno) => failed(errno),
            Ok(never) => match never {},
        }
    }
}

/// Goes to the process's working directory.
pub fn change_directory(process: &Process) -> Result<(), StageError> {
    let cwd = process.cwd();
    rustix::process::chdir(cwd).map_err(StageError::system(format!(
        "chdir to cwd ({:?}) set in config.json",
        cwd
    )))?;
    // A directory that was opened outside this root has a path outside it.
    let real = rustix::process::getcwd(Vec::new())
        .map_err(StageError::system("find the working directory"))?;
    if real.as_bytes().starts_with(b"/") {
        return Ok(());
    }
    Err(StageError::Invalid(
        "the working directory is outside the container's root".into(),
    ))
}

/// The environment as given, each variable once with its last value, plus `HOME` if it is missing or
/// empty.
fn environment(given: &[String], home: impl FnOnce() -> String) -> Vec<String> {
    let name = |variable: &str| variable.split('=').next().unwrap_or_default().to_owned();
    let mut seen = HashSet::new();
    let mut all: Vec<String> = given
        .iter()
        .rev()
        .filter(|variable| seen.insert(name(variable)))
        .cloned()
        .collect();
    all.reverse();
    if value(&all, "HOME").is_none_or(str::is_empty) {
        all.retain(|variable| !variable.starts_with("HOME="));
        all.push(format!("HOME={}", home()));
    }
    all
}

/// The value of a variable.
fn value<'a>(environment: &'a [String], name: &str) -> Option<&'a str> {
    let mut pairs = environment
        .iter()
        .filter_map(|variable| variable.split_once('='));
    pairs.find(|(key, _)| *key == name).map(|(_, value)| value)
}

/// Finds a command by the rules of a shell: a name with a slash is a path, another one is looked
/// for in the directories of `$PATH`.
fn look_up(name: &str, path: &str) -> Result<PathBuf, ExecError> {
    if name.contains('/') {
        return match check(Path::new(name)) {
            Ok(()) => Ok(PathBuf::from(name)),
            Err(Errno::ENOENT) => Err(ExecError::Missing(name.to_owned())),
            Err(errno) => Err(ExecError::Refused {
                path: name.to_owned(),
                errno,
            }),
        };
    }
    let directories = path
        .split(':')
        .map(|dir| if dir.is_empty() { "." } else { dir });
    let candidates = directories.map(|dir| Path::new(dir).join(name));
    let mut found = candidates.filter(|candidate| !name.is_empty() && check(candidate).is_ok());
    found
        .next()
        .ok_or_else(|| ExecError::NotInPath(name.to_owned()))
}

/// Whether a path can be run by the effective user.
fn check(path: &Path) -> Result<(), Errno> {
    let raw = |errno: rustix::io::Errno| Errno::from_raw(errno.raw_os_error());
    let mode = rustix::fs::stat(path).map_err(raw)?.st_mode;
    if FileType::from_raw_mode(mode).is_dir() {
        return Err(Errno::EISDIR);
    }
    rustix::fs::accessat(rustix::fs::CWD, path, Access::EXEC_OK, AtFlags::EACCESS).map_err(raw)?;
    // Root is granted access by capability alone, but execve wants the bit.
    if mode & 0o111 == 0 {
        return Err(Errno::EACCES);
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::{fs, os::unix::fs::PermissionsExt};

    use super::*;

    #[test]
    fn home_is_added_only_if_it_is_missing() {
        let own = |list: &[&str]| list.iter().map(|&text| text.to_owned()).collect::<Vec<_>>();
        let home = || "/h".to_owned();
        assert_eq!(environment(&own(&["A=1"]), home), own(&["A=1", "HOME=/h"]));
        assert_eq!(
            environment(&own(&["HOME=/x", "A=1"]), home),
            own(&["HOME=/x", "A=1"])
        );
        assert_eq!(environment(&own(&["HOME="]), home), own(&["HOME=/h"]));
        assert_eq!(
            environment(&own(&["HOME=/x", "HOME="]), home),
            own(&["HOME=/h"])
        );
    }

    #[test]
    fn a_variable_that_comes_twice_has_its_last_value() {
        let own = |list: &[&str]| list.iter().map(|&text| text.to_owned()).collect::<Vec<_>>();
        let given = own(&["A=1", "HOME=/x", "AB=2", "A=3", "A=4=5"]);
        assert_eq!(
            environment(&given, || unreachable!()),
            own(&["HOME=/x", "AB=2", "A=4=5"])
        );
    }

    #[test]
    fn commands_are_found_by_the_rules() {
        let dir = tempfile::tempdir().unwrap();
        let at = |name: &str| dir.path().join(name).to_str().unwrap().to_owned();
        fs::create_dir(at("first")).unwrap();
        fs::create_dir_all(at("second/tool")).unwrap();
        fs::create_dir(at("third")).unwrap();
        for (file, mode) in [("first/plain", 0o644), ("third/tool", 0o755)] {
            fs::write(at(file), "").unwrap();
            fs::set_permissions(at(file), fs::Permissions::from_mode(mode)).unwrap();
        }
        let path = [at("missing"), at("first"), at("second"), at("third")].join(":");
        assert_eq!(look_up("tool", &path), Ok(PathBuf::from(at("third/tool"))));
        let error = look_up("plain", &path).unwrap_err().to_string();
        assert_eq!(error, "exec: \"plain\": executable file not found in $PATH");
        let error = look_up(&at("first/plain"), &path).unwrap_err().to_string();
        assert!(
            error.ends_with("/first/plain\": permission denied"),
            "{error}"
        );
        let error = look_up(&at("first"), &path).unwrap_err().to_string();
        assert!(error.ends_with("/first\": is a directory"), "{error}");
        let error = look_up("/no/such", &path).unwrap_err().to_string();
        assert_eq!(
            error,
            "exec: \"/no/such\": stat /no/such: no such file or directory"
        );
        assert!(look_up("", &path).is_err());
    }
}
