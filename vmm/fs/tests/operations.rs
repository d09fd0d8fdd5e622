//! Names, links and attributes, as the guest sees them and as they come out on the host. Needs root.
#![allow(missing_docs, reason = "the names of the tests say it")]

mod guest;

use std::{
    fs,
    os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt},
};

use guest::{
    EXCLUSIVE, Entry, FLUSH, FSYNCDIR, Guest, IOCTL, OPENDIR, READLINK, REMOVEXATTR, RENAME, RMDIR,
    STATFS, STATX, Setattr, TMPFILE, names, u32_at, u64_at,
};

#[test]
fn hard_links_are_one_node() {
    let guest = Guest::new(EXCLUSIVE);
    let node = guest.file(guest.share, "a", b"content");
    let directory = guest.mkdir(guest.share, "dir", 0o755, 0).unwrap().node;
    let entry = guest.link(node, directory, "b").unwrap();
    assert_eq!((entry.node, entry.attr.nlink), (node, 2));
    assert_eq!(guest.lookup(directory, "b").unwrap().node, node);
    assert_eq!(guest.link(node, directory, "b"), Err(libc::EEXIST));
    assert_eq!(guest.link(directory, guest.share, "c"), Err(libc::EPERM));
    let host = |name| fs::metadata(guest.host(name)).unwrap().ino();
    assert_eq!(host("a"), host("dir/b"));
    // A link to a symbolic link, not to what it points to.
    let link = guest
        .symlink(guest.share, "link", "/etc/passwd")
        .unwrap()
        .node;
    assert_eq!(guest.link(link, directory, "again").unwrap().node, link);
    assert!(
        fs::symlink_metadata(guest.host("dir/again"))
            .unwrap()
            .is_symlink()
    );
    guest.unlink(guest.share, "a").unwrap();
    assert_eq!(guest.getattr(node).unwrap().nlink, 1);
}

#[test]
fn removed_files_stay_while_they_are_open() {
    let guest = Guest::new(EXCLUSIVE);
    let node = guest.file(guest.share, "file", b"content");
    let fh = guest.open(node, libc::O_RDWR).unwrap();
    guest.unlink(guest.share, "file").unwrap();
    assert_eq!(guest.lookup(guest.share, "file"), Err(libc::ENOENT));
    assert_eq!(guest.getattr(node).unwrap().nlink, 0);
    assert_eq!(guest.write(fh, 7, b"!"), Ok(1));
    assert_eq!(guest.read(fh, 0, 100).unwrap(), b"content!");
    let chmod = Setattr {
        valid: 1,
        mode: 0o600,
        ..Setattr::default()
    };
    assert_eq!(
        guest.setattr(node, &chmod).unwrap().mode,
        libc::S_IFREG | 0o600
    );
    guest.setxattr(node, "user.late", b"x").unwrap();
    assert_eq!(guest.link(node, guest.share, "back"), Err(libc::ENOENT));
    // The same for a name taken over by another file.
    let old = guest.file(guest.share, "old", b"old");
    let old_fh = guest.open(old, libc::O_RDONLY).unwrap();
    guest.file(guest.share, "new", b"new");
    guest
        .rename((guest.share, "new"), (guest.share, "old"), 0)
        .unwrap();
    assert_eq!(guest.read(old_fh, 0, 9).unwrap(), b"old");
    assert_ne!(guest.lookup(guest.share, "old").unwrap().node, old);
    // The name of the file that is still open may be given to a new one, which is another node.
    assert_ne!(guest.file(guest.share, "file", b""), node);
}

#[test]
fn a_file_without_a_name_can_be_given_one() {
    let guest = Guest::new(EXCLUSIVE);
    let tmpfile = |flags: i32| {
        let body = record![
            (libc::O_RDWR | flags).cast_unsigned(),
            libc::S_IFREG | 0o640,
            0_u32,
            0_u32,
            "unused"
        ];
        let reply = guest.call(TMPFILE, guest.share, &body).unwrap();
        (Entry::parse(&reply[..128]), u64_at(&reply, 128))
    };
    let (entry, fh) = tmpfile(0);
    assert_eq!(entry.attr.nlink, 0);
    assert_eq!(guest.write(fh, 0, b"late"), Ok(4));
    assert_eq!(fs::read_dir(guest.host("")).unwrap().count(), 0);
    let linked = guest.link(entry.node, guest.share, "named").unwrap();
    assert_eq!((linked.node, linked.attr.nlink), (entry.node, 1));
    assert_eq!(fs::read(guest.host("named")).unwrap(), b"late");
    let (entry, _) = tmpfile(libc::O_EXCL);
    assert_eq!(
        guest.link(entry.node, guest.share, "never"),
        Err(libc::ENOENT)
    );
}

