//! Builds the guest's kernel from the distribution's kernel source and `guest.config`.
//!
//! [`build`] is the one entry: it gives a ready `vmlinux`, from the cache when its inputs have not
//! changed. What is in the kernel and why stands in `guest.config` and in `README.md`.

mod build;
pub mod config;
mod tools;
mod vmlinux;

use std::ffi::OsString;
use std::path::{Path, PathBuf};

pub use build::{BuildError, Kernel, build};

/// The reviewed configuration that the kernel is built from.
pub const FRAGMENT: &str = include_str!("../guest.config");

/// The directory that built kernels are kept in: `$BULKHEAD_CACHE`, else
/// `$XDG_CACHE_HOME/bulkhead`, else `~/.cache/bulkhead`.
///
/// Returns `None` when none of the three variables is set to an absolute path.
pub fn cache_dir() -> Option<PathBuf> {
    cache_dir_from(|name| std::env::var_os(name))
}

fn cache_dir_from(variable: impl Fn(&str) -> Option<OsString>) -> Option<PathBuf> {
    let absolute = |name: &str| {
        variable(name)
            .map(PathBuf::from)
            .filter(|path| path.is_absolute())
    };
    absolute("BULKHEAD_CACHE")
        .or_else(|| absolute("XDG_CACHE_HOME").map(|path| path.join("bulkhead")))
        .or_else(|| absolute("HOME").map(|path| path.join(Path::new(".cache/bulkhead"))))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cache_directory_follows_the_most_specific_variable() {
        let with = |set: &[(&str, &str)]| {
            cache_dir_from(|name| {
                set.iter()
                    .find(|(key, _)| *key == name)
                    .map(|(_, value)| OsString::from(value))
            })
        };
        let home = ("HOME", "/home/u");
        let xdg = ("XDG_CACHE_HOME", "/x");
        assert_eq!(with(&[home]), Some("/home/u/.cache/bulkhead".into()));
        assert_eq!(with(&[home, xdg]), Some("/x/bulkhead".into()));
        assert_eq!(
            with(&[home, xdg, ("BULKHEAD_CACHE", "/c")]),
            Some("/c".into())
        );
        assert_eq!(
            with(&[home, ("XDG_CACHE_HOME", "relative")]),
            Some("/home/u/.cache/bulkhead".into())
        );
        assert_eq!(with(&[]), None);
    }
}
