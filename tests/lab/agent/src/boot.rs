//! The last part of booting, at the build machine's request.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::Path;
use std::process::Command;

use bulkhead_lab::Containerd;
use rustix::mount::MountFlags;

use crate::init::{helper, mount_at};
use crate::{Context, Result, containerd};

/// Where the programs of the second containerd are, and where they are found before those of the first.
const SECOND: &str = "/opt/containerd-2";
const FOUND_FIRST: &str = "/usr/local/sbin";

/// Image archives that every lab has in its containerd.
const IMAGES: &str = "/var/lib/bulkhead-images/boot";

/// How containerd serves Kubernetes: with pods under runc and under Bulkhead.
const CONFIG: &str = "/etc/containerd/config.toml";

/// The network of these pods.
const NETWORK: &str = "/etc/cni/net.d/10-bridge.conflist";

/// What containerd writes, and waits for.
const STORE: &str = "/var/lib/containerd";

/// How large the disk for that is in a metered lab, in KiB. What is not used of it takes no memory.
const MEMORY_DISK: u32 = 4 << 20;

/// Starts a containerd and imports the images, if asked to.
pub fn run(containerd: Option<Containerd>, metered: bool) -> Result<()> {
    let config = match containerd {
        None => return Ok(()),
        Some(Containerd::V1) => include_str!("etc/containerd-1.toml"),
        Some(Containerd::V2) => {
            prefer_second()?;
            include_str!("etc/containerd-2.toml")
        }
    };
    if metered {
        store_in_memory()?;
    }
    write(CONFIG, config)?;
    write(NETWORK, include_str!("etc/10-bridge.conflist"))?;
    containerd::start()?;
    for entry in fs::read_dir(IMAGES).context(|| format!("list {IMAGES}"))? {
        let archive = entry.context(|| format!("list {IMAGES}"))?.path();
        let output = Command::new("ctr")
            .args(["image", "import"])
            .arg(&archive)
            .output()
            .context(|| "run ctr".into())?;
        if !output.status.success() {
            let said = String::from_utf8_lossy(&output.stderr);
            return Err(format!("import {}: {said}", archive.display()).into());
        }
    }
    Ok(())
}

/// Puts what containerd waits for on a disk in memory, whose work is instructions like any other.
///
/// While everything waits for the emulated disk, no instruction is executed, and the clock runs on from
/// one timer to the next: how far depends on how busy the machine is that the lab runs on.
fn store_in_memory() -> Result<()> {
    helper(
        Command::new("modprobe")
            .args(["brd", "rd_nr=1"])
            .arg(format!("rd_size={MEMORY_DISK}")),
    )?;
    helper(Command::new("mkfs.ext4").args(["-q", "/dev/ram0"]))?;
    mount_at(
        "/dev/ram0",
        STORE,
        "ext4",
        MountFlags::NOATIME,
        c"noinit_itable",
    )
}

fn prefer_second() -> Result<()> {
    for entry in fs::read_dir(SECOND).context(|| format!("list {SECOND}"))? {
        let program = entry.context(|| format!("list {SECOND}"))?.path();
        let name = program.file_name().unwrap_or_default();
        let link = Path::new(FOUND_FIRST).join(name);
        symlink(&program, &link).context(|| format!("make {}", link.display()))?;
    }
    Ok(())
}

fn write(path: &str, content: &str) -> Result<()> {
    let parent = Path::new(path).parent().unwrap_or(Path::new("/"));
    fs::create_dir_all(parent)
        .and_then(|()| fs::write(path, content))
        .context(|| format!("write {path}"))
}
