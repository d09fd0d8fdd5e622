//! The user's terminal while a command in the lab uses it.

use std::io::IsTerminal;

use anyhow::{Context, Result, bail};
use bulkhead_lab::protocol::WindowSize;
use nix::sys::signal::{SigSet, Signal};
use nix::sys::termios::{SetArg, Termios, cfmakeraw, tcgetattr, tcsetattr};

/// The terminal in raw mode; its former mode returns on drop.
pub struct Terminal {
    former: Termios,
}

impl Terminal {
    /// Switches standard input to raw mode; gives the size and an iterator over its changes,
    /// which blocks until the next.
    pub fn raw() -> Result<(Self, WindowSize, impl Iterator<Item = WindowSize> + Send)> {
        let stdin = std::io::stdin();
        if !stdin.is_terminal() {
            bail!("standard input is no terminal");
        }
        let former = tcgetattr(&stdin).context("read the terminal's mode")?;
        let mut raw = former.clone();
        cfmakeraw(&mut raw);
        let mut changed = SigSet::empty();
        changed.add(Signal::SIGWINCH);
        // Threads inherit the mask, so only the iterator's wait takes the signal.
        changed.thread_block().context("block SIGWINCH")?;
        tcsetattr(&stdin, SetArg::TCSANOW, &raw).context("set the terminal's mode")?;
        let resizes = std::iter::from_fn(move || {
            changed.wait().ok()?;
            size().ok()
        });
        Ok((Terminal { former }, size()?, resizes))
    }
}

impl Drop for Terminal {
    fn drop(&mut self) {
        // The terminal may be gone.
        let _ = tcsetattr(std::io::stdin(), SetArg::TCSANOW, &self.former);
    }
}

fn size() -> Result<WindowSize> {
    let size =
        rustix::termios::tcgetwinsize(std::io::stdin()).context("read the terminal's size")?;
    Ok(WindowSize {
        rows: size.ws_row,
        columns: size.ws_col,
    })
}
