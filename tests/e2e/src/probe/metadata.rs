//! What happens to what is known of files: modes, owners, times, attributes, and kinds.

use std::fs::{self, File, OpenOptions, Permissions};
use std::io::{Read, Write};
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt, PermissionsExt, symlink};
use std::os::unix::net::{UnixListener, UnixStream};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result, ensure};
use rustix::fs::{
    AtFlags, CWD, FileType, Gid, Mode, OFlags, Timespec, Timestamps, UTIME_NOW, UTIME_OMIT, Uid,
    XattrFlags, chownat, getxattr, listxattr, mknodat, openat, removexattr, setxattr, utimensat,
};

use super::{Answer, outcome};

/// Somebody who is not root.
const OTHER: u32 = 1234;

pub(super) const QUESTIONS: [(&str, Answer); 10] = [
    ("modes", modes),
    ("owners", owners),
    ("access of others", access_of_others),
    ("times", times),
    ("special files", special_files),
    ("device files", device_files),
    ("sockets", sockets),
    ("extended attributes", extended_attributes),
    ("access control lists", access_control_lists),
    ("open flags", open_flags),
];

fn modes(dir: &Path) -> Result<String> {
    let file = dir.join("file");
    let create = |mode| {
        OpenOptions::new()
            .write(true)
            .create(true)
            .truncate(true)
            .mode(mode)
            .open(&file)
    };
    create(0o7777)?;
    let created = fs::metadata(&file)?.mode();
    fs::set_permissions(&file, Permissions::from_mode(0o6755))?;
    let changed = fs::metadata(&file)?.mode();
    chownat(
        CWD,
        &file,
        Some(Uid::from_raw(OTHER)),
        None,
        AtFlags::empty(),
    )?;
    let after_chown = fs::metadata(&file)?.mode();
    fs::set_permissions(&file, Permissions::from_mode(0o6755))?;
    let written = Command::new("sh")
        .args(["-c", "echo x >> \"$0\""])
        .arg(&file)
        .uid(OTHER)
        .status()?;
    let after_write = fs::metadata(&file)?.mode();
    let directory = dir.join("set-gid");
    fs::create_dir(&directory)?;
    chownat(
        CWD,
        &directory,
        None,
        Some(Gid::from_raw(OTHER)),
        AtFlags::empty(),
    )?;
    fs::set_permissions(&directory, Permissions::from_mode(0o2775))?;
    fs::create_dir(directory.join("below"))?;
    let below = fs::metadata(directory.join("below"))?;
    // A program that changes its user by its mode.
    let program = dir.join("id");
    fs::copy("/usr/bin/id", &program)?;
    chownat(
        CWD,
        &program,
        Some(Uid::from_raw(0)),
        Some(Gid::from_raw(0)),
        AtFlags::empty(),
    )?;
    fs::set_permissions(&program, Permissions::from_mode(0o4755))?;
    let user = Command::new(&program).arg("-u").uid(OTHER).output()?.stdout;
    fs::set_permissions(&program, Permissions::from_mode(0o644))?;
    let not_executable = outcome(Command::new(&program).output());
    Ok(format!(
        "created {created:o}, changed {changed:o}, after chown {after_chown:o}, after write \
         {after_write:o} ({written}), below set-gid {:o} {}, set-uid runs as {:?}, without x \
         {not_executable}",
        below.mode(),
        below.gid(),
        String::from_utf8_lossy(&user)
    ))
}

fn owners(dir: &Path) -> Result<String> {
    let file = dir.join("file");
    fs::write(&file, "")?;
    symlink("file", dir.join("link"))?;
    let (user, group) = (Some(Uid::from_raw(70_000)), Some(Gid::from_raw(70_001)));
    chownat(
        CWD,
        dir.join("link"),
        user,
        group,
        AtFlags::SYMLINK_NOFOLLOW,
    )?;
    chownat(CWD, &file, None, group, AtFlags::empty())?;
    let large = Some(Uid::from_raw(u32::MAX - 1));
    let largest = outcome(chownat(CWD, &file, large, None, AtFlags::empty()));
    let (file, link) = (
        fs::metadata(&file)?,
        fs::symlink_metadata(dir.join("link"))?,
    );
    Ok(format!(
        "file {}:{}, link {}:{}, largest id {largest}",
        file.uid(),
        file.gid(),
        link.uid(),
        link.gid()
    ))
}

