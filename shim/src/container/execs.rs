//! Processes that are executed in a container beside its own.

use std::{sync::Arc, time::Duration};

use bulkhead_agent_api::messages::ExecRequest;
use containerd_shim_protos::events::task as messages;
use protobuf::MessageField;
use tokio::time::timeout_at;

use super::{Container, KILL_DEADLINE, SIGKILL};
use crate::{
    agent_client::{AgentClient, AgentError, Exit},
    anchor::{Anchor, Network},
    apparmor,
    child::KILLED,
    deadline::{self, timeout},
    errors::TaskError,
    events::Event,
    process::{Phase, Process},
    spec,
    stdio::{Owner, Paths, Streaming},
    text,
};

/// How long the execs of a container may take to end once its own process has.
const EXECS_DEADLINE: Duration = Duration::from_secs(5);

/// Exit status of an exec that could not be started.
const NOT_STARTED: u8 = 255;

/// An exec'd process and its OCI `process` object.
#[derive(Debug, Clone)]
pub(super) struct Exec {
    pub(super) process: Arc<Process>,
    spec: Vec<u8>,
    apparmor_profile: Option<String>,
}

impl Container {
    /// Registers a process to be started later. `spec` is its OCI `process` object.
    pub fn add_exec(&self, exec_id: &str, paths: Paths, spec: Vec<u8>) -> Result<(), TaskError> {
        if self.init.exit().is_some() {
            return Err(TaskError::State(format!(
                "Cannot exec in container {}: it has ended",
                self.id
            )));
        }
        self.check_not_paused(exec_id)?;
        let parsed: spec::Process = serde_json::from_slice(&spec)
            .map_err(|error| TaskError::Invalid(format!("Cannot parse the process: {error}")))?;
        let mut execs = self.execs();
        if execs.contains_key(exec_id) {
            return Err(TaskError::AlreadyExists(format!("exec {exec_id}")));
        }
        let size = parsed.console_size.unwrap_or_default();
        let process = Arc::new(Process::new(exec_id.to_owned(), paths, size));
        let exec = Exec {
            process,
            spec,
            apparmor_profile: parsed.apparmor_profile,
        };
        execs.insert(exec_id.to_owned(), exec);
        drop(execs);
        self.publish(Event::ExecAdded(messages::TaskExecAdded {
            container_id: self.id.clone(),
            exec_id: exec_id.to_owned(),
            ..Default::default()
        }));
        Ok(())
    }

    /// Starts a registered process. Returns its PID.
    pub async fn start_exec(self: &Arc<Self>, exec_id: &str) -> Result<u32, TaskError> {
        let exec = self.execs().get(exec_id).cloned().ok_or_else(|| {
            TaskError::NotFound(format!("exec {exec_id} of container {}", self.id))
        })?;
        let process = exec.process.clone();
        if self.init.exit().is_some() {
            return Err(TaskError::State(format!(
                "Cannot start exec {exec_id}: container {} has ended",
                self.id
            )));
        }
        self.check_not_paused(exec_id)?;
        process
            .begin_start()
            .map_err(|phase| self.cannot_start(exec_id, phase))?;
        match self.try_start_exec(exec).await {
            Ok((anchor, agent)) => {
                let pid = anchor.pid();
                process.set_pid(pid);
                self.publish(Event::ExecStarted(messages::TaskExecStarted {
                    container_id: self.id.clone(),
                    exec_id: exec_id.to_owned(),
                    pid,
                    ..Default::default()
                }));
                process.started();
                tokio::spawn(self.clone().supervise(process, anchor, agent));
                Ok(pid)
            }
            Err(error) => {
                process.drop_streaming();
                process.stopped(Exit::now(NOT_STARTED));
                Err(error)
            }
        }
    }

