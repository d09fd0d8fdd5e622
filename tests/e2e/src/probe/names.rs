//! What happens to names and metadata of files: links, renames, directories, modes, owners, times,
//! attributes, special files.

use std::collections::BTreeSet;
use std::fs::{self, File, OpenOptions, Permissions};
use std::io::{Read, Write};
use std::os::fd::AsFd;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt, PermissionsExt, symlink};
use std::os::unix::net::{UnixListener, UnixStream};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result, ensure};
use rustix::fs::{
    AtFlags, CWD, FileType, Gid, Mode, OFlags, RenameFlags, Timespec, Timestamps, UTIME_NOW,
    UTIME_OMIT, Uid, XattrFlags, chownat, getxattr, linkat, listxattr, mknodat, openat,
    removexattr, renameat_with, setxattr, utimensat,
};

use super::{Answer, Answers, outcome};

/// Somebody who is not root.
const OTHER: u32 = 1234;

pub(super) fn ask(top: &Path, answers: &mut Answers) {
    let questions: [(&str, Answer); 20] = [
        ("hard links", hard_links),
        ("anonymous files", anonymous_files),
        ("unlinked files", unlinked_files),
        ("removed directories", removed_directories),
        ("renames", renames),
        ("renames of image files", renames_of_image_files),
        ("modes", modes),
        ("owners", owners),
        ("access of others", access_of_others),
        ("times", times),
        ("symlinks", symlinks),
        ("names", names),
        ("large directories", large_directories),
        ("inode numbers", inode_numbers),
        ("special files", special_files),
        ("sockets", sockets),
        ("extended attributes", extended_attributes),
        ("access control lists", access_control_lists),
        ("image directories replaced", image_directories_replaced),
        ("open flags", open_flags),
    ];
    for (question, answer) in questions {
        let directory = top.join(question.replace(' ', "-"));
        answers.ask(question, || {
            fs::create_dir(&directory)?;
            answer(&directory)
        });
    }
}

fn hard_links(dir: &Path) -> Result<String> {
    let (first, second) = (dir.join("first"), dir.join("second"));
    fs::write(&first, "one")?;
    fs::hard_link(&first, &second)?;
    fs::create_dir(dir.join("below"))?;
    fs::hard_link(&second, dir.join("below/third"))?;
    fs::write(&second, "two")?;
    let metadata = fs::metadata(&first)?;
    let same = metadata.ino() == fs::metadata(dir.join("below/third"))?.ino();
    let content = fs::read_to_string(&first)?;
    let again = outcome(fs::hard_link(&first, &second));
    let directory = outcome(fs::hard_link(dir.join("below"), dir.join("x")));
    fs::remove_file(&first)?;
    let left = fs::metadata(&second)?.nlink();
    // A file of the image gets a second name.
    fs::hard_link("/etc/debian_version", dir.join("image"))?;
    let image = fs::read("/etc/debian_version")? == fs::read(dir.join("image"))?;
    let links = fs::metadata(dir.join("image"))?.nlink();
    Ok(format!(
        "{} links, same {same}, {content}, again {again}, directory {directory}, left {left}, \
         image {image} with {links} links",
        metadata.nlink()
    ))
}

fn anonymous_files(dir: &Path) -> Result<String> {
    let flags = OFlags::TMPFILE | OFlags::RDWR;
    let mut file = File::from(openat(CWD, dir, flags, Mode::from_raw_mode(0o640))?);
    file.write_all(b"anonymous")?;
    let before = file.metadata()?;
    let name = dir.join("named");
    let own = format!("/proc/self/fd/{}", std::os::fd::AsRawFd::as_raw_fd(&file));
    linkat(CWD, own, CWD, &name, AtFlags::SYMLINK_FOLLOW)?;
    let content = fs::read_to_string(&name)?;
    let exclusive = openat(CWD, dir, flags | OFlags::EXCL, Mode::from_raw_mode(0o600))?;
    let own = format!(
        "/proc/self/fd/{}",
        std::os::fd::AsRawFd::as_raw_fd(&exclusive)
    );
    let linked = outcome(linkat(
        CWD,
        own,
        CWD,
        dir.join("no"),
        AtFlags::SYMLINK_FOLLOW,
    ));
    Ok(format!(
        "{:o}, {} links, then {} and {content}, exclusive {linked}",
        before.mode(),
        before.nlink(),
        file.metadata()?.nlink()
    ))
}

fn unlinked_files(dir: &Path) -> Result<String> {
    let path = dir.join("file");
    let mut options = OpenOptions::new();
    let mut file = options
        .read(true)
        .write(true)
        .create_new(true)
        .open(&path)?;
    file.write_all(b"before ")?;
    let mut second = OpenOptions::new().append(true).open(&path)?;
    fs::remove_file(&path)?;
    second.write_all(b"after")?;
    let own = format!("/proc/self/fd/{}", std::os::fd::AsRawFd::as_raw_fd(&file));
    let shown = fs::read_link(&own)?;
    let reopened = fs::read_to_string(&own)?;
    file.set_permissions(Permissions::from_mode(0o604))?;
    file.set_len(9)?;
    let metadata = file.metadata()?;
    fs::write(&path, "another")?;
    let other = fs::metadata(&path)?.ino() != metadata.ino();
    Ok(format!(
        "{reopened:?}, {} links, size {}, mode {:o}, shown as {}, another file {other}, rest {:?}",
        metadata.nlink(),
        metadata.size(),
        metadata.mode(),
        shown.strip_prefix(dir)?.display(),
        std::io::read_to_string(&file)?,
    ))
}