#[test]
fn renames_do_what_their_flags_say() {
    let guest = Guest::new(EXCLUSIVE);
    let share = guest.share;
    let (a, b) = (guest.file(share, "a", b"a"), guest.file(share, "b", b"b"));
    let directory = guest.mkdir(share, "dir", 0o755, 0).unwrap().node;
    assert_eq!(
        guest.rename((share, "a"), (share, "b"), libc::RENAME_NOREPLACE),
        Err(libc::EEXIST)
    );
    guest
        .rename((share, "a"), (share, "b"), libc::RENAME_EXCHANGE)
        .unwrap();
    assert_eq!(guest.lookup(share, "a").unwrap().node, b);
    guest
        .rename((share, "b"), (directory, "c"), libc::RENAME_WHITEOUT)
        .unwrap();
    assert_eq!(guest.lookup(directory, "c").unwrap().node, a);
    let whiteout = guest.lookup(share, "b").unwrap().attr;
    assert_eq!(
        (whiteout.mode & libc::S_IFMT, whiteout.rdev),
        (libc::S_IFCHR, 0)
    );
    assert_eq!(
        guest.rename((share, "a"), (share, "x"), 1 << 3),
        Err(libc::EINVAL)
    );
    assert_eq!(
        guest.rename(
            (share, "a"),
            (share, "x"),
            libc::RENAME_NOREPLACE | libc::RENAME_EXCHANGE
        ),
        Err(libc::EINVAL)
    );
    guest
        .call(RENAME, share, &record![directory, "a", "d"])
        .unwrap();
    assert_eq!(fs::read(guest.host("dir/d")).unwrap(), b"b");
    assert_eq!(
        guest.call(RMDIR, share, &record!["dir"]),
        Err(libc::ENOTEMPTY)
    );
    assert_eq!(guest.unlink(share, "dir"), Err(libc::EISDIR));
    guest.unlink(directory, "c").unwrap();
    guest.unlink(directory, "d").unwrap();
    guest.call(RMDIR, share, &record!["dir"]).unwrap();
    // A directory that is gone takes nothing new.
    assert_eq!(guest.mkdir(directory, "x", 0o755, 0), Err(libc::ENOENT));
}

#[test]
fn symbolic_links_are_the_guests_to_follow() {
    let guest = Guest::new(EXCLUSIVE);
    for (name, target) in [
        ("a", "/etc/passwd"),
        ("b", "../../../etc"),
        ("c", "no such file"),
    ] {
        let entry = guest.symlink(guest.share, name, target).unwrap();
        assert_eq!(entry.attr.mode & libc::S_IFMT, libc::S_IFLNK);
        assert_eq!(
            guest.call(READLINK, entry.node, &[]).unwrap(),
            target.as_bytes()
        );
        assert_eq!(guest.lookup(guest.share, name).unwrap().node, entry.node);
        assert_eq!(guest.open(entry.node, libc::O_RDONLY), Err(libc::ELOOP));
        // Owner, times and attributes are its own.
        let set = Setattr {
            valid: 1 << 1 | 1 << 2 | 1 << 5,
            uid: 12,
            gid: 13,
            mtime: 1_000_000,
            ..Setattr::default()
        };
        let attr = guest.setattr(entry.node, &set).unwrap();
        assert_eq!((attr.uid, attr.gid, attr.mtime), (12, 13, 1_000_000));
        let set = Setattr {
            valid: 1,
            mode: 0o600,
            ..Setattr::default()
        };
        assert_eq!(guest.setattr(entry.node, &set), Err(libc::EOPNOTSUPP));
        guest.setxattr(entry.node, "trusted.own", b"link").unwrap();
        assert_eq!(
            guest.getxattr(entry.node, "trusted.own", 64).unwrap(),
            b"link"
        );
        let set = Setattr {
            valid: 1 << 3,
            ..Setattr::default()
        };
        assert_eq!(guest.setattr(entry.node, &set), Err(libc::EINVAL));
    }
    assert_eq!(fs::metadata("/etc/passwd").unwrap().uid(), 0);
    let node = guest.file(guest.share, "file", b"");
    assert_eq!(guest.call(READLINK, node, &[]), Err(libc::EINVAL));
    let long = "x".repeat(4095);
    let entry = guest.symlink(guest.share, "long", &long).unwrap();
    assert_eq!(
        guest.call(READLINK, entry.node, &[]).unwrap(),
        long.as_bytes()
    );
}

