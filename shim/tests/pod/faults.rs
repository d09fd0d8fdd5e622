//! Each process of a pod is killed at each step of a container's life. The step is held by the VMM, so
//! that what is killed is killed in the middle of it.

use std::{fmt, fs, time::Duration};

use containerd_shim_protos::{
    api::{DeleteResponse, StateRequest},
    shim_async::TaskClient,
};
use nix::sys::signal::Signal;
use protobuf::Message;
use tokio::{task::JoinHandle, time::timeout};

use crate::{
    containerd::{Containerd, deadline, delete, start, wait, wait_gone},
    crashes::signal,
    lifecycle::{connect, exec, kill, shut_down},
    net::Net,
};

/// More than any call takes when something has died.
const LIMIT: Duration = Duration::from_secs(30);

const SIGKILL: u32 = 9;

/// The call during which something dies.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Call {
    Create,
    Start,
    Exec,
    Kill,
    Delete,
}

/// What dies.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Victim {
    Vmm,
    Anchor,
    ExecAnchor,
    Shim,
    /// The shim, which is told to end (SIGTERM) and ends its pod first.
    ShimTold,
}

/// A case of the matrix.
#[derive(Clone, Copy)]
pub struct Fault {
    pub victim: Victim,
    pub call: Call,
    /// The request of the VMM or the call of the agent at which it dies.
    pub step: &'static str,
}

impl fmt::Display for Fault {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { victim, call, step } = self;
        write!(formatter, "{victim:?}_dies_at_{step}_in_{call:?}")
    }
}

/// All cases in which the victim is there.
pub fn matrix() -> impl Iterator<Item = Fault> {
    let steps = [
        (Call::Create, "Boot"),
        (Call::Create, "Connection"),
        (Call::Create, "Share"),
        (Call::Create, "CreateContainer"),
        (Call::Start, "AttachNic"),
        (Call::Start, "SetNetwork"),
        (Call::Start, "StartContainer"),
        (Call::Exec, "Exec"),
        (Call::Kill, "Signal"),
        (Call::Delete, "DetachNic"),
        (Call::Delete, "Delete"),
        (Call::Delete, "ReleaseShares"),
        (Call::Delete, "Unshare"),
    ];
    let victims = [
        Victim::Vmm,
        Victim::Anchor,
        Victim::ExecAnchor,
        Victim::Shim,
        Victim::ShimTold,
    ];
    steps.into_iter().flat_map(move |(call, step)| {
        let there = move |victim: &Victim| match victim {
            Victim::Vmm | Victim::Shim | Victim::ShimTold => true,
            // It is started beside the boot, and ends with its process.
            Victim::Anchor => !matches!(step, "Boot" | "Connection") && call != Call::Delete,
            Victim::ExecAnchor => call == Call::Exec,
        };
        victims
            .into_iter()
            .filter(there)
            .map(move |victim| Fault { victim, call, step })
    })
}

/// How a call ended: its status code and message, or that there was no answer.
type Outcome = Result<(), ttrpc::Error>;

fn spawn<T: Send + 'static>(
    call: impl Future<Output = ttrpc::Result<T>> + Send + 'static,
) -> JoinHandle<Outcome> {
    tokio::spawn(async move { call.await.map(drop) })
}

/// Brings a container to the call of the fault, which is made but not waited for.
async fn begin(containerd: &Containerd, client: &TaskClient, call: Call) -> JoinHandle<Outcome> {
    let (client, create) = (client.clone(), containerd.create_request("c1"));
    if call == Call::Create {
        return spawn(async move { client.create(deadline(), &create).await });
    }
    client.create(deadline(), &create).await.unwrap();
    if call == Call::Start {
        return spawn(async move { client.start(deadline(), &start("c1", "")).await });
    }
    client.start(deadline(), &start("c1", "")).await.unwrap();
    match call {
        Call::Exec => {
            let request = exec("c1", "e1", &["sleep"]);
            client.exec(deadline(), &request).await.unwrap();
            spawn(async move { client.start(deadline(), &start("c1", "e1")).await })
        }
        Call::Kill => spawn(async move { client.kill(deadline(), &kill("c1", "", SIGKILL)).await }),
        _ => {
            let request = kill("c1", "", SIGKILL);
            client.kill(deadline(), &request).await.unwrap();
            client.wait(deadline(), &wait("c1", "")).await.unwrap();
            spawn(async move { client.delete(deadline(), &delete("c1", "")).await })
        }
    }
}

