//! Whether this machine can run Bulkhead itself, judged by trying.

use std::fs::File;
use std::os::fd::AsFd;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use bulkhead_rootfs_builder::{INITRAMFS, VMLINUX};
use bulkhead_vmm_control::{
    Channel, Event, FromVmm, Packet, Reply, Request, Spawned, VmConfig, spawn_alone,
};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use crate::build::Built;

/// How long a guest may take to its agent's first word, and then some: 1 s is slow hardware.
const BOOT_LIMIT: Duration = Duration::from_secs(10);

/// Fails with the reason when containers in microVMs cannot run on this machine.
pub fn check(built: &Built) -> Result<()> {
    if !nix::unistd::geteuid().is_root() {
        bail!("only root can use containerd here");
    }
    if Path::new("/sys/module/kvm_pvm").exists() {
        bail!("its KVM (kvm_pvm) runs no unmodified guest kernel");
    }
    let answer = Command::new("ctr")
        .arg("version")
        .output()
        .context("run ctr")?;
    if !answer.status.success() {
        bail!(
            "containerd does not answer: {}",
            String::from_utf8_lossy(&answer.stderr).trim()
        );
    }
    trial_boot(built).context("the trial boot of a guest failed")
}

/// Boots a guest until its agent dials the host.
fn trial_boot(built: &Built) -> Result<()> {
    let open = |path: &Path| File::open(path).with_context(|| format!("open {}", path.display()));
    let kvm = File::options()
        .read(true)
        .write(true)
        .open("/dev/kvm")
        .context("open /dev/kvm")?;
    let kernel = open(&built.guest.join(VMLINUX))?;
    let initramfs = open(&built.guest.join(INITRAMFS))?;

    let (ours, theirs) = Channel::pair().context("create a control socket")?;
    let _vmm = Vmm::start(&built.programs.join("bulkhead-vmm"), theirs)?;
    let config = VmConfig {
        vcpus: 1,
        memory_mib: 128,
        kernel_args: String::new(),
        fs_requests_per_second: 0,
        fs_bytes_per_second: 0,
        net_packets_per_second: 0,
        net_bytes_per_second: 0,
        console: false,
    };
    ours.send(
        &Request::Boot(config),
        &[kvm.as_fd(), kernel.as_fd(), initramfs.as_fd()],
    )?;
    loop {
        let mut events = [PollFd::new(ours.as_fd(), PollFlags::POLLIN)];
        if poll(&mut events, PollTimeout::try_from(BOOT_LIMIT)?).context("wait for the VMM")? == 0 {
            bail!("the guest was not ready after {BOOT_LIMIT:?}");
        }
        match ours.receive()?.map(|Packet { message, .. }| message) {
            Some(FromVmm::Event(Event::Connection { .. })) => return Ok(()),
            Some(FromVmm::Event(Event::Stopped { reason, console })) => {
                bail!("the guest stopped ({reason:?}):\n{console}");
            }
            Some(FromVmm::Reply(Reply::Failed(reason))) => bail!("{reason}"),
            Some(FromVmm::Reply(_)) => {}
            None => bail!("the VMM ended without a word"),
        }
    }
}

/// A running VMM, ended on drop.
struct Vmm(Spawned);

impl Vmm {
    fn start(program: &Path, control: Channel) -> Result<Self> {
        let process = spawn_alone(program, &control, std::io::stderr().as_fd())
            .with_context(|| format!("run {}", program.display()))?;
        Ok(Vmm(process))
    }
}

impl Drop for Vmm {
    fn drop(&mut self) {
        // It may have ended by itself; it is reaped either way.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}
