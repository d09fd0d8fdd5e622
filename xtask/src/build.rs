//! `cargo xtask build`: everything that is shipped.

use std::fs;
use std::path::PathBuf;

use anyhow::{Context, Result};
use bulkhead_guest_kernel::Kernel;
use bulkhead_lab::{
    BUILD_LIMIT, Cache, Step, cargo, install_host_packages, run_shown, static_build, static_dir,
    target_dir,
};
use bulkhead_rootfs_builder::{INITRAMFS, VMLINUX, build_initramfs, write_manifest};

/// What compiling Bulkhead needs of the machine; the kernel's build looks after its own needs.
const BUILD_PACKAGES: &[&str] = &["busybox-static", "gcc", "libc6-dev", "libseccomp-dev"];

/// Where the shipped files are after a build.
pub struct Built {
    /// The directory of the shim, the VMM and the command.
    pub programs: PathBuf,
    /// The directory of the guest's kernel, initramfs and manifest.
    pub guest: PathBuf,
}

/// Installs what compiling Bulkhead and its tests needs of the machine.
pub fn install_packages() -> Result<()> {
    Ok(install_host_packages(BUILD_PACKAGES)?)
}

/// Builds all programs, the guest's kernel and its initramfs.
pub fn build() -> Result<Built> {
    install_packages()?;

    let step = Step::announce("Building the programs");
    let mut programs = cargo();
    programs.args(["build", "--release"]);
    for package in ["bulkhead-shim", "bulkhead-vmm", "bulkhead-agent"] {
        programs.args(["--package", package]);
    }
    run_shown(static_build(&mut programs), BUILD_LIMIT)?;
    step.done();

    let kernel = kernel()?;

    let guest = target_dir().join("guest");
    fs::create_dir_all(&guest).with_context(|| format!("create {}", guest.display()))?;
    let vmlinux = guest.join(VMLINUX);
    fs::copy(&kernel.vmlinux, &vmlinux)
        .with_context(|| format!("copy {} to {}", kernel.vmlinux.display(), vmlinux.display()))?;
    let programs = static_dir().join("release");
    build_initramfs(&programs.join("bulkhead-agent"), &guest.join(INITRAMFS))?;
    write_manifest(&guest, &kernel.release)?;
    Ok(Built { programs, guest })
}

/// Builds the guest's kernel, so that it is in the cache afterwards.
pub fn prepare_kernel() -> Result<()> {
    kernel().map(drop)
}

fn kernel() -> Result<Kernel> {
    let step = Step::announce("Preparing the guest's kernel");
    let cache = Cache::open()?;
    let kernel = bulkhead_guest_kernel::build(cache.root(), &mut |line| eprintln!("    {line}"))?;
    step.done();
    Ok(kernel)
}

/// Builds the end-to-end tests' program, a static one, which runs inside a lab.
pub fn build_e2e() -> Result<PathBuf> {
    let step = Step::announce("Building the end-to-end tests");
    for_lab(&["--package", "bulkhead-e2e"])?;
    step.done();
    Ok(static_dir().join("lab/bulkhead-e2e"))
}

/// Builds a VMM with attacker code in it, for a test of its jail.
pub fn build_open_vmm() -> Result<PathBuf> {
    let step = Step::announce("Building a VMM with a back door for the tests");
    for_lab(&["--package", "bulkhead-vmm", "--features", "back-door"])?;
    step.done();
    Ok(static_dir().join("lab/bulkhead-vmm"))
}

/// Builds a shim that a test can hold at a step of its choice.
pub fn build_held_shim() -> Result<PathBuf> {
    let step = Step::announce("Building a shim that waits for the tests");
    for_lab(&["--package", "bulkhead-shim", "--features", "steps"])?;
    step.done();
    Ok(static_dir().join("lab/containerd-shim-bulkhead-v2"))
}

fn for_lab(arguments: &[&str]) -> Result<()> {
    let mut build = cargo();
    build.args(["build", "--profile", "lab", "--bins"]);
    build.args(arguments);
    Ok(run_shown(static_build(&mut build), BUILD_LIMIT)?)
}
