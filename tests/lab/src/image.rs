//! The lab's root file system and the container images for tests, built from Debian packages.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use crate::cache::Cache;
use crate::command::run_logged;
use crate::error::{Context, Error};
use crate::oci::{ImageConfig, write_archive};
use crate::step::Step;
use crate::tools;

/// What is installed in the lab.
const PACKAGES: &str = include_str!("../packages.txt");

/// What is taken of a newer Debian beside it, with the programs that tests use.
const SECOND_PACKAGES: [&str; 4] = ["containerd", "docker-cli", "docker.io", "runc"];
const SECOND_PROGRAMS: [&str; 7] = [
    "usr/bin/containerd",
    "usr/bin/containerd-shim-runc-v2",
    "usr/bin/ctr",
    "usr/bin/docker",
    "usr/sbin/docker-proxy",
    "usr/sbin/dockerd",
    "usr/sbin/runc",
];

/// Where the lab has the plug-ins of CNI, and where programs look that have no configuration.
const CNI_PLUGINS: &str = "/usr/lib/cni";
const CNI_DEFAULT: &str = "opt/cni/bin";

/// Where the lab has these, as its agent knows.
const SECOND: &str = "opt/containerd-2";

/// Raised when the way the image is built changes.
const RECIPE: &[u8] = b"5";

/// The size of the lab's disk; the file is sparse.
const DISK_SIZE: &str = "16G";

/// How long a Debian system may take to download and install.
const INSTALL_LIMIT: Duration = Duration::from_secs(30 * 60);

/// How long one step over a local tree may take.
const LOCAL_LIMIT: Duration = Duration::from_secs(10 * 60);

/// An image for tests of what busybox does not have: Debian 13 with some packages.
struct DebianImage {
    name: &'static str,
    packages: &'static [&'static str],
    /// What is large in them and not needed.
    without: &'static [&'static str],
}

const DEBIAN_IMAGES: [DebianImage; 3] = [
    DebianImage {
        name: "debian-dev",
        packages: &["gcc", "libc6-dev", "python3"],
        without: &[],
    },
    DebianImage {
        name: "debian-docker",
        packages: &["docker-cli", "docker.io", "e2fsprogs", "iptables", "mount"],
        without: &[],
    },
    DebianImage {
        name: "debian-services",
        packages: &["apache2-utils", "nginx", "postgresql", "redis-server"],
        // The libraries are for PostgreSQL's compiler, and the last one is a database.
        without: &[
            "usr/lib/x86_64-linux-gnu/libLLVM.so.19.1",
            "usr/lib/x86_64-linux-gnu/libz3.so.4",
            "var/lib/postgresql/17",
        ],
    },
];

/// The archive of `docker.io/library/busybox:latest`.
const BUSYBOX_ARCHIVE: &str = "busybox.tar";

/// The archive of `docker.io/library/pause:latest`, which is not imported at boot.
const PAUSE_ARCHIVE: &str = "pause.tar";

/// What a pod's first container does: nothing, but to reap what others of the pod leave to it.
const PAUSE: &str = "trap exit INT TERM; while :; do sleep 1000000 & wait $!; done";

/// A directory with `root.img`, `vmlinuz`, `virtio_blk.ko` and `busybox.tar`.
pub(crate) fn root_image(cache: &Cache) -> Result<PathBuf, Error> {
    let inputs = [PACKAGES.as_bytes(), PAUSE.as_bytes(), RECIPE];
    cache.entry("lab", &inputs, |partial| {
        let root = partial.join("root");
        let packages: Vec<&str> = PACKAGES.split_whitespace().collect();
        debian(&root, &packages, "Installing the lab's Debian system")?;

        second_containerd(&partial.join("second"), &root.join(SECOND))?;

        let step = Step::start("Making the lab's disk image");
        let plugins = root.join(CNI_DEFAULT);
        fs::create_dir_all(root.join("opt/cni"))
            .and_then(|()| symlink(CNI_PLUGINS, &plugins))
            .context(|| format!("make {}", plugins.display()))?;
        let kernel = kernel_release(&root)?;
        unpack_modules(&root, &kernel)?;
        copy(
            &root.join(format!("boot/vmlinuz-{kernel}")),
            &partial.join("vmlinuz"),
        )?;
        let driver = format!("usr/lib/modules/{kernel}/kernel/drivers/block/virtio_blk.ko");
        copy(&root.join(driver), &partial.join("virtio_blk.ko"))?;
        let archive = partial.join(BUSYBOX_ARCHIVE);
        pack_busybox(&root, &partial.join("busybox"), &archive)?;
        let images = root.join("var/lib/bulkhead-images");
        let at_boot = images.join("boot");
        fs::create_dir_all(&at_boot).context(|| format!("create {}", at_boot.display()))?;
        copy(&archive, &at_boot.join(BUSYBOX_ARCHIVE))?;
        pack_pause(&root, &partial.join("pause"), &images.join(PAUSE_ARCHIVE))?;
        let mut mke2fs = Command::new("mke2fs");
        mke2fs
            // With a journal, though the disk is thrown away after each run: without one, ext4 looks
            // at each inode that was freed in the last minutes before it gives out another.
            .args(["-q", "-F", "-t", "ext4", "-d"])
            .arg(&root)
            .arg(partial.join("root.img"))
            .arg(DISK_SIZE);
        run_logged(&mut mke2fs, LOCAL_LIMIT)?;
        remove(&root)?;
        step.done();
        Ok(())
    })
}

