//! Many clients or pods at once: nothing grows, and all get what one gets.

use std::fs;
use std::net::SocketAddr;
use std::path::Path;
use std::thread;
use std::time::Instant;

use anyhow::{Context, Result, bail, ensure};
use containerd_shim_protos::ttrpc::Code;
use serde_json::{Value, json};

use super::failures::Config;
use super::network::{PORT, server};
use super::{Case, Setting, bulkhead, case};
use crate::ctr::{Container, Foreground, PROBE};
use crate::host::{self, Pod};
use crate::network::{Attachment, Bridge, Namespace, ask};
use crate::shim::{Refused, Shim};

const CONTAINERS: usize = 20;
const CLIENTS: u32 = 8;

/// Operations of each client before what there is counts as what it takes, and after.
const WARM_UP: u32 = 50;
const OPERATIONS: u32 = 125;

/// By how much a shim may grow, in KiB: buffers, and what an allocator keeps.
const SHIM_GROWTH: u64 = 1024;

/// And a VMM: pages of its guest's that nothing had used before.
const VMM_GROWTH: u64 = 16 * 1024;

pub fn cases() -> Vec<Case> {
    vec![
        bulkhead(
            "eight clients work on twenty containers and nothing grows",
            soak,
        )
        .soak(),
        case(
            "fifty pods on a network are up at once and each answers",
            fifty,
        )
        .soak(),
    ]
}

const PODS: usize = 50;

/// How many of them are started at once.
const STARTERS: usize = 5;

fn fifty(setting: &Setting) -> Result<()> {
    // Fifty of the default size are more than the lab has.
    let _config = Config::replace("memory_mib = 256\n")?;
    let bridge = Bridge::new();
    let namespaces: Vec<_> = (0..PODS).map(|_| Namespace::new()).collect::<Result<_>>()?;
    let attach = |namespace| Attachment::bridge(namespace, "eth0", &bridge);
    let attachments: Vec<_> = namespaces.iter().map(attach).collect::<Result<_>>()?;
    let begun = Instant::now();
    let mut pods = servers(setting, &namespaces)?;
    println!("{PODS} pods are up after {:.0?}", begun.elapsed());

    let mut addresses = Vec::new();
    for attachment in &attachments {
        let own = SocketAddr::new(attachment.address(false)?.parse()?, PORT);
        ask(own, 1 << 18)?;
        addresses.push(own);
    }
    // And among each other.
    let neighbours = addresses.iter().cycle().skip(1);
    for (pod, neighbour) in pods.iter().zip(neighbours).step_by(5) {
        let words = [PROBE, "probe", "ask", &neighbour.to_string(), "100000"];
        pod.container.exec(&[], &words)?.succeeds()?;
    }
    println!("all have answered after {:.0?}", begun.elapsed());

    let (mut of_shims, mut of_others) = (0, 0);
    for pod in &pods {
        let pod = Pod::of(pod.container.id())?;
        of_shims += host::pss_kib(pod.shim.pid)?;
        for child in &pod.children {
            of_others += host::pss_kib(child.pid)?;
        }
    }
    let each = |kib| kib / PODS as u64;
    println!(
        "PSS of each: its shim {} KiB, the rest {} KiB",
        each(of_shims),
        each(of_others)
    );

    let begun = Instant::now();
    for pod in &mut pods {
        pod.client.close_stdin();
    }
    for pod in pods {
        pod.finish()?.succeeds()?;
    }
    println!("all are gone after {:.0?}", begun.elapsed());
    Ok(())
}

/// A server in each namespace, some started at once.
fn servers(setting: &Setting, namespaces: &[Namespace]) -> Result<Vec<Foreground>> {
    let start = |namespace: &Namespace| server(setting.container(), namespace);
    thread::scope(|scope| {
        let starters: Vec<_> = namespaces
            .chunks(PODS / STARTERS)
            .map(|share| scope.spawn(move || share.iter().map(start).collect::<Result<Vec<_>>>()))
            .collect();
        let mut all = Vec::new();
        for starter in starters {
            match starter.join() {
                Ok(started) => all.extend(started?),
                Err(panic) => std::panic::resume_unwind(panic),
            }
        }
        Ok(all)
    })
}

/// What a pod's processes have: memory in KiB and open descriptors.
#[derive(Debug)]
struct Footprint {
    shim: (u64, usize),
    vmm: (u64, usize),
}

impl Footprint {
    fn of(container: &Container) -> Result<Self> {
        let pod = Pod::of(container.id())?;
        let of = |pid: i32| -> Result<(u64, usize)> {
            let descriptors = fs::read_dir(format!("/proc/{pid}/fd"))?.count();
            Ok((host::pss_kib(pid)?, descriptors))
        };
        Ok(Self {
            shim: of(pod.shim.pid)?,
            vmm: of(pod.child("bulkhead-vmm")?.pid)?,
        })
    }

    fn check(&self, before: &Self) -> Result<()> {
        let fits = |now: (u64, usize), before: (u64, usize), growth| {
            now.0 <= before.0 + growth && now.1 <= before.1
        };
        ensure!(
            fits(self.shim, before.shim, SHIM_GROWTH) && fits(self.vmm, before.vmm, VMM_GROWTH),
            "before: {before:?}, after: {self:?}"
        );
        Ok(())
    }
}