    async fn try_start_exec(&self, exec: Exec) -> Result<(Anchor, AgentClient), TaskError> {
        let process = exec.process;
        // The guest has the container's own, which may be another one on the host by now.
        let profile = exec.apparmor_profile.as_deref();
        let profile = profile.filter(|name| Some(*name) != self.spec.apparmor_profile());
        let apparmor_policy = apparmor::policy(profile)?;
        let agent = self.agent().await?;
        let owner = Owner {
            namespace: &self.host.namespace,
            container: &self.id,
        };
        let streams = self.host.pod.streams();
        let (streaming, mut stdio) =
            Streaming::open(&process.paths, owner, streams, &self.host.reaper).await?;
        process.set_streaming(streaming);
        process.open_input()?;
        let size = process.size();
        (stdio.width, stdio.height) = (size.width, size.height);
        let request = ExecRequest {
            container_id: self.id.clone(),
            exec_id: process.exec_id.clone(),
            process: exec.spec,
            stdio: MessageField::some(stdio),
            apparmor_policy,
            ..ExecRequest::default()
        };
        // An exec's anchor is where the container's own is.
        let network = match self.spec.network_namespace() {
            None => Network::Host,
            Some(_) => Network::Path(format!("/proc/{}/ns/net", self.init.pid()).into()),
        };
        let name = format!("{}/{}", self.id, process.exec_id);
        let (anchor, started) = tokio::join!(
            Anchor::start(&self.host.reaper, &self.anchors, &network, &name),
            agent.exec(&request),
        );
        if let Err(error) = started {
            if let Ok(anchor) = anchor {
                anchor.finish(NOT_STARTED).await;
            }
            if matches!(error, AgentError::Deadline { .. }) {
                self.abandon_exec(&agent, &process.exec_id);
            }
            return Err(self.explained(error).await);
        }
        match anchor {
            Ok(anchor) => Ok((anchor, agent)),
            Err(error) => {
                self.abandon_exec(&agent, &process.exec_id);
                Err(error.into())
            }
        }
    }

    /// Ends a process in the guest that nobody here knows any more.
    fn abandon_exec(&self, agent: &AgentClient, exec_id: &str) {
        let (agent, id, exec_id) = (agent.clone(), self.id.clone(), exec_id.to_owned());
        tokio::spawn(async move {
            if agent.signal(&id, &exec_id, SIGKILL, false).await.is_ok()
                && timeout(KILL_DEADLINE, agent.wait(&id, &exec_id))
                    .await
                    .is_ok()
            {
                let _ = agent.delete(&id, &exec_id).await;
            }
        });
    }

    /// The kernel of the guest ends execs with the container's own process; their exits are told
    /// before its.
    pub(super) async fn end_execs(&self) {
        let execs: Vec<Arc<Process>> = self
            .execs()
            .values()
            .map(|exec| exec.process.clone())
            .filter(|process| matches!(process.phase(), Phase::Starting | Phase::Running))
            .collect();
        let deadline = deadline::after(EXECS_DEADLINE);
        for exec in execs {
            if timeout_at(deadline, exec.wait()).await.is_err() {
                self.publish_exit(&exec, Exit::now(KILLED));
            }
        }
    }

    /// Releases an exec'd process, which must have ended or not been started.
    pub async fn delete_exec(&self, exec_id: &str) -> Result<(u32, Exit), TaskError> {
        let process = self.process(exec_id)?;
        let exit = match process.phase() {
            Phase::Stopped(exit) => exit,
            Phase::Created => Exit::now(0),
            Phase::Starting | Phase::Running => {
                return Err(TaskError::State(format!(
                    "Cannot delete exec {exec_id}: it is running"
                )));
            }
        };
        process.drain().await;
        // Whoever comes second finds nothing.
        if self.execs().remove(exec_id).is_none() {
            return Err(TaskError::NotFound(format!("exec {exec_id}")));
        }
        if process.pid() != 0
            && let Some(agent) = self.host.pod.ready_agent()
            && let Err(error) = agent.delete(&self.id, exec_id).await
        {
            let error = text::chain(&error);
            tracing::warn!(exec_id, error, "The agent cannot release an exec");
        }
        Ok((process.pid(), exit))
    }
}
