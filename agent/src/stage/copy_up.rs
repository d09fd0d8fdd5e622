//! `tmpcopyup`: a tmpfs that begins with what the image has in its place.

use std::{
    fs::File,
    io,
    os::fd::{AsFd, BorrowedFd},
};

use rustix::{
    fs::{
        AtFlags, Dir, FileType, Gid, Mode, OFlags, Stat, Timespec, Timestamps, Uid, chownat,
        fchmod, fchown, fstat, futimens, mkdirat, mknodat, openat, readlinkat, statat, symlinkat,
    },
    io::Errno,
};

/// Directories within each other that are followed.
const DEPTH_MAX: u32 = 256;

const DIRECTORY: OFlags = OFlags::RDONLY
    .union(OFlags::DIRECTORY)
    .union(OFlags::CLOEXEC);

/// Copies what is in one directory into another, with owners, modes and times; the other keeps its
/// own. Links are copied and never followed, so nothing outside the source is read.
pub fn copy_up(source: BorrowedFd<'_>, target: BorrowedFd<'_>) -> io::Result<()> {
    // Modes are meant as they are in the source.
    let umask = rustix::process::umask(Mode::empty());
    // What is given may be only a path to each.
    let open = |directory| openat(directory, ".", DIRECTORY, Mode::empty());
    let (source, target) = (open(source)?, open(target)?);
    let copied = copy_directory(source.as_fd(), target.as_fd(), DEPTH_MAX);
    rustix::process::umask(umask);
    copied
}

fn copy_directory(source: BorrowedFd<'_>, target: BorrowedFd<'_>, depth: u32) -> io::Result<()> {
    let depth = depth.checked_sub(1).ok_or(Errno::LOOP)?;
    for entry in Dir::read_from(source)? {
        let entry = entry?;
        let name = entry.file_name();
        if name == c"." || name == c".." {
            continue;
        }
        let stat = statat(source, name, AtFlags::SYMLINK_NOFOLLOW)?;
        let mode = Mode::from_raw_mode(stat.st_mode);
        match FileType::from_raw_mode(stat.st_mode) {
            FileType::Directory => {
                mkdirat(target, name, Mode::RWXU)?;
                let from = openat(source, name, DIRECTORY | OFlags::NOFOLLOW, Mode::empty())?;
                let to = openat(target, name, DIRECTORY, Mode::empty())?;
                copy_directory(from.as_fd(), to.as_fd(), depth)?;
                take_over(to.as_fd(), &stat)?;
            }
            FileType::RegularFile => {
                let read = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
                let from = openat(source, name, read, Mode::empty())?;
                let write = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::CLOEXEC;
                let to = openat(target, name, write, Mode::RUSR)?;
                let mut to = File::from(to);
                // Another may have come to its name since.
                if FileType::from_raw_mode(fstat(&from)?.st_mode) == FileType::RegularFile {
                    io::copy(&mut File::from(from), &mut to)?;
                }
                take_over(to.as_fd(), &stat)?;
            }
            FileType::Symlink => {
                symlinkat(readlinkat(source, name, Vec::new())?, target, name)?;
                give_link(target, name, &stat)?;
            }
            kind => {
                mknodat(target, name, kind, mode, stat.st_rdev)?;
                give_link(target, name, &stat)?;
            }
        }
    }
    Ok(())
}

/// Owner, then mode, since a change of owner takes the set-user-ID bit, then times.
fn take_over(target: BorrowedFd<'_>, stat: &Stat) -> io::Result<()> {
    fchown(
        target,
        Some(Uid::from_raw(stat.st_uid)),
        Some(Gid::from_raw(stat.st_gid)),
    )?;
    fchmod(target, Mode::from_raw_mode(stat.st_mode))?;
    let time = |seconds, nanoseconds: u64| Timespec {
        tv_sec: seconds,
        tv_nsec: i64::try_from(nanoseconds).unwrap_or(0),
    };
    let times = Timestamps {
        last_access: time(stat.st_atime, stat.st_atime_nsec),
        last_modification: time(stat.st_mtime, stat.st_mtime_nsec),
    };
    Ok(futimens(target, &times)?)
}

fn give_link(target: BorrowedFd<'_>, name: &std::ffi::CStr, stat: &Stat) -> io::Result<()> {
    let (uid, gid) = (Uid::from_raw(stat.st_uid), Gid::from_raw(stat.st_gid));
    let flags = AtFlags::SYMLINK_NOFOLLOW;
    Ok(chownat(target, name, Some(uid), Some(gid), flags)?)
}

#[cfg(test)]
mod tests {
    use std::{
        fs,
        os::unix::fs::{MetadataExt, PermissionsExt, symlink},
    };

    use super::*;

    #[test]
    fn a_tree_is_copied_and_links_are_not_followed() {
        let dir = tempfile::tempdir().unwrap();
        let at = |path: &str| dir.path().join(path);
        fs::create_dir_all(at("source/sub")).unwrap();
        fs::create_dir(at("target")).unwrap();
        fs::write(at("secret"), "outside").unwrap();
        fs::write(at("source/sub/file"), "inside").unwrap();
        symlink("../secret", at("source/link")).unwrap();
        symlink("/", at("source/sub/up")).unwrap();
        fs::set_permissions(at("source/sub/file"), fs::Permissions::from_mode(0o4751)).unwrap();
        fs::set_permissions(at("source/sub"), fs::Permissions::from_mode(0o1770)).unwrap();

        let open = |path: &str| File::open(at(path)).unwrap();
        copy_up(open("source").as_fd(), open("target").as_fd()).unwrap();

        assert_eq!(fs::read_to_string(at("target/sub/file")).unwrap(), "inside");
        let mode = |path: &str| fs::symlink_metadata(at(path)).unwrap().mode() & 0o7777;
        assert_eq!(mode("target/sub/file"), 0o4751);
        assert_eq!(mode("target/sub"), 0o1770);
        let link = |path: &str| fs::read_link(at(path)).unwrap();
        assert_eq!(link("target/link"), link("source/link"));
        assert_eq!(link("target/sub/up"), link("source/sub/up"));
    }
}
