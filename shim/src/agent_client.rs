//! Calls to the guest's agent. Whatever it answers is checked before it is used.

use std::{
    future::Future,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use bulkhead_agent_api::{
    messages::{
        AdjustClockRequest, ConnectRequest, ContainerRequest, CreateContainerRequest, ExecRequest,
        InfoRequest, InfoResponse, NetworkRequest, OomRequest, ProcessRequest, ReleaseRequest,
        ResizePtyRequest, ShareRequest, SignalRequest, StatsResponse, UpdateRequest,
    },
    service::AgentClient as Service,
};
use thiserror::Error;
use tokio::net::UnixStream;
use ttrpc::{
    Code,
    asynchronous::{Client, transport::Socket},
    context::Context,
};

use crate::{deadline::timeout, text};

/// For calls that set something up. Generous, because the host may be emulated.
const SETUP_DEADLINE: Duration = Duration::from_secs(60);

/// For calls that are quick on any healthy guest.
const QUICK_DEADLINE: Duration = Duration::from_secs(10);

/// containerd gives Stats two seconds in all.
const STATS_DEADLINE: Duration = Duration::from_millis(1500);

/// The longest message of the agent that is passed on, in bytes.
const MAX_MESSAGE: usize = 1024;

/// The most keys in one map of the agent's statistics.
const MAX_STATS: usize = 1024;

/// Why a call to the agent failed.
#[derive(Debug, Error)]
pub enum AgentError {
    /// The agent said no.
    #[error("{message}")]
    Refused {
        /// The gRPC code it gave.
        code: Code,
        /// Its reason, in one line.
        message: String,
    },
    /// No answer in time.
    #[error("The guest's agent did not answer {call} within {seconds} s")]
    Deadline {
        /// Which call.
        call: &'static str,
        /// How long was waited.
        seconds: u64,
    },
    /// The connection is gone.
    #[error("The connection to the guest's agent is lost")]
    Gone,
    /// The answer makes no sense.
    #[error("The guest's agent gave an invalid answer to {call}")]
    Invalid {
        /// Which call.
        call: &'static str,
    },
}

impl AgentError {
    /// The gRPC code for containerd's client.
    pub fn code(&self) -> Code {
        match self {
            Self::Refused { code, .. } => *code,
            Self::Deadline { .. } => Code::DEADLINE_EXCEEDED,
            Self::Gone => Code::UNAVAILABLE,
            Self::Invalid { .. } => Code::INTERNAL,
        }
    }

    fn from_ttrpc(error: ttrpc::Error) -> Self {
        match error {
            ttrpc::Error::RpcStatus(status) => {
                let code = match status.code() {
                    // Those that the protocol knows; any other is none of containerd's business.
                    code @ (Code::NOT_FOUND
                    | Code::ALREADY_EXISTS
                    | Code::FAILED_PRECONDITION
                    | Code::INVALID_ARGUMENT
                    | Code::UNAVAILABLE
                    | Code::UNIMPLEMENTED) => code,
                    _ => Code::UNKNOWN,
                };
                Self::Refused {
                    code,
                    message: text::one_line(status.message(), MAX_MESSAGE),
                }
            }
            _ => Self::Gone,
        }
    }
}

/// How a process ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Exit {
    /// Exit code, 128 + n for death by signal n.
    pub status: u8,
    /// When.
    pub at: SystemTime,
    /// How many processes of the container have been ended for lack of memory until then; known at
    /// the end of its own process alone.
    pub oom_kills: u64,
}

impl Exit {
    /// An end now.
    pub fn now(status: u8) -> Self {
        Self {
            status,
            at: SystemTime::now(),
            oom_kills: 0,
        }
    }
}

/// The one connection to the agent.
#[derive(Clone)]
pub struct AgentClient {
    service: Service,
}

impl std::fmt::Debug for AgentClient {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("AgentClient").finish_non_exhaustive()
    }
}

async fn call<T>(
    name: &'static str,
    deadline: Duration,
    request: impl Future<Output = ttrpc::Result<T>>,
) -> Result<T, AgentError> {
    #[cfg(feature = "steps")]
    crate::steps::before(name).await;
    let answer = timeout(deadline, request).await;
    #[cfg(feature = "steps")]
    crate::steps::after(name).await;
    match answer {
        Ok(result) => result.map_err(AgentError::from_ttrpc),
        Err(_) => Err(AgentError::Deadline {
            call: name,
            seconds: deadline.as_secs().max(1),
        }),
    }
}

impl AgentClient {
    /// Speaks to the agent on `stream`.
    pub fn new(stream: UnixStream) -> Self {
        Self {
            service: Service::new(Client::new(Socket::from(stream))),
        }
    }

