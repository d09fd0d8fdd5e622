//! The terminal of a process, from the container's own devpts.

use std::{
    io,
    os::fd::{AsFd, OwnedFd},
    path::Path,
};

use rustix::{
    fs::{FileType, Gid, OFlags, Uid, fstat, fstatfs, major, minor},
    pty::{OpenptFlags, ioctl_tiocgptpeer, unlockpt},
    termios::{Winsize, tcsetwinsize},
};

use super::{StageError, mounts, root::Root};

/// `DEVPTS_SUPER_MAGIC`, include/uapi/linux/magic.h
const DEVPTS_MAGIC: i64 = 0x1cd1;

/// Makes a terminal the controlling one and this process's streams, and returns its master.
/// `bind_console` also shows it as `/dev/console`.
pub fn open(size: (u16, u16), bind_console: bool, uid: u32) -> Result<OwnedFd, StageError> {
    let root = Root::own().map_err(StageError::system("open the root"))?;
    let master = open_master(&root).map_err(StageError::system("open /dev/pts/ptmx"))?;
    unlockpt(&master).map_err(StageError::system("unlock the terminal"))?;
    // As runc opens it; the flags stay visible.
    let flags = OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC;
    let slave =
        ioctl_tiocgptpeer(&master, flags).map_err(StageError::system("open the terminal"))?;
    let window = Winsize {
        ws_col: size.0,
        ws_row: size.1,
        ws_xpixel: 0,
        ws_ypixel: 0,
    };
    tcsetwinsize(&slave, window).map_err(StageError::system("set the terminal's size"))?;
    let keep_group: Option<Gid> = None;
    rustix::fs::fchown(&slave, Some(Uid::from_raw(uid)), keep_group)
        .map_err(StageError::system("give the terminal to the user"))?;
    if bind_console {
        bind(&root, &slave).map_err(StageError::system("bind /dev/console"))?;
    }
    rustix::process::ioctl_tiocsctty(&slave)
        .map_err(StageError::system("make the terminal the controlling one"))?;
    for dup in [
        rustix::stdio::dup2_stdin(&slave),
        rustix::stdio::dup2_stdout(&slave),
        rustix::stdio::dup2_stderr(&slave),
    ] {
        dup.map_err(StageError::system("connect the terminal"))?;
    }
    Ok(master)
}

/// The image could put anything here, so the node is looked at before it is trusted.
fn open_master(root: &Root) -> io::Result<OwnedFd> {
    let flags = OFlags::RDWR | OFlags::NOCTTY | OFlags::NONBLOCK;
    let master = root.open(Path::new("/dev/pts/ptmx"), flags)?;
    let stat = fstat(&master)?;
    let is_ptmx = FileType::from_raw_mode(stat.st_mode).is_char_device()
        && (major(stat.st_rdev), minor(stat.st_rdev)) == (5, 2);
    if !is_ptmx || fstatfs(&master)?.f_type != DEVPTS_MAGIC {
        return Err(io::Error::other("not a terminal multiplexer"));
    }
    Ok(master)
}

fn bind(root: &Root, slave: &OwnedFd) -> io::Result<()> {
    let target = root.make_file(Path::new("/dev/console"))?;
    let copy = mounts::clone_handle(slave.as_fd(), false)?;
    mounts::attach(copy.as_fd(), target.as_fd())
}
