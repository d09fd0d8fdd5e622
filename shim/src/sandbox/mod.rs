//! A pod that containerd makes by its sandbox API, without a pause container.
//!
//! containerd starts a shim in a bundle without a specification, describes the pod in
//! `CreateSandbox`, and puts containers into it by the task API. What stands for the pod itself is a
//! container as well: one without files, whose process does nothing in the guest but hold the
//! namespaces that the others join, and whose anchor holds the network namespace on the host.
//! It is made by the same steps as any container, from a specification that is written here.
//!
//! ```text
//! New ──CreateSandbox──▶ Created ──StartSandbox──▶ Running ──its process ends──▶ Stopped
//!                           └────────────────StopSandbox──────────────────────────▲
//! ```

mod config;
mod files;
mod spec;

use std::{
    fs,
    os::unix::fs::{DirBuilderExt, symlink},
    path::{Path, PathBuf},
    sync::{Mutex, PoisonError},
    time::SystemTime,
};

use containerd_shim_protos::sandbox_api::CreateSandboxRequest;
use serde_json::Value;
use tokio::sync::watch;

pub use self::config::SandboxError;
use self::config::{PodSandboxConfig, decode};
use crate::{
    agent_client::Exit,
    config::{Config, ConfigError},
    errors::TaskError,
    pod::PodSettings,
    spec::{Mount, Spec, SpecError},
};

/// Directory in a sandbox's bundle with a link to the cgroup of each container.
const MEMBERS: &str = "members";

/// Where a sandbox is in its life.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Phase {
    /// containerd has not described it yet.
    New,
    /// Its VM boots, or has.
    Created,
    /// Containers can join it.
    Running {
        /// Its anchor.
        pid: u32,
        /// When it was started.
        since: SystemTime,
    },
    /// Its process has ended, or never began.
    Stopped(Exit),
}

/// A sandbox.
#[derive(Debug)]
pub struct Sandbox {
    /// Its id.
    pub id: String,
    /// Its bundle.
    pub bundle: PathBuf,
    namespace: String,
    /// Until it is created.
    config: Mutex<Option<Result<Config, ConfigError>>>,
    phase: watch::Sender<Phase>,
}

impl Sandbox {
    /// A sandbox that is to be described. `config` is the machine's configuration.
    pub fn new(
        namespace: &str,
        id: &str,
        bundle: &Path,
        config: Result<Config, ConfigError>,
    ) -> Self {
        Self {
            id: id.to_owned(),
            bundle: bundle.to_owned(),
            namespace: namespace.to_owned(),
            config: Mutex::new(Some(config)),
            phase: watch::Sender::new(Phase::New),
        }
    }

    /// Takes its description, and writes what follows from it into the bundle. Returns what its pod
    /// is made from; `None` if that was done before.
    pub fn describe(
        &self,
        request: &CreateSandboxRequest,
    ) -> Result<Option<PodSettings>, SandboxError> {
        let mut config = self.config.lock().unwrap_or_else(PoisonError::into_inner);
        if config.is_none() {
            return Ok(None);
        }
        if !request.rootfs.is_empty() {
            return Err(SandboxError::Rootfs);
        }
        let described = request.options.as_ref().map(decode).transpose()?;
        let described = described.unwrap_or_default();
        let specification = spec::specification(&self.id, &described, &request.netns_path)?;
        self.write(&described, &specification)?;
        let path = self.bundle.join("config.json");
        let bytes = specification.to_string().into_bytes();
        let spec = Spec::parse(&bytes, &path)?;
        fs::write(&path, &bytes).map_err(|source| SandboxError::Write { path, source })?;
        let Some(config) = config.take() else {
            return Ok(None);
        };
        let _ = self.phase.send_replace(Phase::Created);
        let (namespace, id) = (&self.namespace, &self.id);
        Ok(Some(PodSettings::of(config, &spec, namespace, id, id)))
    }

