//! The task API that containerd calls.

mod sandbox;

use std::{
    collections::{HashMap, HashSet, hash_map::Entry},
    future::Future,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use async_trait::async_trait;
use containerd_shim_protos::{
    api::{
        CheckpointTaskRequest, CloseIORequest, ConnectRequest, ConnectResponse, CreateTaskRequest,
        CreateTaskResponse, DeleteRequest, DeleteResponse, Empty, ExecProcessRequest, KillRequest,
        PauseRequest, PidsRequest, PidsResponse, ProcessInfo, ResizePtyRequest, ResumeRequest,
        ShutdownRequest, StartRequest, StartResponse, StateRequest, StateResponse, StatsRequest,
        StatsResponse, Status, UpdateTaskRequest, WaitRequest, WaitResponse,
    },
    events::task::TaskDelete,
    shim::oci::ProcessDetails,
    shim_async::Task,
};
use protobuf::{Message, MessageField, well_known_types::any::Any};
use tokio::sync::watch;
use ttrpc::r#async::TtrpcContext;

use crate::{
    address::Address,
    container::{Container, Host},
    creation::{self, Neighbourhood},
    deadline::timeout,
    errors::{TaskError, timestamp},
    events::Event,
    pod,
    process::Phase,
    spec::ConsoleSize,
    stats,
    stdio::Paths,
    text,
};

/// How long containerd may take to end a pod that has no containers any more. It says so with the last
/// deletion, unless it was restarted in the middle of that: then it knows of nothing to end.
const SHUTDOWN_DEADLINE: Duration = Duration::from_secs(10);

/// The longest OCI object in JSON that is passed to the guest, in bytes.
const MAX_OBJECT: usize = 1 << 20;

/// A container, or the promise of one.
#[derive(Debug, Clone)]
enum Slot {
    Creating,
    Created(Arc<Container>),
}

#[derive(Debug, Default)]
struct Containers {
    slots: HashMap<String, Slot>,
    /// containers still being created whose deletion containerd has asked for: it has given up
    /// waiting for them, and does not ask again.
    abandoned: HashSet<String>,
    /// containerd has asked for the end while there were containers.
    unwanted: bool,
    /// Nothing is created any more.
    closed: bool,
}

/// The task service of one pod. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Service {
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    host: Arc<Host>,
    address: Address,
    containers: Mutex<Containers>,
    created: AtomicU64,
    finished: watch::Sender<bool>,
}

impl Service {
    /// A service without containers, reached at `address`.
    pub fn new(host: Arc<Host>, address: Address) -> Self {
        Self {
            shared: Arc::new(Shared {
                host,
                address,
                containers: Mutex::default(),
                created: AtomicU64::new(0),
                finished: watch::Sender::new(false),
            }),
        }
    }

