//! The recipe: unpack the source, configure, check, compile, strip, publish.

use std::fs::{self, DirBuilder, File};
use std::io;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use sha2::{Digest, Sha256};

use crate::FRAGMENT;
use crate::config::{Mismatch, mismatches};
use crate::tools::{ToolError, run};
use crate::vmlinux;

/// Set to the path of a ready kernel, it is used instead of building one.
const READY_KERNEL: &str = "BULKHEAD_VMLINUX";

/// The distribution's package of the kernel source, and where it puts it.
const SOURCE_PACKAGE: &str = "linux-source-6.12";
const SOURCE: &str = "/usr/src/linux-source-6.12.tar.xz";

/// What the build needs beside the source, on Debian 12 and 13 alike.
const TOOL_PACKAGES: [&str; 10] = [
    "bc",
    "binutils",
    "bison",
    "flex",
    "gcc",
    "libc6-dev",
    "libelf-dev",
    "make",
    "patch",
    "xz-utils",
];

/// Our changes to the source. When one no longer applies to a new version of the package, the
/// build fails there, and the change has to be looked at again.
const PATCH: &str = concat!(
    include_str!("../patches/return-sites.patch"),
    include_str!("../patches/fuse-submount-acl.patch"),
    include_str!("../patches/fuse-directory-changed.patch"),
    include_str!("../patches/fuse-no-capabilities.patch"),
    include_str!("../patches/fuse-exclusive-create.patch"),
    include_str!("../patches/virtio-mmio-no-ack.patch"),
    include_str!("../patches/vsock-initial-network.patch"),
);

/// Variables for make. Who built the kernel, where and when is fixed: the image depends on its
/// inputs alone.
const MAKE_VARIABLES: [&str; 5] = [
    "ARCH=x86_64",
    "KBUILD_BUILD_TIMESTAMP=1970-01-01 00:00:00 UTC",
    "KBUILD_BUILD_USER=bulkhead",
    "KBUILD_BUILD_HOST=bulkhead",
    "KBUILD_BUILD_VERSION=1",
];

/// One core of a busy machine compiles the kernel in about 20 minutes.
const COMPILE_DEADLINE: Duration = Duration::from_secs(90 * 60);
const STEP_DEADLINE: Duration = Duration::from_secs(15 * 60);

/// Begins the names of working directories in the cache.
const WORK_PREFIX: &str = "build-";

/// A line of progress is given for this many files.
const FILES_PER_LINE: usize = 200;

/// A guest kernel that is ready to be installed.
#[derive(Clone, Debug)]
pub struct Kernel {
    /// The uncompressed, stripped ELF image.
    pub vmlinux: PathBuf,
    /// Its configuration; `None` for a ready kernel that was given by path.
    pub config: Option<PathBuf>,
    /// Its release, as `uname -r` prints it.
    pub release: String,
}

/// Why there is no kernel.
#[derive(Debug, thiserror::Error)]
pub enum BuildError {
    /// The build's packages are missing and only root can install them.
    #[error(
        "building the guest kernel needs packages that are not installed: as root, run \
         `apt-get install --no-install-recommends {}`, or set {READY_KERNEL} to a ready kernel",
        .0.join(" ")
    )]
    Packages(Vec<&'static str>),
    /// A step of the build failed.
    #[error("building the guest kernel failed; its output is in {log}")]
    Step {
        /// The build's whole output.
        log: PathBuf,
        /// The program that failed.
        #[source]
        source: ToolError,
    },
    /// Options that the guest needs are not in the kernel.
    #[error("kconfig did not build the configuration that was asked for: {}", list(.0))]
    Configuration(Vec<Mismatch>),
    /// The image is not a Linux kernel for x86-64.
    #[error("{0} is not an uncompressed Linux kernel for x86-64")]
    NotAKernel(PathBuf),
    /// A file of the cache or of the build could not be handled.
    #[error("cannot {action} {path}")]
    Io {
        /// What was tried.
        action: &'static str,
        /// On what.
        path: PathBuf,
        /// The system's error.
        #[source]
        source: io::Error,
    },
}

fn list(mismatches: &[Mismatch]) -> String {
    mismatches
        .iter()
        .map(Mismatch::to_string)
        .collect::<Vec<_>>()
        .join(", ")
}

