//! The errors of the task API: one gRPC code and one readable line each.

use std::time::{SystemTime, UNIX_EPOCH};

use containerd_shim_protos::protobuf::well_known_types::timestamp::Timestamp;
use thiserror::Error;
use ttrpc::{Code, error::get_rpc_status};

use crate::{
    agent_client::AgentError, anchor::AnchorError, apparmor::ApparmorError, cgroup::CgroupError,
    hooks::HookError, network::NetworkError, pod::PodError, rootfs::RootfsError,
    sandbox::SandboxError, shares::ShareError, spec::SpecError, stdio::StdioError, text,
};

/// Why a call of the task API failed.
#[derive(Debug, Error)]
pub enum TaskError {
    /// There is no such container or process.
    #[error("{0} not found")]
    NotFound(String),
    /// There is one already.
    #[error("{0} already exists")]
    AlreadyExists(String),
    /// Not in this state.
    #[error("{0}")]
    State(String),
    /// The request makes no sense.
    #[error("{0}")]
    Invalid(String),
    /// Bulkhead has no such thing.
    #[error("Bulkhead does not support {0}")]
    Unsupported(&'static str),
    /// The pod's VM did not start, or has ended.
    #[error(transparent)]
    Pod(#[from] PodError),
    /// The agent refused or is gone.
    #[error(transparent)]
    Agent(#[from] AgentError),
    /// The bundle is unusable.
    #[error(transparent)]
    Spec(#[from] SpecError),
    /// The root file system cannot be mounted.
    #[error(transparent)]
    Rootfs(#[from] RootfsError),
    /// A directory or file cannot be shared with the guest.
    #[error(transparent)]
    Share(#[from] ShareError),
    /// The host's cgroup cannot be set up.
    #[error(transparent)]
    Cgroup(#[from] CgroupError),
    /// The host's process cannot be set up.
    #[error(transparent)]
    Anchor(#[from] AnchorError),
    /// The standard streams cannot be set up.
    #[error(transparent)]
    Stdio(#[from] StdioError),
    /// The AppArmor profile cannot be had.
    #[error(transparent)]
    Apparmor(#[from] ApparmorError),
    /// The network cannot be had.
    #[error(transparent)]
    Network(#[from] NetworkError),
    /// A hook failed.
    #[error(transparent)]
    Hook(#[from] HookError),
    /// The sandbox cannot be made as it is described.
    #[error(transparent)]
    Sandbox(#[from] SandboxError),
}

impl TaskError {
    /// The gRPC code for containerd's client.
    pub fn code(&self) -> Code {
        match self {
            Self::NotFound(_) => Code::NOT_FOUND,
            Self::AlreadyExists(_) => Code::ALREADY_EXISTS,
            Self::State(_) => Code::FAILED_PRECONDITION,
            Self::Sandbox(SandboxError::Write { .. } | SandboxError::Read { .. }) => Code::UNKNOWN,
            Self::Sandbox(SandboxError::HostNamespace(_) | SandboxError::Rootfs)
            | Self::Unsupported(_)
            | Self::Rootfs(RootfsError::Unsupported(_)) => Code::UNIMPLEMENTED,
            Self::Invalid(_) | Self::Spec(_) | Self::Sandbox(_) => Code::INVALID_ARGUMENT,
            Self::Cgroup(CgroupError::NotV2 | CgroupError::Path(_)) => Code::FAILED_PRECONDITION,
            Self::Apparmor(_) => Code::FAILED_PRECONDITION,
            Self::Network(
                NetworkError::Foreign(_)
                | NetworkError::TooMany(_)
                | NetworkError::Unsupported { .. },
            ) => Code::FAILED_PRECONDITION,
            Self::Agent(error) | Self::Network(NetworkError::Agent(error)) => error.code(),
            Self::Pod(_)
            | Self::Rootfs(_)
            | Self::Share(_)
            | Self::Cgroup(_)
            | Self::Anchor(_)
            | Self::Stdio(_)
            | Self::Network(_)
            | Self::Hook(_) => Code::UNKNOWN,
        }
    }
}

impl From<TaskError> for ttrpc::Error {
    fn from(error: TaskError) -> Self {
        get_rpc_status(error.code(), text::chain(&error))
    }
}

/// A point in time as protobuf has it.
pub fn timestamp(time: SystemTime) -> Timestamp {
    let since = time.duration_since(UNIX_EPOCH).unwrap_or_default();
    Timestamp {
        seconds: i64::try_from(since.as_secs()).unwrap_or(i64::MAX),
        nanos: i32::try_from(since.subsec_nanos()).unwrap_or(0),
        ..Timestamp::default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn codes_are_grpcs() {
        assert_eq!(TaskError::NotFound("x".into()).code(), Code::NOT_FOUND);
        assert_eq!(TaskError::Unsupported("x").code(), Code::UNIMPLEMENTED);
        let error: ttrpc::Error = TaskError::State("no".into()).into();
        let ttrpc::Error::RpcStatus(status) = error else {
            panic!("not a status");
        };
        assert_eq!(status.code(), Code::FAILED_PRECONDITION);
        assert_eq!(status.message(), "no");
    }

    #[test]
    fn times_have_seconds_and_nanoseconds() {
        let time = UNIX_EPOCH + std::time::Duration::new(5, 7);
        let stamp = timestamp(time);
        assert_eq!((stamp.seconds, stamp.nanos), (5, 7));
    }
}