    fn containers(&self) -> MutexGuard<'_, Containers> {
        self.shared
            .containers
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }

    fn container(&self, id: &str) -> Result<Arc<Container>, TaskError> {
        match self.containers().slots.get(id) {
            Some(Slot::Created(container)) => Ok(container.clone()),
            Some(Slot::Creating) | None => Err(TaskError::NotFound(format!("container {id}"))),
        }
    }

    /// Waits until containerd has shut the pod down.
    pub async fn finished(&self) {
        let mut finished = self.shared.finished.subscribe();
        // The sender is part of this.
        let _ = finished.wait_for(|finished| *finished).await;
    }

    /// Ends the pod with everything in it, without being asked by containerd.
    pub async fn terminate(&self) {
        let slots: Vec<Slot> = {
            let mut containers = self.containers();
            containers.closed = true;
            containers.slots.values().cloned().collect()
        };
        let host = &self.shared.host;
        host.pod.end(pod::SHUT_DOWN);
        for slot in slots {
            if let Slot::Created(container) = slot {
                container.init.wait().await;
                if let Err(error) = container.delete().await {
                    let error = text::chain(&error);
                    tracing::warn!(id = container.id, error, "Cannot release a container");
                }
            }
        }
        host.pod.stop().await;
        self.remove_socket();
    }

    fn remove_socket(&self) {
        if let Err(error) = self.shared.address.remove() {
            let error = text::chain(&error);
            tracing::warn!(error, "The socket is left");
        }
    }

    async fn create_container(self, request: CreateTaskRequest) -> Result<u32, TaskError> {
        let number = self.shared.created.fetch_add(1, Ordering::Relaxed);
        let neighbourhood = {
            let mut containers = self.containers();
            if containers.closed {
                return Err(TaskError::State("The pod is shutting down".into()));
            }
            match containers.slots.entry(request.id.clone()) {
                Entry::Occupied(_) => {
                    return Err(TaskError::AlreadyExists(format!(
                        "container {}",
                        request.id
                    )));
                }
                Entry::Vacant(slot) => slot.insert(Slot::Creating),
            };
            let others = containers.slots.iter();
            let others = others.filter_map(|(id, slot)| match slot {
                Slot::Created(container) => Some((container.init.pid(), id.clone())),
                Slot::Creating => None,
            });
            Neighbourhood {
                prefix: format!("c{number}"),
                containers: others.collect(),
            }
        };
        let created = creation::create(&self.shared.host, &request, &neighbourhood).await;
        let created = match created {
            Ok(container) => self.keep(&request.id, container).await,
            Err(error) => Err(error),
        };
        match created {
            Ok(pid) => Ok(pid),
            Err(error) => {
                let unwanted = {
                    let mut containers = self.containers();
                    containers.slots.remove(&request.id);
                    containers.abandoned.remove(&request.id);
                    containers.unwanted
                };
                if unwanted {
                    self.clone().shut_down().await?;
                } else {
                    tokio::spawn(self.end_when_forgotten());
                }
                let message = text::chain(&error);
                tracing::error!(
                    id = request.id,
                    error = message,
                    "Cannot create a container"
                );
                Err(error)
            }
        }
    }

    /// Enters a new container, unless containerd has already asked for its deletion.
    async fn keep(&self, id: &str, container: Arc<Container>) -> Result<u32, TaskError> {
        {
            let mut containers = self.containers();
            if !containers.abandoned.contains(id) {
                containers.unwanted = false;
                let pid = container.init.pid();
                containers
                    .slots
                    .insert(id.to_owned(), Slot::Created(container));
                return Ok(pid);
            }
        }
        container.delete().await?;
        Err(TaskError::State(format!(
            "Container {id} was deleted while it was being created"
        )))
    }

    async fn start_process(self, request: StartRequest) -> Result<StartResponse, TaskError> {
        let container = self.container(&request.id)?;
        let pid = if request.exec_id.is_empty() {
            container.start().await?
        } else {
            container.start_exec(&request.exec_id).await?
        };
        Ok(StartResponse {
            pid,
            ..StartResponse::default()
        })
    }

    async fn delete_process(self, request: DeleteRequest) -> Result<DeleteResponse, TaskError> {
        {
            let mut containers = self.containers();
            if request.exec_id.is_empty()
                && matches!(containers.slots.get(&request.id), Some(Slot::Creating))
            {
                containers.abandoned.insert(request.id.clone());
            }
        }
        let container = self.container(&request.id)?;
        let (pid, exit) = if request.exec_id.is_empty() {
            let exit = container.delete().await?;
            // Whoever was second finds nothing.
            if self.containers().slots.remove(&request.id).is_none() {
                return Err(TaskError::NotFound(format!("container {}", request.id)));
            }
            let pid = container.init.pid();
            let deleted = Event::Delete(TaskDelete {
                container_id: request.id,
                pid,
                exit_status: exit.status.into(),
                exited_at: MessageField::some(timestamp(exit.at)),
                ..TaskDelete::default()
            });
            self.shared.host.publish(&container.id, deleted);
            tokio::spawn(self.end_when_forgotten());
            (pid, exit)
        } else {
            container.delete_exec(&request.exec_id).await?
        };
        Ok(DeleteResponse {
            pid,
            exit_status: exit.status.into(),
            exited_at: MessageField::some(timestamp(exit.at)),
            ..DeleteResponse::default()
        })
    }

    /// Ends the pod unless it is used again, or containerd ends it.
    async fn end_when_forgotten(self) {
        if self.shared.host.sandbox.is_some() {
            // Of which containerd tells the end.
            return self.stop_unused_vm().await;
        }
        let ended = timeout(SHUTDOWN_DEADLINE, self.finished()).await;
        if ended.is_err() && self.containers().slots.is_empty() {
            tracing::warn!("The pod has no containers, and containerd has forgotten it");
            // Without containers it does not fail.
            let _ = self.shut_down().await;
        }
    }

    async fn shut_down(self) -> Result<Empty, TaskError> {
        {
            let mut containers = self.containers();
            if !containers.slots.is_empty() {
                containers.unwanted = true;
                return Ok(Empty::new());
            }
            containers.closed = true;
        }
        // Before the answer: whoever starts the same pod again after it finds nothing of this one.
        self.shared.host.pod.stop().await;
        self.remove_socket();
        self.shared.finished.send_replace(true);
        Ok(Empty::new())
    }

    fn state_of(&self, request: &StateRequest) -> Result<StateResponse, TaskError> {
        let container = self.container(&request.id)?;
        let process = container.process(&request.exec_id)?;
        let mut state = StateResponse {
            id: container.id.clone(),
            bundle: container.bundle.clone(),
            pid: process.pid(),
            stdin: process.paths.stdin.clone(),
            stdout: process.paths.stdout.clone(),
            stderr: process.paths.stderr.clone(),
            terminal: process.paths.terminal,
            exec_id: process.exec_id.clone(),
            ..StateResponse::default()
        };
        state.status = match process.phase() {
            Phase::Created | Phase::Starting => Status::CREATED,
            Phase::Running if request.exec_id.is_empty() && container.is_paused() => Status::PAUSED,
            Phase::Running => Status::RUNNING,
            Phase::Stopped(exit) => {
                state.exit_status = exit.status.into();
                state.exited_at = MessageField::some(timestamp(exit.at));
                Status::STOPPED
            }
        }
        .into();
        Ok(state)
    }

    fn add_exec(&self, request: ExecProcessRequest) -> Result<Empty, TaskError> {
        let container = self.container(&request.id)?;
        if request.exec_id.is_empty() {
            return Err(TaskError::Invalid("An exec needs an id".into()));
        }
        let spec = request.spec.value.clone();
        check_size("The process is", &spec)?;
        let paths = Paths {
            terminal: request.terminal,
            stdin: request.stdin,
            stdout: request.stdout,
            stderr: request.stderr,
        };
        container.add_exec(&request.exec_id, paths, spec)?;
        Ok(Empty::new())
    }

    fn list_pids(&self, request: &PidsRequest) -> Result<PidsResponse, TaskError> {
        let container = self.container(&request.id)?;
        let processes = container
            .processes()
            .iter()
            .map(|process| {
                let mut info = ProcessInfo {
                    pid: process.pid(),
                    ..ProcessInfo::default()
                };
                if !process.exec_id.is_empty() {
                    info.info = MessageField::some(exec_details(&process.exec_id)?);
                }
                Ok(info)
            })
            .collect::<Result<_, TaskError>>()?;
        Ok(PidsResponse {
            processes,
            ..PidsResponse::default()
        })
    }
}