/// The processes that die.
fn processes_of(containerd: &Containerd, victim: Victim, shim: u32) -> Vec<i32> {
    let anchors = || {
        let members = containerd.cgroup("c1").join("anchors/cgroup.procs");
        let members = fs::read_to_string(members).unwrap();
        let members: Vec<i32> = members.lines().map(|line| line.parse().unwrap()).collect();
        // By age, as their numbers do not start over within a test.
        let mut sorted = members;
        sorted.sort_unstable();
        sorted
    };
    match victim {
        Victim::Vmm => containerd.vmm_pids(),
        Victim::Anchor => anchors()[..1].to_vec(),
        Victim::ExecAnchor => anchors()[1..].to_vec(),
        Victim::Shim | Victim::ShimTold => vec![shim.try_into().unwrap()],
    }
}

/// Kills the victim at the step; everybody is answered, and nothing is left.
pub async fn survive(fault: Fault) {
    let Fault { victim, call, step } = fault;
    let (containerd, mut held) = Containerd::held_at(step).await;
    containerd.add_bundle("c1", None, &["sleep"]);
    let net = Net::with_interface();
    containerd.set_network("c1", &net.path());
    let (client, _) = containerd.start_shim("c1").await;
    let shim = connect(&client).await;
    let pending = begin(&containerd, &client, call).await;
    let reached = timeout(LIMIT, held.reached()).await;
    reached.unwrap_or_else(|_| panic!("{fault}: the step is not reached"));
    let request = wait("c1", "");
    let mut waiting = None;
    if !matches!(call, Call::Create | Call::Delete) && victim != Victim::ExecAnchor {
        let waiting = waiting.insert(Box::pin(client.wait(deadline(), &request)));
        // Requests are read in order: the shim has the first when it answers the second.
        tokio::select! {
            biased;
            waited = waiting => panic!("{fault}: ended before: {waited:?}"),
            connected = connect(&client) => assert_eq!(connected, shim),
        }
    }

    let dying = processes_of(&containerd, victim, shim);
    assert_eq!(dying.len(), 1, "{fault}: {dying:?}");
    let shim_dies = matches!(victim, Victim::Shim | Victim::ShimTold);
    signal(
        dying[0],
        if victim == Victim::ShimTold {
            Signal::SIGTERM
        } else {
            Signal::SIGKILL
        },
    );
    if !shim_dies {
        // The shim and its VMM go on with what they were at.
        held.release();
    }
    let outcome = timeout(LIMIT, pending).await;
    let outcome = outcome.unwrap_or_else(|_| panic!("{fault}: {call:?} does not end"));
    check_outcome(fault, &outcome.unwrap());
    if let Some(waiting) = waiting {
        let waited = timeout(LIMIT, waiting).await;
        match waited.unwrap_or_else(|_| panic!("{fault}: Wait does not end")) {
            Ok(exited) => assert_eq!(exited.exit_status, 137, "{fault}"),
            Err(error) => assert!(shim_dies, "{fault}: {error}"),
        }
    }
    if shim_dies {
        wait_gone(dying[0]);
    } else {
        finish(&client, fault).await;
    }
    if victim != Victim::Shim {
        // By itself, and containerd has been told.
        containerd.assert_nothing_left("c1");
        net.assert_nothing_left();
        check_events(&containerd, fault);
    }
    let output = containerd.run_shim("c1", "delete", || Ok(()));
    assert!(output.status.success(), "{fault}: {output:?}");
    let answer = DeleteResponse::parse_from_bytes(&output.stdout).unwrap();
    assert_eq!(answer.exit_status, 137, "{fault}");
    containerd.assert_nothing_left("c1");
    net.assert_nothing_left();
    another_pod(&containerd).await;
}

