//! The virtual machine a lab runs in: QEMU's arguments and its initramfs.

use std::fs;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::Stdio;

use nix::sys::prctl::set_pdeathsig;
use nix::sys::signal::Signal;
use tokio::process::{Child, Command};

use crate::error::{Context, Error};
use crate::lab::{LabOptions, LabState};

/// What a lab boots from; all of it cached and read-only.
pub(crate) struct Machine {
    /// Where QEMU and the libraries it needs are unpacked.
    pub qemu_root: PathBuf,
    /// The directory with the root file system, kernel and block driver.
    pub image: PathBuf,
    /// The agent, a static binary.
    pub agent: PathBuf,
}

impl Machine {
    /// Starts QEMU, which dies with the calling thread. The agent answers on `channel`.
    pub(crate) fn spawn(
        &self,
        options: &LabOptions,
        state: &LabState,
        channel: UnixStream,
    ) -> Result<Child, Error> {
        let initramfs = state.file("initramfs.cpio");
        self.write_initramfs(&initramfs)?;
        // The agent keeps everything off the first processor.
        let processors = (options.cpus + 1).to_string();
        let mut command = self.qemu();
        command
            .args(["-M", "q35", "-cpu", "EPYC,+svm,+npt", "-m"])
            .arg(options.memory_mib.to_string())
            .args(if options.metered {
                // The clock advances 1 ns an instruction: time is the same on every machine.
                ["-accel", "tcg,thread=single", "-smp", "1"]
            } else {
                ["-accel", "tcg,thread=multi", "-smp", &processors]
            })
            .args(if options.metered {
                ["-icount", "shift=0,sleep=off,align=off"].as_slice()
            } else {
                &[]
            })
            .args([
                "-nodefaults",
                "-no-user-config",
                "-no-reboot",
                "-display",
                "none",
            ])
            .arg("-kernel")
            .arg(self.image.join("vmlinuz"))
            .arg("-initrd")
            .arg(&initramfs)
            .args([
                "-append",
                "console=ttyS0 quiet panic=-1 reboot=t mitigations=off no_timer_check nowatchdog",
            ])
            .arg("-drive")
            .arg(format!(
                "file={},if=none,id=root,format=raw,snapshot=on,cache=unsafe",
                self.image.join("root.img").display()
            ))
            .args(["-device", "virtio-blk-pci,drive=root"])
            .arg("-chardev")
            .arg(format!(
                "file,id=console,path={}",
                state.console().display()
            ))
            .args(["-serial", "chardev:console"])
            .args(["-chardev", "socket,id=agent,fd=0"])
            .args(["-device", "virtio-serial-pci,max_ports=2"])
            .args(["-device", "virtserialport,chardev=agent,name=bulkhead-lab"])
            .env("TMPDIR", state.directory())
            .stdin(Stdio::from(OwnedFd::from(channel)))
            .stdout(state.append("qemu.log")?)
            .stderr(state.append("qemu.log")?)
            .kill_on_drop(true);
        // SAFETY: between fork and exec only prctl is called, which is async-signal-safe and
        // allocates nothing.
        unsafe {
            command.pre_exec(|| Ok(set_pdeathsig(Signal::SIGKILL)?));
        }
        command.spawn().context(|| "start QEMU")
    }

    /// QEMU, run by the C library it came with, so that it works on an older Debian.
    fn qemu(&self) -> Command {
        let usr = self.qemu_root.join("usr");
        let libraries = usr.join("lib/x86_64-linux-gnu");
        let mut command = Command::new(usr.join("lib64/ld-linux-x86-64.so.2"));
        command
            .arg("--library-path")
            .arg(format!("{0}:{0}/pulseaudio", libraries.display()))
            .arg(usr.join("bin/qemu-system-x86_64"))
            .arg("-L")
            .arg(usr.join("share/seabios"))
            .arg("-L")
            .arg(usr.join("share/qemu"));
        command
    }

    /// An initramfs with the agent as `/init` and the block driver it loads.
    fn write_initramfs(&self, path: &Path) -> Result<(), Error> {
        let read = |path: &Path| fs::read(path).context(|| format!("read {}", path.display()));
        let files = [
            ("init", 0o100_755, read(&self.agent)?),
            (
                "virtio_blk.ko",
                0o100_644,
                read(&self.image.join("virtio_blk.ko"))?,
            ),
        ];
        let entries = files.into_iter().map(|(name, mode, content)| {
            let builder = cpio::newc::Builder::new(name).mode(mode);
            (builder, std::io::Cursor::new(content))
        });
        fs::File::create(path)
            .and_then(|file| cpio::write_cpio(entries, file))
            .map(drop)
            .context(|| format!("write {}", path.display()))
    }
}
