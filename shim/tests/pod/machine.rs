//! A machine for the tests, in a mount namespace of their own: empty `/run`, cgroup v2, and a
//! `/dev/kvm`, which nobody uses.

use std::{fs, os::fd::AsRawFd, path::Path};

use nix::{
    mount::{MsFlags, mount},
    sched::{CloneFlags, unshare},
    sys::statfs::{CGROUP2_SUPER_MAGIC, statfs},
};

const NONE: Option<&str> = None;

/// Sets the machine up. There is one thread so far.
pub fn prepare() {
    assert!(
        nix::unistd::geteuid().is_root(),
        "these tests mount file systems and make cgroups: run them as root"
    );
    private_mounts();
    mount(Some("run"), "/run", Some("tmpfs"), MsFlags::empty(), NONE).unwrap();
    let cgroup = "/sys/fs/cgroup";
    if statfs(cgroup).unwrap().filesystem_type() != CGROUP2_SUPER_MAGIC {
        mount(
            Some("cgroup2"),
            cgroup,
            Some("cgroup2"),
            MsFlags::empty(),
            NONE,
        )
        .unwrap();
    }
    if !Path::new("/dev/kvm").exists() {
        small_dev();
        fs::write("/dev/kvm", "").unwrap();
    }
}

fn private_mounts() {
    unshare(CloneFlags::CLONE_NEWNS).unwrap();
    mount(NONE, "/", NONE, MsFlags::MS_REC | MsFlags::MS_PRIVATE, NONE).unwrap();
}

/// Replaces `/dev` by one with a few devices.
fn small_dev() {
    let names = ["null", "zero", "random", "urandom", "fuse"];
    let devices = names.map(|name| fs::File::open(Path::new("/dev").join(name)).unwrap());
    mount(Some("dev"), "/dev", Some("tmpfs"), MsFlags::empty(), NONE).unwrap();
    for (name, device) in names.iter().zip(&devices) {
        let path = Path::new("/dev").join(name);
        fs::write(&path, "").unwrap();
        let source = format!("/proc/self/fd/{}", device.as_raw_fd());
        mount(Some(source.as_str()), &path, NONE, MsFlags::MS_BIND, NONE).unwrap();
    }
}

/// For one process: the machine without `/dev/kvm`.
pub fn without_kvm() -> std::io::Result<()> {
    private_mounts();
    small_dev();
    Ok(())
}