/// A call fails with a status for its reason, unless it is done all the same.
fn check_outcome(fault: Fault, outcome: &Outcome) {
    let Fault { victim, call, .. } = fault;
    match (victim, outcome) {
        (Victim::Shim, Err(error)) => {
            let answered = matches!(error, ttrpc::Error::RpcStatus(_));
            assert!(!answered, "{fault}: {error}");
        }
        (Victim::Shim, Ok(())) => panic!("{fault}: answered by a shim that is dead"),
        // It may still have the time to answer.
        (Victim::ShimTold, Err(_)) => {}
        // Nothing can be created or started in a VM that is gone.
        (Victim::Vmm | Victim::ShimTold, Ok(())) => {
            assert!(matches!(call, Call::Kill | Call::Delete), "{fault}")
        }
        (_, Err(ttrpc::Error::RpcStatus(status))) => {
            assert!(!status.message().is_empty(), "{fault}: no reason");
        }
        (_, Err(error)) => panic!("{fault}: no status: {error}"),
        (Victim::Anchor | Victim::ExecAnchor, Ok(())) => {}
    }
}

/// Ends and deletes what is there, and shuts the pod down.
async fn finish(client: &TaskClient, fault: Fault) {
    let request = StateRequest {
        id: "c1".into(),
        ..StateRequest::default()
    };
    if client.state(deadline(), &request).await.is_ok() {
        if fault.victim == Victim::ExecAnchor {
            let waited = timeout(LIMIT, client.wait(deadline(), &wait("c1", "e1"))).await;
            let waited = waited.unwrap_or_else(|_| panic!("{fault}: the exec does not end"));
            waited.unwrap();
            let request = kill("c1", "", SIGKILL);
            client.kill(deadline(), &request).await.unwrap();
        }
        let waited = timeout(LIMIT, client.wait(deadline(), &wait("c1", ""))).await;
        let waited = waited.unwrap_or_else(|_| panic!("{fault}: the container does not end"));
        assert_eq!(waited.unwrap().exit_status, 137, "{fault}");
        let deleted = timeout(LIMIT, client.delete(deadline(), &delete("c1", ""))).await;
        let deleted = deleted.unwrap_or_else(|_| panic!("{fault}: Delete does not end"));
        deleted.unwrap_or_else(|error| panic!("{fault}: {error}"));
    }
    let shut = timeout(LIMIT, shut_down(client)).await;
    shut.unwrap_or_else(|_| panic!("{fault}: Shutdown does not end"));
}

/// Whatever was created or started has ended, for containerd too.
fn check_events(containerd: &Containerd, fault: Fault) {
    let topics = containerd.topics();
    let count = |topic: &str| topics.iter().filter(|found| *found == topic).count();
    let created = count("/tasks/create");
    assert_eq!(created, count("/tasks/exit c1 137"), "{fault}: {topics:?}");
    let started = count("/tasks/exec-started");
    assert_eq!(started, count("/tasks/exit e1 137"), "{fault}: {topics:?}");
}

async fn another_pod(containerd: &Containerd) {
    containerd.set_scenario("normal");
    containerd.add_bundle("c2", None, &["say", "hello", "0"]);
    let (client, _) = containerd.start_shim("c2").await;
    let request = containerd.create_request("c2");
    client.create(deadline(), &request).await.unwrap();
    client.start(deadline(), &start("c2", "")).await.unwrap();
    let exited = client.wait(deadline(), &wait("c2", "")).await.unwrap();
    assert_eq!(exited.exit_status, 0);
    client.delete(deadline(), &delete("c2", "")).await.unwrap();
    shut_down(&client).await;
    containerd.assert_nothing_left("c2");
}
