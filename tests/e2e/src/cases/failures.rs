//! When Bulkhead cannot start or keep a machine: one readable line that names the cause.

use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use bulkhead_rootfs_builder::{
    INITRAMFS, MANIFEST, Manifest, VMLINUX, build_initramfs, write_manifest,
};
use tempfile::TempDir;

use super::{Case, Setting, bulkhead};
use crate::command::Finished;
use crate::ctr::{RUNC, Run};
use crate::host::Log;

pub fn cases() -> Vec<Case> {
    vec![
        bulkhead("without /dev/kvm the error says so", no_kvm),
        bulkhead("without a kernel the error names the file", no_kernel),
        bulkhead("a corrupt kernel is refused by its hash", corrupt_kernel),
        bulkhead(
            "without an initramfs the error names the file",
            no_initramfs,
        ),
        bulkhead(
            "a corrupt initramfs is refused by its hash",
            corrupt_initramfs,
        ),
        bulkhead("without a manifest the error names the file", no_manifest),
        bulkhead(
            "a key that the configuration does not know is named",
            unknown_key,
        ),
        bulkhead(
            "more memory than the host can give is refused",
            too_much_memory,
        ),
        bulkhead(
            "a guest that panics at boot is reported with its panic",
            panic_at_boot,
        ),
        bulkhead(
            "a guest that panics later ends its container with the panic in the log",
            panic_later,
        ),
        bulkhead("an agent that never answers is given up", silent_agent),
        bulkhead(
            "a shared network namespace is refused with a reason",
            host_network,
        ),
    ]
}

/// Where the configuration is.
const CONFIG: &str = "/etc/bulkhead/config.toml";
/// Where the guest's files are, unless the configuration says otherwise.
const GUEST: &str = "/usr/lib/bulkhead";

/// A container's failed start, which [`says`] these words.
fn fails(setting: &Setting, words: &[&str]) -> Result<()> {
    let done = setting.container().run(&["echo", "hello"])?;
    says(&done, words)
}

/// A failure: one line that holds all of `words`, whatever their case.
pub fn says(done: &Finished, words: &[&str]) -> Result<()> {
    ensure!(
        done.code() == 1 && done.stdout.is_empty(),
        "a failure was expected: {done}"
    );
    let message = done.err();
    ensure!(
        message.trim_end().lines().count() == 1,
        "the message is not one line: {done}"
    );
    ensure!(
        message.len() < 1000,
        "the message has {} bytes: {done}",
        message.len()
    );
    let readable = message
        .trim_end()
        .chars()
        .all(|character| !character.is_control());
    ensure!(readable, "the message has control characters: {message:?}");
    for word in words {
        ensure!(
            message.to_lowercase().contains(&word.to_lowercase()),
            "the message does not say {word:?}: {done}"
        );
    }
    Ok(())
}

/// Another configuration, until dropped.
pub struct Config {
    original: Option<Vec<u8>>,
}

impl Config {
    /// Puts it in the place of the machine's.
    pub fn replace(with: &str) -> Result<Self> {
        let original = fs::read(CONFIG).ok();
        fs::create_dir_all(
            Path::new(CONFIG)
                .parent()
                .context("the configuration has no directory")?,
        )?;
        let config = Self { original };
        fs::write(CONFIG, with).with_context(|| format!("cannot write {CONFIG}"))?;
        Ok(config)
    }
}

impl Drop for Config {
    fn drop(&mut self) {
        let restored = match &self.original {
            Some(original) => fs::write(CONFIG, original),
            None => fs::remove_file(CONFIG),
        };
        if let Err(error) = restored {
            eprintln!("{CONFIG} cannot be restored: {error}");
        }
    }
}

/// A copy of the guest's files that may be damaged, and a configuration that names it.
pub struct Guest {
    directory: TempDir,
    _config: Config,
}

