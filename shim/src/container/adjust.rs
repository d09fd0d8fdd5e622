//! What changes about a container while it runs: pausing, limits, and what it uses.

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::Duration,
};

use bulkhead_agent_api::messages::StatsResponse;
use containerd_shim_protos::events::task as messages;
use tokio::{sync::Mutex as AsyncMutex, time::sleep};

use super::Container;
use crate::{
    agent_client::AgentError,
    errors::TaskError,
    events::Event,
    process::Phase,
    spec::{Cpu, LinuxResources},
};

/// The least time between two events about memory: a guest can end processes faster than anybody
/// wants to know.
const OOM_INTERVAL: Duration = Duration::from_secs(1);

/// How a container differs from what it was created as.
#[derive(Debug)]
pub(super) struct Adjusted {
    /// The limits of CPU time, held for as long as one call changes anything.
    turn: AsyncMutex<Cpu>,
    paused: AtomicBool,
    /// As far as containerd was told.
    oom_kills: AtomicU64,
}

impl Adjusted {
    pub(super) fn new(cpu: Cpu) -> Self {
        Self {
            turn: AsyncMutex::new(cpu),
            paused: AtomicBool::new(false),
            oom_kills: AtomicU64::new(0),
        }
    }
}

impl Container {
    /// Whether its processes stand still.
    pub fn is_paused(&self) -> bool {
        self.adjusted.paused.load(Ordering::Relaxed) && self.init.exit().is_none()
    }

    pub(super) fn check_not_paused(&self, exec_id: &str) -> Result<(), TaskError> {
        if self.is_paused() {
            return Err(TaskError::State(format!(
                "Cannot start exec {exec_id}: container {} is paused",
                self.id
            )));
        }
        Ok(())
    }

    /// Stops every process of the container, in the guest. Other containers of the pod go on.
    pub async fn pause(&self) -> Result<(), TaskError> {
        let _turn = self.adjusted.turn.lock().await;
        self.check_running("pause")?;
        if self.is_paused() {
            return Err(self.wrong_state("pause", "it is paused already"));
        }
        self.told(self.agent().await?.pause(&self.id).await).await?;
        self.adjusted.paused.store(true, Ordering::Relaxed);
        self.publish(Event::Paused(messages::TaskPaused {
            container_id: self.id.clone(),
            ..Default::default()
        }));
        Ok(())
    }

    /// Lets the processes of a paused container go on.
    pub async fn resume(&self) -> Result<(), TaskError> {
        let _turn = self.adjusted.turn.lock().await;
        self.check_running("resume")?;
        if !self.is_paused() {
            return Err(self.wrong_state("resume", "it is not paused"));
        }
        self.told(self.agent().await?.resume(&self.id).await)
            .await?;
        self.adjusted.paused.store(false, Ordering::Relaxed);
        self.publish(Event::Resumed(messages::TaskResumed {
            container_id: self.id.clone(),
            ..Default::default()
        }));
        Ok(())
    }

    /// Changes limits, given as an OCI `linux.resources` object in JSON: in the guest, and for the
    /// pod's first container the pod's share of the host's CPUs.
    pub async fn update(&self, resources: Vec<u8>) -> Result<(), TaskError> {
        let mut cpu = self.adjusted.turn.lock().await;
        if self.init.exit().is_some() {
            return Err(self.wrong_state("update", "it has ended"));
        }
        let changes: LinuxResources = serde_json::from_slice(&resources)
            .map_err(|error| TaskError::Invalid(format!("Cannot parse the resources: {error}")))?;
        self.told(self.agent().await?.update(&self.id, resources).await)
            .await?;
        cpu.change(&changes.cpu.unwrap_or_default());
        // The cgroup of the pod's first container is the pod's.
        if self.anchors.parent() == self.host.pod.cgroup() {
            self.host.pod.limit_cpu(&cpu)?;
        }
        Ok(())
    }

    /// What the container uses.
    pub async fn stats(&self) -> Result<StatsResponse, TaskError> {
        let stats = self.agent().await?.stats(&self.id).await;
        self.told(stats).await
    }

    /// Tells containerd of processes that are ended for lack of memory, for as long as the
    /// container runs.
    pub(super) async fn watch_memory(self: Arc<Self>) {
        let Ok(agent) = self.agent().await else {
            return;
        };
        while self.init.exit().is_none() {
            let known = self.adjusted.oom_kills.load(Ordering::Relaxed);
            let told = tokio::select! {
                told = agent.wait_for_oom(&self.id, known) => told,
                // With it comes the last count.
                _ = self.init.wait() => return,
            };
            match told {
                Ok(kills) if kills > known => self.tell_oom(kills),
                // The container's end, or the pod's.
                _ => return,
            }
            tokio::select! {
                () = sleep(OOM_INTERVAL) => {}
                _ = self.init.wait() => {}
            }
        }
    }

    /// Tells containerd when more processes have been ended than it knows of.
    pub(super) fn tell_oom(&self, kills: u64) {
        if self.adjusted.oom_kills.fetch_max(kills, Ordering::Relaxed) < kills {
            self.publish(Event::Oom(messages::TaskOOM {
                container_id: self.id.clone(),
                ..Default::default()
            }));
        }
    }

    async fn told<T>(&self, answer: Result<T, AgentError>) -> Result<T, TaskError> {
        match answer {
            Ok(answer) => Ok(answer),
            Err(error) => Err(self.explained(error).await),
        }
    }

    fn check_running(&self, what: &str) -> Result<(), TaskError> {
        match self.init.phase() {
            Phase::Running => Ok(()),
            Phase::Created | Phase::Starting => Err(self.wrong_state(what, "it is not started")),
            Phase::Stopped(_) => Err(self.wrong_state(what, "it has ended")),
        }
    }

    fn wrong_state(&self, what: &str, state: &str) -> TaskError {
        TaskError::State(format!("Cannot {what} container {}: {state}", self.id))
    }
}
