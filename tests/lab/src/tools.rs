//! Programs the lab needs on the build machine: Debian packages, QEMU, the lab's agent.

use std::ffi::OsStr;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use crate::cache::Cache;
use crate::command::run_logged;
use crate::emulator;
use crate::error::{Context, Error};
use crate::step::Step;

/// What building and running a lab uses of the build machine.
pub(crate) const LAB_HOST_PACKAGES: &[&str] = &[
    "debian-archive-keyring",
    "e2fsprogs",
    "gcc",
    "kmod",
    "mmdebstrap",
    "xz-utils",
];

/// How long package downloads and installations may take.
const APT_LIMIT: Duration = Duration::from_secs(20 * 60);

/// How long one cargo build may take.
pub const BUILD_LIMIT: Duration = Duration::from_secs(40 * 60);

/// The target of everything that is shipped.
const TARGET: &str = "x86_64-unknown-linux-gnu";

/// The keys that sign Debian 13, by which the keyring package is known to be new enough; Debian 12
/// and 13 name their files differently.
const TRIXIE_KEYS: [&str; 2] = [
    "/usr/share/keyrings/debian-archive-trixie-automatic.gpg",
    "/usr/share/keyrings/debian-archive-trixie-automatic.pgp",
];

/// Installs those of the Debian packages that are missing; needs root only when some are.
pub fn install_host_packages(packages: &[&str]) -> Result<(), Error> {
    let mut wanted: Vec<&str> = Vec::new();
    for package in packages {
        if !is_installed(package)? {
            wanted.push(package);
        }
    }
    // An early Debian 12 has the keyring package but not the keys; its update brings them.
    let keys_missing = !TRIXIE_KEYS.iter().any(|path| Path::new(path).exists());
    if packages.contains(&"debian-archive-keyring") && keys_missing {
        wanted.push("debian-archive-keyring");
    }
    if wanted.is_empty() {
        return Ok(());
    }
    let list = wanted.join(" ");
    if !nix::unistd::geteuid().is_root() {
        return Err(Error::Missing {
            what: format!("some of the Debian packages {list}"),
            hint: format!("run as root: apt-get install {list}"),
        });
    }
    let step = Step::start(format!("Installing Debian packages: {list}"));
    apt(["update"])?;
    apt(["install", "--yes", "--no-install-recommends"]
        .iter()
        .chain(&wanted))?;
    step.done();
    Ok(())
}

fn apt<S: AsRef<OsStr>>(arguments: impl IntoIterator<Item = S>) -> Result<(), Error> {
    let mut command = Command::new("apt-get");
    command
        .env("DEBIAN_FRONTEND", "noninteractive")
        .args(["-o", "DPkg::Lock::Timeout=600"])
        .args(arguments);
    run_logged(&mut command, APT_LIMIT)
}

fn is_installed(package: &str) -> Result<bool, Error> {
    let output = Command::new("dpkg-query")
        .args(["--show", "--showformat", "${db:Status-Status}", package])
        .output()
        .context(|| "run dpkg-query (a Debian system is needed)")?;
    Ok(output.status.success() && output.stdout == b"installed")
}

/// A QEMU 10 from Debian 13, unpacked into a root of its own.
///
/// Debian 12's QEMU 7.2 now and then makes the lab's kernel double-fault when instructions are
/// counted.
pub(crate) fn qemu(cache: &Cache) -> Result<PathBuf, Error> {
    let inputs: [&[u8]; 2] = [b"trixie qemu-system-x86", &emulator::CASE];
    let entry = cache.entry("qemu", &inputs, |partial| {
        let step = Step::start("Unpacking QEMU from Debian 13");
        let mut command = Command::new("mmdebstrap");
        command
            .args(["--variant=extract", "--include=qemu-system-x86,seabios"])
            .arg("--format=directory")
            .args(["trixie"])
            .arg(partial.join("root"));
        run_logged(&mut command, APT_LIMIT)?;
        step.done();
        if !emulator::mend(&partial.join("root/usr/bin/qemu-system-x86_64"))? {
            eprintln!(
                "This QEMU is not the known one; if guests hang, see tests/lab/src/emulator.rs"
            );
        }
        Ok(())
    })?;
    Ok(entry.join("root"))
}

/// Builds the agent that runs in the lab; it must be static, for it runs before there is a root.
pub(crate) fn lab_agent() -> Result<PathBuf, Error> {
    let step = Step::start("Building the lab's agent");
    let mut command = cargo();
    command.args([
        "build",
        "--package",
        "bulkhead-lab-agent",
        "--profile",
        "lab",
    ]);
    run_logged(static_build(&mut command), BUILD_LIMIT)?;
    step.done();
    Ok(static_dir().join("lab/bulkhead-lab-agent"))
}

/// Cargo in the workspace.
pub fn cargo() -> Command {
    let mut command = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    command.current_dir(workspace());
    command
}

/// Makes a `cargo build` link statically, into a directory of its own: other flags for the same
/// target directory would build everything anew each time. The target must be named, for build
/// scripts and procedural macros cannot be static.
pub fn static_build(command: &mut Command) -> &mut Command {
    command
        .env("RUSTFLAGS", "-C target-feature=+crt-static")
        .args(["--target", TARGET, "--target-dir"])
        .arg(target_dir().join("static"))
}

/// Where static builds are, in a directory named after their profile.
pub fn static_dir() -> PathBuf {
    target_dir().join("static").join(TARGET)
}

/// Cargo's target directory.
pub fn target_dir() -> PathBuf {
    std::env::var_os("CARGO_TARGET_DIR").map_or_else(|| workspace().join("target"), PathBuf::from)
}

/// The root of the sources.
pub fn workspace() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .ancestors()
        .nth(2)
        .map_or_else(|| PathBuf::from("/"), Path::to_path_buf)
}