impl Guest {
    pub fn copy() -> Result<Self> {
        let directory = tempfile::tempdir_in("/var/tmp")?;
        for name in [VMLINUX, INITRAMFS, MANIFEST] {
            fs::copy(Path::new(GUEST).join(name), directory.path().join(name))
                .with_context(|| format!("cannot copy {name}"))?;
        }
        let config = Config::replace(&format!("guest_dir = {:?}\n", directory.path()))?;
        Ok(Self {
            directory,
            _config: config,
        })
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    /// Changes one bit in the middle of a file, and neither its size nor its times.
    pub fn damage(&self, name: &str) -> Result<()> {
        let path = self.path(name);
        let file = File::options().read(true).write(true).open(&path)?;
        let metadata = file.metadata()?;
        let mut byte = [0];
        let middle = metadata.len() / 2;
        file.read_exact_at(&mut byte, middle)?;
        file.write_all_at(&[byte[0] ^ 1], middle)?;
        file.set_modified(metadata.modified()?)?;
        Ok(())
    }
}

fn no_kvm(setting: &Setting) -> Result<()> {
    struct Hidden;
    impl Drop for Hidden {
        fn drop(&mut self) {
            if let Err(error) = fs::rename("/dev/kvm-hidden", "/dev/kvm") {
                eprintln!("/dev/kvm cannot be restored: {error}");
            }
        }
    }
    fs::rename("/dev/kvm", "/dev/kvm-hidden").context("cannot hide /dev/kvm")?;
    let _hidden = Hidden;
    fails(setting, &["/dev/kvm", "no such file"])
}

fn no_kernel(setting: &Setting) -> Result<()> {
    let guest = Guest::copy()?;
    let path = guest.path(VMLINUX);
    fs::remove_file(&path)?;
    fails(setting, &[&path.to_string_lossy(), "no such file"])
}

fn corrupt_kernel(setting: &Setting) -> Result<()> {
    let guest = Guest::copy()?;
    // Once as it is: what was checked then must not be believed after.
    setting.container().run(&["true"])?.succeeds()?;
    guest.damage(VMLINUX)?;
    fails(setting, &[&guest.path(VMLINUX).to_string_lossy(), "sha256"])
}

fn no_initramfs(setting: &Setting) -> Result<()> {
    let guest = Guest::copy()?;
    let path = guest.path(INITRAMFS);
    fs::remove_file(&path)?;
    fails(setting, &[&path.to_string_lossy(), "no such file"])
}

fn corrupt_initramfs(setting: &Setting) -> Result<()> {
    let guest = Guest::copy()?;
    guest.damage(INITRAMFS)?;
    fails(
        setting,
        &[&guest.path(INITRAMFS).to_string_lossy(), "sha256"],
    )
}

fn no_manifest(setting: &Setting) -> Result<()> {
    let guest = Guest::copy()?;
    let path = guest.path(MANIFEST);
    fs::remove_file(&path)?;
    fails(setting, &[&path.to_string_lossy(), "no such file"])
}

fn unknown_key(setting: &Setting) -> Result<()> {
    let _config = Config::replace("memory = 512\n")?;
    fails(setting, &[CONFIG, "memory"])
}

fn too_much_memory(setting: &Setting) -> Result<()> {
    // 3.8 TiB.
    let _config = Config::replace("memory_mib = 4000000\n")?;
    fails(setting, &["memory", "4000000"])
}

fn panic_at_boot(setting: &Setting) -> Result<()> {
    let _config = Config::replace("kernel_args = \"rdinit=/nonexistent\"\n")?;
    fails(setting, &["kernel panic"])
}

fn panic_later(setting: &Setting) -> Result<()> {
    let log = Log::start();
    let started = setting.container().flags(&["--privileged"]).spawn(&[
        "sh",
        "-c",
        "echo ready; exec sleep 1000",
    ])?;
    started.client.expect("ready")?;
    let exec = started
        .container
        .exec(&[], &["sh", "-c", "echo c > /proc/sysrq-trigger"])?;
    ensure!(
        exec.code() != 0,
        "an exec in a machine that panicked succeeded: {exec}"
    );
    started.client.finish()?.exits_with(137)?;
    let text = log.tail(64 * 1024)?;
    ensure!(
        text.to_lowercase().contains("kernel panic"),
        "the log does not tell of the panic:\n{text}"
    );
    Ok(())
}

fn silent_agent(setting: &Setting) -> Result<()> {
    let guest = Guest::copy()?;
    // Busybox as PID 1 waits for somebody at a console.
    let busybox = Run::new(RUNC)
        .run(&["cat", "/bin/busybox"])?
        .exits_with(0)?
        .stdout;
    let init = guest.path("busybox");
    fs::write(&init, busybox)?;
    build_initramfs(&init, &guest.path(INITRAMFS))?;
    let release = Manifest::read(guest.directory.path())?.kernel_release;
    write_manifest(guest.directory.path(), &release)?;
    let _config = Config::replace(&format!(
        "guest_dir = {:?}\nboot_timeout = 10\n",
        guest.directory.path()
    ))?;
    let done = setting.container().run(&["echo", "hello"])?;
    says(&done, &["agent", "within 10 s"])
}

fn host_network(setting: &Setting) -> Result<()> {
    let done = setting
        .container()
        .flags(&["--net-host"])
        .run(&["echo", "hello"])?;
    says(&done, &["network"])
}
