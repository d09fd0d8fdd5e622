//! What happens to names of files: links, renames, directories.

use std::collections::BTreeSet;
use std::fs::{self, File, OpenOptions, Permissions};
use std::io::{Read, Write};
use std::os::fd::AsRawFd;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt, PermissionsExt, symlink};
use std::path::Path;

use anyhow::Result;
use rustix::fs::{AtFlags, CWD, Mode, OFlags, RenameFlags, linkat, openat, renameat_with};

use super::{Answer, outcome};

pub(super) const QUESTIONS: [(&str, Answer); 11] = [
    ("hard links", hard_links),
    ("anonymous files", anonymous_files),
    ("unlinked files", unlinked_files),
    ("removed directories", removed_directories),
    ("renames", renames),
    ("renames of image files", renames_of_image_files),
    ("symlinks", symlinks),
    ("names", names),
    ("large directories", large_directories),
    ("inode numbers", inode_numbers),
    ("image directories replaced", image_directories_replaced),
];

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
    let own = format!("/proc/self/fd/{}", file.as_raw_fd());
    linkat(CWD, own, CWD, &name, AtFlags::SYMLINK_FOLLOW)?;
    let content = fs::read_to_string(&name)?;
    let exclusive = openat(CWD, dir, flags | OFlags::EXCL, Mode::from_raw_mode(0o600))?;
    let own = format!("/proc/self/fd/{}", exclusive.as_raw_fd());
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
    let own = format!("/proc/self/fd/{}", file.as_raw_fd());
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