/// The OCI archive of `docker.io/library/busybox:latest`, which every lab has in its containerd.
pub fn busybox_archive(cache: &Cache) -> Result<PathBuf, Error> {
    tools::install_host_packages(tools::LAB_HOST_PACKAGES)?;
    Ok(root_image(cache)?.join(BUSYBOX_ARCHIVE))
}

/// The OCI archive of `docker.io/library/NAME:latest`, an image of Debian for tests.
pub fn debian_archive(cache: &Cache, name: &str) -> Result<PathBuf, Error> {
    let known = DEBIAN_IMAGES.iter().find(|image| image.name == name);
    let image = known.ok_or_else(|| Error::Missing {
        what: format!("a recipe for the image {name}"),
        hint: format!(
            "there are {}",
            DEBIAN_IMAGES.map(|image| image.name).join(", ")
        ),
    })?;
    tools::install_host_packages(tools::LAB_HOST_PACKAGES)?;
    let inputs = [image.packages, image.without].concat().join(" ");
    let archive = format!("{name}.tar");
    let entry = cache.entry(name, &[inputs.as_bytes(), RECIPE], |partial| {
        let root = partial.join("root");
        let what = format!("Installing Debian for the image {name}");
        debian(&root, image.packages, &what)?;
        let step = Step::start(format!("Packing the image {name}"));
        for path in image.without.iter().map(|path| root.join(path)) {
            let metadata = fs::symlink_metadata(&path);
            let removed = match metadata.map(|metadata| metadata.is_dir()) {
                Ok(true) => fs::remove_dir_all(&path),
                _ => fs::remove_file(&path),
            };
            removed.context(|| format!("remove {}", path.display()))?;
        }
        let config = ImageConfig {
            reference: &format!("docker.io/library/{name}:latest"),
            command: &["/bin/bash"],
        };
        write_archive(&root, &config, &partial.join(&archive))?;
        remove(&root)?;
        step.done();
        Ok(())
    })?;
    Ok(entry.join(archive))
}

/// Takes the programs of Debian unstable's containerd and Docker, by way of a directory that is removed again.
fn second_containerd(unpacked: &Path, programs: &Path) -> Result<(), Error> {
    let step = Step::start("Adding a second containerd");
    let mut command = Command::new("mmdebstrap");
    command
        .args(["--variant=extract", "--format=directory"])
        // A mirror may be behind.
        .arg("--aptopt=Acquire::Check-Valid-Until \"false\"")
        .arg(format!("--include={}", SECOND_PACKAGES.join(",")))
        .arg("sid")
        .arg(unpacked);
    run_logged(&mut command, INSTALL_LIMIT)?;
    fs::create_dir_all(programs).context(|| format!("create {}", programs.display()))?;
    for program in SECOND_PROGRAMS.map(Path::new) {
        let name = program.file_name().unwrap_or_default();
        copy(&unpacked.join(program), &programs.join(name))?;
    }
    remove(unpacked)?;
    step.done();
    Ok(())
}

/// Installs a minimal Debian 13 with some packages into a directory.
fn debian(root: &Path, packages: &[&str], what: &str) -> Result<(), Error> {
    let step = Step::start(what);
    let mut command = Command::new("mmdebstrap");
    command
        // Kernel packages build no initramfs then; the lab brings its own.
        .env("INITRD", "No")
        .args(["--variant=minbase", "--format=directory"])
        .args(
            ["doc", "man", "locale", "info"]
                .map(|directory| format!("--dpkgopt=path-exclude=/usr/share/{directory}/*")),
        )
        .arg(format!("--include={}", packages.join(",")))
        .arg("trixie")
        .arg(root);
    run_logged(&mut command, INSTALL_LIMIT)?;
    step.done();
    Ok(())
}