fn removed_directories(dir: &Path) -> Result<String> {
    let path = dir.join("gone");
    fs::create_dir(&path)?;
    let open = File::open(&path)?;
    let full = dir.join("full");
    fs::create_dir_all(full.join("below"))?;
    let refused = outcome(fs::remove_dir(&full));
    fs::remove_dir(&path)?;
    let entries = rustix::fs::Dir::read_from(&open)?.count();
    let inside = openat(
        &open,
        "x",
        OFlags::CREATE | OFlags::WRONLY,
        Mode::from_raw_mode(0o600),
    );
    let links = open.metadata()?.nlink();
    Ok(format!(
        "full {refused}, {entries} entries, create {}, {links} links",
        outcome(inside)
    ))
}

fn renames(dir: &Path) -> Result<String> {
    let path = |name: &str| dir.join(name);
    let rename =
        |from: &str, to: &str, flags| outcome(renameat_with(CWD, path(from), CWD, path(to), flags));
    fs::write(path("a"), "a")?;
    fs::write(path("b"), "b")?;
    let mut open = File::open(path("b"))?;
    let refused = rename("a", "b", RenameFlags::NOREPLACE);
    let exchanged = rename("a", "b", RenameFlags::EXCHANGE);
    let content = fs::read_to_string(path("a"))? + &fs::read_to_string(path("b"))?;
    fs::rename(path("b"), path("a"))?;
    let mut kept = String::new();
    open.read_to_string(&mut kept)?;
    fs::create_dir_all(path("full/below"))?;
    fs::create_dir_all(path("moved/inner"))?;
    fs::create_dir(path("empty"))?;
    let over_full = rename("moved", "full", RenameFlags::empty());
    let over_empty = rename("moved", "empty", RenameFlags::empty());
    let into_itself = rename("full", "full/below/x", RenameFlags::empty());
    let file_over_directory = rename("a", "full", RenameFlags::empty());
    let directory_over_file = rename("full", "a", RenameFlags::empty());
    let exchanged_kinds = rename("full", "a", RenameFlags::EXCHANGE);
    let inner = path("empty/inner").is_dir();
    Ok(format!(
        "no replace {refused}, exchange {exchanged} {content}, open file {kept}, over full \
         {over_full}, over empty {over_empty} {inner}, into itself {into_itself}, file over \
         directory {file_over_directory}, directory over file {directory_over_file}, exchange \
         {exchanged_kinds} {}",
        path("full").is_file()
    ))
}

fn renames_of_image_files(dir: &Path) -> Result<String> {
    let original = fs::read("/etc/debian_version")?;
    fs::rename("/etc/debian_version", dir.join("moved"))?;
    let gone = outcome(fs::metadata("/etc/debian_version"));
    let same = fs::read(dir.join("moved"))? == original;
    fs::rename(dir.join("moved"), "/etc/debian_version")?;
    // Overlay file systems refuse this without redirects; programs fall back to copying.
    let directory = outcome(fs::rename("/usr/share/doc", dir.join("doc")));
    Ok(format!("gone {gone}, same {same}, directory {directory}"))
}

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
    let recent = now
        .modified()?
        .elapsed()
        .is_ok_and(|age| age.as_secs() < 600);
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

fn symlinks(dir: &Path) -> Result<String> {
    let link = |name: &str, target: &str| symlink(target, dir.join(name));
    link("absolute", "/etc/debian_version")?;
    link(
        "upwards",
        "../../../../../../../../../../etc/debian_version",
    )?;
    link("dangling", "nowhere")?;
    link("loop", "loop")?;
    let long = "x/".repeat(2047);
    link("long", &long)?;
    let too_long = outcome(link("too-long", &"x".repeat(4096)));
    let expected = fs::read("/etc/debian_version")?;
    let reads = |name: &str| fs::read(dir.join(name)).map(|content| content == expected);
    let no_follow = OpenOptions::new()
        .read(true)
        .custom_flags(libc::O_NOFOLLOW)
        .open(dir.join("absolute"));
    // A link to outside of the container's root leads nowhere, whatever the host has there.
    link("host", "/run/containerd/containerd.sock")?;
    link("self", "/proc/self/root/etc/debian_version")?;
    Ok(format!(
        "absolute {:?}, upwards {:?}, dangling {}, create through it {}, loop {}, long {}, too long \
         {too_long}, no follow {}, host {}, through /proc {:?}, size {}",
        reads("absolute").ok(),
        reads("upwards").ok(),
        outcome(fs::metadata(dir.join("dangling"))),
        outcome(fs::write(dir.join("dangling"), "")),
        outcome(fs::metadata(dir.join("loop"))),
        fs::read_link(dir.join("long"))?.as_os_str().len() == long.len(),
        outcome(no_follow),
        outcome(fs::metadata(dir.join("host"))),
        reads("self").ok(),
        fs::symlink_metadata(dir.join("absolute"))?.size(),
    ))
}

