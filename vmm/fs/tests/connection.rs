//! The connection as a whole: what is agreed on, the shares, nodes and what may be cached of them.
//! Needs root.
#![allow(missing_docs, reason = "the names of the tests say it")]

mod guest;

use std::fs;

use guest::{
    DESTROY, EXCLUSIVE, Guest, OFFERED, OPENDIR, ROOT, SHARED, STATFS, STATX, SYNCFS, Setattr,
    names, u32_at, u64_at,
};

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
        assert_eq!(names(&entries), [".", "..", "share", "resolv"]);
        // One entry at a time comes to the same.
        let entries = guest.list(ROOT, plus, 200).unwrap();
        assert_eq!(names(&entries), [".", "..", "share", "resolv"]);
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