fn kernel_release(root: &Path) -> Result<String, Error> {
    let modules = root.join("usr/lib/modules");
    let missing = || Error::Missing {
        what: format!("a kernel in {}", modules.display()),
        hint: "the lab's package list must have one".into(),
    };
    let mut entries = fs::read_dir(&modules).context(|| format!("list {}", modules.display()))?;
    let entry = entries.next().ok_or_else(missing)?;
    let entry = entry.context(|| format!("list {}", modules.display()))?;
    entry.file_name().into_string().map_err(|_| missing())
}

/// Decompresses the kernel's modules once, so that no boot has to do it under emulation.
fn unpack_modules(root: &Path, kernel: &str) -> Result<(), Error> {
    let mut unxz = Command::new("find");
    unxz.arg(root.join("usr/lib/modules"))
        .args(["-name", "*.ko.xz", "-exec", "unxz", "{}", "+"]);
    run_logged(&mut unxz, LOCAL_LIMIT)?;
    let mut depmod = Command::new("depmod");
    depmod.arg("--basedir").arg(root.join("usr")).arg(kernel);
    run_logged(&mut depmod, LOCAL_LIMIT)
}

/// Packs an image of the busybox that is in `lab_root`; `root` is where it is put together.
fn pack_busybox(lab_root: &Path, root: &Path, archive: &Path) -> Result<(), Error> {
    let io = |result: std::io::Result<()>| result.context(|| format!("make {}", root.display()));
    for directory in [
        "bin", "dev", "etc", "home", "proc", "root", "sys", "tmp", "usr", "var",
    ] {
        io(fs::create_dir_all(root.join(directory)))?;
    }
    for link in ["sbin", "usr/bin", "usr/sbin"] {
        let to = if link.contains('/') { "../bin" } else { "bin" };
        io(symlink(to, root.join(link)))?;
    }
    io(symlink("/tmp", root.join("var/tmp")))?;
    io(fs::write(root.join("etc/passwd"), PASSWD))?;
    io(fs::write(root.join("etc/group"), GROUP))?;
    let mut modes = Command::new("chmod");
    modes.arg("1777").arg(root.join("tmp"));
    run_logged(&mut modes, LOCAL_LIMIT)?;

    let busybox = root.join("bin/busybox");
    copy(&lab_root.join("usr/bin/busybox"), &busybox)?;
    let applets = Command::new(&busybox)
        .arg("--list")
        .output()
        .context(|| format!("run {}", busybox.display()))?;
    for applet in String::from_utf8_lossy(&applets.stdout).lines() {
        if applet != "busybox" {
            io(symlink("busybox", root.join("bin").join(applet)))?;
        }
    }
    let config = ImageConfig {
        reference: "docker.io/library/busybox:latest",
        command: &["sh"],
    };
    write_archive(root, &config, archive)?;
    remove(root)
}

/// Packs the image that pods begin with; `root` is where it is put together.
fn pack_pause(lab_root: &Path, root: &Path, archive: &Path) -> Result<(), Error> {
    fs::create_dir_all(root).context(|| format!("create {}", root.display()))?;
    copy(&lab_root.join("usr/bin/busybox"), &root.join("busybox"))?;
    let config = ImageConfig {
        reference: "docker.io/library/pause:latest",
        command: &["/busybox", "sh", "-c", PAUSE],
    };
    write_archive(root, &config, archive)?;
    remove(root)
}

const PASSWD: &str = "\
root:x:0:0:root:/root:/bin/sh
daemon:x:1:1:daemon:/usr/sbin:/bin/false
www-data:x:33:33:www-data:/var/www:/bin/false
nobody:x:65534:65534:nobody:/home:/bin/false
";

const GROUP: &str = "\
root:x:0:
daemon:x:1:
tty:x:5:
www-data:x:33:
nogroup:x:65534:
";

fn copy(from: &Path, to: &Path) -> Result<(), Error> {
    let copied = fs::copy(from, to);
    copied
        .map(drop)
        .context(|| format!("copy {} to {}", from.display(), to.display()))
}

fn remove(path: &Path) -> Result<(), Error> {
    fs::remove_dir_all(path).context(|| format!("remove {}", path.display()))
}
