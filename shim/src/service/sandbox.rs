//! The sandbox API that containerd calls for a pod without a pause container.

use std::{
    future::Future,
    sync::Arc,
    time::{Duration, SystemTime},
};

use async_trait::async_trait;
use containerd_shim_protos::{
    api::CreateTaskRequest,
    sandbox_api::{
        CreateSandboxRequest, CreateSandboxResponse, PingRequest, PingResponse, PlatformRequest,
        PlatformResponse, SandboxMetricsRequest, SandboxMetricsResponse, SandboxStatusRequest,
        SandboxStatusResponse, ShutdownSandboxRequest, ShutdownSandboxResponse,
        StartSandboxRequest, StartSandboxResponse, StopSandboxRequest, StopSandboxResponse,
        WaitSandboxRequest, WaitSandboxResponse,
    },
    sandbox_async::Sandbox as SandboxApi,
};
use futures::future::join_all;
use protobuf::MessageField;
use serde_json::{Value, json};
use ttrpc::r#async::TtrpcContext;

use super::{Service, Slot, pack, to_the_end};
use crate::{
    agent_client::Exit,
    cgroup,
    child::KILLED,
    container::Container,
    deadline::timeout,
    errors::{TaskError, timestamp},
    pod,
    sandbox::{Phase, Sandbox},
    spec::Spec,
    stats, text,
};

/// How long containerd may take to describe a sandbox whose shim it has started. It does so at once,
/// unless it was ended in between.
const CREATE_DEADLINE: Duration = Duration::from_secs(30);

/// How long the processes of a sandbox may take to end that is stopped, after SIGKILL. Then its VM
/// ends.
const STOP_DEADLINE: Duration = Duration::from_secs(20);

/// What CRI calls a sandbox that containers can join, and any other.
const READY: &str = "SANDBOX_READY";
const NOT_READY: &str = "SANDBOX_NOTREADY";

const SIGTERM: u32 = libc::SIGTERM.unsigned_abs();
const SIGKILL: u32 = libc::SIGKILL.unsigned_abs();

impl Service {
    /// The sandbox, by its id.
    fn sandbox(&self, id: &str) -> Result<&Sandbox, TaskError> {
        let sandbox = self.shared.host.sandbox.as_deref();
        let sandbox = sandbox.filter(|sandbox| sandbox.id == id);
        sandbox.ok_or_else(|| TaskError::NotFound(format!("sandbox {id}")))
    }

    fn created_sandbox(&self, id: &str) -> Result<&Sandbox, TaskError> {
        let sandbox = self.sandbox(id)?;
        match sandbox.phase() {
            Phase::New => Err(TaskError::NotFound(format!("sandbox {id}"))),
            _ => Ok(sandbox),
        }
    }

    /// Ends a shim whose sandbox containerd does not describe.
    pub async fn end_unless_described(self) {
        let Some(sandbox) = &self.shared.host.sandbox else {
            return;
        };
        if timeout(CREATE_DEADLINE, sandbox.described()).await.is_err() {
            tracing::warn!("containerd has forgotten the sandbox that it has started");
            self.clone().shut_down_sandbox().await;
        }
    }

    fn create_sandbox_pod(&self, request: &CreateSandboxRequest) -> Result<(), TaskError> {
        let sandbox = self.sandbox(&request.sandbox_id)?;
        if self.containers().closed {
            return Err(TaskError::State("The sandbox is shutting down".into()));
        }
        let Some(settings) = sandbox.describe(request)? else {
            let what = format!("sandbox {}", request.sandbox_id);
            return Err(TaskError::AlreadyExists(what));
        };
        let host = &self.shared.host;
        host.pod.boot(settings, host.reaper.clone());
        Ok(())
    }

    async fn start_sandbox_pod(self, id: String) -> Result<StartSandboxResponse, TaskError> {
        let sandbox = self.created_sandbox(&id)?;
        if sandbox.phase() != Phase::Created {
            let message = format!("Cannot start sandbox {id}: it was started already");
            return Err(TaskError::State(message));
        }
        let request = CreateTaskRequest {
            id: id.clone(),
            bundle: sandbox.bundle.display().to_string(),
            ..CreateTaskRequest::default()
        };
        let pid = self.clone().create_container(request).await?;
        let container = self.container(&id)?;
        if let Err(error) = container.start().await {
            self.forget_sandbox_container(&container).await;
            return Err(error);
        }
        let since = SystemTime::now();
        if !sandbox.enter(Phase::Running { pid, since }) {
            self.forget_sandbox_container(&container).await;
            let message = format!("Cannot start sandbox {id}: it was stopped meanwhile");
            return Err(TaskError::State(message));
        }
        tokio::spawn(self.clone().follow(container));
        Ok(StartSandboxResponse {
            pid,
            created_at: MessageField::some(timestamp(since)),
            ..StartSandboxResponse::default()
        })
    }