    /// Who is answering.
    pub async fn info(&self) -> Result<InfoResponse, AgentError> {
        let request = InfoRequest::default();
        call(
            "Info",
            QUICK_DEADLINE,
            self.service.info(Context::default(), &request),
        )
        .await
    }

    /// Waits until more than `known` processes of a container have been ended for lack of memory, or
    /// its own process has ended; returns how many. The end of the VM ends the wait.
    pub async fn wait_for_oom(&self, container: &str, known: u64) -> Result<u64, AgentError> {
        let request = OomRequest {
            container_id: container.to_owned(),
            known_kills: known,
            ..OomRequest::default()
        };
        let answer = self.service.wait_for_oom(Context::default(), &request);
        Ok(answer.await.map_err(AgentError::from_ttrpc)?.kills)
    }

    /// Stops every process of a container.
    pub async fn pause(&self, container: &str) -> Result<(), AgentError> {
        let request = whole(container);
        let answer = self.service.pause(Context::default(), &request);
        call("Pause", QUICK_DEADLINE, answer).await.map(drop)
    }

    /// Lets them go on.
    pub async fn resume(&self, container: &str) -> Result<(), AgentError> {
        let request = whole(container);
        let answer = self.service.resume(Context::default(), &request);
        call("Resume", QUICK_DEADLINE, answer).await.map(drop)
    }

    /// Changes a container's limits, an OCI `linux.resources` object as JSON.
    pub async fn update(&self, container: &str, resources: Vec<u8>) -> Result<(), AgentError> {
        let request = UpdateRequest {
            container_id: container.to_owned(),
            resources,
            ..UpdateRequest::default()
        };
        let answer = self.service.update(Context::default(), &request);
        call("Update", QUICK_DEADLINE, answer).await.map(drop)
    }

    /// Makes a container's network namespace what the request says.
    pub async fn set_network(&self, request: &NetworkRequest) -> Result<(), AgentError> {
        let answer = self.service.set_network(Context::default(), request);
        call("SetNetwork", SETUP_DEADLINE, answer).await.map(drop)
    }

    /// Makes the guest's copy of a share what the share is now.
    pub async fn refresh_mirror(&self, share: &str) -> Result<(), AgentError> {
        let request = ShareRequest {
            share: share.to_owned(),
            ..ShareRequest::default()
        };
        let answer = self.service.refresh_mirror(Context::default(), &request);
        call("RefreshMirror", SETUP_DEADLINE, answer)
            .await
            .map(drop)
    }

    /// Has the guest let go of shares, and of their copies.
    pub async fn release_shares(&self, shares: Vec<String>) -> Result<(), AgentError> {
        let request = ReleaseRequest {
            shares,
            ..ReleaseRequest::default()
        };
        let answer = self.service.release_shares(Context::default(), &request);
        call("ReleaseShares", SETUP_DEADLINE, answer)
            .await
            .map(drop)
    }

    /// Connects a stream with a port of a container.
    pub async fn connect(&self, request: &ConnectRequest) -> Result<(), AgentError> {
        let answer = self.service.connect(Context::default(), request);
        call("Connect", QUICK_DEADLINE, answer).await.map(drop)
    }

    /// Moves the guest's clock by so many nanoseconds, and returns what it is then, in nanoseconds since
    /// the epoch.
    pub async fn adjust_clock(&self, offset_ns: i64) -> Result<u64, AgentError> {
        let request = AdjustClockRequest {
            offset_ns,
            ..AdjustClockRequest::default()
        };
        let answer = self.service.adjust_clock(Context::default(), &request);
        let answer = call("AdjustClock", QUICK_DEADLINE, answer).await?;
        Ok(answer.now_ns)
    }

    /// Sets a container up. `hooks` is how long its hooks in the guest may take.
    pub async fn create(
        &self,
        request: &CreateContainerRequest,
        hooks: Duration,
    ) -> Result<(), AgentError> {
        call(
            "CreateContainer",
            SETUP_DEADLINE + hooks,
            self.service.create_container(Context::default(), request),
        )
        .await
        .map(drop)
    }

    /// Starts a container's own process. `hooks` is how long the hooks before it may take.
    pub async fn start(&self, container: &str, hooks: Duration) -> Result<(), AgentError> {
        let request = whole(container);
        call(
            "StartContainer",
            SETUP_DEADLINE + hooks,
            self.service.start_container(Context::default(), &request),
        )
        .await
        .map(drop)
    }

    /// Starts another process.
    pub async fn exec(&self, request: &ExecRequest) -> Result<(), AgentError> {
        call(
            "Exec",
            SETUP_DEADLINE,
            self.service.exec(Context::default(), request),
        )
        .await
        .map(drop)
    }

