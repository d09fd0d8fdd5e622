//! One container: its cgroup, its own process and those that were exec'd into it.

use std::{
    collections::HashMap,
    io,
    os::fd::OwnedFd,
    path::{Component, Path, PathBuf},
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use bulkhead_agent_api::messages::{CreateContainerRequest, ExecRequest, StatsResponse, Stdio};
use oci_spec::runtime::{
    LinuxNamespaceType, LinuxPersonality, LinuxResources, LinuxSeccomp, Process as ProcessSpec,
    Spec,
};
use tokio::{sync::Mutex as AsyncMutex, time::timeout};

use crate::{
    apparmor,
    cgroup::Cgroup,
    error::ServiceError,
    neighbours::{Neighbour, Neighbours, Network, Networks},
    network::{Identity, identity, namespace_of},
    process::{Place, Process, StageChannel, launch},
    reaper::Reaper,
    serve::Guest,
    spec::{self, SpecError, Supplied},
    stage::{
        mounts,
        namespaces::{self, flag},
        protocol::{CreateTask, IdMappings, Request, Task},
        settings::{sysctl_interface, sysctl_path},
    },
    volumes,
};

/// For the kernel to end every process of a container and take its cgroup away, and for the host
/// to take the container's last writes.
const REMOVE_DEADLINE: Duration = Duration::from_secs(30);

/// For the kernel to stop every process of a container, wherever in it they are.
const FREEZE_DEADLINE: Duration = Duration::from_secs(8);

/// Signals that do not end a process by default, signal(7).
const HARMLESS: [i32; 4] = [libc::SIGCHLD, libc::SIGCONT, libc::SIGURG, libc::SIGWINCH];

const SIGKILL: u32 = libc::SIGKILL.unsigned_abs();

/// A container that has been created and not deleted.
#[derive(Debug)]
pub struct Container {
    cgroup: Cgroup,
    /// What the cgroup is limited to. Locked for as long as that changes.
    resources: AsyncMutex<LinuxResources>,
    seccomp: Option<LinuxSeccomp>,
    personality: Option<LinuxPersonality>,
    users: Option<IdMappings>,
    /// Of its own process, and of an exec'd one that names none.
    apparmor_profile: Option<String>,
    init: Arc<Process>,
    /// Its network namespace, unless its process ended at once.
    network: Option<Identity>,
    /// Of network interfaces, by their paths below /proc/sys.
    interface_sysctls: Vec<(String, String)>,
    /// Its processes are in another container's PID namespace.
    shares_pids: bool,
    /// Present until the container is started.
    waiting: AsyncMutex<Option<StageChannel>>,
    /// `None` while a process is being started.
    execs: Mutex<HashMap<String, Option<Arc<Process>>>>,
}

impl Container {
    /// Sets a container up, to the point where its process waits for the start.
    pub async fn create(
        guest: &Guest,
        reaper: &Reaper,
        networks: &Networks,
        request: CreateContainerRequest,
        neighbours: Neighbours,
    ) -> Result<Self, ServiceError> {
        let share = |name: &str| share_path(&guest.shared_dir, name);
        let mut binds = HashMap::new();
        let mut shared = Vec::new();
        for mount in &request.shared_mounts {
            let index = usize::try_from(mount.index).unwrap_or(usize::MAX);
            let mut path = share(&mount.share)?;
            shared.push(path.clone());
            if mount.mirrored {
                path = guest.mirrors.provide(&mount.share, path).await?;
            }
            binds.insert(index, path);
        }
        for mount in &request.memory_mounts {
            let index = usize::try_from(mount.index).unwrap_or(usize::MAX);
            binds.insert(index, guest.memory.provide(&mount.name, mount.size)?);
        }
        volumes::hold(shared).await?;
        let mut hook_programs = HashMap::new();
        for hook in &request.create_container_hooks {
            let index = usize::try_from(hook.index).unwrap_or(usize::MAX);
            hook_programs.insert(index, share(&hook.share)?);
        }
        let supplied = Supplied {
            shares: binds.keys().copied().collect(),
            namespaces: neighbours.kinds(),
        };
        let spec = spec::read_spec(&request.spec, &supplied)?;
        let rootfs = match request.rootfs_share.as_str() {
            "" => None,
            name => Some(share(name)?),
        };
        let process = spec.process().clone();
        let process = process.ok_or(SpecError::Missing { field: "process" })?;
        guest.profiles.provide(&process, request.apparmor_policy)?;
        let apparmor_profile = process.apparmor_profile().clone();
        let linux = spec.linux().as_ref();
        let seccomp = linux.and_then(|linux| linux.seccomp().clone());
        let personality = linux.and_then(|linux| linux.personality().clone());
        let sysctls = linux.and_then(|linux| linux.sysctl().as_ref());
        let sysctls = sysctls.into_iter().flatten();
        let sysctls = sysctls.map(|(name, value)| (sysctl_path(name), value.clone()));
        let interface_sysctls = sysctls.filter(|(path, _)| sysctl_interface(path).is_some());
        let interface_sysctls = interface_sysctls.collect();
        let users = neighbours.users(&spec);
        let shares_pids = neighbours.kinds().contains(&LinuxNamespaceType::Pid);
        let mut network = match neighbours.kinds().contains(&LinuxNamespaceType::Network) {
            true => None,
            false => networks.of(&spec).await,
        };
        let mut joined = neighbours.into_descriptors();
        if let Some(namespace) = network
            .as_ref()
            .map(Network::namespace)
            .transpose()?
            .flatten()
        {
            joined.push((namespace, flag(LinuxNamespaceType::Network)));
        }
        let (joined, flags): (Vec<_>, Vec<_>) = joined.into_iter().unzip();
        let resources = linux.and_then(|linux| linux.resources().as_ref());
        let owner = cgroup_owner(&spec, users.as_ref());
        let id = &request.container_id;
        let cgroup = Cgroup::create(&guest.cgroup_root, id, resources, owner)?;
        let limits = resources.cloned().unwrap_or_default();
        let stdio = request.stdio.into_option().unwrap_or_default();
        let stage_request = Request {
            container: request.container_id.clone(),
            terminal: terminal_size(&process, &stdio)?,
            process,
            seccomp: seccomp.clone(),
            personality: personality.clone(),
            users: users.clone(),
            task: Task::Create(Box::new(CreateTask {
                spec,
                rootfs,
                binds,
                bundle: request.bundle.into(),
                hook_programs,
                joined: flags,
            })),
        };
        let launched = async {
            let place = Place {
                cgroup: cgroup.open()?,
                init: None,
                joined,
            };
            let launched = launch(guest, reaper, stage_request, place, &stdio).await?;
            if let Some(network) = &mut network {
                network.keep(launched.0.pidfd())?;
            }
            Ok(launched)
        };
        match launched.await {
            Ok((init, channel)) => Ok(Self {
                network: namespace_of(init.pidfd()).and_then(|it| identity(&it)).ok(),
                cgroup,
                resources: AsyncMutex::new(limits),
                seccomp,
                personality,
                users,
                apparmor_profile,
                init: Arc::new(init),
                interface_sysctls,
                shares_pids,
                waiting: AsyncMutex::new(Some(channel)),
                execs: Mutex::default(),
            }),
            Err(error) => {
                // The first error is the one to tell.
                let _ = timeout(REMOVE_DEADLINE, cgroup.remove()).await;
                Err(error)
            }
        }
    }

    /// Ends what is left of a container when its own process has ended, as the kernel does where
    /// that was PID 1 of a namespace of its own.
    pub async fn end_with_init(&self) {
        if !self.shares_pids {
            return;
        }
        self.init.wait().await;
        if let Err(error) = self.cgroup.kill() {
            crate::log::error(&crate::log::chain(&error));
        }
    }

    /// Itself, for another container that joins one of its namespaces.
    pub fn neighbour(&self, kind: LinuxNamespaceType) -> Result<Neighbour, ServiceError> {
        let pidfd = self.init.pidfd().try_clone();
        Ok(Neighbour {
            kind,
            pidfd: pidfd.map_err(ServiceError::system("copy the container's pidfd"))?,
            users: self.users.clone(),
        })
    }

    /// Its own process.
    pub fn init(&self) -> &OwnedFd {
        self.init.pidfd()
    }

    /// Which network namespace its process was created in, if that is known.
    pub fn network(&self) -> Option<Identity> {
        self.network
    }

    /// The spec's sysctls of network interfaces, by their paths below /proc/sys.
    pub fn interface_sysctls(&self) -> &[(String, String)] {
        &self.interface_sysctls
    }

    /// Starts the container's process.
    pub async fn start(&self) -> Result<(), ServiceError> {
        let mut waiting = self.waiting.lock().await;
        if self.init.has_ended() {
            return Err(ServiceError::WrongState {
                what: "start the container",
                state: "its process has ended",
            });
        }
        match waiting.take() {
            Some(channel) => channel.start().await,
            None => Err(ServiceError::WrongState {
                what: "start the container",
                state: "it has been started",
            }),
        }
    }

    /// Starts another process.
    pub async fn exec(
        &self,
        guest: &Guest,
        reaper: &Reaper,
        request: ExecRequest,
    ) -> Result<(), ServiceError> {
        if request.exec_id.is_empty() {
            return Err(ServiceError::BadRequest {
                what: "name of an exec",
                value: request.exec_id,
            });
        }
        let mut process = spec::read_process(&request.process)?;
        apparmor::inherit(&mut process, self.apparmor_profile.as_deref());
        if self.init.has_ended() {
            return Err(ServiceError::WrongState {
                what: "exec in the container",
                state: "its process has ended",
            });
        }
        let name = request.exec_id.clone();
        if self.execs().contains_key(&name) {
            return Err(ServiceError::ProcessExists {
                container: request.container_id,
                exec: name,
            });
        }
        self.execs().insert(name.clone(), None);
        let result = self.launch_exec(guest, reaper, process, request).await;
        match result {
            Ok(process) => {
                self.execs().insert(name, Some(Arc::new(process)));
                Ok(())
            }
            Err(error) => {
                self.execs().remove(&name);
                Err(error)
            }
        }
    }

    async fn launch_exec(
        &self,
        guest: &Guest,
        reaper: &Reaper,
        process: ProcessSpec,
        request: ExecRequest,
    ) -> Result<Process, ServiceError> {
        guest.profiles.provide(&process, request.apparmor_policy)?;
        let stdio = request.stdio.into_option().unwrap_or_default();
        let stage_request = Request {
            container: request.container_id.clone(),
            terminal: terminal_size(&process, &stdio)?,
            process,
            seccomp: self.seccomp.clone(),
            personality: self.personality.clone(),
            users: self.users.clone(),
            task: Task::Join,
        };
        let cgroup = self.cgroup.open_of(&guest.cgroup_root, self.init.pid())?;
        let init = self.init.pidfd().try_clone();
        let init = init.map_err(ServiceError::system("copy the container's pidfd"))?;
        let place = Place {
            cgroup,
            init: Some(init),
            joined: vec![],
        };
        let launched = launch(guest, reaper, stage_request, place, &stdio);
        Ok(launched.await?.0)
    }

    /// The container's own process, or an exec'd one.
    pub fn process(&self, container: &str, exec: &str) -> Result<Arc<Process>, ServiceError> {
        if exec.is_empty() {
            return Ok(Arc::clone(&self.init));
        }
        let process = self.execs().get(exec).cloned().flatten();
        process.ok_or_else(|| ServiceError::NoProcess {
            container: container.to_owned(),
            exec: exec.to_owned(),
        })
    }

    /// Signals the container's own process.
    pub async fn signal(&self, signal: u32) -> Result<(), ServiceError> {
        // Before its execve the process is PID 1 of its namespace and deaf to all but SIGKILL.
        let harmless = |signal: u32| HARMLESS.iter().any(|one| one.unsigned_abs() == signal);
        // SIGKILL, which always works, also does not wait for a start that is under way.
        if !matches!(signal, 0 | SIGKILL) && self.waiting.lock().await.is_some() {
            if harmless(signal) {
                return Ok(());
            }
            return self.init.end_early(signal);
        }
        self.init.signal(signal)
    }

    /// Signals every process of the container.
    pub async fn signal_all(&self, signal: u32) -> Result<(), ServiceError> {
        if signal != SIGKILL && self.waiting.lock().await.is_some() {
            return self.signal(signal).await;
        }
        let processes = self.cgroup.processes()?;
        if processes.is_empty() {
            return Err(ServiceError::ProcessFinished);
        }
        if signal == SIGKILL {
            return Ok(self.cgroup.kill()?);
        }
        let number = i32::try_from(signal).ok();
        for pid in processes {
            let Some(number) = number else { break };
            // SAFETY: kill(2) takes two numbers. The pid was in the cgroup a moment ago.
            let result = unsafe { libc::kill(pid, number) };
            let error = io::Error::last_os_error();
            if result < 0 && error.raw_os_error() != Some(libc::ESRCH) {
                return Err(ServiceError::system(format!(
                    "send signal {signal} to {pid}"
                ))(error));
            }
        }
        Ok(())
    }

    /// Forgets an exec'd process that has ended.
    pub fn delete_exec(&self, container: &str, exec: &str) -> Result<(), ServiceError> {
        if !self.process(container, exec)?.has_ended() {
            return Err(ServiceError::WrongState {
                what: "delete the process",
                state: "it is running",
            });
        }
        self.execs().remove(exec);
        Ok(())
    }

    /// Takes down what the container has outside its processes. They end first if they have not.
    pub async fn remove(&self, guest: &Guest) -> Result<(), ServiceError> {
        if !self.init.has_ended() {
            return Err(ServiceError::WrongState {
                what: "delete the container",
                state: "it is running",
            });
        }
        let removed = timeout(REMOVE_DEADLINE, self.cgroup.remove()).await;
        removed.map_err(|_| ServiceError::Deadline("the removal of the cgroup"))??;
        flush(guest.shared_dir.clone()).await
    }

    /// Stops every process.
    pub async fn pause(&self) -> Result<(), ServiceError> {
        let wrong = |state| ServiceError::WrongState {
            what: "pause the container",
            state,
        };
        if self.init.has_ended() {
            return Err(wrong("its process has ended"));
        }
        // One that is not started cannot be found frozen by its start.
        let waiting = self.waiting.lock().await;
        if waiting.is_some() {
            return Err(wrong("it is not started"));
        }
        match timeout(FREEZE_DEADLINE, self.cgroup.freeze(true)).await {
            Ok(frozen) => Ok(frozen?),
            Err(_) => {
                self.resume().await?;
                Err(ServiceError::Deadline("stopping the container's processes"))
            }
        }
    }

    /// Lets its processes go on.
    pub async fn resume(&self) -> Result<(), ServiceError> {
        let resumed = timeout(FREEZE_DEADLINE, self.cgroup.freeze(false)).await;
        Ok(resumed.map_err(|_| ServiceError::Deadline("resuming the container's processes"))??)
    }

    /// Changes limits: those in this `linux.resources`, whatever else was set.
    pub async fn update(&self, changes: &[u8]) -> Result<(), ServiceError> {
        let mut resources = self.resources.lock().await;
        let next = spec::merge_resources(&resources, changes)?;
        self.cgroup.update(&resources, &next)?;
        *resources = next;
        Ok(())
    }

    /// Waits until the kernel has ended more than `known` processes for lack of memory, or the
    /// container's own has ended. Returns how many.
    pub async fn wait_for_oom(&self, known: u64) -> Result<u64, ServiceError> {
        tokio::select! {
            kills = self.cgroup.more_oom_kills(known) => Ok(kills?),
            _ = self.init.wait() => self.oom_kills(),
        }
    }

    /// How many processes the kernel has ended for lack of memory.
    pub fn oom_kills(&self) -> Result<u64, ServiceError> {
        Ok(self.cgroup.oom_kills()?)
    }

    /// Numbers of the container's cgroup.
    pub fn stats(&self) -> Result<StatsResponse, ServiceError> {
        Ok(self.cgroup.stats()?)
    }

    fn execs(&self) -> std::sync::MutexGuard<'_, HashMap<String, Option<Arc<Process>>>> {
        self.execs.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The user outside a user namespace who gets a container's cgroup: it has a writable view of it.
fn cgroup_owner(spec: &Spec, users: Option<&IdMappings>) -> Option<u32> {
    let writable = spec.mounts().iter().flatten().any(|mount| {
        let is_cgroup = matches!(mount.typ().as_deref(), Some("cgroup" | "cgroup2"));
        is_cgroup && !mounts::options(mount).attributes.is_read_only()
    });
    let process = spec.process().as_ref()?;
    (writable && namespaces::has(spec, LinuxNamespaceType::Cgroup))
        .then(|| users?.user(process.user().uid()))?
}

/// Gives the host what the container wrote to shared files and what is still in the guest's page
/// cache: the host closes the shares after this.
async fn flush(shared_dir: PathBuf) -> Result<(), ServiceError> {
    // On a thread of its own, as it waits for the host.
    let flush = tokio::task::spawn_blocking(move || {
        let dir = std::fs::File::open(shared_dir)?;
        Ok(rustix::fs::syncfs(dir)?)
    });
    match timeout(REMOVE_DEADLINE, flush).await {
        Err(_) => Err(ServiceError::Deadline("writing back shared files")),
        Ok(Err(gone)) => Err(ServiceError::system("write back shared files")(
            io::Error::other(gone),
        )),
        Ok(Ok(result)) => {
            result.map_err(ServiceError::system::<io::Error>("write back shared files"))
        }
    }
}

/// Where a share appears. Its name is one component of a path.
pub fn share_path(shared_dir: &Path, name: &str) -> Result<PathBuf, ServiceError> {
    let mut components = Path::new(name).components();
    match (components.next(), components.next()) {
        (Some(Component::Normal(only)), None) if only == name => Ok(shared_dir.join(name)),
        _ => Err(ServiceError::BadRequest {
            what: "name of a share",
            value: name.to_owned(),
        }),
    }
}

/// Size of the terminal that the process is to have, if any: the client's, or the spec's.
fn terminal_size(process: &ProcessSpec, stdio: &Stdio) -> Result<Option<(u16, u16)>, ServiceError> {
    if process.terminal().unwrap_or(false) != stdio.terminal {
        return Err(ServiceError::BadRequest {
            what: "process.terminal, which the streams contradict",
            value: process.terminal().unwrap_or(false).to_string(),
        });
    }
    if !stdio.terminal {
        return Ok(None);
    }
    let narrow = |size: u64| u16::try_from(size).unwrap_or(u16::MAX);
    let given = (stdio.width, stdio.height) != (0, 0);
    Ok(Some(match process.console_size() {
        Some(size) if !given => (narrow(size.width()), narrow(size.height())),
        _ => (narrow(stdio.width.into()), narrow(stdio.height.into())),
    }))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shares_are_found_below_their_directory_only() {
        let dir = Path::new("/shared");
        assert_eq!(
            share_path(dir, "root-1").ok(),
            Some(PathBuf::from("/shared/root-1"))
        );
        for name in ["", ".", "..", "a/b", "/etc", "a/", "../x"] {
            assert!(share_path(dir, name).is_err(), "{name:?}");
        }
    }
}
