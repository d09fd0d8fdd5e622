//! A trial: a pod's guest is started as the shim starts it, asked who it is, and ended.

use std::{
    future, io, process,
    sync::Arc,
    time::{Duration, Instant},
};

use tokio::{
    signal::unix::{SignalKind, signal},
    time::timeout,
};

use super::{
    installation,
    machine::{Machine, Unreadable},
    report::Outcome,
    with_runtime,
};
use crate::{
    cgroup,
    child::Reaper,
    config::Config,
    pod::{Pod, PodSettings},
    text,
    timeline::Timeline,
};

/// The trial pod's namespace. containerd's names begin with a letter or a digit, so no pod of
/// containerd has a state directory of the same name.
const NAMESPACE: &str = "_check";

/// For all that is not counted in `boot_timeout`: the VMM's first answer, and the agent's.
const MARGIN: Duration = Duration::from_secs(60);

/// The longest release or version of the guest that is told, in bytes.
const MAX_NAME: usize = 80;

/// A guest that answered.
struct Answer {
    /// From the start of the pod to the agent's connection.
    ready_after: Duration,
    /// `uname -r` in the guest.
    kernel: String,
    /// The agent's version.
    agent: String,
}

/// KVM on this host runs the guest that is installed, up to its agent.
pub fn boots(machine: &Machine) -> Result<Outcome, Unreadable> {
    let mut config = match &machine.config {
        Ok(config) => config.clone(),
        Err(error) => {
            let error = text::chain(error);
            return Ok(Outcome::failed(error, "correct the configuration"));
        }
    };
    config.vmm = installation::vmm_path(machine, &config);
    let tried = with_runtime(async |reaper| trial(config, reaper).await);
    Ok(match tried {
        Ok(Ok(answer)) => Outcome::ok(format!(
            "agent {} ready after {} ms, on Linux {}",
            text::one_line(&answer.agent, MAX_NAME),
            answer.ready_after.as_millis(),
            text::one_line(&answer.kernel, MAX_NAME),
        )),
        Ok(Err(reason)) => Outcome::failed(reason, how_to_boot(machine)?),
        Err(error) => Outcome::failed(
            format!("Cannot set up the trial: {error}"),
            "see what limits this process: ulimit -a",
        ),
    })
}

fn how_to_boot(machine: &Machine) -> Result<&'static str, Unreadable> {
    Ok(if machine.has("/sys/module/kvm_pvm") {
        "this host's KVM is kvm_pvm, which runs no unmodified kernel: use a host with kvm_intel or \
         kvm_amd"
    } else if machine.has_cpu_flag("hypervisor")? {
        "see what KVM says (dmesg | grep -i kvm), and that this virtual machine's own host gives it \
         nested virtualisation"
    } else {
        "see what KVM says: dmesg | grep -i kvm"
    })
}

/// Starts a pod and ends it, also when a signal ends the wait.
async fn trial(config: Config, reaper: Reaper) -> Result<Answer, String> {
    let limit = Duration::from_secs(config.boot_timeout.into()) + MARGIN;
    let name = format!("bulkhead-check-{}", process::id());
    let settings = PodSettings {
        config: Ok(config),
        namespace: NAMESPACE.to_owned(),
        group: name.clone(),
        // Directly below the root: a parent would be left behind.
        cgroup: cgroup::directory(&format!("/{name}"), "", ""),
        oom_score_adj: None,
    };
    // Registered before there is anything to clean up.
    let interrupted = interruption().map_err(|error| format!("Cannot handle signals: {error}"))?;
    let begun = Instant::now();
    let pod = Pod::new(Arc::new(Timeline::default()));
    pod.boot(settings, reaper);
    let answered = tokio::select! {
        answered = timeout(limit, ask(&pod, begun)) => answered
            .unwrap_or_else(|_| Err(format!("the guest did not answer within {limit:?}"))),
        () = interrupted => Err("the trial was interrupted".to_owned()),
    };
    pod.stop().await;
    answered
}

async fn ask(pod: &Pod, begun: Instant) -> Result<Answer, String> {
    let agent = pod.agent().await.map_err(|error| text::chain(&error))?;
    let ready_after = begun.elapsed();
    match agent.info().await {
        Ok(info) => Ok(Answer {
            ready_after,
            kernel: info.kernel_release,
            agent: info.version,
        }),
        Err(error) => Err(match pod.explain(error).await {
            Ok(error) => text::chain(&error),
            Err(error) => text::chain(&error),
        }),
    }
}

/// Ends when somebody wants this process to end.
fn interruption() -> io::Result<impl Future<Output = ()>> {
    let mut signals = [
        signal(SignalKind::interrupt())?,
        signal(SignalKind::terminate())?,
        signal(SignalKind::hangup())?,
    ];
    Ok(future::poll_fn(move |context| {
        let ready = signals
            .iter_mut()
            .any(|signal| signal.poll_recv(context).is_ready());
        if ready {
            std::task::Poll::Ready(())
        } else {
            std::task::Poll::Pending
        }
    }))
}