    /// Waits for the end of the sandbox's process. Its containers go on.
    async fn follow(self, container: Arc<Container>) {
        let exit = container.init.wait().await;
        self.forget_sandbox_container(&container).await;
        if let Some(sandbox) = &self.shared.host.sandbox {
            sandbox.enter(Phase::Stopped(exit));
        }
        self.stop_unused_vm().await;
    }

    async fn forget_sandbox_container(&self, container: &Container) {
        if let Err(error) = container.delete().await {
            let error = text::chain(&error);
            tracing::warn!(id = container.id, error, "Cannot release the sandbox");
        }
        self.containers().slots.remove(&container.id);
    }

    /// Ends the VM of a sandbox that has ended, when no container is left in it: containerd may keep
    /// what it knows of the sandbox for long.
    pub(super) async fn stop_unused_vm(&self) {
        let host = &self.shared.host;
        let sandbox = host.sandbox.as_ref();
        let stopped = sandbox.is_some_and(|it| matches!(it.phase(), Phase::Stopped(_)));
        if stopped && self.containers().slots.is_empty() {
            host.pod.stop().await;
        }
    }

    async fn stop_sandbox_pod(self, id: String, grace: Duration) -> Result<(), TaskError> {
        let sandbox = self.created_sandbox(&id)?;
        let containers = self.created_containers();
        let (own, others): (Vec<_>, Vec<_>) = containers.into_iter().partition(|it| it.id == id);
        if !grace.is_zero() && !others.is_empty() {
            end_all(&others, SIGTERM, grace).await;
        }
        if !end_all(&others, SIGKILL, STOP_DEADLINE).await {
            self.shared.host.pod.end(pod::SHUT_DOWN);
        }
        // What they have written is the host's before their VM ends.
        join_all(others.iter().map(|container| container.delete())).await;
        match sandbox.phase() {
            Phase::Running { .. } => {
                end_all(&own, SIGKILL, STOP_DEADLINE).await;
                if timeout(STOP_DEADLINE, sandbox.stopped()).await.is_err() {
                    // With the VM its process ends.
                    self.shared.host.pod.end(pod::SHUT_DOWN);
                    sandbox.stopped().await;
                }
            }
            _ => {
                sandbox.enter(Phase::Stopped(Exit::now(KILLED)));
            }
        }
        self.shared.host.pod.stop().await;
        Ok(())
    }

    fn created_containers(&self) -> Vec<Arc<Container>> {
        let containers = self.containers();
        let created = containers.slots.values().filter_map(|slot| match slot {
            Slot::Created(container) => Some(container.clone()),
            Slot::Creating => None,
        });
        created.collect()
    }

    async fn shut_down_sandbox(self) {
        self.terminate().await;
        if let Some(sandbox) = &self.shared.host.sandbox {
            sandbox.enter(Phase::Stopped(Exit::now(KILLED)));
        }
        self.shared.finished.send_replace(true);
    }

    fn sandbox_status_of(
        &self,
        request: &SandboxStatusRequest,
    ) -> Result<SandboxStatusResponse, TaskError> {
        let sandbox = self.sandbox(&request.sandbox_id)?;
        let mut status = SandboxStatusResponse {
            sandbox_id: request.sandbox_id.clone(),
            state: NOT_READY.into(),
            ..SandboxStatusResponse::default()
        };
        match sandbox.phase() {
            Phase::New | Phase::Created => {}
            Phase::Running { pid, since } => {
                status.pid = pid;
                status.state = READY.into();
                status.created_at = MessageField::some(timestamp(since));
            }
            Phase::Stopped(exit) => {
                status.exited_at = MessageField::some(timestamp(exit.at));
            }
        }
        if request.verbose {
            let info = verbose(sandbox, status.pid);
            status.info.insert("info".into(), info.to_string());
        }
        Ok(status)
    }

    fn metrics_of(&self, id: &str) -> Result<SandboxMetricsResponse, TaskError> {
        self.created_sandbox(id)?;
        let pod = &self.shared.host.pod;
        if let Some(failure) = pod.failure() {
            return Err(failure.into());
        }
        let usage = pod.cgroup().map(cgroup::usage).unwrap_or_default();
        let mut response = SandboxMetricsResponse::default();
        let metric = response.metrics.mut_or_insert_default();
        metric.id = id.to_owned();
        metric.timestamp = MessageField::some(timestamp(SystemTime::now()));
        let data = pack(stats::TYPE_URL, &stats::metrics(&usage))?;
        metric.data = MessageField::some(data);
        Ok(response)
    }
}

