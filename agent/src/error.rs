//! What a call from the host fails with, and the status that it is answered with.

use std::io;

use thiserror::Error;
use ttrpc::{Code, get_status};

use crate::{
    apparmor::ProfileError,
    cgroup::CgroupError,
    log,
    network::NetworkError,
    spec::SpecError,
    stage::protocol::{Failure, FailureKind},
};

/// Why a call of the service failed.
#[derive(Debug, Error)]
pub enum ServiceError {
    /// No container by that name.
    #[error("container {0:?} does not exist")]
    NoContainer(String),
    /// No process by that name in the container.
    #[error("process {exec:?} of container {container:?} does not exist")]
    NoProcess {
        /// The container.
        container: String,
        /// The name of the exec.
        exec: String,
    },
    /// The process has ended; containerd expects this as "not found".
    #[error("process already finished")]
    ProcessFinished,
    /// A container by that name exists.
    #[error("container {0:?} already exists")]
    ContainerExists(String),
    /// A process by that name exists in the container.
    #[error("process {exec:?} of container {container:?} already exists")]
    ProcessExists {
        /// The container.
        container: String,
        /// The name of the exec.
        exec: String,
    },
    /// The call does not fit the state of the container or process.
    #[error("cannot {what}: {state}")]
    WrongState {
        /// What was to be done.
        what: &'static str,
        /// Why that is impossible now.
        state: &'static str,
    },
    /// A request that makes no sense by itself.
    #[error("invalid {what}: {value:?}")]
    BadRequest {
        /// Which part of the request.
        what: &'static str,
        /// The value that was given.
        value: String,
    },
    /// The spec cannot be honoured.
    #[error(transparent)]
    Spec(#[from] SpecError),
    /// The process cannot have its AppArmor profile.
    #[error(transparent)]
    Profile(#[from] ProfileError),
    /// The container's cgroup could not be set up or read.
    #[error(transparent)]
    Cgroup(#[from] CgroupError),
    /// The container's network could not be set up.
    #[error(transparent)]
    Network(#[from] NetworkError),
    /// No program takes connections there.
    #[error("Nobody listens on port {port} of container {container}")]
    NobodyListens {
        /// The TCP port.
        port: u16,
        /// The container.
        container: String,
    },
    /// The set-up of a process failed in its stage.
    #[error("unable to start container process: {}", .0.message)]
    Stage(Failure),
    /// The stage ended without a word.
    #[error("the set-up of the process ended unexpectedly{}", status.map(|status| format!(" with status {status}")).unwrap_or_default())]
    StageVanished {
        /// Its status, if it is known.
        status: Option<u32>,
    },
    /// A step took longer than its deadline.
    #[error("timed out: {0}")]
    Deadline(&'static str),
    /// A system call of the agent failed.
    #[error("failed to {what}")]
    System {
        /// What was tried on what.
        what: String,
        /// The system's answer.
        #[source]
        source: io::Error,
    },
}

impl ServiceError {
    /// For `map_err`: a failed system call, and what was tried.
    pub fn system<E: Into<io::Error>>(what: impl Into<String>) -> impl FnOnce(E) -> Self {
        let what = what.into();
        move |source| Self::System {
            what,
            source: source.into(),
        }
    }

    fn code(&self) -> Code {
        match self {
            Self::NoContainer(_) | Self::NoProcess { .. } | Self::ProcessFinished => {
                Code::NOT_FOUND
            }
            Self::ContainerExists(_) | Self::ProcessExists { .. } => Code::ALREADY_EXISTS,
            Self::WrongState { .. } => Code::FAILED_PRECONDITION,
            Self::BadRequest { .. } | Self::Spec(_) => Code::INVALID_ARGUMENT,
            Self::Profile(error) => match error {
                ProfileError::NoPolicy(_) => Code::INVALID_ARGUMENT,
                ProfileError::Differs(_) | ProfileError::Refused { .. } => {
                    Code::FAILED_PRECONDITION
                }
                ProfileError::System { .. } => Code::INTERNAL,
            },
            Self::Network(error) => match error {
                NetworkError::Invalid(_) => Code::INVALID_ARGUMENT,
                NetworkError::NameTaken { .. } => Code::FAILED_PRECONDITION,
                NetworkError::Interface { .. }
                | NetworkError::Item { .. }
                | NetworkError::System { .. } => Code::INTERNAL,
            },
            Self::NobodyListens { .. } => Code::UNAVAILABLE,
            Self::Stage(Failure { kind, .. }) => match kind {
                FailureKind::Invalid => Code::INVALID_ARGUMENT,
                FailureKind::Internal => Code::INTERNAL,
            },
            Self::Deadline(_) => Code::DEADLINE_EXCEEDED,
            // A value that the kernel does not take.
            Self::Cgroup(CgroupError::Set { source, .. })
                if matches!(source.raw_os_error(), Some(libc::EINVAL | libc::ERANGE)) =>
            {
                Code::INVALID_ARGUMENT
            }
            Self::Cgroup(_) | Self::StageVanished { .. } | Self::System { .. } => Code::INTERNAL,
        }
    }
}

impl From<ServiceError> for ttrpc::Error {
    fn from(error: ServiceError) -> Self {
        Self::RpcStatus(get_status(error.code(), log::chain(&error)))
    }
}
