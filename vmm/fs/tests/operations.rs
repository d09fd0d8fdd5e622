//! Every operation, as the guest sees it and as it comes out on the host. Needs root.
#![allow(missing_docs, reason = "the names of the tests say it")]

mod guest;

use std::{
    fs,
    os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt},
};

use guest::{
    COPY_FILE_RANGE, DESTROY, EXCLUSIVE, Entry, FALLOCATE, FLUSH, FSYNC, FSYNCDIR, Guest, IOCTL,
    LSEEK, OFFERED, OPENDIR, READLINK, REMOVEXATTR, RENAME, RMDIR, ROOT, SHARED, STATFS, STATX,
    SYNCFS, Setattr, TMPFILE, u32_at, u64_at,
};

const NAMES: fn(&[guest::Dirent]) -> Vec<&str> =
    |entries| entries.iter().map(|entry| entry.name.as_str()).collect();

#[test]
fn init_agrees_on_what_both_know() {
    let guest = Guest::new(EXCLUSIVE);
    let reply = guest.init(OFFERED).unwrap();
    assert_eq!(reply.len(), 64);
    assert_eq!((u32_at(&reply, 0), u32_at(&reply, 4)), (7, 41));
    let flags = u64::from(u32_at(&reply, 12)) | u64::from(u32_at(&reply, 32)) << 32;
    for (bit, agreed) in [
        (0, true),   // ASYNC_READ
        (1, false),  // POSIX_LOCKS: the guest's own
        (6, true),   // DONT_MASK
        (10, false), // FLOCK_LOCKS
        (12, true),  // AUTO_INVAL_DATA
        (13, true),  // DO_READDIRPLUS
        (16, false), // WRITEBACK_CACHE
        (20, true),  // POSIX_ACL
        (22, true),  // MAX_PAGES
        (28, true),  // HANDLE_KILLPRIV_V2
        (29, true),  // SETXATTR_EXT
        (32, false), // SECURITY_CTX
        (40, true),  // ALLOW_IDMAP
    ] {
        assert_eq!(flags & 1 << bit != 0, agreed, "bit {bit}");
    }
    assert_eq!(u32_at(&reply, 20), 1024 * 1024); // max_write
    assert_eq!(u32_at(&reply, 28), 256); // max_pages, and no map alignment
    // Nothing is agreed on that was not offered.
    let reply = guest.init(1 << 30).unwrap();
    assert_eq!((u32_at(&reply, 12), u32_at(&reply, 32)), (1 << 30, 0));
    // Another major version gets ours; one before ours, or a very old minor, cannot be served.
    let init =
        |major: u32, minor: u32| guest.call(guest::INIT, 0, &record![major, minor, 0_u32, 0_u32]);
    assert_eq!(u32_at(&init(8, 0).unwrap(), 0), 7);
    assert_eq!(init(6, 99), Err(libc::EPROTO));
    assert_eq!(init(7, 8), Err(libc::EPROTO));
}

#[test]
fn the_root_lists_the_shares_and_cannot_be_changed() {
    let guest = Guest::new(EXCLUSIVE);
    let file = guest.directory.path().join("resolv.conf");
    fs::write(&file, "nameserver ::1\n").unwrap();
    let server = &guest.server;
    server
        .share("resolv", guest::path_fd(&file), SHARED)
        .unwrap();
    assert!(
        server
            .share("resolv", guest::path_fd(&file), SHARED)
            .is_err()
    );
    for name in ["", ".", "..", "a/b", "a\0b"] {
        assert!(
            server.share(name, guest::path_fd(&file), SHARED).is_err(),
            "{name:?}"
        );
    }
    let attr = guest.getattr(ROOT).unwrap();
    assert_eq!((attr.mode, attr.uid), (libc::S_IFDIR | 0o555, 0));
    for plus in [false, true] {
        let entries = guest.list(ROOT, plus, 4096).unwrap();
        assert_eq!(NAMES(&entries), [".", "..", "share", "resolv"]);
        // One entry at a time comes to the same.
        let entries = guest.list(ROOT, plus, 200).unwrap();
        assert_eq!(NAMES(&entries), [".", "..", "share", "resolv"]);
    }
    let share = guest.lookup(ROOT, "share").unwrap();
    assert_eq!(share.entry_valid, 0);
    assert_eq!(share.attr.flags, 1, "a submount");
    let resolv = guest.lookup(ROOT, "resolv").unwrap();
    assert_eq!(
        (resolv.entry_valid, resolv.attr_valid, resolv.attr.flags),
        (0, 0, 0)
    );
    assert_eq!(resolv.attr.ino, resolv.node);
    let fh = guest.open(resolv.node, libc::O_RDONLY).unwrap();
    assert_eq!(guest.read(fh, 0, 100).unwrap(), b"nameserver ::1\n");

    assert_eq!(guest.lookup(ROOT, "nothing"), Err(libc::ENOENT));
    assert_eq!(guest.mkdir(ROOT, "x", 0o755, 0), Err(libc::EROFS));
    assert_eq!(guest.unlink(ROOT, "resolv"), Err(libc::EROFS));
    assert_eq!(
        guest.rename((ROOT, "share"), (ROOT, "x"), 0),
        Err(libc::EROFS)
    );
    assert_eq!(guest.getxattr(ROOT, "user.x", 10), Err(libc::ENODATA));
    assert_eq!(guest.listxattr(ROOT, 10).unwrap(), b"");
    assert_eq!(guest.call(STATFS, ROOT, &[]).unwrap().len(), 80);
    assert_eq!(guest.call(STATX, ROOT, &[0; 24]).unwrap().len(), 32 + 256);
    guest.call(SYNCFS, ROOT, &[0; 8]).unwrap();
    guest.forget(ROOT, 100);
    guest.getattr(ROOT).unwrap();
}