fn check_size(what: &str, object: &[u8]) -> Result<(), TaskError> {
    if object.len() > MAX_OBJECT {
        return Err(TaskError::Invalid(format!(
            "{what} described by {} bytes; {MAX_OBJECT} are possible",
            object.len()
        )));
    }
    Ok(())
}

fn exec_details(exec_id: &str) -> Result<Any, TaskError> {
    let details = ProcessDetails {
        exec_id: exec_id.to_owned(),
        ..ProcessDetails::default()
    };
    pack("containerd.runc.v1.ProcessDetails", &details)
}

fn pack(type_url: &str, message: &impl Message) -> Result<Any, TaskError> {
    let value = message
        .write_to_bytes()
        .map_err(|error| TaskError::Invalid(format!("Cannot encode {type_url}: {error}")))?;
    Ok(Any {
        type_url: type_url.to_owned(),
        value,
        ..Any::default()
    })
}

/// Runs a call to its end, also when its caller goes away: half of a creation or of a deletion
/// must not be left.
async fn to_the_end<T: Send + 'static>(
    call: impl Future<Output = Result<T, TaskError>> + Send + 'static,
) -> ttrpc::Result<T> {
    match tokio::spawn(call).await {
        Ok(result) => Ok(result?),
        Err(error) => Err(ttrpc::Error::Others(error.to_string())),
    }
}

#[async_trait]
impl Task for Service {
    async fn state(&self, _: &TtrpcContext, request: StateRequest) -> ttrpc::Result<StateResponse> {
        Ok(self.state_of(&request)?)
    }

    async fn create(
        &self,
        _: &TtrpcContext,
        request: CreateTaskRequest,
    ) -> ttrpc::Result<CreateTaskResponse> {
        if let Some(sandbox) = &self.shared.host.sandbox {
            sandbox.check_open_to(&request.id)?;
        }
        let pid = to_the_end(self.clone().create_container(request)).await?;
        Ok(CreateTaskResponse {
            pid,
            ..CreateTaskResponse::default()
        })
    }

