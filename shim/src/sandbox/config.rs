//! What containerd's CRI plugin says of a pod.

use std::{io, path::PathBuf};

use protobuf::{EnumOrUnknown, Message, well_known_types::any::Any};
use thiserror::Error;

pub use self::generated::cri::DNSConfig;
pub use self::generated::cri::{
    IDMapping, NamespaceMode, NamespaceOption, PodSandboxConfig, UserNamespace,
};
use crate::spec::SpecError;

#[allow(
    missing_docs,
    clippy::all,
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    reason = "generated code"
)]
mod generated {
    include!(concat!(env!("OUT_DIR"), "/cri/mod.rs"));
}

/// The message's name.
const CONFIG: &str = "runtime.v1.PodSandboxConfig";

/// A sandbox that cannot be made.
#[derive(Debug, Error)]
pub enum SandboxError {
    /// It is described by something else.
    #[error("The sandbox's options are {0:?}; {CONFIG} is needed")]
    Type(String),
    /// The description is not what it says it is.
    #[error("Cannot decode the sandbox's options")]
    Decode(#[source] protobuf::Error),
    /// Its containers would be on the host.
    #[error("host {0} namespace cannot be honoured in a microVM")]
    HostNamespace(&'static str),
    /// A value makes no sense.
    #[error("The sandbox's {field} is invalid: {reason}")]
    Invalid {
        /// Which one.
        field: &'static str,
        /// What is wrong with it.
        reason: String,
    },
    /// It is to have files.
    #[error("A sandbox has no root file system, but mounts for one are given")]
    Rootfs,
    /// What its containers find cannot be written.
    #[error("Cannot write {path}")]
    Write {
        /// The file's path.
        path: PathBuf,
        /// The system's error.
        #[source]
        source: io::Error,
    },
    /// What its containers find cannot be read on the host.
    #[error("Cannot read {path}")]
    Read {
        /// The file's path.
        path: PathBuf,
        /// The system's error.
        #[source]
        source: io::Error,
    },
    /// The specification that is made for it cannot be used.
    #[error(transparent)]
    Spec(#[from] SpecError),
}

impl SandboxError {
    pub(super) fn invalid(field: &'static str, reason: impl Into<String>) -> Self {
        Self::Invalid {
            field,
            reason: reason.into(),
        }
    }
}

/// Takes the options of a sandbox. Without a type there are none.
pub fn decode(options: &Any) -> Result<PodSandboxConfig, SandboxError> {
    match options.type_url.rsplit('/').next() {
        Some("") if options.value.is_empty() => Ok(PodSandboxConfig::default()),
        Some(CONFIG) => {
            PodSandboxConfig::parse_from_bytes(&options.value).map_err(SandboxError::Decode)
        }
        _ => Err(SandboxError::Type(options.type_url.clone())),
    }
}

/// Refuses a namespace that is not the pod's own.
pub fn check_own(
    name: &'static str,
    mode: EnumOrUnknown<NamespaceMode>,
) -> Result<(), SandboxError> {
    match mode.enum_value() {
        Ok(NamespaceMode::POD | NamespaceMode::CONTAINER) => Ok(()),
        Ok(NamespaceMode::NODE) => Err(SandboxError::HostNamespace(name)),
        Ok(NamespaceMode::TARGET) => {
            let reason = format!("{name}: another container's");
            Err(SandboxError::invalid("namespace", reason))
        }
        Err(number) => {
            let reason = format!("{name}: there is no mode {number}");
            Err(SandboxError::invalid("namespace", reason))
        }
    }
}
