//! Everything about every file of a tree.

use std::ffi::OsString;
use std::fmt::Write as _;
use std::fs::{self, File, Metadata};
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::Path;

use anyhow::{Context, Result};
use rustix::fs::{lgetxattr, llistxattr};
use sha2::{Digest, Sha256};

/// One line for each file below `directory`, sorted by path.
pub fn describe(directory: &Path) -> Result<String> {
    let mut out = String::new();
    walk(directory, directory, &mut out)?;
    Ok(out)
}

fn walk(top: &Path, directory: &Path, out: &mut String) -> Result<()> {
    let listing =
        fs::read_dir(directory).with_context(|| format!("list {}", directory.display()))?;
    let mut names: Vec<OsString> = listing
        .map(|entry| Ok(entry?.file_name()))
        .collect::<Result<_>>()?;
    names.sort();
    for name in names {
        let path = directory.join(name);
        let metadata =
            fs::symlink_metadata(&path).with_context(|| format!("look at {}", path.display()))?;
        writeln!(out, "{}", line(path.strip_prefix(top)?, &path, &metadata)?)?;
        if metadata.is_dir() {
            walk(top, &path, out)?;
        }
    }
    Ok(())
}

fn line(name: &Path, path: &Path, metadata: &Metadata) -> Result<String> {
    let mut line = format!(
        "{} {:o} {}:{}",
        name.as_os_str().as_bytes().escape_ascii(),
        metadata.mode(),
        metadata.uid(),
        metadata.gid(),
    );
    let kind = metadata.file_type();
    // The size of a directory and its count of links belong to the file system, not to the tree.
    if !kind.is_dir() {
        write!(line, " {} links={}", metadata.size(), metadata.nlink())?;
    }
    write!(line, " {}.{:09}", metadata.mtime(), metadata.mtime_nsec())?;
    if kind.is_symlink() {
        let target = fs::read_link(path)?;
        write!(line, " -> {}", target.as_os_str().as_bytes().escape_ascii())?;
    }
    if kind.is_char_device() || kind.is_block_device() {
        write!(line, " device={:x}", metadata.rdev())?;
    }
    if kind.is_file() {
        let mut hasher = Sha256::new();
        io::copy(&mut File::open(path)?, &mut hasher)?;
        write!(line, " sha256=")?;
        for byte in hasher.finalize() {
            write!(line, "{byte:02x}")?;
        }
    }
    for (attribute, value) in attributes(path)? {
        write!(line, " {attribute}={}", value.escape_ascii())?;
    }
    Ok(line)
}

fn attributes(path: &Path) -> Result<Vec<(String, Vec<u8>)>> {
    let mut list = vec![0; 64 * 1024];
    let length = llistxattr(path, &mut list)?;
    let mut found = Vec::new();
    for name in list[..length]
        .split(|&byte| byte == 0)
        .filter(|name| !name.is_empty())
    {
        let mut value = vec![0; 64 * 1024];
        let length = lgetxattr(path, name, &mut value)?;
        value.truncate(length);
        found.push((String::from_utf8_lossy(name).into_owned(), value));
    }
    found.sort();
    Ok(found)
}