/// Signals every process of containers, and waits for their own. Returns whether they have ended.
async fn end_all(containers: &[Arc<Container>], signal: u32, limit: Duration) -> bool {
    let ends = containers.iter().map(|container| async move {
        // It may have ended, or not obey.
        let _ = container.kill("", signal, signal == SIGKILL).await;
        container.init.wait().await;
    });
    timeout(limit, join_all(ends)).await.is_ok()
}

/// What people want to know of a sandbox, in the form that they know of pause containers.
fn verbose(sandbox: &Sandbox, pid: u32) -> Value {
    let spec = Spec::read(&sandbox.bundle).ok();
    let spec = spec.and_then(|(_, bytes)| serde_json::from_slice::<Value>(&bytes).ok());
    json!({ "pid": pid, "runtimeSpec": spec })
}

/// [`to_the_end`] of a call that is answered by nothing.
async fn done<T: Default>(
    call: impl Future<Output = Result<(), TaskError>> + Send + 'static,
) -> ttrpc::Result<T> {
    to_the_end(call).await.map(|()| T::default())
}

#[async_trait]
impl SandboxApi for Service {
    async fn create_sandbox(
        &self,
        _: &TtrpcContext,
        request: CreateSandboxRequest,
    ) -> ttrpc::Result<CreateSandboxResponse> {
        self.create_sandbox_pod(&request)?;
        Ok(CreateSandboxResponse::default())
    }

    async fn start_sandbox(
        &self,
        _: &TtrpcContext,
        request: StartSandboxRequest,
    ) -> ttrpc::Result<StartSandboxResponse> {
        to_the_end(self.clone().start_sandbox_pod(request.sandbox_id)).await
    }

    async fn platform(
        &self,
        _: &TtrpcContext,
        request: PlatformRequest,
    ) -> ttrpc::Result<PlatformResponse> {
        self.sandbox(&request.sandbox_id)?;
        let mut response = PlatformResponse::default();
        let platform = response.platform.mut_or_insert_default();
        platform.os = "linux".into();
        // As Go names x86-64, for which alone there are guests.
        platform.architecture = "amd64".into();
        Ok(response)
    }

    async fn stop_sandbox(
        &self,
        _: &TtrpcContext,
        request: StopSandboxRequest,
    ) -> ttrpc::Result<StopSandboxResponse> {
        let grace = Duration::from_secs(request.timeout_secs.into());
        done(self.clone().stop_sandbox_pod(request.sandbox_id, grace)).await
    }

    async fn wait_sandbox(
        &self,
        _: &TtrpcContext,
        request: WaitSandboxRequest,
    ) -> ttrpc::Result<WaitSandboxResponse> {
        let exit = self.created_sandbox(&request.sandbox_id)?.stopped().await;
        Ok(WaitSandboxResponse {
            exit_status: exit.status.into(),
            exited_at: MessageField::some(timestamp(exit.at)),
            ..WaitSandboxResponse::default()
        })
    }

    async fn sandbox_status(
        &self,
        _: &TtrpcContext,
        request: SandboxStatusRequest,
    ) -> ttrpc::Result<SandboxStatusResponse> {
        Ok(self.sandbox_status_of(&request)?)
    }

    async fn ping_sandbox(
        &self,
        _: &TtrpcContext,
        request: PingRequest,
    ) -> ttrpc::Result<PingResponse> {
        self.created_sandbox(&request.sandbox_id)?;
        if let Some(failure) = self.shared.host.pod.failure() {
            return Err(TaskError::from(failure).into());
        }
        Ok(PingResponse::default())
    }

    async fn shutdown_sandbox(
        &self,
        _: &TtrpcContext,
        request: ShutdownSandboxRequest,
    ) -> ttrpc::Result<ShutdownSandboxResponse> {
        self.sandbox(&request.sandbox_id)?;
        let service = self.clone();
        done(async move {
            service.shut_down_sandbox().await;
            Ok(())
        })
        .await
    }

    async fn sandbox_metrics(
        &self,
        _: &TtrpcContext,
        request: SandboxMetricsRequest,
    ) -> ttrpc::Result<SandboxMetricsResponse> {
        Ok(self.metrics_of(&request.sandbox_id)?)
    }
}