fn soak(setting: &Setting) -> Result<()> {
    let directory = tempfile::tempdir()?;
    let containers: Vec<_> = (0..CONTAINERS)
        .map(|_| setting.container().detach(&["sleep", "1000000"]))
        .collect::<Result<_>>()?;
    let footprints = || -> Result<Vec<_>> { containers.iter().map(Footprint::of).collect() };
    work(&containers, directory.path(), 0..WARM_UP)?;
    let before = footprints()?;
    work(&containers, directory.path(), WARM_UP..WARM_UP + OPERATIONS)?;
    for (after, before) in footprints()?.iter().zip(&before) {
        after.check(before)?;
    }
    Ok(())
}

/// Has every client do these operations.
fn work(containers: &[Container], directory: &Path, numbers: std::ops::Range<u32>) -> Result<()> {
    thread::scope(|scope| {
        let clients: Vec<_> = (0..CLIENTS)
            .map(|client| {
                let numbers = numbers.clone();
                scope.spawn(move || -> Result<()> {
                    let mut client = Client::new(client, containers, directory)?;
                    numbers
                        .into_iter()
                        .try_for_each(|number| client.step(number))
                })
            })
            .collect();
        for client in clients {
            match client.join() {
                Ok(result) => result?,
                Err(panic) => std::panic::resume_unwind(panic),
            }
        }
        anyhow::Ok(())
    })?;
    // What one client has paused, another may have left so.
    for container in containers {
        let _ = Shim::of(container)?.resume(container.id());
    }
    Ok(())
}

/// A client with a connection to every shim.
struct Client<'a> {
    name: u32,
    containers: Vec<(&'a str, Shim)>,
    directory: &'a Path,
    chance: u64,
}

impl<'a> Client<'a> {
    fn new(name: u32, containers: &'a [Container], directory: &'a Path) -> Result<Self> {
        let connect = |container: &'a Container| Ok((container.id(), Shim::of(container)?));
        Ok(Self {
            name,
            containers: containers.iter().map(connect).collect::<Result<_>>()?,
            directory,
            chance: u64::from(name) + 1,
        })
    }

    /// A number below `limit`, the same in every run.
    fn pick(&mut self, limit: u64) -> u64 {
        // Knuth's linear congruential generator; its high bits are the better ones.
        self.chance = self
            .chance
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1_442_695_040_888_963_407);
        (self.chance >> 33) % limit
    }

    fn step(&mut self, number: u32) -> Result<()> {
        let index = usize::try_from(self.pick(CONTAINERS as u64))?;
        let operation = self.pick(10);
        let limit = 100 + self.pick(100);
        let (id, shim) = &self.containers[index];
        let exec_id = format!("exec-{}-{number}", self.name);
        let done = match operation {
            0..=3 => self.talk(id, shim, &exec_id),
            4 => self.kill(id, shim, &exec_id),
            5 => shim.pause(id).and_then(|()| shim.resume(id)),
            6 => shim.update(id, &json!({ "pids": { "limit": limit } })),
            _ => shim.look(id),
        };
        match done {
            Ok(()) => Ok(()),
            // Somebody else has paused or resumed it meanwhile; or twenty guests on one emulated CPU
            // have kept one from telling its statistics in the two seconds that containerd has.
            Err(error) => match error.downcast_ref::<Refused>() {
                Some(Refused {
                    code: Code::FAILED_PRECONDITION | Code::DEADLINE_EXCEEDED,
                    ..
                }) => Ok(()),
                _ => Err(error).with_context(|| format!("operation {operation} on {id}")),
            },
        }
    }

    fn talk(&self, id: &str, shim: &Shim, exec_id: &str) -> Result<()> {
        let script = format!("echo {exec_id}; exit 7");
        let process = process(&["sh", "-c", &script]);
        let ended = shim.exec(id, self.directory, exec_id, &process)?.finish()?;
        let said = String::from_utf8_lossy(&ended.stdout);
        if ended.code != 7 || said.trim_end() != exec_id {
            bail!(
                "{exec_id} in {id} said {said:?} and ended with {}",
                ended.code
            );
        }
        self.forget(exec_id)
    }

    fn kill(&self, id: &str, shim: &Shim, exec_id: &str) -> Result<()> {
        let process = process(&["sleep", "1000"]);
        let started = shim.exec(id, self.directory, exec_id, &process)?;
        started.kill(9)?;
        let code = started.finish()?.code;
        ensure!(code == 137, "a killed process ended with {code}");
        self.forget(exec_id)
    }

    /// Removes the FIFOs of an exec.
    fn forget(&self, exec_id: &str) -> Result<()> {
        for stream in ["stdin", "stdout", "stderr"] {
            fs::remove_file(self.directory.join(format!("{exec_id}-{stream}")))?;
        }
        Ok(())
    }
}

fn process(args: &[&str]) -> Value {
    json!({
        "args": args,
        "cwd": "/",
        "env": ["PATH=/bin"],
        "user": { "uid": 0, "gid": 0 },
    })
}
