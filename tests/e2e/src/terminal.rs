//! A terminal of the test's own, with a command on its other side.

use std::fs::File;
use std::io::Write;
use std::process::{Command, Stdio};

use anyhow::{Context, Result};
use nix::pty::{Winsize, openpty};
use rustix::process::{Pid, PidfdFlags, Signal, kill_process, pidfd_open};
use rustix::termios::{OptionalActions, OutputModes, tcgetattr, tcsetattr, tcsetwinsize};

use crate::command::{Capture, DEADLINE, shown, wait_readable};

/// A command whose input and output are a terminal; killed when dropped.
pub struct Terminal {
    child: std::process::Child,
    master: File,
    /// What has appeared on the screen so far.
    pub screen: Capture,
}

impl Terminal {
    /// Starts a command on a terminal of this size.
    pub fn spawn(mut command: Command, rows: u16, columns: u16) -> Result<Self> {
        let pty = openpty(&winsize(rows, columns), None).context("cannot open a terminal")?;
        // The container's own terminal ends its lines with CR LF; this one shall add nothing.
        let mut attributes = tcgetattr(&pty.slave)?;
        attributes.output_modes.remove(OutputModes::ONLCR);
        tcsetattr(&pty.slave, OptionalActions::Now, &attributes)?;
        let side = || pty.slave.try_clone().map(Stdio::from);
        command.stdin(side()?).stdout(side()?).stderr(side()?);
        let child = command
            .spawn()
            .with_context(|| format!("cannot run {command:?}"))?;
        // The command's copies of the other side must be the last, or its end is never seen.
        drop(command);
        drop(pty.slave);
        let master = File::from(pty.master);
        let screen = Capture::start(master.try_clone()?);
        Ok(Self {
            child,
            master,
            screen,
        })
    }

    /// Types these bytes.
    pub fn type_in(&mut self, bytes: &str) -> Result<()> {
        self.master
            .write_all(bytes.as_bytes())
            .context("cannot type on the terminal")
    }

    /// Waits until `text` has appeared.
    pub fn expect(&self, text: &str) -> Result<()> {
        self.screen.expect(text, DEADLINE)
    }

    /// Changes the size and tells the command, as a terminal emulator's kernel side does.
    pub fn resize(&self, rows: u16, columns: u16) -> Result<()> {
        tcsetwinsize(
            &self.master,
            rustix::termios::Winsize {
                ws_row: rows,
                ws_col: columns,
                ws_xpixel: 0,
                ws_ypixel: 0,
            },
        )
        .context("cannot resize the terminal")?;
        kill_process(Pid::from_child(&self.child), Signal::WINCH)
            .context("cannot tell ctr of the new size")
    }

    /// Waits for the command's end and gives its exit code.
    pub fn finish(mut self) -> Result<i32> {
        let pidfd = pidfd_open(Pid::from_child(&self.child), PidfdFlags::empty())?;
        anyhow::ensure!(
            wait_readable(&pidfd, DEADLINE)?,
            "the command on the terminal did not end; the screen: {}",
            shown(&self.screen.bytes())
        );
        let status = self.child.wait()?;
        status
            .code()
            .with_context(|| format!("the command on the terminal ended by {status}"))
    }
}

impl Drop for Terminal {
    fn drop(&mut self) {
        if let Ok(None) = self.child.try_wait() {
            // It has been seen alive; nobody is left to tell of an error.
            let _ = self.child.kill();
            let _ = self.child.wait();
        }
    }
}

fn winsize(rows: u16, columns: u16) -> Winsize {
    Winsize {
        ws_row: rows,
        ws_col: columns,
        ws_xpixel: 0,
        ws_ypixel: 0,
    }
}
