//! The options of a spec's mount, sorted by who takes them.

use std::{
    io,
    os::fd::{AsRawFd, BorrowedFd},
};

// include/uapi/linux/mount.h
const ATTR_RDONLY: u64 = 0x01;
const ATTR_NOSUID: u64 = 0x02;
const ATTR_NODEV: u64 = 0x04;
const ATTR_NOEXEC: u64 = 0x08;
/// Field of the three ways to keep access times.
const ATTR_ATIME: u64 = 0x70;
const ATTR_RELATIME: u64 = 0x00;
const ATTR_NOATIME: u64 = 0x10;
const ATTR_STRICTATIME: u64 = 0x20;
const ATTR_NODIRATIME: u64 = 0x80;
const ATTR_NOSYMFOLLOW: u64 = 0x20_0000;

/// Options that change a mount's attributes: name, bits to set, bits to clear.
const ATTRIBUTES: [(&str, u64, u64); 18] = [
    ("ro", ATTR_RDONLY, 0),
    ("rw", 0, ATTR_RDONLY),
    ("nosuid", ATTR_NOSUID, 0),
    ("suid", 0, ATTR_NOSUID),
    ("nodev", ATTR_NODEV, 0),
    ("dev", 0, ATTR_NODEV),
    ("noexec", ATTR_NOEXEC, 0),
    ("exec", 0, ATTR_NOEXEC),
    ("relatime", ATTR_RELATIME, ATTR_ATIME),
    ("norelatime", ATTR_RELATIME, ATTR_ATIME),
    ("noatime", ATTR_NOATIME, ATTR_ATIME),
    ("atime", ATTR_RELATIME, ATTR_ATIME),
    ("strictatime", ATTR_STRICTATIME, ATTR_ATIME),
    ("nostrictatime", ATTR_RELATIME, ATTR_ATIME),
    ("nodiratime", ATTR_NODIRATIME, 0),
    ("diratime", 0, ATTR_NODIRATIME),
    ("nosymfollow", ATTR_NOSYMFOLLOW, 0),
    ("symfollow", 0, ATTR_NOSYMFOLLOW),
];

/// `struct mount_attr` of mount_setattr(2).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
pub struct Attributes {
    set: u64,
    clear: u64,
    propagation: u64,
    user_namespace: u64,
}

impl Attributes {
    /// Only the change to read-only.
    pub const READ_ONLY: Self = Self {
        set: ATTR_RDONLY,
        clear: 0,
        propagation: 0,
        user_namespace: 0,
    };

    /// Whether it makes something read-only.
    pub fn is_read_only(&self) -> bool {
        self.set & ATTR_RDONLY != 0
    }

    /// Leaves writable what it would make read-only.
    pub fn keep_writable(&mut self) {
        self.set &= !ATTR_RDONLY;
    }

    /// Only a change of propagation, as `MS_PRIVATE` and the like.
    pub fn propagation(flag: libc::c_ulong) -> Self {
        Self {
            propagation: flag,
            ..Self::default()
        }
    }

    fn add(&mut self, set: u64, clear: u64) {
        self.set = self.set & !clear | set;
        self.clear = self.clear & !set | clear;
        // An atime mode is always named whole: its field is cleared before it is set.
        self.clear |= clear & ATTR_ATIME;
    }

    /// Applies the change to a mount, or with `recursive` also to all mounts below it.
    pub fn apply(&self, mount: BorrowedFd<'_>, recursive: bool) -> io::Result<()> {
        if *self == Self::default() {
            return Ok(());
        }
        let recursive = if recursive { libc::AT_RECURSIVE } else { 0 };
        // SAFETY: an open descriptor with an empty path, and a whole `struct mount_attr`.
        let result = unsafe {
            libc::syscall(
                libc::SYS_mount_setattr,
                mount.as_raw_fd(),
                c"".as_ptr(),
                libc::AT_EMPTY_PATH | recursive,
                &raw const *self,
                size_of::<Self>(),
            )
        };
        if result < 0 {
            return Err(io::Error::last_os_error());
        }
        Ok(())
    }
}

/// A mount's options, sorted by who takes them.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct MountOptions {
    /// A bind mount; with `Some(true)` of everything below the source as well.
    pub bind: Option<bool>,
    /// A bind mount with the ids of the container's user namespace, which the host maps.
    pub idmap: bool,
    /// A tmpfs that begins with a copy of what it hides.
    pub copy_up: bool,
    /// A change of the mount that is there.
    pub remount: bool,
    /// For the mount itself.
    pub attributes: Attributes,
    /// For the mount and all below it (`rro` and the like).
    pub recursive: Attributes,
    /// Propagation, one after the other, and whether it is recursive.
    pub propagation: Vec<(Attributes, bool)>,
    /// For the file system: flags, or keys with values.
    pub data: Vec<(String, Option<String>)>,
}

