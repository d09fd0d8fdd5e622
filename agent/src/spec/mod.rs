//! The OCI spec as it came from containerd, and the promise that nothing in it is dropped: what
//! is not applied is refused by name.

mod checks;
mod lossless;
mod update;

use std::{collections::HashSet, path::Path};

use nix::sys::stat::SFlag;
use oci_spec::runtime::{LinuxDeviceType, LinuxNamespace, LinuxNamespaceType, Process, Spec};
use serde::{Serialize, de::DeserializeOwned};
use thiserror::Error;

pub use self::update::merge_resources;

/// Why a spec is refused.
#[derive(Debug, Error)]
pub enum SpecError {
    /// Not the JSON of a spec.
    #[error("failed to read the OCI {what}")]
    Json {
        /// `spec` or `process`.
        what: &'static str,
        /// What the JSON parser says.
        #[source]
        source: serde_json::Error,
    },
    /// A field that nothing here knows.
    #[error("{field} is not supported in a microVM")]
    Unknown {
        /// Its path from the root of the document.
        field: String,
    },
    /// A field that must be there.
    #[error("{field} is missing")]
    Missing {
        /// Its path.
        field: &'static str,
    },
    /// A known field that cannot be applied.
    #[error("{field} is not supported: {reason}")]
    Unsupported {
        /// Its path.
        field: String,
        /// Why not.
        reason: String,
    },
    /// A value that makes no sense.
    #[error("{field} is invalid: {reason}")]
    Invalid {
        /// Its path.
        field: String,
        /// What is wrong with it.
        reason: String,
    },
}

impl SpecError {
    /// A field that is known and cannot be applied.
    pub fn unsupported(field: impl Into<String>, reason: impl Into<String>) -> Self {
        Self::Unsupported {
            field: field.into(),
            reason: reason.into(),
        }
    }

    /// A value that makes no sense.
    pub fn invalid(field: impl Into<String>, reason: impl Into<String>) -> Self {
        Self::Invalid {
            field: field.into(),
            reason: reason.into(),
        }
    }
}

/// What the host has for a spec besides its text.
#[derive(Debug, Default)]
pub struct Supplied {
    /// The mounts, by index, that have a share.
    pub shares: HashSet<usize>,
    /// The kinds of namespaces that are another container's of the pod.
    pub namespaces: HashSet<LinuxNamespaceType>,
}

/// Reads and checks a container's `config.json`.
pub fn read_spec(json: &[u8], supplied: &Supplied) -> Result<Spec, SpecError> {
    let spec: Spec = read("spec", json)?;
    checks::spec(&spec, supplied)?;
    Ok(spec)
}

/// Path of the existing namespace that is to be joined; none for a new one.
pub fn path_of(namespace: &LinuxNamespace) -> Option<&Path> {
    let path = namespace.path().as_deref();
    path.filter(|path| !path.as_os_str().is_empty())
}

/// Reads and checks the `process` object of an exec.
pub fn read_process(json: &[u8]) -> Result<Process, SpecError> {
    let process: Process = read("process", json)?;
    checks::process(&process)?;
    Ok(process)
}

fn read<T: DeserializeOwned + Serialize>(what: &'static str, json: &[u8]) -> Result<T, SpecError> {
    let json_error = |source| SpecError::Json { what, source };
    let input: serde_json::Value = serde_json::from_slice(json).map_err(json_error)?;
    let read = T::deserialize(&input).map_err(json_error)?;
    let kept = serde_json::to_value(&read).map_err(json_error)?;
    match lossless::first_lost(&input, &kept) {
        Some(field) => Err(SpecError::Unknown { field }),
        None => Ok(read),
    }
}

/// The file type of a device node, or `None` for the wildcard that only rules may use.
pub fn device_type(kind: LinuxDeviceType) -> Option<SFlag> {
    match kind {
        LinuxDeviceType::A => None,
        LinuxDeviceType::B => Some(SFlag::S_IFBLK),
        LinuxDeviceType::C | LinuxDeviceType::U => Some(SFlag::S_IFCHR),
        LinuxDeviceType::P => Some(SFlag::S_IFIFO),
    }
}

/// Whether the spec brings its own `/dev` by a bind mount, in which case nothing is made in it.
pub fn has_bound_dev(spec: &Spec) -> bool {
    spec.mounts().iter().flatten().any(|mount| {
        let is_dev =
            mount.destination() == Path::new("/dev") || mount.destination() == Path::new("/dev/");
        is_dev && crate::stage::mounts::is_bind(mount)
    })
}