    /// Waits for a process's end, however long that takes; the end of the VM ends the wait.
    pub async fn wait(&self, container: &str, exec: &str) -> Result<Exit, AgentError> {
        let request = process(container, exec);
        let answer = self
            .service
            .wait(Context::default(), &request)
            .await
            .map_err(AgentError::from_ttrpc)?;
        Ok(Exit {
            status: u8::try_from(answer.status)
                .map_err(|_| AgentError::Invalid { call: "Wait" })?,
            at: plausible_time(answer.exited_at_ns, SystemTime::now()),
            oom_kills: answer.oom_kills,
        })
    }

    /// Sends a signal.
    pub async fn signal(
        &self,
        container: &str,
        exec: &str,
        signal: u32,
        all: bool,
    ) -> Result<(), AgentError> {
        let request = SignalRequest {
            container_id: container.to_owned(),
            exec_id: exec.to_owned(),
            signal,
            all,
            ..SignalRequest::default()
        };
        call(
            "Signal",
            QUICK_DEADLINE,
            self.service.signal(Context::default(), &request),
        )
        .await
        .map(drop)
    }

    /// Sets the size of a process's terminal.
    pub async fn resize(
        &self,
        container: &str,
        exec: &str,
        width: u32,
        height: u32,
    ) -> Result<(), AgentError> {
        let request = ResizePtyRequest {
            container_id: container.to_owned(),
            exec_id: exec.to_owned(),
            width,
            height,
            ..ResizePtyRequest::default()
        };
        call(
            "ResizePty",
            QUICK_DEADLINE,
            self.service.resize_pty(Context::default(), &request),
        )
        .await
        .map(drop)
    }

    /// Releases a process, or with `exec` empty the container.
    pub async fn delete(&self, container: &str, exec: &str) -> Result<(), AgentError> {
        let request = process(container, exec);
        call(
            "Delete",
            QUICK_DEADLINE,
            self.service.delete(Context::default(), &request),
        )
        .await
        .map(drop)
    }

    /// What a container uses.
    pub async fn stats(&self, container: &str) -> Result<StatsResponse, AgentError> {
        let request = whole(container);
        let stats = call(
            "Stats",
            STATS_DEADLINE,
            self.service.stats(Context::default(), &request),
        )
        .await?;
        let memory = &stats.memory;
        if memory.stat.len() > MAX_STATS
            || memory.events.len() > MAX_STATS
            || stats.io.len() > MAX_STATS
        {
            return Err(AgentError::Invalid { call: "Stats" });
        }
        Ok(stats)
    }
}

fn whole(container: &str) -> ContainerRequest {
    ContainerRequest {
        container_id: container.to_owned(),
        ..ContainerRequest::default()
    }
}

fn process(container: &str, exec: &str) -> ProcessRequest {
    ProcessRequest {
        container_id: container.to_owned(),
        exec_id: exec.to_owned(),
        ..ProcessRequest::default()
    }
}

/// The guest's clock is the guest's to set: a time that is later than now, or earlier than any
/// this VM can have been running, is replaced by now.
fn plausible_time(nanoseconds: u64, now: SystemTime) -> SystemTime {
    const OLDEST: Duration = Duration::from_secs(3600);
    let told = UNIX_EPOCH + Duration::from_nanos(nanoseconds);
    match now.duration_since(told) {
        Ok(age) if age <= OLDEST => told,
        _ => now,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn implausible_times_become_now() {
        let now = UNIX_EPOCH + Duration::from_secs(1_800_000_000);
        let just_before = now - Duration::from_millis(3);
        let nanoseconds = |time: SystemTime| {
            u64::try_from(time.duration_since(UNIX_EPOCH).unwrap().as_nanos()).unwrap()
        };
        assert_eq!(plausible_time(nanoseconds(just_before), now), just_before);
        assert_eq!(plausible_time(0, now), now);
        assert_eq!(plausible_time(u64::MAX, now), now);
    }

    #[test]
    fn a_refusal_keeps_its_code_and_becomes_one_line() {
        let error = AgentError::from_ttrpc(ttrpc::error::get_rpc_status(
            Code::NOT_FOUND,
            "no\nsuch\x1b[31mthing",
        ));
        assert_eq!(error.code(), Code::NOT_FOUND);
        assert_eq!(error.to_string(), "no such [31mthing");
        let error =
            AgentError::from_ttrpc(ttrpc::error::get_rpc_status(Code::UNAUTHENTICATED, "x"));
        assert_eq!(error.code(), Code::UNKNOWN);
    }
}