    fn write(&self, described: &PodSandboxConfig, spec: &Value) -> Result<(), SandboxError> {
        let hostname = spec["hostname"].as_str().unwrap_or_default();
        files::write(&self.bundle, hostname, described.dns_config.as_ref())?;
        let path = self.bundle.join(MEMBERS);
        let mut directory = fs::DirBuilder::new();
        let made = directory.recursive(true).mode(0o700).create(&path);
        made.map_err(|source| SandboxError::Write { path, source })
    }

    /// The specification of a container in it, with its bytes. `pid` is the sandbox's anchor, if it
    /// is there.
    pub fn specification_of(
        &self,
        bundle: &Path,
        pid: Option<u32>,
    ) -> Result<(Spec, Vec<u8>), SpecError> {
        let (spec, bytes) = Spec::read(bundle)?;
        if bundle == self.bundle {
            return Ok((spec, bytes));
        }
        let path = bundle.join("config.json");
        let parsed = serde_json::from_slice(&bytes);
        let mut value = parsed.map_err(|source| SpecError::Parse {
            path: path.clone(),
            source,
        })?;
        files::complete(&mut value, &self.bundle);
        if let Some(pid) = pid {
            spec::name_sandbox(&mut value, pid);
        }
        let bytes = value.to_string().into_bytes();
        Ok((Spec::parse(&bytes, &path)?, bytes))
    }

    /// How large the memory is that its containers share, in bytes, if a mount is that: its source is
    /// not a place on the host, but a name.
    pub fn shared_memory(&self, mount: &Mount) -> Option<u64> {
        let is_shared = mount.source == self.bundle.join(files::SHARED_MEMORY);
        is_shared.then_some(files::SHARED_MEMORY_SIZE)
    }

    /// Refuses a container of the task API when there is nothing that it could join.
    pub fn check_open_to(&self, container: &str) -> Result<(), TaskError> {
        if container == self.id {
            return Err(TaskError::AlreadyExists(format!("sandbox {container}")));
        }
        match self.phase() {
            Phase::Running { .. } => Ok(()),
            _ => Err(TaskError::State(format!(
                "Cannot create container {container}: sandbox {} is not running",
                self.id
            ))),
        }
    }

    /// Remembers a container's cgroup for the time after a crash: containerd then cleans up after
    /// sandboxes alone.
    pub fn note(&self, container: &str, cgroup: &Path) -> Result<Member, SandboxError> {
        let path = self.bundle.join(MEMBERS).join(container);
        match symlink(cgroup, &path) {
            Ok(()) => Ok(Member(path)),
            Err(source) => Err(SandboxError::Write { path, source }),
        }
    }

    /// Where it is in its life.
    pub fn phase(&self) -> Phase {
        *self.phase.borrow()
    }

    /// Goes to the next phase. Nothing follows the end; returns whether anything changed.
    pub fn enter(&self, next: Phase) -> bool {
        self.phase.send_if_modified(|phase| {
            let alive = !matches!(phase, Phase::Stopped(_));
            if alive {
                *phase = next;
            }
            alive
        })
    }

    /// Waits until containerd has described it.
    pub async fn described(&self) {
        let mut phase = self.phase.subscribe();
        // The sender is part of this.
        let _ = phase.wait_for(|phase| *phase != Phase::New).await;
    }

    /// Waits for its end.
    pub async fn stopped(&self) -> Exit {
        let mut phase = self.phase.subscribe();
        loop {
            if let Phase::Stopped(exit) = *phase.borrow_and_update() {
                return exit;
            }
            if phase.changed().await.is_err() {
                return Exit::now(crate::child::KILLED);
            }
        }
    }
}

/// A container that is remembered for as long as this is there.
#[derive(Debug)]
pub struct Member(PathBuf);

impl Drop for Member {
    fn drop(&mut self) {
        // The bundle may have been removed.
        let _ = fs::remove_file(&self.0);
    }
}

/// The cgroups of containers that a crashed sandbox has left.
pub fn left_cgroups(bundle: &Path) -> Vec<PathBuf> {
    let members = fs::read_dir(bundle.join(MEMBERS)).into_iter().flatten();
    let members = members.flatten();
    members
        .filter_map(|entry| fs::read_link(entry.path()).ok())
        .collect()
}