/// Gives the guest kernel, building it in `cache_dir` unless it is there from before.
///
/// A cached kernel is used while the configuration, the version of the source package, the
/// compiler and the linker are those that it was built with. `progress` is called with a line for
/// people at every step; a build takes about 5 minutes on two cores. Missing Debian packages are
/// installed when running as root. `$BULKHEAD_VMLINUX` names a ready kernel to use instead.
pub fn build(cache_dir: &Path, progress: &mut dyn FnMut(&str)) -> Result<Kernel, BuildError> {
    if let Some(path) = std::env::var_os(READY_KERNEL) {
        return Kernel::open(PathBuf::from(path), None);
    }

    let directory = cache_dir.join("kernel");
    DirBuilder::new()
        .recursive(true)
        .mode(0o755)
        .create(&directory)
        .map_err(io_error("create", &directory))?;
    // One build at a time: the others wait for it and then find its result. It ends by its
    // deadlines, and its lock with it.
    let lock_path = directory.join("lock");
    let lock = File::create(&lock_path).map_err(io_error("create", &lock_path))?;
    if lock.try_lock().is_err() {
        progress("waiting for another build of the guest kernel");
        lock.lock().map_err(io_error("lock", &lock_path))?;
    }
    let mut steps = Steps::new(directory.join("build.log"), progress)?;
    install_packages(&mut steps)?;
    let inputs = Inputs::read(&steps)?;
    let built = directory.join(inputs.key());
    if !built.exists() {
        let log = steps.log_path.display().to_string();
        let source = &inputs.source;
        steps.announce(&format!(
            "building the guest kernel from {SOURCE_PACKAGE} {source}; its output goes to {log}"
        ));
        remove_leftovers(&directory)?;
        let work = tempfile::Builder::new()
            .prefix(WORK_PREFIX)
            .tempdir_in(&directory)
            .map_err(io_error("create a directory in", &directory))?;
        let result = compile(work.path(), &mut steps)?;
        fs::rename(&result, &built).map_err(io_error("publish", &built))?;
    }
    Kernel::open(built.join("vmlinux"), Some(built.join("config")))
}

impl Kernel {
    /// Takes a built kernel after a look at the image.
    fn open(vmlinux: PathBuf, config: Option<PathBuf>) -> Result<Self, BuildError> {
        let image = fs::read(&vmlinux).map_err(io_error("read", &vmlinux))?;
        match vmlinux::release(&image) {
            Some(release) => Ok(Self {
                vmlinux,
                config,
                release,
            }),
            None => Err(BuildError::NotAKernel(vmlinux)),
        }
    }
}

/// Removes the working directories of builds that were killed. The lock is held: none is in use.
fn remove_leftovers(directory: &Path) -> Result<(), BuildError> {
    let entries = fs::read_dir(directory).map_err(io_error("list", directory))?;
    for entry in entries {
        let entry = entry.map_err(io_error("list", directory))?;
        if entry.file_name().to_string_lossy().starts_with(WORK_PREFIX) {
            let path = entry.path();
            fs::remove_dir_all(&path).map_err(io_error("remove", &path))?;
        }
    }
    Ok(())
}

/// Runs the steps of one build, with their output in one log.
struct Steps<'a> {
    log: File,
    log_path: PathBuf,
    progress: &'a mut dyn FnMut(&str),
}

impl<'a> Steps<'a> {
    fn new(log_path: PathBuf, progress: &'a mut dyn FnMut(&str)) -> Result<Self, BuildError> {
        Ok(Self {
            log: File::create(&log_path).map_err(io_error("create", &log_path))?,
            log_path,
            progress,
        })
    }

    fn announce(&mut self, line: &str) {
        (self.progress)(line);
    }

    fn run(&self, command: &mut Command) -> Result<(), BuildError> {
        run(command, STEP_DEADLINE, &self.log, &mut |_| {}).map_err(|error| self.error(error))
    }

    /// The standard output of a command.
    fn output(&self, command: &mut Command) -> Result<String, BuildError> {
        let mut output = String::new();
        run(command, STEP_DEADLINE, &self.log, &mut |line| {
            output.push_str(line);
            output.push('\n');
        })
        .map_err(|error| self.error(error))?;
        Ok(output)
    }

