//! The table of mounts (proc_pid_mountinfo(5)).

use std::{ffi::OsString, os::unix::ffi::OsStringExt, path::PathBuf};

/// Where it is read.
pub const PATH: &str = "/proc/self/mountinfo";

/// One mount, in the bytes that the table shows.
#[derive(Debug)]
pub struct Line<'a> {
    /// Tells it from all others.
    pub id: u64,
    /// What of the file system is mounted.
    pub root: &'a [u8],
    point: &'a [u8],
    flags: &'a [u8],
    /// Type of the file system.
    pub kind: &'a [u8],
    /// What was given as the source.
    pub source: &'a [u8],
    /// Options of the file system.
    pub options: &'a [u8],
}

/// The lines of a table.
pub fn lines(table: &[u8]) -> impl Iterator<Item = Line<'_>> {
    let lines = table.split(|byte| *byte == b'\n');
    lines.filter_map(Line::parse)
}

impl<'a> Line<'a> {
    /// Reads one line.
    pub fn parse(line: &'a [u8]) -> Option<Self> {
        let mut fields = line.split(|byte| *byte == b' ');
        let id = std::str::from_utf8(fields.next()?).ok()?.parse().ok()?;
        let (root, point, flags) = (fields.nth(2)?, fields.next()?, fields.next()?);
        // Optional fields come between.
        fields.find(|field| *field == b"-")?;
        let (kind, source, options) = (fields.next()?, fields.next()?, fields.next()?);
        Some(Self {
            id,
            root,
            point,
            flags,
            kind,
            source,
            options,
        })
    }

    /// Where it is mounted.
    pub fn point(&self) -> PathBuf {
        plain(self.point).into()
    }

    /// Whether nothing can be changed by way of this mount.
    pub fn is_read_only(&self) -> bool {
        let mut flags = self.flags.split(|byte| *byte == b',');
        flags.any(|flag| flag == b"ro")
    }
}

/// Bytes that are shown as three octal digits are themselves again.
pub fn plain(shown: &[u8]) -> OsString {
    let mut bytes = Vec::with_capacity(shown.len());
    let mut rest = shown;
    while let Some((&first, after)) = rest.split_first() {
        let octal = after.get(..3).filter(|_| first == b'\\');
        let digits = octal.and_then(|digits| std::str::from_utf8(digits).ok());
        match digits.and_then(|digits| u8::from_str_radix(digits, 8).ok()) {
            Some(byte) => {
                bytes.push(byte);
                rest = &after[3..];
            }
            None => {
                bytes.push(first);
                rest = after;
            }
        }
    }
    OsString::from_vec(bytes)
}
