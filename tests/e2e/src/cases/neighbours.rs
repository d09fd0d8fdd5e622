//! What a pod can do to its neighbours and to the host: use up what it was given.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Instant;

use anyhow::{Context, Result, ensure};
use rustix::io::Errno;

use super::failures::Config;
use super::{Case, Setting, bulkhead};
use crate::command::DEADLINE;
use crate::ctr::{Container, tasks};
use crate::host::{self, Pod};

pub fn cases() -> Vec<Case> {
    vec![
        bulkhead(
            "a guest that floods its devices works for itself alone",
            flood,
        ),
        bulkhead(
            "a pod keeps to its share of the CPUs whatever its guest does",
            cpu_share,
        ),
        bulkhead("with core scheduling no two pods share a core", own_cores),
    ]
}

/// Requests for files, lines for the console and randomness, as fast as the guest can.
const FLOOD: &str = "
    [ -e /dev/hwrng ] || mknod /dev/hwrng c 10 183
    line=$(head -c 700 /dev/zero | tr '\\0' x)
    for name in a b; do
        while :; do ls -lR /bin /etc >/dev/null; touch /tmp/$name; rm /tmp/$name; done &
    done
    while :; do echo \"<3>$line\" > /dev/kmsg; done &
    dd if=/dev/hwrng of=/dev/null bs=4096 &
    echo flooding
    wait
";

/// CPU time that the flood takes before its end, in clock ticks of 10 ms.
const FLOOD_TICKS: u64 = 1_000;

/// What a VMM may have of memory in KiB: its guest's by default, and something for itself.
const MOST_VMM_KIB: u64 = (512 + 32) * 1024;

/// And a shim.
const MOST_SHIM_KIB: u64 = 16 * 1024;

/// Where the console's file ends, in bytes.
const MOST_CONSOLE: u64 = 16 << 20;

fn flood(setting: &Setting) -> Result<()> {
    let _config = Config::replace("console = true\n")?;
    let quiet = setting.container().detach(&["sleep", "100000"])?;
    let noisy = setting
        .container()
        .flags(&["--privileged"])
        .spawn(&["sh", "-c", FLOOD])?;
    noisy.client.expect("flooding")?;
    let flooding = Pod::of(noisy.container.id())?;
    let vmm = flooding.child("bulkhead-vmm")?.pid;
    let shims = [flooding.shim.pid, Pod::of(quiet.id())?.shim.pid];
    let before = (host::cpu_ticks(vmm)?, ticks(&shims)?);

    let begun = Instant::now();
    while host::cpu_ticks(vmm)? < before.0 + FLOOD_TICKS {
        ensure!(begun.elapsed() < DEADLINE, "the flood came to a halt");
        // Both pods answer, each in the time that every client has.
        for container in [&quiet, &noisy.container] {
            container.exec(&[], &["true"])?.succeeds()?;
        }
        ensure!(tasks()?.len() == 2, "not both are running");
    }

    let (of_vmm, of_shims) = (host::cpu_ticks(vmm)? - before.0, ticks(&shims)? - before.1);
    ensure!(
        of_shims * 4 < of_vmm,
        "the shims have used {of_shims} ticks, the VMM {of_vmm}"
    );
    let memory = host::pss_kib(vmm)?;
    ensure!(memory < MOST_VMM_KIB, "the VMM has {memory} KiB");
    for shim in shims {
        let memory = host::pss_kib(shim)?;
        ensure!(memory < MOST_SHIM_KIB, "a shim has {memory} KiB");
    }
    let console = format!("/run/bulkhead/default:{}/console.log", noisy.container.id());
    let written = fs::metadata(&console)
        .with_context(|| console.clone())?
        .len();
    ensure!(
        (1..=MOST_CONSOLE).contains(&written),
        "{console} has {written} bytes"
    );
    noisy.container.kill("KILL")?;
    noisy.client.finish()?.exits_with(137)?;
    Ok(())
}

fn ticks(pids: &[i32]) -> Result<u64> {
    pids.iter().map(|pid| host::cpu_ticks(*pid)).sum()
}

fn cpu_share(setting: &Setting) -> Result<()> {
    // The VMM's own work for files comes on top of what the guest's kernel limits.
    let script = "while :; do ls -lR /bin /etc >/dev/null; touch /tmp/a; rm /tmp/a; done";
    let container = setting
        .container()
        .flags(&["--cpus", "0.2", "--cpu-shares", "512"])
        .detach(&["sh", "-c", script])?;
    let cgroup = cgroup(&container);
    for (file, expected) in [("cpu.max", "25000 100000"), ("cpu.weight", "59")] {
        let value = host::read(&cgroup.join(file))?;
        ensure!(value.trim_end() == expected, "{file} is {value:?}");
    }
    let begun = Instant::now();
    while throttled(&cgroup)? == 0 {
        ensure!(begun.elapsed() < DEADLINE, "it was never throttled");
        container.exec(&[], &["true"])?.succeeds()?;
    }
    Ok(())
}

/// In how many periods the cgroup had used up its quota.
fn throttled(cgroup: &Path) -> Result<u64> {
    let stat = host::read(&cgroup.join("cpu.stat"))?;
    let count = stat
        .lines()
        .find_map(|line| line.strip_prefix("nr_throttled "));
    count
        .context("no nr_throttled")?
        .parse()
        .context("no number")
}

/// Where `ctr` puts a container.
fn cgroup(container: &Container) -> PathBuf {
    Path::new("/sys/fs/cgroup/default").join(container.id())
}

fn own_cores(setting: &Setting) -> Result<()> {
    let _config = Config::replace("core_scheduling = true\n")?;
    let start = || setting.container().detach(&["sleep", "100000"]);
    let smt = match host::core_cookie(1) {
        Ok(cookie) => cookie.is_some(),
        // This kernel cannot do it (Debian's for clouds), so no pod may run.
        Err(Errno::INVAL) => {
            let refused = setting.container().run(&["true"])?;
            ensure!(
                refused.code() == 1 && refused.err().contains("CONFIG_SCHED_CORE"),
                "{refused}"
            );
            return Ok(());
        }
        Err(errno) => return Err(errno).context("cannot read a core scheduling cookie"),
    };
    let (a, b) = (start()?, start()?);
    let cookie = |container: &Container| -> Result<Option<u64>> {
        let vmm = Pod::of(container.id())?.child("bulkhead-vmm")?.pid;
        Ok(host::core_cookie(vmm)?)
    };
    let (of_a, of_b) = (cookie(&a)?, cookie(&b)?);
    // Without threads that share a core there are no cookies.
    ensure!(
        !smt || of_a != Some(0) && of_b != Some(0) && of_a != of_b,
        "{of_a:?}, {of_b:?}"
    );
    Ok(())
}