#[test]
fn special_files_are_entries_and_are_never_opened() {
    let guest = Guest::new(EXCLUSIVE);
    for (name, mode, device) in [
        ("pipe", libc::S_IFIFO | 0o644, 0),
        ("socket", libc::S_IFSOCK | 0o600, 0),
        ("null", libc::S_IFCHR | 0o666, 1 << 8 | 3),
        ("disk", libc::S_IFBLK | 0o660, 259 << 8 | 5),
        ("regular", libc::S_IFREG | 0o640, 0),
    ] {
        let entry = guest.mknod(guest.share, name, mode, device).unwrap();
        assert_eq!((entry.attr.mode, entry.attr.rdev), (mode, device), "{name}");
        if name != "regular" {
            assert_eq!(
                guest.open(entry.node, libc::O_RDONLY),
                Err(libc::ENXIO),
                "{name}"
            );
            let size = Setattr {
                valid: 1 << 3,
                ..Setattr::default()
            };
            assert_eq!(
                guest.setattr(entry.node, &size),
                Err(libc::EINVAL),
                "{name}"
            );
        }
        let set = Setattr {
            valid: 1,
            mode: 0o4711,
            ..Setattr::default()
        };
        assert_eq!(
            guest.setattr(entry.node, &set).unwrap().mode & 0o7777,
            0o4711
        );
        guest.setxattr(entry.node, "trusted.t", b"1").unwrap();
    }
    let kind = |name| fs::metadata(guest.host(name)).unwrap().file_type();
    assert!(kind("pipe").is_fifo() && kind("socket").is_socket());
    assert!(kind("null").is_char_device() && kind("disk").is_block_device());
    assert_eq!(
        guest.mknod(guest.share, "x", libc::S_IFDIR | 0o755, 0),
        Err(libc::EINVAL)
    );
    assert_eq!(
        guest.mknod(guest.share, "x", libc::S_IFLNK | 0o755, 0),
        Err(libc::EINVAL)
    );
}

#[test]
fn attributes_are_set_together() {
    let guest = Guest::new(EXCLUSIVE);
    let node = guest.file(guest.share, "file", b"content");
    let set = Setattr {
        valid: 0b11_1111,
        size: 3,
        atime: (-5_i64).cast_unsigned(),
        mtime: 7_000_000_000,
        nanoseconds: 123_456_789,
        mode: 0o6751,
        uid: 1000,
        gid: 2000,
        ..Setattr::default()
    };
    let attr = guest.setattr(node, &set).unwrap();
    assert_eq!(
        (attr.uid, attr.gid, attr.size, attr.mtime),
        (1000, 2000, 3, 7_000_000_000)
    );
    let host = fs::metadata(guest.host("file")).unwrap();
    assert_eq!((host.atime(), host.mtime_nsec()), (-5, 123_456_789));
    assert_eq!(host.mode() & 0o7777, 0o6751);
    // A new owner takes the bits away.
    let attr = guest.setattr(
        node,
        &Setattr {
            valid: 1 << 1,
            uid: 5,
            ..Setattr::default()
        },
    );
    assert_eq!(attr.unwrap().mode & 0o7777, 0o751);
    let now = Setattr {
        valid: 1 << 4 | 1 << 5 | 1 << 7 | 1 << 8,
        ..Setattr::default()
    };
    assert!(guest.setattr(node, &now).unwrap().mtime < 7_000_000_000);
    for wrong in [
        Setattr {
            valid: 1 << 1,
            uid: u32::MAX,
            ..Setattr::default()
        },
        Setattr {
            valid: 1 << 5,
            nanoseconds: (1 << 30) - 1,
            ..Setattr::default()
        },
        Setattr {
            valid: 1 << 3,
            size: u64::MAX,
            ..Setattr::default()
        },
    ] {
        assert_eq!(guest.setattr(node, &wrong), Err(libc::EINVAL), "{wrong:?}");
    }
    let statx = guest.call(STATX, node, &[0; 24]).unwrap();
    assert_eq!(u64_at(&statx, 32 + 40), 3);
    assert_eq!(guest.call(STATFS, node, &[]).unwrap().len(), 80);
}

