//! No way out of a share, whatever the guest asks and whatever changes meanwhile. Needs root.
#![allow(missing_docs, reason = "the names of the tests say it")]

mod guest;

use std::{
    collections::BTreeMap,
    fs,
    os::unix::fs::{MetadataExt, symlink},
    sync::atomic::{AtomicBool, Ordering},
};

use guest::{
    CREATE, EXCLUSIVE, FALLOCATE, Guest, LINK, LOOKUP, MKDIR, MKNOD, OPENDIR, READ_ONLY,
    REMOVEXATTR, RENAME, RMDIR, ROOT, SHARED, SYMLINK, Setattr, TMPFILE, UNLINK, u64_at,
};
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use proptest::prelude::*;

/// What lies beside the share, to see that it stays as it was.
fn outside(guest: &Guest) -> BTreeMap<String, (u64, u32, u32, i64)> {
    fs::read_dir(guest.directory.path())
        .unwrap()
        .map(|entry| entry.unwrap())
        .filter(|entry| entry.file_name() != "share")
        .map(|entry| {
            let meta = fs::symlink_metadata(entry.path()).unwrap();
            let name = entry.file_name().into_string().unwrap();
            (
                name,
                (meta.ino(), meta.mode(), meta.uid(), meta.ctime_nsec()),
            )
        })
        .collect()
}

#[test]
fn names_lead_nowhere_but_into_their_directory() {
    let guest = Guest::new(EXCLUSIVE);
    fs::write(guest.directory.path().join("secret"), "secret").unwrap();
    let node = guest.file(guest.share, "file", b"");
    let before = outside(&guest);
    for name in [
        "..",
        ".",
        "",
        "/",
        "/etc/passwd",
        "../secret",
        "a/../../secret",
        "file/",
    ] {
        let share = guest.share;
        for (opcode, body) in [
            (LOOKUP, record![name]),
            (MKDIR, record![0o755_u32, 0_u32, name]),
            (
                MKNOD,
                record![libc::S_IFREG | 0o644, 0_u32, 0_u32, 0_u32, name],
            ),
            (SYMLINK, record![name, "target"]),
            (LINK, record![node, name]),
            (UNLINK, record![name]),
            (RMDIR, record![name]),
            (RENAME, record![share, "file", name]),
            (RENAME, record![share, name, "other"]),
            (
                CREATE,
                record![libc::O_RDWR.cast_unsigned(), 0o644_u32, 0_u32, 0_u32, name],
            ),
        ] {
            assert_eq!(
                guest.call(opcode, share, &body),
                Err(libc::EINVAL),
                "{opcode} {name:?}"
            );
            assert!(guest.call(opcode, ROOT, &body).is_err());
        }
    }
    assert_eq!(outside(&guest), before);
}

#[test]
fn links_that_point_outside_are_not_followed() {
    let guest = Guest::new(EXCLUSIVE);
    let secret = guest.directory.path().join("secret");
    fs::create_dir(&secret).unwrap();
    fs::write(secret.join("file"), "secret").unwrap();
    symlink(&secret, guest.host("link")).unwrap();
    symlink("/proc/self/root", guest.host("magic")).unwrap();
    let share = guest.share;
    for name in ["link", "magic"] {
        let node = guest.lookup(share, name).unwrap().node;
        assert_eq!(guest.lookup(node, "file"), Err(libc::ENOTDIR));
        assert_eq!(guest.mkdir(node, "new", 0o755, 0), Err(libc::ENOTDIR));
        assert_eq!(
            guest.create(node, "new", libc::O_RDWR, 0o644).map(drop),
            Err(libc::ENOTDIR)
        );
        assert_eq!(guest.unlink(node, "file"), Err(libc::ENOTDIR));
        assert_eq!(
            guest.rename((node, "file"), (share, "file"), 0),
            Err(libc::ENOTDIR)
        );
        assert_eq!(guest.call(OPENDIR, node, &[0; 8]), Err(libc::ENOTDIR));
        let tmpfile = record![libc::O_RDWR.cast_unsigned(), 0o644_u32, 0_u32, 0_u32, "x"];
        assert_eq!(guest.call(TMPFILE, node, &tmpfile), Err(libc::ENOTDIR));
        // A link of that name is in the way of a new file, and not the way to one.
        assert_eq!(
            guest.create(share, name, libc::O_RDWR, 0o644).map(drop),
            Err(libc::ESTALE)
        );
    }
    let entries = guest.list(share, true, 4096).unwrap();
    let link = entries.iter().find(|entry| entry.name == "link").unwrap();
    assert_eq!(link.entry.unwrap().attr.mode & libc::S_IFMT, libc::S_IFLNK);
    assert_eq!(fs::read_dir(&secret).unwrap().count(), 1);
}

