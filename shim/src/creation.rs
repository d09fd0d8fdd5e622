//! The creation of a container, and how it is undone when a step fails.

use std::{collections::HashMap, path::Path, sync::Arc};

use bulkhead_agent_api::messages::{CreateContainerRequest, JoinedNamespace};
use containerd_shim_protos::{
    api::CreateTaskRequest,
    events::task::{TaskCreate, TaskIO},
};
use protobuf::MessageField;

use crate::{
    agent_client::AgentClient,
    anchor::{Anchor, Network},
    apparmor,
    cgroup::{self, Cgroup},
    child::KILLED,
    container::{Container, Host, Parts, Resources},
    errors::TaskError,
    events::Event,
    hooks,
    network::{NetworkError, namespace::Namespace},
    pod::PodError,
    process::Process,
    rootfs::Rootfs,
    spec::Spec,
    stdio::{Owner, Paths, Streaming},
    timeline::Phase,
};

/// What the steps have made so far.
#[derive(Debug, Default)]
struct Progress {
    resources: Resources,
    anchor: Option<Anchor>,
}

/// The pod around a new container.
#[derive(Debug)]
pub struct Neighbourhood {
    /// Beginning of the names of its shares, unused so far in the pod.
    pub prefix: String,
    /// The other containers, by their pids on the host.
    pub containers: HashMap<u32, String>,
}

/// Creates a container. When that fails, nothing of it is left.
pub async fn create(
    host: &Arc<Host>,
    request: &CreateTaskRequest,
    neighbourhood: &Neighbourhood,
) -> Result<Arc<Container>, TaskError> {
    let mut progress = Progress::default();
    let built = build(host, request, neighbourhood, &mut progress).await;
    let (spec, process, agent) = match built {
        Ok(built) => built,
        Err(error) => {
            undo(host, &request.id, progress).await;
            return Err(error);
        }
    };
    let Some(anchor) = progress.anchor.take() else {
        undo(host, &request.id, progress).await;
        return Err(TaskError::Invalid("the container has no anchor".into()));
    };
    process.set_pid(anchor.pid());
    let created = Event::Create(TaskCreate {
        container_id: request.id.clone(),
        bundle: request.bundle.clone(),
        rootfs: request.rootfs.clone(),
        io: MessageField::some(TaskIO {
            stdin: request.stdin.clone(),
            stdout: request.stdout.clone(),
            stderr: request.stderr.clone(),
            terminal: request.terminal,
            ..TaskIO::default()
        }),
        checkpoint: String::new(),
        pid: anchor.pid(),
        ..TaskCreate::default()
    });
    host.publish(&request.id, created);
    host.pod.timeline().reached(Phase::ContainerCreated);
    let parts = Parts {
        id: request.id.clone(),
        bundle: request.bundle.clone(),
        anchors: cgroup::anchors(&cgroup::directory(
            spec.cgroups_path(),
            &host.namespace,
            &request.id,
        )?),
        spec,
        init: process,
        resources: progress.resources,
    };
    Ok(Container::new(host.clone(), parts, anchor, agent))
}

impl Neighbourhood {
    /// The pid of another container, by its id.
    fn pid_of(&self, id: &str) -> Option<u32> {
        let mut all = self.containers.iter();
        all.find(|(_, other)| *other == id).map(|(pid, _)| *pid)
    }

    /// The namespaces of other containers that a spec asks for, and whose anchor is the process
    /// `anchor`.
    fn joined_by(&self, spec: &Spec, anchor: u32) -> Vec<JoinedNamespace> {
        let named = spec.namespaces_of_processes();
        let named = named.filter(|(kind, _)| *kind != "network");
        let named = named.filter_map(|(kind, pid)| Some((kind, self.containers.get(&pid)?)));
        let network = self.in_the_network_of(anchor).map(|id| ("network", id));
        let joined = named.chain(network).map(|(kind, id)| JoinedNamespace {
            type_: kind.to_owned(),
            container_id: id.clone(),
            ..JoinedNamespace::default()
        });
        joined.collect()
    }

    /// Another container's network can be joined in its own VM alone.
    fn check_network(&self, spec: &Spec) -> Result<(), NetworkError> {
        let mut named = spec.namespaces_of_processes();
        let foreign = named
            .find(|(kind, pid)| *kind == "network" && !self.containers.contains_key(pid))
            .map(|(_, pid)| pid);
        foreign.map_or(Ok(()), |pid| Err(NetworkError::Foreign(pid)))
    }

    /// Who is in the same network namespace on the host, by whatever path it came there.
    fn in_the_network_of(&self, anchor: u32) -> Option<&String> {
        if self.containers.is_empty() {
            return None;
        }
        let own = Namespace::of(anchor).ok()?;
        let same = |pid: u32| Namespace::of(pid).is_ok_and(|other| other.id() == own.id());
        let found = self.containers.iter().find(|(pid, _)| same(**pid));
        found.map(|(_, id)| id)
    }
}

async fn undo(host: &Host, id: &str, mut progress: Progress) {
    if let Some(anchor) = progress.anchor.take() {
        anchor.finish(KILLED).await;
    }
    progress.resources.release(host, id).await;
}