#[test]
fn unsharing_closes_everything_and_the_guest_is_told() {
    let guest = Guest::new(EXCLUSIVE);
    let node = guest.file(guest.share, "file", b"content");
    let fh = guest.open(node, libc::O_RDONLY).unwrap();
    let open = || {
        fs::read_dir("/proc/self/fd")
            .unwrap()
            .filter_map(|entry| fs::read_link(entry.unwrap().path()).ok())
            .filter(|path| path.starts_with(guest.directory.path()))
            .count()
    };
    assert_eq!(open(), 3);
    guest.server.unshare("share").unwrap();
    assert_eq!(open(), 0);
    assert!(guest.server.unshare("share").is_err());
    assert_eq!(guest.getattr(node), Err(libc::ESTALE));
    assert_eq!(guest.getattr(guest.share), Err(libc::ESTALE));
    assert_eq!(guest.read(fh, 0, 1), Err(libc::EBADF));
    assert_eq!(guest.lookup(ROOT, "share"), Err(libc::ENOENT));
    // The name is free again, and the new share has other nodes.
    guest
        .server
        .share("share", guest::path_fd(&guest.host("")), SHARED)
        .unwrap();
    assert_ne!(guest.lookup(ROOT, "share").unwrap().node, guest.share);
}

#[test]
fn nodes_live_as_long_as_the_guest_knows_them() {
    let guest = Guest::new(EXCLUSIVE);
    let node = guest.file(guest.share, "file", b"");
    assert_eq!(guest.lookup(guest.share, "file").unwrap().node, node);
    guest.forget(node, 1);
    guest.getattr(node).unwrap();
    guest.tell(guest::BATCH_FORGET, 0, &record![1_u32, 0_u32, node, 1_u64]);
    assert_eq!(guest.getattr(node), Err(libc::ESTALE));
    let again = guest.lookup(guest.share, "file").unwrap().node;
    assert_ne!(again, node, "ids are not used again");
    guest.forget(guest.share, u64::MAX);
    guest.getattr(guest.share).unwrap();
    // Starting over forgets all but the shares.
    guest.call(DESTROY, 0, &[]).unwrap();
    assert_eq!(guest.getattr(again), Err(libc::ESTALE));
    guest.getattr(guest.share).unwrap();
}

#[test]
fn what_may_be_cached_depends_on_who_else_changes_it() {
    for (options, forever) in [(EXCLUSIVE, true), (SHARED, false)] {
        let guest = Guest::new(options);
        let node = guest.file(guest.share, "file", b"");
        let entry = guest.lookup(guest.share, "file").unwrap();
        assert_eq!(entry.entry_valid > 1000, forever);
        assert_eq!(entry.attr_valid > 1000, forever);
        let reply = guest.call(guest::LOOKUP, guest.share, &record!["none"]);
        if forever {
            let negative = reply.unwrap();
            assert_eq!((u64_at(&negative, 0), u64_at(&negative, 24)), (0, 0));
            assert!(u64_at(&negative, 16) > 1000);
        } else {
            assert_eq!(reply, Err(libc::ENOENT));
        }
        let opened = guest
            .call(guest::OPEN, node, &record![0_u32, 0_u32])
            .unwrap();
        assert_eq!(u32_at(&opened, 8), if forever { 1 << 1 } else { 0 });
        let opened = guest
            .call(OPENDIR, guest.share, &record![0_u32, 0_u32])
            .unwrap();
        assert_eq!(
            u32_at(&opened, 8),
            if forever { 1 << 1 | 1 << 3 } else { 0 }
        );
        // Set-user-ID goes away by itself, so it is never cached.
        let mode = Setattr {
            valid: 1,
            mode: 0o4755,
            ..Setattr::default()
        };
        guest.setattr(node, &mode).unwrap();
        assert_eq!(guest.lookup(guest.share, "file").unwrap().attr_valid, 0);
    }
}

