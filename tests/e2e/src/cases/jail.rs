//! What a pod's processes may do on the host, and whose the files are that they write.

use std::collections::BTreeSet;

use anyhow::{Result, ensure};

use super::failures::Config;
use super::{Case, Setting, bulkhead, case};
use crate::ctr::{Container, RUNC, Run};
use crate::host::{Log, Pod};
use crate::network::{Attachment, Bridge, GATEWAY, Namespace};
use crate::posture::{self, ANCHOR, SHIM, VMM};
use crate::probe::tree;

pub fn cases() -> Vec<Case> {
    vec![
        bulkhead(
            "each process of a pod has its rights and no others",
            postures,
        ),
        bulkhead("no two pods have an id in common", distinct_ids),
        case(
            "what a container writes belongs to the same ids as under runc",
            ownership,
        ),
        bulkhead("a container cannot dial the host", no_vsock).in_debian(),
        bulkhead("whoever breaks out into the VMM gets nothing", broken_out).in_debian(),
    ]
}

fn postures(setting: &Setting) -> Result<()> {
    let container = setting.container().detach(&["sleep", "100000"])?;
    let pod = Pod::of(container.id())?;
    posture::compare("the VMM", pod.child("bulkhead-vmm")?.pid, VMM)?;
    posture::compare("the anchor", pod.child("bulkhead-anchor")?.pid, ANCHOR)?;
    posture::compare("the shim", pod.shim.pid, SHIM)
}

fn distinct_ids(setting: &Setting) -> Result<()> {
    let start = || setting.container().detach(&["sleep", "100000"]);
    let (a, b) = (start()?, start()?);
    let first = |container: &Container| {
        posture::first_id(Pod::of(container.id())?.child("bulkhead-vmm")?.pid)
    };
    let (of_a, of_b) = (first(&a)?, first(&b)?);
    ensure!(of_a != of_b, "both begin at {of_a}");
    Ok(())
}

/// Every way in which a file's owner, mode or kind is set, and what overlayfs makes of deletions.
const WRITES: &str = "
    set -e
    mkdir -p /w/d /w/sgid
    echo a > /w/f; chown 12:34 /w/f; chmod 6755 /w/f
    echo b > /w/max; chown 262143:262142 /w/max
    ln /w/f /w/hard; ln -s /no/where /w/soft; chown -h 7:8 /w/soft
    mkfifo /w/fifo
    chown 0:99 /w/sgid; chmod 2775 /w/sgid; touch /w/sgid/inherits
    umask 027; touch /w/d/masked
    cp -p /w/f /w/copy; mv /w/copy /w/d/moved
    rm -r /home; mkdir /home; chown 5:6 /home; touch /home/new
    chown 3:4 /etc/passwd; rmdir /usr || true; rm -r /usr
";

fn ownership(setting: &Setting) -> Result<()> {
    let written = |runtime: &str| {
        let container = Run::new(runtime).detach(&["sh", "-c", WRITES])?;
        container.attach()?.finish()?.succeeds()?;
        let description = tree::describe(&container.changes()?)?;
        Ok::<_, anyhow::Error>(without_times(&description))
    };
    let (runc, tested) = (written(RUNC)?, written(&setting.runtime)?);
    ensure!(runc.contains("w/max 100644 262143:262142"), "{runc}");
    ensure!(
        runc == tested,
        "under runc:\n{runc}under the runtime under test:\n{tested}"
    );
    Ok(())
}

/// The description without what says when a file was written.
fn without_times(description: &str) -> String {
    let is_time = |word: &&str| {
        word.split_once('.').is_some_and(|(seconds, fraction)| {
            fraction.len() == 9
                && seconds
                    .bytes()
                    .chain(fraction.bytes())
                    .all(|byte| byte.is_ascii_digit())
        })
    };
    let line = |line: &str| {
        let words: Vec<_> = line.split(' ').filter(|word| !is_time(word)).collect();
        words.join(" ") + "\n"
    };
    description.lines().map(line).collect()
}

fn no_vsock(setting: &Setting) -> Result<()> {
    // In the initial user namespace of the guest, and with every capability.
    let script = "import socket\nsocket.socket(socket.AF_VSOCK)";
    let finished = setting
        .container()
        .debian()
        .flags(&["--privileged"])
        .run(&["python3", "-c", script])?;
    let errors = String::from_utf8_lossy(&finished.stderr).into_owned();
    ensure!(
        finished.code() == 1 && errors.contains("Address family not supported"),
        "{finished:?}"
    );
    Ok(())
}

/// A VMM with attacker code in it (`vmm/src/back_door.rs`).
const OPEN_VMM: &str = "/usr/local/lib/bulkhead-test/bulkhead-vmm";

/// The kinds of threads of a VMM.
const THREADS: [&str; 5] = ["main", "vcpu", "devices", "fs", "net"];

fn broken_out(setting: &Setting) -> Result<()> {
    let log = Log::start();
    let attempts = {
        let _config = Config::replace(&format!("vmm = {OPEN_VMM:?}\n"))?;
        // A neighbour, whose process and files are there to be reached.
        let _neighbour = setting.container().detach(&["sleep", "100000"])?;
        let bridge = Bridge::new();
        let namespace = Namespace::new()?;
        let _eth = Attachment::bridge(&namespace, "eth0", &bridge)?;
        let container = setting
            .container()
            .debian()
            .flags(&["--privileged", "--with-ns", &namespace.flag()])
            .detach(&["sleep", "100000"])?;
        let script = "import os\n\
                      try: os.getxattr('/etc/passwd', 'user.bulkhead.break-out')\n\
                      except OSError: pass";
        container
            .exec(&[], &["python3", "-c", script])?
            .succeeds()?;
        // Each thread has its turn when there is something for it to do: output, an error on the
        // guest's console, a packet, an end.
        let script = format!(
            "import socket\nopen('/dev/kmsg', 'w').write('<3>hello')\n\
             socket.socket(socket.AF_INET, socket.SOCK_DGRAM).sendto(b'x', ('{GATEWAY}', 9))"
        );
        container
            .exec(&[], &["python3", "-c", &script])?
            .succeeds()?;
        drop(container);
        log.tail(1 << 20)?
    };
    let mut attempts: Vec<&str> = attempts
        .lines()
        .filter_map(|line| Some(line.split_once("back door: ")?.1.trim_end_matches('"')))
        .collect();
    attempts.sort_unstable();
    attempts.dedup();
    // By name: the threads that serve files are several, and may be stopped for different reasons.
    let of = |thread: &str| {
        let prefix = format!("{thread}: ");
        attempts
            .iter()
            .filter_map(|line| line.strip_prefix(&prefix)?.split(": ").next())
            .collect::<BTreeSet<_>>()
    };
    let first = of(THREADS[0]);
    ensure!(first.len() > 50, "{} attempts: {first:#?}", first.len());
    for thread in THREADS {
        let made = of(thread);
        ensure!(
            made == first && made.contains("end"),
            "{thread} tried {made:#?} instead of {first:#?}"
        );
    }
    let done: Vec<_> = attempts
        .iter()
        .filter(|line| line.ends_with(": DONE"))
        .collect();
    ensure!(done.is_empty(), "not stopped: {done:#?}");
    Ok(())
}