fn access_of_others(dir: &Path) -> Result<String> {
    let mut answer = String::new();
    let file = dir.join("file");
    fs::write(&file, "secret")?;
    for (mode, group) in [
        (0o600, 0),
        (0o640, OTHER),
        (0o660, OTHER),
        (0o604, OTHER),
        (0o666, 0),
    ] {
        chownat(
            CWD,
            &file,
            None,
            Some(Gid::from_raw(group)),
            AtFlags::empty(),
        )?;
        fs::set_permissions(&file, Permissions::from_mode(mode))?;
        answer += &format!(
            "{mode:o} of group {group}: {}; ",
            as_other("access", &file)?
        );
    }
    fs::set_permissions(dir, Permissions::from_mode(0o700))?;
    answer += &format!("closed directory: {}; ", as_other("access", &file)?);
    fs::set_permissions(dir, Permissions::from_mode(0o1777))?;
    let removed = Command::new("rm")
        .arg("-f")
        .arg(&file)
        .uid(OTHER)
        .gid(OTHER)
        .output()?;
    answer += &format!("sticky directory: removed {}", removed.status.success());
    Ok(answer)
}

/// Runs another probe as a user and group that are not root.
fn as_other(probe: &str, file: &Path) -> Result<String> {
    let output = Command::new(std::env::current_exe()?)
        .args(["probe", probe])
        .arg(file)
        .uid(OTHER)
        .gid(OTHER)
        .output()?;
    ensure!(
        output.status.success(),
        "{}",
        String::from_utf8_lossy(&output.stderr)
    );
    Ok(String::from_utf8_lossy(&output.stdout)
        .trim_end()
        .to_owned())
}

/// The other side of `as_other("access", ..)`.
pub(super) fn access_as_another(file: &Path) -> Result<()> {
    let read = outcome(File::open(file));
    let write = outcome(OpenOptions::new().append(true).open(file));
    println!("read {read}, write {write}");
    Ok(())
}

fn times(dir: &Path) -> Result<String> {
    let file = dir.join("file");
    fs::write(&file, "x")?;
    let time = |seconds, nanoseconds| Timespec {
        tv_sec: seconds,
        tv_nsec: nanoseconds,
    };
    let set = |path: &Path, access, modification, flags| {
        let times = Timestamps {
            last_access: access,
            last_modification: modification,
        };
        utimensat(CWD, path, &times, flags)
    };
    let (precise, late) = (time(1_000_000_000, 123_456_789), time(5_000_000_000, 1));
    set(&file, late, precise, AtFlags::empty())?;
    let both = fs::metadata(&file)?;
    set(&file, time(7, 7), time(0, UTIME_OMIT), AtFlags::empty())?;
    let one = fs::metadata(&file)?;
    set(
        &file,
        time(0, UTIME_OMIT),
        time(0, UTIME_NOW),
        AtFlags::empty(),
    )?;
    let now = fs::metadata(&file)?;
    // A shared file's time is the host's, whose clock may be a little ahead of the guest's.
    let recent = match now.modified()?.elapsed() {
        Ok(age) => age.as_secs() < 600,
        Err(ahead) => ahead.duration().as_secs() < 2,
    };
    set(&file, precise, precise, AtFlags::empty())?;
    OpenOptions::new()
        .append(true)
        .open(&file)?
        .write_all(b"y")?;
    let by_write = fs::metadata(&file)?.mtime() != precise.tv_sec;
    symlink("nowhere", dir.join("link"))?;
    set(&dir.join("link"), precise, late, AtFlags::SYMLINK_NOFOLLOW)?;
    let link = fs::symlink_metadata(dir.join("link"))?;
    set(dir, precise, precise, AtFlags::empty())?;
    fs::write(dir.join("new"), "")?;
    let by_create = fs::metadata(dir)?.mtime() != precise.tv_sec;
    Ok(format!(
        "{}.{:09} {}.{:09}, access alone {} {}, now {recent}, by a write {by_write}, link {}.{:09}, \
         directory by a new file {by_create}",
        both.atime(),
        both.atime_nsec(),
        both.mtime(),
        both.mtime_nsec(),
        one.atime(),
        one.mtime(),
        link.mtime(),
        link.mtime_nsec()
    ))
}