#[test]
fn extended_attributes_are_the_hosts() {
    let guest = Guest::new(EXCLUSIVE);
    let file = guest.file(guest.share, "file", b"");
    let value = vec![7; 2000];
    guest.setxattr(file, "user.name", &value).unwrap();
    guest.setxattr(file, "user.empty", b"").unwrap();
    guest
        .setxattr(guest.share, "trusted.overlay.opaque", b"y")
        .unwrap();
    assert_eq!(guest.getxattr(file, "user.name", 4096).unwrap(), value);
    assert_eq!(guest.getxattr(file, "user.name", 10), Err(libc::ERANGE));
    assert_eq!(
        u32_at(&guest.getxattr(file, "user.name", 0).unwrap(), 0),
        2000
    );
    assert_eq!(guest.getxattr(file, "user.empty", 10).unwrap(), b"");
    assert_eq!(guest.getxattr(file, "user.none", 10), Err(libc::ENODATA));
    assert_eq!(guest.getxattr(file, "nonsense", 10), Err(libc::EOPNOTSUPP));
    let list = guest.listxattr(file, 4096).unwrap();
    assert_eq!(
        u32_at(&guest.listxattr(file, 0).unwrap(), 0) as usize,
        list.len()
    );
    let mut names: Vec<_> = list
        .split(|byte| *byte == 0)
        .filter(|name| !name.is_empty())
        .collect();
    names.sort_unstable();
    assert_eq!(names, [&b"user.empty"[..], b"user.name"]);
    guest
        .call(REMOVEXATTR, file, &record!["user.name"])
        .unwrap();
    assert_eq!(guest.getxattr(file, "user.name", 0), Err(libc::ENODATA));
    assert_eq!(
        guest.setxattr(file, "user.big", &vec![0; 65_537]),
        Err(libc::E2BIG)
    );
    assert_eq!(
        guest.setxattr(file, &"x".repeat(256), b""),
        Err(libc::ERANGE)
    );
}

#[test]
fn a_directory_of_20_000_entries_is_listed_once_each() {
    let guest = Guest::new(EXCLUSIVE);
    for i in 0..20_000 {
        fs::write(guest.host(&format!("entry-{i:05}")), "").unwrap();
    }
    for plus in [false, true] {
        let reply = guest
            .call(OPENDIR, guest.share, &record![0_u32, 0_u32])
            .unwrap();
        let fh = u64_at(&reply, 0);
        let list = |offset| {
            let some = guest
                .list_some(guest.share, fh, plus, offset, 4096)
                .unwrap();
            for entry in some.iter().filter_map(|entry| entry.entry) {
                assert_eq!(entry.attr.mode & libc::S_IFMT, libc::S_IFREG);
                guest.forget(entry.node, 1);
            }
            some
        };
        let mut entries: Vec<guest::Dirent> = Vec::new();
        loop {
            let some = list(entries.last().map_or(0, |entry| entry.offset));
            if some.is_empty() {
                break;
            }
            entries.extend(some);
        }
        let mut names = names(&entries);
        names.sort_unstable();
        names.dedup();
        assert_eq!((names.len(), entries.len()), (20_002, 20_002));
        let looked_up = entries.iter().filter(|entry| entry.entry.is_some());
        assert_eq!(looked_up.count(), if plus { 20_000 } else { 0 });
        // Any offset is good for going on from there, in any order.
        for i in [15_000, 3, 19_990] {
            assert_eq!(list(entries[i].offset)[0].name, entries[i + 1].name);
        }
        guest
            .call(FSYNCDIR, guest.share, &record![fh, 0_u32, 0_u32])
            .unwrap();
    }
}

#[test]
fn a_directory_can_be_emptied_while_it_is_read() {
    let guest = Guest::new(EXCLUSIVE);
    for i in 0..2_000 {
        fs::write(guest.host(&format!("entry-{i}")), "").unwrap();
    }
    let reply = guest
        .call(OPENDIR, guest.share, &record![0_u32, 0_u32])
        .unwrap();
    let (fh, mut offset) = (u64_at(&reply, 0), 0);
    loop {
        let some = guest
            .list_some(guest.share, fh, false, offset, 4096)
            .unwrap();
        let Some(last) = some.last() else { break };
        offset = last.offset;
        for entry in some.iter().filter(|entry| !entry.name.starts_with('.')) {
            guest.unlink(guest.share, &entry.name).unwrap();
        }
    }
    assert_eq!(fs::read_dir(guest.host("")).unwrap().count(), 0);
}

#[test]
fn what_the_guest_does_itself_is_declined() {
    let guest = Guest::new(EXCLUSIVE);
    assert_eq!(guest.call(FLUSH, guest.share, &[0; 24]), Err(libc::ENOSYS));
    assert_eq!(guest.call(IOCTL, guest.share, &[0; 32]), Err(libc::ENOTTY));
    for opcode in [0, 7, 31, 33, 34, 37, 40, 41, 48, 49, 4096, u32::MAX] {
        assert_eq!(guest.call(opcode, guest.share, &[0; 64]), Err(libc::ENOSYS));
    }
}

#[test]
fn modes_on_the_host_are_what_was_asked_for() {
    let guest = Guest::new(EXCLUSIVE);
    let mode = |name| fs::metadata(guest.host(name)).unwrap().permissions().mode() & 0o7777;
    guest.mkdir(guest.share, "sticky", 0o1777, 0).unwrap();
    assert_eq!(mode("sticky"), 0o1777);
    guest
        .create(guest.share, "suid", libc::O_RDWR, 0o4755)
        .unwrap();
    assert_eq!(mode("suid"), 0o4755);
}