#[test]
fn a_directory_that_becomes_a_link_is_no_way_out() {
    let guest = Guest::new(SHARED);
    let secret = guest.directory.path().join("secret");
    fs::create_dir(&secret).unwrap();
    fs::write(secret.join("canary"), "secret").unwrap();
    let canary = fs::metadata(secret.join("canary")).unwrap().ino();
    let mode = fs::metadata(&secret).unwrap().mode();
    fs::create_dir(guest.host("flip")).unwrap();
    symlink(&secret, guest.host("flop")).unwrap();
    let done = AtomicBool::new(false);
    std::thread::scope(|scope| {
        // Exchanges the directory and the link for as long as the guest tries.
        let flipper = scope.spawn(|| {
            let share = fs::File::open(guest.host("")).unwrap();
            while !done.load(Ordering::Relaxed) {
                rustix::fs::renameat_with(
                    &share,
                    "flip",
                    &share,
                    "flop",
                    rustix::fs::RenameFlags::EXCHANGE,
                )
                .unwrap();
            }
        });
        for round in 0..500 {
            let Ok(entry) = guest.lookup(guest.share, "flip") else {
                continue;
            };
            if let Ok(found) = guest.lookup(entry.node, "canary") {
                assert_ne!(found.attr.ino, canary);
            }
            if let Ok((_, fh)) =
                guest.create(entry.node, &format!("new-{round}"), libc::O_RDWR, 0o644)
            {
                guest.release(fh);
            }
            let _ = guest.mkdir(entry.node, "dir", 0o755, 0);
            let _ = guest.unlink(entry.node, "canary");
            let _ = guest.setattr(
                entry.node,
                &Setattr {
                    valid: 1,
                    mode: 0o700,
                    ..Setattr::default()
                },
            );
            let _ = guest.setxattr(entry.node, "trusted.mark", b"x");
            let _ = guest.list(entry.node, true, 4096);
            guest.forget(entry.node, 2);
        }
        done.store(true, Ordering::Relaxed);
        flipper.join().unwrap();
    });
    let left: Vec<_> = fs::read_dir(&secret)
        .unwrap()
        .map(|e| e.unwrap().file_name())
        .collect();
    assert_eq!(left, ["canary"]);
    assert_eq!(fs::metadata(&secret).unwrap().mode(), mode);
}

#[test]
fn shares_are_apart() {
    let guest = Guest::new(EXCLUSIVE);
    let other = guest.directory.path().join("other");
    fs::create_dir(&other).unwrap();
    guest
        .server
        .share("other", guest::path_fd(&other), SHARED)
        .unwrap();
    // The same directory once more, with fewer rights.
    guest
        .server
        .share("again", guest::path_fd(&guest.host("")), READ_ONLY)
        .unwrap();
    let other = guest.lookup(ROOT, "other").unwrap().node;
    let again = guest.lookup(ROOT, "again").unwrap().node;
    assert_ne!(again, guest.share);
    let node = guest.file(guest.share, "file", b"");
    assert_eq!(guest.link(node, other, "file"), Err(libc::EXDEV));
    assert_eq!(
        guest.rename((guest.share, "file"), (other, "file"), 0),
        Err(libc::EXDEV)
    );
    let same = guest.lookup(again, "file").unwrap().node;
    assert_ne!(same, node);
    assert_eq!(guest.open(same, libc::O_RDWR), Err(libc::EROFS));
}