fn special_files(dir: &Path) -> Result<String> {
    let make = |name: &str, kind, device| {
        mknodat(
            CWD,
            dir.join(name),
            kind,
            Mode::from_raw_mode(0o660),
            device,
        )
    };
    make("pipe", FileType::Fifo, 0)?;
    let socket = outcome(make("socket", FileType::Socket, 0));
    let no_writer = OpenOptions::new()
        .write(true)
        .custom_flags(libc::O_NONBLOCK)
        .open(dir.join("pipe"));
    let no_writer = outcome(no_writer);
    let mut reader = OpenOptions::new()
        .read(true)
        .custom_flags(libc::O_NONBLOCK)
        .open(dir.join("pipe"))?;
    OpenOptions::new()
        .write(true)
        .open(dir.join("pipe"))?
        .write_all(b"through")?;
    let mut through = String::new();
    reader.read_to_string(&mut through)?;
    Ok(format!(
        "socket {socket} {}, pipe without reader {no_writer}, {through}",
        fs::symlink_metadata(dir.join("socket"))?
            .file_type()
            .is_socket(),
    ))
}

fn device_files(dir: &Path) -> Result<String> {
    let make = |name: &str, kind, major, minor| {
        let device = rustix::fs::makedev(major, minor);
        let mode = Mode::from_raw_mode(0o660);
        outcome(mknodat(CWD, dir.join(name), kind, mode, device))
    };
    let character = make("null", FileType::CharacterDevice, 1, 3);
    let block = make("block", FileType::BlockDevice, 7, 0);
    let Ok(metadata) = fs::symlink_metadata(dir.join("null")) else {
        return Ok(format!("character {character}, block {block}"));
    };
    let written = outcome(fs::write(dir.join("null"), "x"));
    // The device filter of the container refuses what it does not list.
    let disk = outcome(File::open(dir.join("block")));
    Ok(format!(
        "character {character} {:o} {:x} write {written}, block {block} open {disk}",
        metadata.mode(),
        metadata.rdev(),
    ))
}

fn sockets(dir: &Path) -> Result<String> {
    let path = dir.join("socket");
    let listener = UnixListener::bind(&path)?;
    let again = outcome(UnixListener::bind(&path));
    let mut client = UnixStream::connect(&path)?;
    client.write_all(b"hello")?;
    drop(client);
    let (mut server, _) = listener.accept()?;
    let mut received = String::new();
    server.read_to_string(&mut received)?;
    drop(listener);
    let refused = outcome(UnixStream::connect(&path));
    Ok(format!("{received}, bound again {again}, closed {refused}"))
}

fn extended_attributes(dir: &Path) -> Result<String> {
    let file = dir.join("file");
    fs::write(&file, "x")?;
    let set = |name: &str, value: &[u8], flags| outcome(setxattr(&file, name, value, flags));
    let plain = set("user.a", b"\0binary\xff", XattrFlags::empty());
    let empty = set("user.empty", b"", XattrFlags::empty());
    let create = set("user.a", b"", XattrFlags::CREATE);
    let replace = set("user.b", b"", XattrFlags::REPLACE);
    let unknown = set("unknown.a", b"", XattrFlags::empty());
    let trusted = set("trusted.a", b"x", XattrFlags::empty());
    let opaque = set("trusted.overlay.opaque", b"y", XattrFlags::empty());
    let large = set("user.large", &[7; 2000], XattrFlags::empty());
    let mut value = [0; 100];
    let length = getxattr(&file, "user.a", &mut value)?;
    let value = value[..length].escape_ascii().to_string();
    let small = outcome(getxattr(&file, "user.large", &mut [0; 10]));
    let missing = outcome(getxattr(&file, "user.none", &mut [0; 10]));
    let mut list = [0; 1000];
    let length = listxattr(&file, &mut list)?;
    let mut list: Vec<_> = list[..length]
        .split(|&byte| byte == 0)
        .map(String::from_utf8_lossy)
        .collect();
    list.sort();
    let removed = outcome(removexattr(&file, "user.empty"));
    let removed_again = outcome(removexattr(&file, "user.empty"));
    symlink("file", dir.join("link"))?;
    let on_link = outcome(rustix::fs::lsetxattr(
        dir.join("link"),
        "user.a",
        b"",
        XattrFlags::empty(),
    ));
    let on_directory = outcome(setxattr(dir, "user.a", b"d", XattrFlags::empty()));
    // VFS_CAP_REVISION_2 with CAP_NET_BIND_SERVICE permitted and effective (capabilities(7)).
    let capability = [1, 0, 0, 2, 0, 4, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];
    let granted = outcome(setxattr(
        &file,
        "security.capability",
        &capability,
        XattrFlags::empty(),
    ));
    let mut back = [0; 20];
    let kept = getxattr(&file, "security.capability", &mut back).is_ok() && back == capability;
    OpenOptions::new()
        .append(true)
        .open(&file)?
        .write_all(b"y")?;
    let after_write = outcome(getxattr(&file, "security.capability", &mut back));
    Ok(format!(
        "set {plain} {value}, empty {empty}, create {create}, replace {replace}, unknown {unknown}, \
         trusted {trusted}, overlay's {opaque}, large {large}, small buffer {small}, missing \
         {missing}, list {}, removed {removed} {removed_again}, link {on_link}, directory \
         {on_directory}, capability {granted} {kept} after write {after_write}",
        list.join(" ")
    ))
}