#[test]
fn data_goes_where_it_belongs() {
    let guest = Guest::new(EXCLUSIVE);
    let (entry, fh) = guest
        .create(guest.share, "file", libc::O_RDWR | libc::O_EXCL, 0o644)
        .unwrap();
    let data: Vec<u8> = (0..1_000_000_u32)
        .flat_map(|i| i.to_le_bytes())
        .take(1 << 20)
        .collect();
    assert_eq!(guest.write(fh, 3, &data), Ok(data.len()));
    assert_eq!(guest.read(fh, 3, 1 << 20).unwrap(), data);
    assert_eq!(
        guest.read(fh, 1 << 20, 100).unwrap(),
        data[data.len() - 3..]
    );
    assert_eq!(guest.read(fh, 1 << 30, 100).unwrap(), b"");
    assert_eq!(fs::read(guest.host("file")).unwrap()[3..], data);
    assert_eq!(guest.getattr(entry.node).unwrap().size, (1 << 20) + 3);
    assert_eq!(guest.read(fh, u64::MAX, 1), Err(libc::EINVAL));
    assert_eq!(
        guest.write(fh, i64::MAX.cast_unsigned(), b"xx"),
        Err(libc::EINVAL)
    );
    assert_eq!(guest.read(fh + 1, 0, 1), Err(libc::EBADF));
    guest
        .call(FSYNC, entry.node, &record![fh, 0_u32, 0_u32])
        .unwrap();
    guest
        .call(FSYNC, entry.node, &record![fh, 1_u32, 0_u32])
        .unwrap();
    guest.call(SYNCFS, guest.share, &[0; 8]).unwrap();
    // A shorter buffer than was asked for gets what it holds.
    let body = record![fh, 3_u64, 100_u32, 0_u32, 0_u64, 0_u32, 0_u32];
    assert_eq!(
        guest.call_for(guest::READ, 0, &body, 10).unwrap(),
        data[..10]
    );
    // A write must have the length it says.
    let body = record![fh, 0_u64, 5_u32, 0_u32, 0_u64, 0_u32, 0_u32, &b"four"[..]];
    assert_eq!(guest.call(guest::WRITE, 0, &body), Err(libc::EINVAL));
}

#[test]
fn appending_finds_the_end_and_written_back_pages_their_place() {
    let guest = Guest::new(SHARED);
    let node = guest.file(guest.share, "log", b"one\n");
    let fh = guest.open(node, libc::O_WRONLY | libc::O_APPEND).unwrap();
    fs::write(guest.host("log"), "one\ntwo\n").unwrap();
    // The guest does not know of the second line yet.
    assert_eq!(
        guest.write_with(fh, 4, b"three\n", 0, libc::O_APPEND),
        Ok(6)
    );
    assert_eq!(guest.write_with(fh, 0, b"ONE", 1, libc::O_APPEND), Ok(3));
    assert_eq!(
        fs::read_to_string(guest.host("log")).unwrap(),
        "ONE\ntwo\nthree\n"
    );
}