    /// Compiles with make, saying now and then how far it is.
    fn compile(&mut self, make: &mut Command) -> Result<(), BuildError> {
        let started = Instant::now();
        let mut files = 0;
        let progress = &mut self.progress;
        run(make, COMPILE_DEADLINE, &self.log, &mut |line| {
            // Kbuild prints one indented line for each file that it makes.
            if line.starts_with("  ") {
                files += 1;
                if files % FILES_PER_LINE == 0 {
                    let seconds = started.elapsed().as_secs();
                    progress(&format!("compiled {files} files in {seconds} s"));
                }
            }
        })
        .map_err(|error| self.error(error))
    }

    fn error(&self, source: ToolError) -> BuildError {
        BuildError::Step {
            log: self.log_path.clone(),
            source,
        }
    }
}

/// Installs what is missing of the build's packages.
fn install_packages(steps: &mut Steps<'_>) -> Result<(), BuildError> {
    let wanted = [&[SOURCE_PACKAGE], TOOL_PACKAGES.as_slice()].concat();
    // Of all packages, because asking for one that dpkg has never heard of is an error.
    let known = steps.output(
        Command::new("dpkg-query")
            .args(["--show", "--showformat=${Package} ${db:Status-Status}\n"]),
    )?;
    let missing: Vec<_> = wanted
        .into_iter()
        .filter(|package| {
            let installed = format!("{package} installed");
            !known.lines().any(|line| line == installed)
        })
        .collect();
    if missing.is_empty() {
        return Ok(());
    }
    if !rustix::process::geteuid().is_root() {
        return Err(BuildError::Packages(missing));
    }
    steps.announce(&format!("installing {}", missing.join(" ")));
    let apt_get = |arguments: &[&str]| {
        let mut command = Command::new("apt-get");
        command
            .env("DEBIAN_FRONTEND", "noninteractive")
            .args(["-q", "-y", "-o", "DPkg::Lock::Timeout=300"])
            .args(arguments);
        steps.run(&mut command)
    };
    apt_get(&["update"])?;
    apt_get(&[&["install", "--no-install-recommends"], missing.as_slice()].concat())
}

/// What the kernel is built from, beside this file and the fragment.
struct Inputs {
    source: String,
    compiler: String,
    linker: String,
}

impl Inputs {
    fn read(steps: &Steps<'_>) -> Result<Self, BuildError> {
        let output = |words: &[&str]| steps.output(Command::new(words[0]).args(&words[1..]));
        let source = [
            "dpkg-query",
            "--show",
            "--showformat=${Version}",
            SOURCE_PACKAGE,
        ];
        Ok(Self {
            source: output(&source)?.trim_end().to_owned(),
            compiler: output(&["gcc", "--version"])?,
            linker: output(&["ld", "--version"])?,
        })
    }

    /// The name of the build in the cache.
    fn key(&self) -> String {
        let mut hash = Sha256::new();
        let parts = [FRAGMENT, PATCH, &self.source, &self.compiler, &self.linker];
        for part in parts.into_iter().chain(MAKE_VARIABLES) {
            hash.update(part.len().to_le_bytes());
            hash.update(part);
        }
        hash.finalize()
            .iter()
            .map(|byte| format!("{byte:02x}"))
            .collect()
    }
}