fn access_control_lists(dir: &Path) -> Result<String> {
    // The attribute's form (linux/posix_acl_xattr.h): version 2, then tag, permissions and id.
    let mut list: Vec<u8> = 2u32.to_le_bytes().to_vec();
    let undefined = u32::MAX;
    for (tag, permissions, id) in [
        (0x01u16, 6u16, undefined),
        (0x02, 4, OTHER),
        (0x04, 0, undefined),
        (0x10, 4, undefined),
        (0x20, 0, undefined),
    ] {
        list.extend(tag.to_le_bytes());
        list.extend(permissions.to_le_bytes());
        list.extend(id.to_le_bytes());
    }
    let file = dir.join("file");
    fs::write(&file, "x")?;
    setxattr(&file, "system.posix_acl_access", &list, XattrFlags::empty())?;
    let mode = fs::metadata(&file)?.mode();
    fs::set_permissions(dir, Permissions::from_mode(0o755))?;
    let access = as_other("access", &file)?;
    setxattr(dir, "system.posix_acl_default", &list, XattrFlags::empty())?;
    fs::write(dir.join("below"), "")?;
    let mut inherited = vec![0; 100];
    let length = getxattr(dir.join("below"), "system.posix_acl_access", &mut inherited)?;
    let below = fs::metadata(dir.join("below"))?.mode();
    Ok(format!(
        "mode {mode:o}, other: {access}, inherited {} mode {below:o}",
        inherited[..length] == list
    ))
}

fn open_flags(dir: &Path) -> Result<String> {
    let file = dir.join("file");
    fs::write(&file, "content")?;
    let open = |path: &Path, flags: OFlags| openat(CWD, path, flags, Mode::from_raw_mode(0o600));
    let exclusive = outcome(open(&file, OFlags::CREATE | OFlags::EXCL | OFlags::WRONLY));
    let directory = outcome(open(&file, OFlags::DIRECTORY));
    let write_directory = outcome(open(dir, OFlags::WRONLY));
    let no_access_time = outcome(open(&file, OFlags::NOATIME));
    let direct = outcome(open(&file, OFlags::DIRECT));
    let path_only = open(&file, OFlags::PATH)?;
    let read_path = outcome(rustix::io::read(path_only.as_fd(), &mut [0; 4]));
    let own = format!("/proc/self/fd/{}", path_only.as_raw_fd());
    let through = fs::read_to_string(own)?;
    let truncated = open(&file, OFlags::TRUNC | OFlags::WRONLY).map(drop);
    let size = fs::metadata(&file)?.size();
    // A program that runs cannot be written.
    let program = dir.join("sleep");
    fs::copy("/usr/bin/sleep", &program)?;
    let mut running = Command::new(&program).arg("1000").spawn()?;
    let busy = outcome(open(&program, OFlags::WRONLY));
    running.kill()?;
    running.wait()?;
    fs::write(dir.join("script"), "#!/bin/sh\necho script $1\n")?;
    fs::set_permissions(dir.join("script"), Permissions::from_mode(0o755))?;
    let script = Command::new(dir.join("script"))
        .arg("runs")
        .output()
        .context("run a script")?;
    Ok(format!(
        "exclusive {exclusive}, directory {directory}, write to a directory {write_directory}, no \
         access time {no_access_time}, direct {direct}, path only {read_path} {through}, truncate {} \
         {size}, running program {busy}, {:?}",
        outcome(truncated),
        String::from_utf8_lossy(&script.stdout)
    ))
}