#[test]
fn files_are_larger_than_4_gib_and_have_holes() {
    let guest = Guest::new(EXCLUSIVE);
    let (entry, fh) = guest
        .create(guest.share, "big", libc::O_RDWR, 0o644)
        .unwrap();
    let far = 5 << 30;
    assert_eq!(guest.write(fh, far, b"far"), Ok(3));
    assert_eq!(guest.read(fh, far, 10).unwrap(), b"far");
    let attr = guest.getattr(entry.node).unwrap();
    assert_eq!(attr.size, far + 3);
    assert!(attr.blocks < 100);
    let seek = |offset: u64, whence: i32| {
        guest
            .call(
                LSEEK,
                entry.node,
                &record![fh, offset, whence.cast_unsigned(), 0_u32],
            )
            .map(|reply| u64_at(&reply, 0))
    };
    assert_eq!(seek(0, libc::SEEK_DATA), Ok(far));
    assert_eq!(seek(0, libc::SEEK_HOLE), Ok(0));
    assert_eq!(seek(far + 3, libc::SEEK_DATA), Err(libc::ENXIO));
    assert_eq!(seek(u64::MAX, libc::SEEK_DATA), Err(libc::ENXIO));
    assert_eq!(seek(0, libc::SEEK_END), Err(libc::EINVAL));

    let allocate = |offset: u64, length: u64, mode: i32| {
        let body = record![fh, offset, length, mode.cast_unsigned(), 0_u32];
        guest.call(FALLOCATE, entry.node, &body).map(drop)
    };
    assert_eq!(allocate(0, 8192, libc::FALLOC_FL_KEEP_SIZE), Ok(()));
    assert!(guest.getattr(entry.node).unwrap().blocks >= 16);
    assert_eq!(guest.write(fh, 0, b"data"), Ok(4));
    let punch = libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE;
    assert_eq!(allocate(0, 4096, punch), Ok(()));
    assert_eq!(guest.read(fh, 0, 4).unwrap(), [0; 4]);
    assert_eq!(allocate(far, 4096, 0), Ok(()));
    assert_eq!(guest.getattr(entry.node).unwrap().size, far + 4096);
    assert_eq!(
        allocate(0, 4096, libc::FALLOC_FL_COLLAPSE_RANGE),
        Err(libc::EOPNOTSUPP)
    );
    let size = Setattr {
        valid: 1 << 3,
        size: far << 1,
        ..Setattr::default()
    };
    assert_eq!(guest.setattr(entry.node, &size).unwrap().size, far << 1);
    // By handle: also for a file without a name.
    let size = Setattr {
        valid: 1 << 3 | 1 << 6,
        fh,
        size: 5,
        ..Setattr::default()
    };
    assert_eq!(guest.setattr(entry.node, &size).unwrap().size, 5);
}

#[test]
fn ranges_are_copied_on_the_host() {
    let guest = Guest::new(EXCLUSIVE);
    let from = guest.file(guest.share, "from", b"0123456789");
    let to = guest.file(guest.share, "to", b"abcdefghij");
    let (from, to_fh) = (
        guest.open(from, libc::O_RDONLY).unwrap(),
        guest.open(to, libc::O_RDWR).unwrap(),
    );
    let copy = |length: u64, flags: u64| {
        guest
            .call(
                COPY_FILE_RANGE,
                0,
                &record![from, 2_u64, to, to_fh, 4_u64, length, flags],
            )
            .map(|reply| u32_at(&reply, 0))
    };
    assert_eq!(copy(3, 0), Ok(3));
    assert_eq!(guest.read(to_fh, 0, 20).unwrap(), b"abcd234hij");
    assert_eq!(copy(u64::MAX, 0), Ok(8));
    assert_eq!(copy(1, 1), Err(libc::EINVAL));
}

#[test]
fn create_never_opens_what_was_there() {
    let guest = Guest::new(SHARED);
    guest.file(guest.share, "file", b"");
    nix::unistd::mkfifo(&guest.host("pipe"), nix::sys::stat::Mode::S_IRWXU).unwrap();
    for name in ["file", "pipe"] {
        let create = |flags| guest.create(guest.share, name, flags, 0o600).map(drop);
        assert_eq!(create(libc::O_RDWR | libc::O_EXCL), Err(libc::EEXIST));
        assert_eq!(create(libc::O_RDWR | libc::O_TRUNC), Err(libc::ESTALE));
    }
}

#[test]
fn opening_truncates_only_when_asked() {
    let guest = Guest::new(EXCLUSIVE);
    let node = guest.file(guest.share, "file", b"content");
    let fh = guest.open(node, libc::O_RDWR | libc::O_DIRECT).unwrap();
    assert_eq!(guest.read(fh, 1, 3).unwrap(), b"ont");
    guest.open(node, libc::O_WRONLY | libc::O_TRUNC).unwrap();
    assert_eq!(guest.getattr(node).unwrap().size, 0);
    assert_eq!(guest.open(node, 3), Err(libc::EINVAL));
    assert_eq!(guest.open(guest.share, libc::O_RDONLY), Err(libc::EISDIR));
    assert_eq!(
        guest.call(OPENDIR, node, &record![0_u32, 0_u32]),
        Err(libc::ENOTDIR)
    );
}

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
        let mut names = NAMES(&entries);
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