    async fn start(&self, _: &TtrpcContext, request: StartRequest) -> ttrpc::Result<StartResponse> {
        to_the_end(self.clone().start_process(request)).await
    }

    async fn delete(
        &self,
        _: &TtrpcContext,
        request: DeleteRequest,
    ) -> ttrpc::Result<DeleteResponse> {
        to_the_end(self.clone().delete_process(request)).await
    }

    async fn pids(&self, _: &TtrpcContext, request: PidsRequest) -> ttrpc::Result<PidsResponse> {
        Ok(self.list_pids(&request)?)
    }

    async fn pause(&self, _: &TtrpcContext, request: PauseRequest) -> ttrpc::Result<Empty> {
        let container = self.container(&request.id)?;
        to_the_end(async move { container.pause().await }).await?;
        Ok(Empty::new())
    }

    async fn resume(&self, _: &TtrpcContext, request: ResumeRequest) -> ttrpc::Result<Empty> {
        let container = self.container(&request.id)?;
        to_the_end(async move { container.resume().await }).await?;
        Ok(Empty::new())
    }

    async fn checkpoint(&self, _: &TtrpcContext, _: CheckpointTaskRequest) -> ttrpc::Result<Empty> {
        Err(TaskError::Unsupported("checkpoints").into())
    }

    async fn kill(&self, _: &TtrpcContext, request: KillRequest) -> ttrpc::Result<Empty> {
        let container = self.container(&request.id)?;
        container
            .kill(&request.exec_id, request.signal, request.all)
            .await?;
        Ok(Empty::new())
    }

    async fn exec(&self, _: &TtrpcContext, request: ExecProcessRequest) -> ttrpc::Result<Empty> {
        Ok(self.add_exec(request)?)
    }

    async fn resize_pty(
        &self,
        _: &TtrpcContext,
        request: ResizePtyRequest,
    ) -> ttrpc::Result<Empty> {
        let size = ConsoleSize {
            width: request.width,
            height: request.height,
        };
        let container = self.container(&request.id)?;
        container.resize(&request.exec_id, size).await?;
        Ok(Empty::new())
    }

    async fn close_io(&self, _: &TtrpcContext, request: CloseIORequest) -> ttrpc::Result<Empty> {
        let process = self.container(&request.id)?.process(&request.exec_id)?;
        if request.stdin {
            process.close_input();
        }
        Ok(Empty::new())
    }

    async fn update(&self, _: &TtrpcContext, request: UpdateTaskRequest) -> ttrpc::Result<Empty> {
        let container = self.container(&request.id)?;
        let resources = request.resources.value.clone();
        check_size("The resources are", &resources)?;
        to_the_end(async move { container.update(resources).await }).await?;
        Ok(Empty::new())
    }

    async fn wait(&self, _: &TtrpcContext, request: WaitRequest) -> ttrpc::Result<WaitResponse> {
        let process = self.container(&request.id)?.process(&request.exec_id)?;
        let exit = process.wait().await;
        Ok(WaitResponse {
            exit_status: exit.status.into(),
            exited_at: MessageField::some(timestamp(exit.at)),
            ..WaitResponse::default()
        })
    }

    async fn stats(&self, _: &TtrpcContext, request: StatsRequest) -> ttrpc::Result<StatsResponse> {
        let container = self.container(&request.id)?;
        let metrics = stats::metrics(&container.stats().await?);
        Ok(StatsResponse {
            stats: MessageField::some(pack(stats::TYPE_URL, &metrics)?),
            ..StatsResponse::default()
        })
    }

    async fn connect(
        &self,
        _: &TtrpcContext,
        request: ConnectRequest,
    ) -> ttrpc::Result<ConnectResponse> {
        let task_pid = self
            .container(&request.id)
            .map_or(0, |container| container.init.pid());
        Ok(ConnectResponse {
            shim_pid: std::process::id(),
            task_pid,
            version: env!("CARGO_PKG_VERSION").to_owned(),
            ..ConnectResponse::default()
        })
    }

    async fn shutdown(&self, _: &TtrpcContext, _: ShutdownRequest) -> ttrpc::Result<Empty> {
        // A sandbox ends by `ShutdownSandbox`, without containers or with.
        if self.shared.host.sandbox.is_some() {
            return Ok(Empty::new());
        }
        to_the_end(self.clone().shut_down()).await
    }
}