async fn build(
    host: &Arc<Host>,
    request: &CreateTaskRequest,
    neighbourhood: &Neighbourhood,
    progress: &mut Progress,
) -> Result<(Spec, Arc<Process>, AgentClient), TaskError> {
    // What is wrong with the VM comes before what follows from it.
    if let Some(failure) = host.pod.failure() {
        return Err(failure.into());
    }
    if !request.checkpoint.is_empty() {
        return Err(TaskError::Unsupported("restoring from a checkpoint"));
    }
    let bundle = Path::new(&request.bundle);
    let (spec, spec_bytes) = match &host.sandbox {
        Some(sandbox) => sandbox.specification_of(bundle, neighbourhood.pid_of(&sandbox.id))?,
        None => Spec::read(bundle)?,
    };
    let apparmor_policy = apparmor::policy(spec.apparmor_profile())?;

    neighbourhood.check_network(&spec)?;

    // What stands for a sandbox has no files.
    if !host.is_sandbox(&request.id) {
        let root = spec.root.as_ref().map(|root| root.path.as_path());
        let rootfs = Rootfs::new(bundle, &request.rootfs, root)?;
        progress.resources.rootfs = Some(rootfs);
    }

    let cgroup = cgroup::directory(spec.cgroups_path(), &host.namespace, &request.id)?;
    let anchors = cgroup::anchors(&cgroup);
    let is_first = host.pod.cgroup() == Some(&*cgroup);
    if is_first {
        cgroup::ensure(&anchors)?;
    } else {
        if let Some(sandbox) = &host.sandbox {
            progress.resources.member = Some(sandbox.note(&request.id, &cgroup)?);
        }
        progress.resources.cgroup = Some(Cgroup::create(cgroup)?);
    }

    let paths = Paths {
        terminal: request.terminal,
        stdin: request.stdin.clone(),
        stdout: request.stdout.clone(),
        stderr: request.stderr.clone(),
    };
    let owner = Owner {
        namespace: &host.namespace,
        container: &request.id,
    };
    let (streaming, mut stdio) =
        Streaming::open(&paths, owner, host.pod.streams(), &host.reaper).await?;
    let size = spec.console_size();
    (stdio.width, stdio.height) = (size.width, size.height);
    let process = Arc::new(Process::new(String::new(), paths, size));
    process.set_streaming(streaming);

    let network = Network::from_spec(spec.network_namespace());
    let (anchor, agent) = tokio::join!(
        Anchor::start(&host.reaper, &anchors, &network, &request.id),
        host.pod.agent(),
    );
    let pid = progress.anchor.insert(anchor?).pid();
    let agent = agent?;
    let Some(confinement) = host.pod.confinement() else {
        return Err(PodError::Ended("it has no VMM".into()).into());
    };

    if spec.has_early_hooks() {
        if let Some(rootfs) = &mut progress.resources.rootfs {
            rootfs.show(bundle, &confinement.state_dir).await?;
        }
        run_early_hooks(host, &spec, request, pid).await?;
    }

    let shares = &mut progress.resources.shares;
    let rootfs_share = match &mut progress.resources.rootfs {
        Some(rootfs) => {
            let prefix = &neighbourhood.prefix;
            let shared = shares.add_rootfs(&host.pod, confinement, &host.reaper, prefix, rootfs);
            shared.await?
        }
        None => String::new(),
    };
    let sandbox = host.sandbox.as_deref();
    let mounts = shares.add_mounts(&host.pod, confinement, &spec, sandbox);
    let mounts = mounts.await?;
    let early_hooks = spec.hooks_of(|hooks| &hooks.create_container);
    let create_container_hooks = shares
        .add_hooks(&host.pod, confinement, &neighbourhood.prefix, early_hooks)
        .await?;

    // Noted first: an answer that comes too late may still mean that it was created.
    progress.resources.in_guest = true;
    let message = CreateContainerRequest {
        container_id: request.id.clone(),
        spec: spec_bytes,
        rootfs_share,
        shared_mounts: mounts.shared,
        memory_mounts: mounts.memory,
        stdio: MessageField::some(stdio),
        joined_namespaces: neighbourhood.joined_by(&spec, pid),
        apparmor_policy,
        bundle: request.bundle.clone(),
        create_container_hooks,
        ..CreateContainerRequest::default()
    };
    let created = agent.create(&message, hooks::time(early_hooks)).await;
    if let Err(error) = created {
        return Err(match host.pod.explain(error).await {
            Ok(error) => error.into(),
            Err(error) => error.into(),
        });
    }
    // Not before: the VM boots unhindered, and runs nothing of the container's yet.
    if is_first {
        host.pod.limit_cpu(&spec.cpu())?;
    }
    Ok((spec, process, agent))
}

/// Hooks that may still prevent the container.
async fn run_early_hooks(
    host: &Host,
    spec: &Spec,
    request: &CreateTaskRequest,
    pid: u32,
) -> Result<(), TaskError> {
    let Some(hooks) = &spec.hooks else {
        return Ok(());
    };
    let none = Default::default();
    let state = hooks::State {
        oci_version: &spec.oci_version,
        id: &request.id,
        status: "creating",
        pid,
        bundle: request.bundle.as_ref(),
        annotations: spec.annotations.as_ref().unwrap_or(&none),
    };
    hooks::run(&hooks.prestart, &state, &host.reaper).await?;
    hooks::run(&hooks.create_runtime, &state, &host.reaper).await?;
    Ok(())
}