impl MountOptions {
    /// Sorts the options of a spec's mount.
    pub fn parse(options: &[String]) -> Self {
        let mut parsed = Self::default();
        for option in options {
            parsed.add(option);
        }
        parsed
    }

    fn add(&mut self, option: &str) {
        let attribute = |name: &str| {
            let found = ATTRIBUTES.iter().find(|(known, ..)| *known == name);
            found.map(|(_, set, clear)| (*set, *clear))
        };
        if let Some((set, clear)) = attribute(option) {
            self.attributes.add(set, clear);
            return;
        }
        if let Some(propagation) = propagation(option) {
            self.propagation.push(propagation);
            return;
        }
        if let Some((set, clear)) = option.strip_prefix('r').and_then(attribute) {
            self.recursive.add(set, clear);
            return;
        }
        match option {
            "bind" => self.bind = Some(self.bind.unwrap_or(false)),
            "rbind" => self.bind = Some(true),
            "idmap" | "ridmap" => self.idmap = true,
            "tmpcopyup" => self.copy_up = true,
            "remount" => self.remount = true,
            "defaults" | "async" | "loud" | "silent" => {}
            // mount(2) takes these and leaves everything to the file system.
            "acl" | "noacl" | "iversion" | "noiversion" | "mand" | "nomand" | "" => {}
            _ => self.data.push(match option.split_once('=') {
                Some((key, value)) => (key.to_owned(), Some(value.to_owned())),
                None => (option.to_owned(), None),
            }),
        }
    }
}

/// `private`, `rslave` and the like.
pub fn propagation(option: &str) -> Option<(Attributes, bool)> {
    let flag = |name: &str| match name {
        "private" => Some(libc::MS_PRIVATE),
        "slave" => Some(libc::MS_SLAVE),
        "shared" => Some(libc::MS_SHARED),
        "unbindable" => Some(libc::MS_UNBINDABLE),
        _ => None,
    };
    let plain = flag(option).map(|flag| (flag, false));
    let recursive = || {
        option
            .strip_prefix('r')
            .and_then(flag)
            .map(|flag| (flag, true))
    };
    let found = plain.or_else(recursive);
    found.map(|(flag, recursive)| (Attributes::propagation(flag), recursive))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(options: &[&str]) -> MountOptions {
        let options: Vec<String> = options.iter().map(|&option| option.to_owned()).collect();
        MountOptions::parse(&options)
    }

    #[test]
    fn options_go_where_they_belong() {
        let parsed = parse(&[
            "nosuid",
            "strictatime",
            "mode=755",
            "size=65536k",
            "newinstance",
        ]);
        assert_eq!(parsed.attributes.set, ATTR_NOSUID | ATTR_STRICTATIME);
        assert_eq!(parsed.attributes.clear, ATTR_ATIME);
        assert_eq!(
            parsed.data,
            [
                ("mode".into(), Some("755".into())),
                ("size".into(), Some("65536k".into())),
                ("newinstance".into(), None),
            ]
        );
    }

    #[test]
    fn recursive_forms_are_told_apart() {
        let parsed = parse(&["rbind", "rro", "rprivate", "relatime"]);
        assert_eq!(parsed.bind, Some(true));
        assert_eq!(parsed.recursive, Attributes::READ_ONLY);
        assert_eq!(
            parsed.propagation,
            [(Attributes::propagation(libc::MS_PRIVATE), true)]
        );
        assert_eq!(parsed.attributes.clear, ATTR_ATIME);
        assert_eq!(parse(&["bind", "ro"]).attributes, Attributes::READ_ONLY);
    }

    #[test]
    fn the_last_of_opposite_options_counts() {
        let parsed = parse(&["ro", "rw", "noatime", "relatime"]);
        assert_eq!(parsed.attributes.set, 0);
        assert_eq!(parsed.attributes.clear, ATTR_RDONLY | ATTR_ATIME);
    }

    #[test]
    fn what_is_done_once_is_no_data() {
        let parsed = parse(&["tmpcopyup", "remount", "ridmap", "rnosymfollow", "acl"]);
        assert!(parsed.copy_up && parsed.remount && parsed.idmap);
        assert_eq!(parsed.recursive.set, ATTR_NOSYMFOLLOW);
        assert_eq!(parsed.data, []);
    }
}