#[test]
fn a_read_only_share_is_not_changed_by_anything() {
    let guest = Guest::new(READ_ONLY);
    fs::write(guest.host("file"), "content").unwrap();
    fs::create_dir(guest.host("dir")).unwrap();
    let share = guest.share;
    let node = guest.lookup(share, "file").unwrap().node;
    let flags = libc::O_RDWR.cast_unsigned();
    let erofs = Err(libc::EROFS);
    for (opcode, body) in [
        (MKDIR, record![0o755_u32, 0_u32, "x"]),
        (
            MKNOD,
            record![libc::S_IFREG | 0o644, 0_u32, 0_u32, 0_u32, "x"],
        ),
        (SYMLINK, record!["x", "target"]),
        (LINK, record![node, "x"]),
        (UNLINK, record!["file"]),
        (RMDIR, record!["dir"]),
        (RENAME, record![share, "file", "x"]),
        (CREATE, record![flags, 0o644_u32, 0_u32, 0_u32, "x"]),
        (TMPFILE, record![flags, 0o644_u32, 0_u32, 0_u32, "x"]),
        (REMOVEXATTR, record!["user.x"]),
    ] {
        assert_eq!(guest.call(opcode, share, &body), erofs, "{opcode}");
    }
    assert_eq!(guest.setxattr(node, "user.x", b""), Err(libc::EROFS));
    for valid in [0, 1, 2, 4, 8, 16, 32] {
        let set = Setattr {
            valid,
            ..Setattr::default()
        };
        assert_eq!(guest.setattr(node, &set), Err(libc::EROFS), "{valid}");
    }
    for flags in [libc::O_WRONLY, libc::O_RDWR, libc::O_RDONLY | libc::O_TRUNC] {
        assert_eq!(guest.open(node, flags), Err(libc::EROFS));
    }
    let fh = guest.open(node, libc::O_RDONLY).unwrap();
    assert_eq!(guest.read(fh, 0, 10).unwrap(), b"content");
    assert_eq!(guest.write(fh, 0, b"x"), Err(libc::EBADF));
    let allocate = record![fh, 0_u64, 10_u64, 0_u32, 0_u32];
    assert_eq!(guest.call(FALLOCATE, node, &allocate), Err(libc::EBADF));
    let size = Setattr {
        valid: 1 << 3 | 1 << 6,
        fh,
        ..Setattr::default()
    };
    assert_eq!(guest.setattr(node, &size), Err(libc::EROFS));
    assert_eq!(guest.list(share, true, 4096).unwrap().len(), 4);
}

#[test]
fn mounts_below_a_share_are_crossed_and_announced() {
    // In a mount namespace of its own; the thread ends with the test.
    nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWNS).unwrap();
    let private = MsFlags::MS_PRIVATE | MsFlags::MS_REC;
    mount(None::<&str>, "/", None::<&str>, private, None::<&str>).unwrap();
    let guest = Guest::new(EXCLUSIVE);
    fs::create_dir(guest.host("tmp")).unwrap();
    mount(
        Some("none"),
        &guest.host("tmp"),
        Some("tmpfs"),
        MsFlags::empty(),
        None::<&str>,
    )
    .unwrap();
    fs::write(guest.host("tmp/inside"), "inside").unwrap();
    let mounted = guest.lookup(guest.share, "tmp").unwrap();
    assert_eq!(mounted.attr.flags, 1, "a submount");
    let inside = guest.lookup(mounted.node, "inside").unwrap();
    assert_eq!(inside.attr.flags, 0);
    let fh = guest.open(inside.node, libc::O_RDONLY).unwrap();
    assert_eq!(guest.read(fh, 0, 10).unwrap(), b"inside");
    let entries = guest.list(guest.share, true, 4096).unwrap();
    let entry = entries.iter().find(|entry| entry.name == "tmp").unwrap();
    assert!(entry.entry.is_none(), "left to the guest to look up");
    assert_eq!(guest.link(inside.node, guest.share, "x"), Err(libc::EXDEV));
    assert_eq!(
        guest.call(RMDIR, guest.share, &record!["tmp"]),
        Err(libc::EBUSY)
    );
    // Without the feature nothing is announced.
    guest.init(1 << 30).unwrap();
    assert_eq!(guest.lookup(guest.share, "tmp").unwrap().attr.flags, 0);
    umount2(&guest.host("tmp"), MntFlags::MNT_DETACH).unwrap();
}

#[test]
fn files_of_a_lower_layer_change_for_those_who_have_them_open() {
    nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWNS).unwrap();
    let private = MsFlags::MS_PRIVATE | MsFlags::MS_REC;
    mount(None::<&str>, "/", None::<&str>, private, None::<&str>).unwrap();
    let guest = Guest::new(EXCLUSIVE);
    let layers = tempfile::tempdir().unwrap();
    for layer in ["lower", "upper", "work"] {
        fs::create_dir(layers.path().join(layer)).unwrap();
    }
    for name in ["written", "truncated"] {
        fs::write(layers.path().join("lower").join(name), "old").unwrap();
    }
    let path = layers.path().display();
    let options = format!("lowerdir={path}/lower,upperdir={path}/upper,workdir={path}/work");
    let none = MsFlags::empty();
    mount(
        Some("o"),
        &guest.host(""),
        Some("overlay"),
        none,
        Some(&*options),
    )
    .unwrap();
    let server = &guest.server;
    server
        .share("rootfs", guest::path_fd(&guest.host("")), EXCLUSIVE)
        .unwrap();
    let root = guest.lookup(ROOT, "rootfs").unwrap().node;

    let node = guest.lookup(root, "written").unwrap().node;
    let reader = guest.open(node, libc::O_RDONLY).unwrap();
    assert_eq!(guest.read(reader, 0, 10).unwrap(), b"old");
    let writer = guest.open(node, libc::O_RDWR).unwrap();
    guest.write(writer, 0, b"new").unwrap();
    assert_eq!(guest.read(reader, 0, 10).unwrap(), b"new");
    assert_eq!(
        guest.lookup(root, "written").unwrap().node,
        node,
        "the same file"
    );
    guest.release(reader);
    guest.open(node, libc::O_RDWR).unwrap();
    assert_eq!(guest.read(reader, 0, 10), Err(libc::EBADF));

    let node = guest.lookup(root, "truncated").unwrap().node;
    let reader = guest.open(node, libc::O_RDONLY).unwrap();
    let size = Setattr {
        valid: 1 << 3,
        size: 1,
        ..Setattr::default()
    };
    guest.setattr(node, &size).unwrap();
    assert_eq!(guest.read(reader, 0, 10).unwrap(), b"o");
    guest.server.unshare("rootfs").unwrap();
    umount2(&guest.host(""), MntFlags::MNT_DETACH).unwrap();
}