/// Builds in the empty directory `work` and returns a directory with `vmlinux` and `config`.
fn compile(work: &Path, steps: &mut Steps<'_>) -> Result<PathBuf, BuildError> {
    let [source, result] = ["source", "result"].map(|name| work.join(name));
    for directory in [&source, &result] {
        fs::create_dir(directory).map_err(io_error("create", directory))?;
    }
    let [fragment, patch] = ["guest.config", "patch"].map(|name| work.join(name));
    for (path, text) in [(&fragment, FRAGMENT), (&patch, PATCH)] {
        fs::write(path, text).map_err(io_error("write", path))?;
    }
    let make = |arguments: &[&str]| {
        let mut command = Command::new("make");
        // The caller's environment does not reach the build: make takes variables from it.
        command
            .env_clear()
            .env("PATH", "/usr/sbin:/usr/bin:/sbin:/bin")
            .env("LC_ALL", "C")
            .arg("-C")
            .arg(&source)
            .args(MAKE_VARIABLES)
            .args(arguments);
        command
    };

    steps.announce("unpacking the source");
    steps.run(
        Command::new("tar")
            .args([
                "--extract",
                "--strip-components=1",
                "--file",
                SOURCE,
                "--directory",
            ])
            .arg(&source),
    )?;
    steps.run(
        Command::new("patch")
            .args(["--strip=1", "--batch", "--directory"])
            .arg(&source)
            .arg("--input")
            .arg(&patch),
    )?;

    let all_config = format!("KCONFIG_ALLCONFIG={}", fragment.display());
    steps.run(&mut make(&[&all_config, "allnoconfig"]))?;
    // Once now, not after minutes of compiling, and once on what was built.
    let config = source.join(".config");
    check(&config)?;
    let jobs = std::thread::available_parallelism().map_or(1, usize::from);
    steps.compile(&mut make(&[&format!("-j{jobs}"), "vmlinux"]))?;
    check(&config)?;

    steps.run(
        Command::new("strip")
            .args(["--strip-all", "-o"])
            .arg(result.join("vmlinux"))
            .arg(source.join("vmlinux")),
    )?;
    fs::copy(&config, result.join("config")).map_err(io_error("copy", &config))?;
    Ok(result)
}

/// Fails when the configuration at `path` lacks something that the fragment asks for.
fn check(path: &Path) -> Result<(), BuildError> {
    let built = fs::read_to_string(path).map_err(io_error("read", path))?;
    match mismatches(FRAGMENT, &built) {
        dropped if dropped.is_empty() => Ok(()),
        dropped => Err(BuildError::Configuration(dropped)),
    }
}

fn io_error(action: &'static str, path: &Path) -> impl FnOnce(io::Error) -> BuildError {
    let path = path.to_owned();
    move |source| BuildError::Io {
        action,
        path,
        source,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_input_changes_the_key() {
        let inputs = |source: &str, compiler: &str, linker: &str| {
            Inputs {
                source: source.into(),
                compiler: compiler.into(),
                linker: linker.into(),
            }
            .key()
        };
        let base = inputs("6.12.1", "gcc 12", "ld 2.40");
        assert_eq!(base, inputs("6.12.1", "gcc 12", "ld 2.40"));
        assert_ne!(base, inputs("6.12.2", "gcc 12", "ld 2.40"));
        assert_ne!(base, inputs("6.12.1", "gcc 14", "ld 2.40"));
        assert_ne!(base, inputs("6.12.1", "gcc 12", "ld 2.44"));
        // Where one part ends and the next begins matters.
        assert_ne!(base, inputs("6.12.1g", "cc 12", "ld 2.40"));
    }

    #[test]
    fn a_configuration_with_dropped_options_fails_the_build_and_names_them() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join(".config");
        fs::write(&path, FRAGMENT).unwrap();
        check(&path).unwrap();

        let without = FRAGMENT.replace("CONFIG_VIRTIO_FS=y\n", "").replace(
            "CONFIG_SECCOMP_FILTER=y",
            "# CONFIG_SECCOMP_FILTER is not set",
        );
        fs::write(&path, without).unwrap();
        let message = check(&path).unwrap_err().to_string();
        assert!(message.contains("CONFIG_VIRTIO_FS is n"), "{message}");
        assert!(message.contains("CONFIG_SECCOMP_FILTER is n"), "{message}");
        assert!(!message.contains("CONFIG_FUSE_FS"), "{message}");
    }

    #[test]
    fn only_a_kernel_is_taken_as_a_kernel() {
        let file = tempfile::NamedTempFile::new().unwrap();
        fs::write(file.path(), b"\x7fELF something else").unwrap();
        assert!(matches!(
            Kernel::open(file.path().to_owned(), None),
            Err(BuildError::NotAKernel(_))
        ));
        let error = Kernel::open(PathBuf::from("/absent/vmlinux"), None).unwrap_err();
        assert!(error.to_string().contains("/absent/vmlinux"));
    }
}
