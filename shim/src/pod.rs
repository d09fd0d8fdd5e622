//! A pod: one VM, from its boot to its end.
//!
//! ```text
//! Booting ──agent connects──▶ Ready ──┐
//!    └───────────────────────────────▶┴──▶ Ended(reason)
//! ```

use std::{
    collections::HashMap,
    fs::{File, OpenOptions},
    io,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    path::{Path, PathBuf},
    sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError},
    time::Duration,
};

use bulkhead_agent_api::{AGENT_PORT, STREAM_PORT};
use bulkhead_rootfs_builder::{GuestFiles, VerifyError, verify};
use bulkhead_vmm_control::{Counters, Reply, Request, UserNamespace, UserNamespaceError};
use thiserror::Error;
use tokio::{
    sync::{Mutex as AsyncMutex, MutexGuard as AsyncMutexGuard, mpsc, watch},
    time::{Instant, sleep_until, timeout_at},
};

use crate::{
    agent_client::{AgentClient, AgentError},
    cgroup::{self, Cgroup, CgroupError},
    child::Reaper,
    clock,
    config::{Config, ConfigError},
    deadline::timeout,
    ids::{IdClaim, IdError},
    network::scan::Interface,
    sizing::{self, Machine},
    spec::{Cpu, Spec},
    state::{StateDirectory, StateError},
    streams::Streams,
    text,
    timeline::{GuestTimes, Phase, Timeline},
    vmm_process::{Notice, VmmError, VmmProcess, VmmSettings},
    volumes::Volumes,
};

/// How long to wait for the VMM to tell why the agent's connection is gone.
const EXPLANATION_DEADLINE: Duration = Duration::from_secs(3);

/// How long a killed VMM may take to give its memory back.
const EXIT_DEADLINE: Duration = Duration::from_secs(20);

/// Why a pod ends that is no longer wanted.
pub const SHUT_DOWN: &str = "it was shut down";

/// Where KVM is.
const KVM: &str = "/dev/kvm";

/// Name of the memory of verified files, in the state directory of all pods.
pub const VERIFIED: &str = "verified.json";

/// Why a pod is not there.
#[derive(Debug, Clone, Error)]
pub enum PodError {
    /// The VM did not come up.
    #[error("Cannot start the VM: {0}")]
    Boot(Arc<str>),
    /// The VM was up and has ended.
    #[error("The VM has ended: {0}")]
    Ended(Arc<str>),
}