/// One step of a guest that tries things.
#[derive(Debug, Clone)]
struct Step {
    what: u8,
    parent: usize,
    other: usize,
    name: usize,
    new_name: usize,
}

fn step() -> impl Strategy<Value = Step> {
    (
        0..12_u8,
        any::<usize>(),
        any::<usize>(),
        any::<usize>(),
        any::<usize>(),
    )
        .prop_map(|(what, parent, other, name, new_name)| Step {
            what,
            parent,
            other,
            name,
            new_name,
        })
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 40, ..ProptestConfig::default() })]

    #[test]
    fn no_sequence_of_operations_escapes(steps in proptest::collection::vec(step(), 1..80)) {
        let guest = Guest::new(EXCLUSIVE);
        let secret = guest.directory.path().join("secret");
        fs::create_dir(&secret).unwrap();
        fs::write(secret.join("canary"), "secret").unwrap();
        let before = outside(&guest);
        let canary = fs::metadata(secret.join("canary")).unwrap();
        let names = ["a", "b", "c", "..", ".", "secret", "canary", "a/b", "../secret", ""];
        let targets = ["..", "../secret", "../../", "/", "/proc/self/cwd", "a"];
        let mut nodes = vec![ROOT, guest.share];
        for step in steps {
            let parent = nodes[step.parent % nodes.len()];
            let other = nodes[step.other % nodes.len()];
            let name = names[step.name % names.len()];
            let new_name = names[step.new_name % names.len()];
            let target = targets[step.new_name % targets.len()];
            let found = match step.what {
                0 => guest.lookup(parent, name).ok(),
                1 => guest.mkdir(parent, name, 0o755, 0).ok(),
                2 => guest.symlink(parent, name, target).ok(),
                3 => guest.link(other, parent, name).ok(),
                4 => guest.create(parent, name, libc::O_RDWR, 0o644).ok().map(|(entry, _)| entry),
                5 => guest.rename((parent, name), (other, new_name), 0).ok().and(None),
                6 => guest.rename((parent, name), (other, new_name), 2).ok().and(None),
                7 => guest.unlink(parent, name).ok().and(None),
                8 => guest.call(RMDIR, parent, &record![name]).ok().and(None),
                9 => guest.setattr(parent, &Setattr { valid: 7, mode: 0o777, uid: 5, gid: 5, ..Setattr::default() }).ok().and(None),
                10 => guest.setxattr(parent, "trusted.mark", b"x").ok().and(None),
                _ => guest.list(parent, true, 4096).ok().and_then(|entries| entries.iter().filter_map(|entry| entry.entry).next_back()),
            };
            if let Some(entry) = found {
                prop_assert_ne!(entry.attr.ino, canary.ino());
                nodes.push(entry.node);
            }
        }
        prop_assert_eq!(outside(&guest), before);
        prop_assert_eq!(fs::metadata(secret.join("canary")).unwrap().ctime_nsec(), canary.ctime_nsec());
        prop_assert_eq!(fs::read_dir(&secret).unwrap().count(), 1);
    }
}

#[test]
fn an_unshared_directory_is_out_of_reach_by_every_old_handle() {
    let guest = Guest::new(SHARED);
    let directory = guest.mkdir(guest.share, "dir", 0o755, 0).unwrap().node;
    let reply = guest.call(OPENDIR, directory, &[0; 8]).unwrap();
    let fh = u64_at(&reply, 0);
    guest.server.unshare("share").unwrap();
    assert!(guest.list_some(directory, fh, true, 0, 4096).is_err());
    assert_eq!(guest.mkdir(directory, "x", 0o755, 0), Err(libc::ESTALE));
    assert!(!guest.host("dir/x").exists());
}
