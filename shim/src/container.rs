//! A container: its own process, those that were exec'd, and what it has on the host.

mod adjust;
mod execs;

use std::{
    collections::BTreeMap,
    path::PathBuf,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use containerd_shim_protos::events::task as messages;
use protobuf::MessageField;
use tokio::{pin, sync::Mutex as AsyncMutex};
use ttrpc::Code;

use self::{adjust::Adjusted, execs::Exec};
use crate::{
    agent_client::{AgentClient, AgentError, Exit},
    anchor::{Anchor, AnchorEvent},
    cgroup::Cgroup,
    child::{KILLED, Reaper},
    deadline::timeout,
    errors::{TaskError, timestamp},
    events::{Event, Events},
    hooks,
    network::{Membership, NetworkError, Networks},
    pod::Pod,
    process::{Phase, Process},
    rootfs::Rootfs,
    sandbox::{Member, Sandbox},
    shares::Shares,
    spec::{self, Spec},
    text, timeline,
};

/// How long a killed process may take to end.
const KILL_DEADLINE: Duration = Duration::from_secs(10);

/// How long any process may take to end after SIGKILL, with all that it holds, before its guest counts
/// as one that does not obey.
const OBEY_DEADLINE: Duration = Duration::from_secs(30);

/// How long the end of a process may be on its way to here when the VM has ended.
const LAST_WORDS_DEADLINE: Duration = Duration::from_secs(3);

/// How long the root file system may take to be unmounted, which may have to write to a disk.
const UNMOUNT_DEADLINE: Duration = Duration::from_secs(60);

/// Why a pod ends whose guest refuses what cannot be refused.
const DISOBEYS: &str = "the guest does not obey SIGKILL";

const SIGKILL: u32 = libc::SIGKILL.unsigned_abs();

/// What all containers of a pod share.
#[derive(Debug)]
pub struct Host {
    /// containerd's namespace.
    pub namespace: String,
    /// The VM.
    pub pod: Arc<Pod>,
    /// What the VM's containers have of the host's network namespaces.
    pub networks: Arc<Networks>,
    /// containerd's ear.
    pub events: Events,
    /// Parent of all processes.
    pub reaper: Reaper,
    /// The pod itself, if containerd makes it by its sandbox API.
    pub sandbox: Option<Arc<Sandbox>>,
}

impl Host {
    /// Whether the container of that id is the pod itself.
    pub fn is_sandbox(&self, id: &str) -> bool {
        let sandbox = self.sandbox.as_ref();
        sandbox.is_some_and(|sandbox| sandbox.id == id)
    }

    /// Tells containerd of something that has happened to a container, for which it has a task.
    pub fn publish(&self, id: &str, event: Event) {
        if !self.is_sandbox(id) {
            self.events.publish(event);
        }
    }
}

/// What a container has beside its processes, in the order in which it is released.
#[derive(Debug, Default)]
pub struct Resources {
    /// The network, from the start on.
    pub network: Option<Membership>,
    /// The agent knows the container.
    pub in_guest: bool,
    /// What the guest sees of the host.
    pub shares: Shares,
    /// The root file system.
    pub rootfs: Option<Rootfs>,
    /// The cgroup, unless it is the pod's.
    pub cgroup: Option<Cgroup>,
    /// The sandbox knows of the cgroup.
    pub member: Option<Member>,
}

impl Resources {
    /// Gives everything back. What fails is logged, and the rest still done.
    pub async fn release(&mut self, host: &Host, id: &str) {
        if let Some(membership) = self.network.take() {
            host.networks.leave(&membership).await;
        }
        if std::mem::take(&mut self.in_guest)
            && let Some(agent) = host.pod.ready_agent()
            && let Err(error) = agent.delete(id, "").await
            && error.code() != Code::NOT_FOUND
        {
            let error = text::chain(&error);
            tracing::warn!(id, error, "The agent cannot release a container");
        }
        self.shares.remove(&host.pod).await;
        if let Some(rootfs) = self.rootfs.take() {
            let unmounted = tokio::task::spawn_blocking(move || drop(rootfs));
            if timeout(UNMOUNT_DEADLINE, unmounted).await.is_err() {
                tracing::error!(id, "The root file system is still being unmounted");
            }
        }
        self.cgroup = None;
        self.member = None;
    }
}

/// What a container is made of.
#[derive(Debug)]
pub struct Parts {
    /// Its id.
    pub id: String,
    /// Its bundle.
    pub bundle: String,
    /// Its specification.
    pub spec: Spec,
    /// Its own process.
    pub init: Arc<Process>,
    /// Directory of its anchors' cgroup.
    pub anchors: PathBuf,
    /// What is to be released.
    pub resources: Resources,
}

/// A created container.
#[derive(Debug)]
pub struct Container {
    /// Its id.
    pub id: String,
    /// Its bundle.
    pub bundle: String,
    /// Its own process.
    pub init: Arc<Process>,
    spec: Spec,
    anchors: PathBuf,
    host: Arc<Host>,
    execs: Mutex<BTreeMap<String, Exec>>,
    resources: AsyncMutex<Resources>,
    adjusted: Adjusted,
}

impl Container {
    /// Takes over a container that the agent has created, and watches its process.
    pub fn new(host: Arc<Host>, parts: Parts, anchor: Anchor, agent: AgentClient) -> Arc<Self> {
        let container = Arc::new(Self {
            id: parts.id,
            bundle: parts.bundle,
            init: parts.init,
            adjusted: Adjusted::new(parts.spec.cpu()),
            spec: parts.spec,
            anchors: parts.anchors,
            host,
            execs: Mutex::default(),
            resources: AsyncMutex::new(parts.resources),
        });
        let init = container.init.clone();
        tokio::spawn(container.clone().supervise(init, anchor, agent));
        container
    }

    fn execs(&self) -> MutexGuard<'_, BTreeMap<String, Exec>> {
        self.execs.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn publish(&self, event: Event) {
        self.host.publish(&self.id, event);
    }

    /// A process by its exec id; empty for the container's own.
    pub fn process(&self, exec_id: &str) -> Result<Arc<Process>, TaskError> {
        if exec_id.is_empty() {
            return Ok(self.init.clone());
        }
        self.execs()
            .get(exec_id)
            .map(|exec| exec.process.clone())
            .ok_or_else(|| TaskError::NotFound(format!("exec {exec_id} of container {}", self.id)))
    }

    /// Its own process, also when it has ended, and those that run beside it. A containerd that comes
    /// back deletes a container without processes, and with it the exit code that nobody has read yet.
    pub fn processes(&self) -> Vec<Arc<Process>> {
        let execs = self.execs();
        let execs = execs.values().map(|exec| exec.process.clone());
        let running = execs.filter(|process| process.pid() != 0 && process.exit().is_none());
        std::iter::once(self.init.clone()).chain(running).collect()
    }

    /// The agent, or why it is gone.
    async fn agent(&self) -> Result<AgentClient, TaskError> {
        Ok(self.host.pod.agent().await?)
    }

    async fn explained(&self, error: AgentError) -> TaskError {
        match self.host.pod.explain(error).await {
            Ok(error) => error.into(),
            Err(error) => error.into(),
        }
    }

    /// Starts the container's own process. Returns its PID.
    pub async fn start(self: &Arc<Self>) -> Result<u32, TaskError> {
        self.init
            .begin_start()
            .map_err(|phase| self.cannot_start("", phase))?;
        if let Err(error) = self.try_start().await {
            self.init.not_started();
            self.kill_created().await;
            let membership = self.resources.lock().await.network.take();
            if let Some(membership) = membership {
                self.host.networks.leave(&membership).await;
            }
            return Err(error);
        }
        let pid = self.init.pid();
        self.publish(Event::Start(messages::TaskStart {
            container_id: self.id.clone(),
            pid,
            ..Default::default()
        }));
        self.init.started();
        tokio::spawn(self.clone().watch_memory());
        let pod = &self.host.pod;
        if pod.timeline().reached(timeline::Phase::ContainerStarted) {
            pod.write_timeline();
        }
        self.run_late_hooks("running").await;
        Ok(pid)
    }

    async fn try_start(&self) -> Result<(), TaskError> {
        self.init.open_input()?;
        self.join_network().await?;
        let hooks = self.spec.hooks_of(|hooks| &hooks.start_container);
        let agent = self.agent().await?;
        match agent.start(&self.id, hooks::time(hooks)).await {
            Ok(()) => Ok(()),
            Err(error) => Err(self.explained(error).await),
        }
    }

    /// Gives the container the network that the host has set up for it.
    async fn join_network(&self) -> Result<(), TaskError> {
        let Some(path) = self.spec.network_namespace() else {
            return Ok(());
        };
        let by_path = !path.as_os_str().is_empty();
        let joining = self.host.networks.join(&self.id, &self.init, by_path);
        match joining.await {
            Ok(membership) => {
                self.resources.lock().await.network = Some(membership);
                Ok(())
            }
            Err(NetworkError::Agent(error)) => Err(self.explained(error).await),
            Err(error) => Err(error.into()),
        }
    }

    fn cannot_start(&self, exec_id: &str, phase: Phase) -> TaskError {
        let what = if exec_id.is_empty() {
            format!("container {}", self.id)
        } else {
            format!("exec {exec_id}")
        };
        TaskError::State(match phase {
            Phase::Stopped(_) => format!("Cannot start {what}: it has ended"),
            _ => format!("Cannot start {what}: it is started already"),
        })
    }

    /// Ends a process that was never started, and waits for that.
    async fn kill_created(&self) {
        if let Some(agent) = self.host.pod.ready_agent() {
            // It may be dead already.
            let _ = agent.signal(&self.id, "", SIGKILL, true).await;
        }
        if timeout(KILL_DEADLINE, self.init.wait()).await.is_err() {
            self.host.pod.end(DISOBEYS);
            // With the pod it ends.
            let _ = timeout(KILL_DEADLINE, self.init.wait()).await;
        }
    }

    /// Hooks whose failure changes nothing any more.
    async fn run_late_hooks(&self, status: &'static str) {
        let Some(hooks) = &self.spec.hooks else {
            return;
        };
        let (hooks, pid) = match status {
            "running" => (&hooks.poststart, self.init.pid()),
            _ => (&hooks.poststop, 0),
        };
        let none = Default::default();
        let state = hooks::State {
            oci_version: &self.spec.oci_version,
            id: &self.id,
            status,
            pid,
            bundle: self.bundle.as_ref(),
            annotations: self.spec.annotations.as_ref().unwrap_or(&none),
        };
        for hook in hooks {
            let one = std::slice::from_ref(hook);
            if let Err(error) = hooks::run(one, &state, &self.host.reaper).await {
                let error = text::chain(&error);
                tracing::warn!(id = self.id, error, "A hook failed");
            }
        }
    }

    /// Follows a process from its creation or start to its end.
    async fn supervise(
        self: Arc<Self>,
        process: Arc<Process>,
        mut anchor: Anchor,
        agent: AgentClient,
    ) {
        let exit = {
            let end = self.end_in_guest(&process, &agent);
            pin!(end);
            let mut alive = true;
            loop {
                let signal = tokio::select! {
                    exit = &mut end => break exit,
                    event = anchor.event(), if alive => match event {
                        AnchorEvent::Signal(signal) => signal.into(),
                        AnchorEvent::Died => {
                            alive = false;
                            SIGKILL
                        }
                    },
                };
                let (container, process) = (self.clone(), process.clone());
                let agent = agent.clone();
                tokio::spawn(async move {
                    let (id, exec_id) = (&container.id, &process.exec_id);
                    // It may have ended.
                    let _ = agent.signal(id, exec_id, signal, false).await;
                    if signal == SIGKILL {
                        must_end(&container.host.pod, &process).await;
                    }
                });
            }
        };
        process.settled().await;
        if process.exec_id.is_empty() {
            self.end_execs().await;
            self.tell_oom(exit.oom_kills);
        }
        anchor.finish(exit.status).await;
        self.publish_exit(&process, exit);
    }

    /// Waits for a process's end: until the guest tells it, or the VM is no more, or the container's
    /// own process has ended and this one counts as ended with it.
    async fn end_in_guest(&self, process: &Process, agent: &AgentClient) -> Exit {
        let exec_id = &process.exec_id;
        let wait = agent.wait(&self.id, exec_id);
        pin!(wait);
        let told = tokio::select! {
            biased;
            told = &mut wait => told,
            // A VMM that does not die, killed as it is, keeps the connection open.
            _ = self.host.pod.ended() => timeout(LAST_WORDS_DEADLINE, &mut wait)
                .await
                .unwrap_or(Err(AgentError::Gone)),
            exit = process.wait() => return exit,
        };
        match told {
            Ok(exit) => exit,
            Err(error) => {
                let error = text::chain(&self.explained(error).await);
                tracing::warn!(id = self.id, exec_id, error, "A process is lost");
                Exit::now(KILLED)
            }
        }
    }

    fn publish_exit(&self, process: &Process, exit: Exit) {
        if !process.stopped(exit) {
            return;
        }
        let id = if process.exec_id.is_empty() {
            &self.id
        } else {
            &process.exec_id
        };
        self.publish(Event::Exit(messages::TaskExit {
            container_id: self.id.clone(),
            id: id.clone(),
            pid: process.pid(),
            exit_status: exit.status.into(),
            exited_at: MessageField::some(timestamp(exit.at)),
            ..Default::default()
        }));
    }

    /// Sends a signal to a process, or with `all` to every process of the container.
    pub async fn kill(&self, exec_id: &str, signal: u32, all: bool) -> Result<(), TaskError> {
        let process = self.process(exec_id)?;
        let finished = || TaskError::NotFound(format!("running process of {}", self.id));
        match process.phase() {
            Phase::Stopped(_) => return Err(finished()),
            Phase::Created if !exec_id.is_empty() => {
                return Err(TaskError::State(format!(
                    "Cannot signal exec {exec_id}: it is not started"
                )));
            }
            _ => {}
        }
        let Ok(agent) = self.host.pod.agent().await else {
            return Err(finished());
        };
        let all = all && exec_id.is_empty();
        // An exec that is being started may be unknown to the guest, and go on.
        let known = exec_id.is_empty() || process.phase() == Phase::Running;
        let answer = agent.signal(&self.id, exec_id, signal, all).await;
        if signal == SIGKILL && known {
            let pod = self.host.pod.clone();
            tokio::spawn(async move { must_end(&pod, &process).await });
        }
        match answer {
            Ok(()) => Ok(()),
            // A guest that is too stuck to obey is killed from outside: SIGKILL cannot be refused.
            Err(AgentError::Deadline { .. }) if exec_id.is_empty() && signal == SIGKILL => {
                self.host.pod.end(DISOBEYS);
                Ok(())
            }
            Err(error) => match self.host.pod.explain(error).await {
                Ok(error) => Err(error.into()),
                Err(_) => Err(finished()),
            },
        }
    }

    /// Sets the size of a terminal, now or when it is made.
    pub async fn resize(&self, exec_id: &str, size: spec::ConsoleSize) -> Result<(), TaskError> {
        let process = self.process(exec_id)?;
        process.set_size(size);
        let made = match process.phase() {
            Phase::Created => exec_id.is_empty(),
            Phase::Starting | Phase::Running => true,
            Phase::Stopped(_) => false,
        };
        if !made || !process.paths.terminal {
            return Ok(());
        }
        let agent = self.agent().await?;
        match agent
            .resize(&self.id, exec_id, size.width, size.height)
            .await
        {
            Ok(()) => Ok(()),
            Err(error) => Err(self.explained(error).await),
        }
    }

    /// Releases the container, which must have ended or not been started. May be repeated.
    pub async fn delete(&self) -> Result<Exit, TaskError> {
        let mut resources = self.resources.lock().await;
        match self.init.phase() {
            Phase::Stopped(_) => {}
            Phase::Created => self.kill_created().await,
            Phase::Starting | Phase::Running => {
                return Err(TaskError::State(format!(
                    "Cannot delete container {}: it is running",
                    self.id
                )));
            }
        }
        let Some(exit) = self.init.exit() else {
            return Err(TaskError::State(format!(
                "Cannot delete container {}: its process does not end",
                self.id
            )));
        };
        self.drain().await;
        resources.release(&self.host, &self.id).await;
        self.run_late_hooks("stopped").await;
        Ok(exit)
    }

    async fn drain(&self) {
        let execs = std::mem::take(&mut *self.execs());
        let draining = execs.values().map(|exec| exec.process.drain());
        tokio::join!(self.init.drain(), futures::future::join_all(draining));
    }
}

/// Sees to it that a process that got SIGKILL ends, whatever its guest says: at the latest with the pod.
async fn must_end(pod: &Pod, process: &Process) {
    if timeout(OBEY_DEADLINE, process.wait()).await.is_err() {
        pod.end(DISOBEYS);
    }
}