fn names(dir: &Path) -> Result<String> {
    let write = |name: &[u8]| outcome(fs::write(dir.join(std::ffi::OsStr::from_bytes(name)), "x"));
    let odd = [&b"-\n\t\"\\"[..], b"\xff\xfe", "ü".as_bytes(), b"...", b" "]
        .map(write)
        .join(" ");
    let longest = write(&[b'n'; 255]);
    let too_long = write(&[b'n'; 256]);
    let case = (write(b"CASE"), dir.join("case").exists());
    let count = fs::read_dir(dir)?.count();
    let missing = outcome(fs::metadata(dir.join("no/such")));
    let through_file = outcome(fs::metadata(dir.join("CASE/x")));
    Ok(format!(
        "{odd}, 255 {longest}, 256 {too_long}, case {case:?}, {count} names, missing {missing}, \
         through a file {through_file}"
    ))
}

fn large_directories(dir: &Path) -> Result<String> {
    const COUNT: usize = 1500;
    for number in 0..COUNT {
        fs::write(
            dir.join(format!("a-file-with-a-rather-long-name-{number}")),
            "",
        )?;
    }
    let names: BTreeSet<_> = fs::read_dir(dir)?
        .map(|entry| Ok(entry?.file_name()))
        .collect::<Result<_>>()?;
    let kinds = fs::read_dir(dir)?
        .flatten()
        .filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_file()));
    let kinds = kinds.count();
    // As rm -r does: remove while listing.
    for entry in fs::read_dir(dir)? {
        fs::remove_file(entry?.path())?;
    }
    let left = fs::read_dir(dir)?.count();
    let mut open = rustix::fs::Dir::read_from(File::open(dir)?)?;
    let dots = open.by_ref().count();
    fs::write(dir.join("late"), "")?;
    open.rewind();
    Ok(format!(
        "{} names, {kinds} files, {left} left, {dots} dots, rewound {}",
        names.len(),
        open.count()
    ))
}

fn inode_numbers(dir: &Path) -> Result<String> {
    fs::write(dir.join("file"), "")?;
    fs::create_dir(dir.join("below"))?;
    let before = fs::metadata(dir.join("file"))?.ino();
    let mut same = true;
    for entry in rustix::fs::Dir::read_from(File::open(dir)?)? {
        let entry = entry?;
        let name = std::ffi::OsStr::from_bytes(entry.file_name().to_bytes());
        if name != ".." {
            same &= entry.ino() == fs::symlink_metadata(dir.join(name))?.ino();
        }
    }
    fs::rename(dir.join("file"), dir.join("below/file"))?;
    let after = fs::metadata(dir.join("below/file"))?.ino();
    let device = fs::metadata(dir)?.dev() == fs::metadata(dir.join("below/file"))?.dev();
    // A file of the image keeps its number when it is first changed.
    let image = fs::metadata("/etc/issue")?.ino();
    fs::set_permissions("/etc/issue", Permissions::from_mode(0o640))?;
    let kept = fs::metadata("/etc/issue")?.ino() == image;
    Ok(format!(
        "listed as looked up {same}, kept by rename {}, one device {device}, kept by first change {kept}",
        before == after
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
    let null = rustix::fs::makedev(1, 3);
    let character = outcome(make("null", FileType::CharacterDevice, null));
    let block = outcome(make(
        "block",
        FileType::BlockDevice,
        rustix::fs::makedev(7, 0),
    ));
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
    let metadata = fs::symlink_metadata(dir.join("null"))?;
    let written = outcome(fs::write(dir.join("null"), "x"));
    // The device filter of the container refuses what it does not list.
    let disk = outcome(File::open(dir.join("block")));
    Ok(format!(
        "character {character} {:o} {:x} write {written}, block {block} open {disk}, socket {socket} \
         {}, pipe without reader {no_writer}, {through}",
        metadata.mode(),
        metadata.rdev(),
        fs::symlink_metadata(dir.join("socket"))?
            .file_type()
            .is_socket(),
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

fn image_directories_replaced(dir: &Path) -> Result<String> {
    let image = Path::new("/usr/share/base-files");
    let before = fs::read_dir(image)?.count() > 0;
    fs::remove_dir_all(image)?;
    let gone = outcome(fs::metadata(image));
    fs::create_dir(image)?;
    let fresh = fs::read_dir(image)?.count();
    fs::write(image.join("new"), "")?;
    let metadata = fs::metadata("/usr/share")?;
    let listed = fs::read_dir("/usr/share")?
        .flatten()
        .any(|entry| entry.path() == image);
    let _ = dir;
    Ok(format!(
        "had files {before}, gone {gone}, fresh {fresh}, parent {:o}, listed {listed}",
        metadata.mode()
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
    let own = format!(
        "/proc/self/fd/{}",
        std::os::fd::AsRawFd::as_raw_fd(&path_only)
    );
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
