//! The shim's daemon: one pod, from containerd's `start` to its `Shutdown`.

use std::{
    collections::HashMap, io, os::unix::net, path::PathBuf, process::ExitCode, sync::Arc,
    time::Duration,
};

use containerd_shim_protos::{sandbox_async::create_sandbox, shim_async::create_task};
use thiserror::Error;
use tokio::{
    net::UnixListener,
    runtime,
    signal::unix::{SignalKind, signal},
    time::timeout,
};
use tracing::Level;
use ttrpc::asynchronous::{Server, Service as Methods};

use crate::{
    address::Address,
    child::Reaper,
    config::Config,
    connections::Connections,
    container::Host,
    events::Events,
    logging,
    network::Networks,
    options::Options,
    pod::{Pod, PodSettings},
    privileges,
    sandbox::Sandbox,
    service::Service,
    spec::Spec,
    text,
    timeline::{self, Phase, Timeline},
};

/// How long containerd may take for the last events. It retries nothing of a shim that is gone.
const DRAIN_DEADLINE: Duration = Duration::from_secs(30);

/// How long the last answers may take to be read.
const SERVER_DEADLINE: Duration = Duration::from_secs(2);

/// The service's name in the version that containerd 1.7 speaks. The messages are the same.
const TASK_V2: &str = "containerd.task.v2.Task";

/// What `start` has found out.
#[derive(Debug)]
pub struct Daemon {
    /// containerd's namespace.
    pub namespace: String,
    /// The first container's id.
    pub id: String,
    /// Name of the pod.
    pub group: String,
    /// What containerd says of the runtime's configuration.
    pub options: Options,
    /// The first container's bundle.
    pub bundle: PathBuf,
    /// Log more.
    pub debug: bool,
    /// `CLOCK_MONOTONIC` when `start` began to run, in nanoseconds.
    pub started_ns: u64,
    /// Where to serve.
    pub address: Address,
}

/// Why the daemon cannot work.
#[derive(Debug, Error)]
enum DaemonError {
    #[error("Cannot drop capabilities")]
    Privileges(#[source] io::Error),
    #[error("Cannot set up the runtime")]
    Runtime(#[source] io::Error),
    #[error("Cannot serve the task API")]
    Serve(#[source] ttrpc::Error),
}

/// Runs the daemon until the pod is no more. Without a specification of its first container, it is
/// for a sandbox.
pub fn run(settings: Daemon, spec: Option<&Spec>, listener: net::UnixListener) -> ExitCode {
    let daemon_ns = timeline::now_ns();
    let config = Config::of_pod(&settings.options);
    let level = match &config {
        _ if settings.debug => Level::DEBUG,
        Ok(config) => config.log_level.into(),
        Err(_) => Level::INFO,
    };
    logging::start(&settings.bundle, level);
    if let Err(error) = privileges::restrict() {
        return failed(&DaemonError::Privileges(error.into()), &settings.address);
    }
    // What a container's helper leaves behind is reaped here rather than by containerd.
    if let Err(errno) = nix::sys::prctl::set_child_subreaper(true) {
        tracing::warn!(%errno, "Cannot become a subreaper");
    }

    let timeline = Arc::new(Timeline::default());
    timeline.reached_at(Phase::ShimStart, settings.started_ns);
    timeline.reached_at(Phase::ShimDaemon, daemon_ns);
    let runtime = match runtime::Builder::new_current_thread().enable_all().build() {
        Ok(runtime) => runtime,
        Err(error) => return failed(&DaemonError::Runtime(error), &settings.address),
    };
    let served = runtime.block_on(async {
        let reaper = Reaper::start().map_err(DaemonError::Runtime)?;
        let pod = Pod::new(timeline);
        let (namespace, id) = (&settings.namespace, &settings.id);
        let sandbox = match spec {
            Some(spec) => {
                // First of all: the VM boots while containerd connects.
                let settings = PodSettings::of(config, spec, namespace, &settings.group, id);
                pod.boot(settings, reaper.clone());
                None
            }
            None => Some(Sandbox::new(namespace, id, &settings.bundle, config)),
        };
        let host = Arc::new(Host {
            namespace: settings.namespace.clone(),
            networks: Networks::new(pod.clone()),
            pod,
            events: Events::start(settings.namespace),
            reaper,
            sandbox: sandbox.map(Arc::new),
        });
        serve(host, settings.address.clone(), listener).await
    });
    // Whatever thread still unmounts something is waited for by no one.
    runtime.shutdown_background();
    match served {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => failed(&error, &settings.address),
    }
}

fn failed(error: &DaemonError, address: &Address) -> ExitCode {
    let error = text::chain(error);
    tracing::error!(error, "The shim cannot work");
    let _ = address.remove();
    ExitCode::FAILURE
}

async fn serve(
    host: Arc<Host>,
    address: Address,
    listener: net::UnixListener,
) -> Result<(), DaemonError> {
    listener
        .set_nonblocking(true)
        .map_err(DaemonError::Runtime)?;
    let listener = UnixListener::from_std(listener).map_err(DaemonError::Runtime)?;
    let mut terminated = signal(SignalKind::terminate()).map_err(DaemonError::Runtime)?;
    let mut interrupted = signal(SignalKind::interrupt()).map_err(DaemonError::Runtime)?;

    let service = Service::new(host.clone(), address);
    let connections = Connections::default();
    let mut server = Server::new()
        .add_listener(connections.trusted(listener))
        .register_service(methods(&service, host.sandbox.is_some()));
    server.start().await.map_err(DaemonError::Serve)?;

    tokio::spawn(service.clone().end_unless_described());
    tokio::select! {
        () = service.finished() => {}
        _ = terminated.recv() => service.terminate().await,
        _ = interrupted.recv() => service.terminate().await,
    }
    host.events.drain(DRAIN_DEADLINE).await;
    if host.sandbox.is_some() {
        // containerd's client takes the end of its connection for an error of a call whose answer it
        // has not looked at yet, and the end of a sandbox then for one that has failed.
        let _ = timeout(SERVER_DEADLINE, connections.closed()).await;
    }
    let _ = timeout(SERVER_DEADLINE, server.shutdown()).await;
    Ok(())
}

/// The task service under both of its names, and that of sandboxes.
fn methods(service: &Service, has_sandbox: bool) -> HashMap<String, Methods> {
    let current = create_task(Arc::new(service.clone()));
    let older = create_task(Arc::new(service.clone()))
        .into_values()
        .map(|methods| (TASK_V2.to_owned(), methods));
    let sandbox = has_sandbox.then(|| create_sandbox(Arc::new(service.clone())));
    let all = current.into_iter().chain(older);
    all.chain(sandbox.into_iter().flatten()).collect()
}