/// Why a boot failed.
#[derive(Debug, Error)]
enum BootError {
    #[error(transparent)]
    Config(#[from] ConfigError),
    #[error("Cannot open {KVM}: {source}; {hint}")]
    Kvm {
        source: io::Error,
        hint: &'static str,
    },
    #[error("The guest's files cannot be used")]
    Guest(#[source] VerifyError),
    #[error(transparent)]
    State(#[from] StateError),
    #[error(transparent)]
    Cgroup(#[from] CgroupError),
    #[error(transparent)]
    Ids(#[from] IdError),
    #[error(transparent)]
    UserNamespace(#[from] UserNamespaceError),
    #[error(transparent)]
    Vmm(#[from] VmmError),
    #[error("{0}")]
    Died(String),
}

#[derive(Debug, Clone)]
enum State {
    Booting,
    Ready(AgentClient),
    Ended(PodError),
}

/// What a pod is made from.
#[derive(Debug)]
pub struct PodSettings {
    /// The machine's configuration, or why there is none.
    pub config: Result<Config, ConfigError>,
    /// containerd's namespace.
    pub namespace: String,
    /// Name of the pod.
    pub group: String,
    /// Directory of the pod's own cgroup.
    pub cgroup: Result<PathBuf, CgroupError>,
    /// OOM preference of the VMM.
    pub oom_score_adj: Option<i32>,
}

impl PodSettings {
    /// For the pod whose first container, `id`, has this specification.
    pub fn of(
        config: Result<Config, ConfigError>,
        spec: &Spec,
        namespace: &str,
        group: &str,
        id: &str,
    ) -> Self {
        let none = HashMap::default();
        let annotations = spec.annotations.as_ref().unwrap_or(&none);
        let process = spec.process.as_ref();
        Self {
            config: config.and_then(|config| {
                sizing::fit(config, spec, &Machine::this()).with_annotations(annotations)
            }),
            namespace: namespace.to_owned(),
            group: group.to_owned(),
            cgroup: cgroup::directory(spec.cgroups_path(), namespace, id),
            oom_score_adj: process.and_then(|process| process.oom_score_adj),
        }
    }
}

/// What a pod owns on the host beside the VMM. Released when the pod is stopped.
#[derive(Debug, Default)]
struct Belongings {
    vmm: Option<Arc<VmmProcess>>,
    cgroup: Option<Cgroup>,
    state: Option<StateDirectory>,
    ids: Option<IdClaim>,
}

/// How the VMM is kept from all but its own files.
#[derive(Debug)]
pub struct Confinement {
    /// The user namespace by which it sees files.
    pub namespace: Arc<UserNamespace>,
    /// The state directory of all pods, a place for mounts that nobody else sees.
    pub state_dir: PathBuf,
}

/// A pod.
#[derive(Debug)]
pub struct Pod {
    state: watch::Sender<State>,
    belongings: Mutex<Belongings>,
    cgroup: OnceLock<PathBuf>,
    confinement: OnceLock<Confinement>,
    queue_pairs: OnceLock<u8>,
    volumes: AsyncMutex<Volumes>,
    streams: Arc<Streams>,
    timeline: Arc<Timeline>,
}

impl Pod {
    /// A pod that is about to boot.
    pub fn new(timeline: Arc<Timeline>) -> Arc<Self> {
        Arc::new(Self {
            state: watch::Sender::new(State::Booting),
            belongings: Mutex::default(),
            cgroup: OnceLock::new(),
            confinement: OnceLock::new(),
            queue_pairs: OnceLock::new(),
            volumes: AsyncMutex::default(),
            streams: Streams::new(),
            timeline,
        })
    }

    /// Starts its VM in the background. To be called once.
    pub fn boot(self: &Arc<Self>, settings: PodSettings, reaper: Reaper) {
        if let Ok(cgroup) = &settings.cgroup {
            let _ = self.cgroup.set(cgroup.clone());
        }
        let running = self.clone();
        tokio::spawn(async move {
            let limit = match &settings.config {
                Ok(config) => Duration::from_secs(config.boot_timeout.into()),
                // It fails at once.
                Err(_) => Duration::ZERO,
            };
            let deadline = Instant::now() + limit;
            let reason = match timeout_at(deadline, running.start(settings, &reaper)).await {
                Ok(Ok(notices)) => running.run(notices, deadline).await,
                Ok(Err(error)) => Some(text::chain(&error)),
                Err(_) => None,
            };
            running.end(&reason.unwrap_or_else(|| {
                let seconds = limit.as_secs();
                format!("the guest's agent did not answer within {seconds} s (boot_timeout)")
            }));
        });
    }

    /// Directory of its cgroup, which outlives its containers.
    pub fn cgroup(&self) -> Option<&Path> {
        self.cgroup.get().map(PathBuf::as_path)
    }

    fn belongings(&self) -> MutexGuard<'_, Belongings> {
        self.belongings
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }

    /// The streams that the guest dials.
    pub fn streams(&self) -> &Arc<Streams> {
        &self.streams
    }

    /// The record of the start.
    pub fn timeline(&self) -> &Timeline {
        &self.timeline
    }

    /// Why the pod is not there any more, if so.
    pub fn failure(&self) -> Option<PodError> {
        match &*self.state.borrow() {
            State::Ended(error) => Some(error.clone()),
            State::Booting | State::Ready(_) => None,
        }
    }

    /// Builds everything up to a running guest.
    async fn start(
        &self,
        settings: PodSettings,
        reaper: &Reaper,
    ) -> Result<mpsc::Receiver<Notice>, BootError> {
        let config = settings.config?;
        let kvm = open_kvm()?;
        let state =
            StateDirectory::create(&config.state_dir, &settings.namespace, &settings.group)?;
        let console = config.console.then(|| state.console()).transpose()?;
        let ids = IdClaim::lowest(&config.state_dir, &config.ids())?;
        let namespace = Arc::new(UserNamespace::create(ids.range())?);
        let cgroup = Cgroup::create(settings.cgroup?)?;
        let cgroup = {
            let mut belongings = self.belongings();
            belongings.state = Some(state);
            belongings.ids = Some(ids);
            belongings.cgroup.insert(cgroup).for_vmm(&config)?
        };
        let confinement = Confinement {
            namespace: namespace.clone(),
            state_dir: config.state_dir.clone(),
        };
        // A pod is started once.
        let _ = self.confinement.set(confinement);
        let _ = self.queue_pairs.set(config.vm().queue_pairs());
        self.timeline.reached(Phase::PodIdentified);
        let guest = verified(&config).await?;
        if let Some(error) = &guest.cache_error {
            let error = text::chain(error);
            tracing::warn!(error, "Guest files will be verified again");
        }
        // Whoever ended the pod meanwhile has released what it had, and would not know of a VMM.
        if let Some(failure) = self.failure() {
            return Err(BootError::Died(failure.to_string()));
        }
        let (vmm, notices) = VmmProcess::spawn(
            VmmSettings {
                path: &config.vmm_path()?,
                user_namespace: &namespace,
                cgroup: cgroup.as_fd(),
                oom_score_adj: settings.oom_score_adj,
                core_scheduling: config.core_scheduling,
            },
            reaper,
        )?;
        let vmm = Arc::new(vmm);
        self.belongings().vmm = Some(vmm.clone());
        self.timeline.reached(Phase::VmmSpawned);
        let mut fds = vec![kvm.as_fd(), guest.vmlinux.as_fd(), guest.initramfs.as_fd()];
        fds.extend(console.as_ref().map(AsFd::as_fd));
        match vmm.order(&Request::Boot(config.vm()), &fds).await {
            Err(VmmError::Gone) => return Err(BootError::Died(last_reason(notices).await)),
            result => result?,
        }
        self.timeline.reached(Phase::VmmBooted);
        Ok(notices)
    }

    /// Serves a running VM until its end, and returns the reason; `None` when its agent has not
    /// connected by the deadline.
    async fn run(
        self: &Arc<Self>,
        mut notices: mpsc::Receiver<Notice>,
        deadline: Instant,
    ) -> Option<String> {
        loop {
            let booting = matches!(*self.state.borrow(), State::Booting);
            tokio::select! {
                notice = notices.recv() => match notice {
                    Some(Notice::Connection { port: AGENT_PORT, stream }) if booting => {
                        self.timeline.reached(Phase::AgentReady);
                        let agent = AgentClient::new(stream);
                        tokio::spawn(self.clone().measure(agent.clone()));
                        tokio::spawn(clock::follow(agent.clone()));
                        self.state.send_replace(State::Ready(agent));
                    }
                    Some(Notice::Connection { port: STREAM_PORT, stream }) if !booting => {
                        self.streams.accept(stream);
                    }
                    Some(Notice::Connection { port, .. }) => {
                        tracing::warn!(port, "The guest dialled a port it may not; closed");
                    }
                    Some(Notice::Ended { reason }) => return Some(reason),
                    None => return Some(VmmError::Gone.to_string()),
                },
                () = sleep_until(deadline), if booting => return None,
            }
        }
    }

    /// Asks for what the timeline tells beyond the shim's own times.
    async fn measure(self: Arc<Self>, agent: AgentClient) {
        let counters = self.counters().await.ok();
        if let Some(counters) = &counters {
            let jail = &counters.jail;
            for (phase, at_ns) in [
                (Phase::VmmStarted, jail.started_ns),
                (Phase::VmmLimited, jail.limited_ns),
                (Phase::VmmSeparated, jail.separated_ns),
                (Phase::VmmRooted, jail.rooted_ns),
                (Phase::VmmJoined, jail.joined_ns),
                (Phase::VmmJailed, jail.jailed_ns),
                (Phase::KernelEntered, counters.entered_ns),
            ] {
                self.timeline.reached_at(phase, at_ns);
            }
        }
        let guest = agent.info().await.ok().map(|info| GuestTimes {
            agent_started_ns: info.started_ns,
            agent_ready_ns: info.ready_ns,
        });
        self.timeline
            .set_guest(counters.map(|counters| counters.exits), guest);
    }

    /// Writes the timeline into the pod's state directory.
    pub fn write_timeline(&self) {
        let belongings = self.belongings();
        if let Some(state) = &belongings.state
            && let Err(error) = self.timeline.write(state.path())
        {
            tracing::warn!(%error, "Cannot write the timeline");
        }
    }

    /// Kills the VM, which ends the pod. The first reason stays.
    pub fn end(&self, reason: &str) {
        if let Some(vmm) = &self.belongings().vmm {
            vmm.kill();
        }
        self.state.send_if_modified(|state| {
            let error = match state {
                State::Booting => PodError::Boot(reason.into()),
                State::Ready(_) => PodError::Ended(reason.into()),
                State::Ended(_) => return false,
            };
            let message = error.to_string();
            tracing::info!(reason = message, "The pod has ended");
            *state = State::Ended(error);
            true
        });
    }

    /// The agent, as soon as it is ready. The boot's own deadline bounds the wait.
    pub async fn agent(&self) -> Result<AgentClient, PodError> {
        let mut state = self.state.subscribe();
        let settled = state
            .wait_for(|state| !matches!(state, State::Booting))
            .await
            .map(|state| state.clone());
        match settled {
            Ok(State::Ready(agent)) => Ok(agent),
            Ok(State::Ended(error)) => Err(error),
            Ok(State::Booting) | Err(_) => Err(PodError::Boot("the shim is ending".into())),
        }
    }

    /// The agent, if it is ready.
    pub fn ready_agent(&self) -> Option<AgentClient> {
        match &*self.state.borrow() {
            State::Ready(agent) => Some(agent.clone()),
            State::Booting | State::Ended(_) => None,
        }
    }

    /// Waits for the end of the pod.
    pub async fn ended(&self) -> PodError {
        let mut state = self.state.subscribe();
        loop {
            if let State::Ended(error) = &*state.borrow_and_update() {
                return error.clone();
            }
            if state.changed().await.is_err() {
                return PodError::Ended("the shim is ending".into());
            }
        }
    }

    /// The cause of a lost connection to the agent. The connection has no second try: a VM whose
    /// agent is gone is ended.
    pub async fn explain(&self, error: AgentError) -> Result<AgentError, PodError> {
        if !matches!(error, AgentError::Gone) {
            return Ok(error);
        }
        match timeout(EXPLANATION_DEADLINE, self.ended()).await {
            Ok(cause) => Err(cause),
            Err(_) => {
                self.end("the connection to the guest's agent is lost");
                Err(self.ended().await)
            }
        }
    }

    fn vmm(&self) -> Result<Arc<VmmProcess>, VmmError> {
        self.belongings().vmm.clone().ok_or(VmmError::Gone)
    }

    /// What the VMM is kept from. There is nothing before there is a VMM.
    pub fn confinement(&self) -> Option<&Confinement> {
        self.confinement.get()
    }

    /// What of the host its containers have mounted.
    pub async fn volumes(&self) -> AsyncMutexGuard<'_, Volumes> {
        self.volumes.lock().await
    }

    /// Holds the pod to these limits of CPU time, whatever its guest does.
    pub fn limit_cpu(&self, cpu: &Cpu) -> Result<(), CgroupError> {
        match &self.belongings().cgroup {
            Some(cgroup) => cgroup.limit_cpu(cpu),
            // It has ended, and runs nothing.
            None => Ok(()),
        }
    }

    /// Makes a directory or file of the host visible to the guest.
    pub async fn share(
        &self,
        name: &str,
        tree: BorrowedFd<'_>,
        read_only: bool,
        exclusive: bool,
    ) -> Result<(), VmmError> {
        let request = Request::Share {
            name: name.to_owned(),
            read_only,
            exclusive,
        };
        self.order(&request, &[tree]).await
    }

    /// Takes it away. Afterwards the VMM holds nothing of it.
    pub async fn unshare(&self, name: &str) -> Result<(), VmmError> {
        let request = Request::Unshare {
            name: name.to_owned(),
        };
        self.order(&request, &[]).await
    }

    /// Queue pairs of each network interface.
    pub fn queue_pairs(&self) -> u8 {
        self.queue_pairs.get().copied().unwrap_or(1)
    }

    /// Connects an interface with the guest, by the queues of its tap.
    pub async fn attach_nic(
        &self,
        slot: u8,
        interface: &Interface,
        queues: &[OwnedFd],
    ) -> Result<(), VmmError> {
        let request = Request::AttachNic {
            slot,
            mac: interface.mac,
            mtu: interface.mtu,
        };
        let queues: Vec<BorrowedFd> = queues.iter().map(AsFd::as_fd).collect();
        self.order(&request, &queues).await
    }

    /// Takes it away. Afterwards the VMM holds nothing of it.
    pub async fn detach_nic(&self, slot: u8) -> Result<(), VmmError> {
        self.order(&Request::DetachNic { slot }, &[]).await
    }

    /// Asks the VMM for something. One that does not answer is ended, so that its shares and containers
    /// need not be waited for one after the other.
    async fn order(&self, request: &Request, fds: &[BorrowedFd<'_>]) -> Result<(), VmmError> {
        let result = self.vmm()?.order(request, fds).await;
        if let Err(error @ VmmError::Deadline) = &result {
            self.end(&text::chain(error));
        }
        result
    }

    async fn counters(&self) -> Result<Counters, VmmError> {
        match self.vmm()?.request(&Request::Counters, &[]).await? {
            Reply::Counters(counters) => Ok(counters),
            _ => Err(VmmError::Mismatch),
        }
    }

    /// Ends the VM and releases everything that the pod has on the host.
    pub async fn stop(&self) {
        self.end(SHUT_DOWN);
        let vmm = self.belongings().vmm.clone();
        if let Some(vmm) = vmm
            && timeout(EXIT_DEADLINE, vmm.exited()).await.is_err()
        {
            tracing::error!("The VMM does not die");
        }
        let released = std::mem::take(&mut *self.belongings());
        drop(released);
    }
}

/// The guest's files. What was not verified before is hashed, which takes a while: containerd is
/// answered meanwhile.
async fn verified(config: &Config) -> Result<GuestFiles, BootError> {
    let directory = config.guest_dir.clone();
    let memory = config.state_dir.join(VERIFIED);
    let hashed = tokio::task::spawn_blocking(move || verify(&directory, &memory)).await;
    hashed
        .map_err(|error| BootError::Died(error.to_string()))?
        .map_err(BootError::Guest)
}

/// Why a VMM ended that is gone already.
async fn last_reason(mut notices: mpsc::Receiver<Notice>) -> String {
    while let Some(notice) = notices.recv().await {
        if let Notice::Ended { reason } = notice {
            return reason;
        }
    }
    VmmError::Gone.to_string()
}

fn open_kvm() -> Result<File, BootError> {
    OpenOptions::new()
        .read(true)
        .write(true)
        .open(Path::new(KVM))
        .map_err(|source| BootError::Kvm {
            hint: match source.kind() {
                io::ErrorKind::PermissionDenied => "the shim must run as root",
                _ => {
                    "load the kernel module kvm_intel or kvm_amd, and enable virtualization in \
                     the firmware or for this virtual machine"
                }
            },
            source,
        })
}
