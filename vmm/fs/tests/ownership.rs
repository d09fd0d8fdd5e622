//! Whose new files are and what they may become: as on a local file system. Needs root.
#![allow(missing_docs, reason = "the names of the tests say it")]

mod guest;

use std::fs;

use guest::{CREATE, EXCLUSIVE, Entry, Guest, RENAME2, Setattr, u64_at};

/// A POSIX ACL as an extended attribute: version 2, then tag, permissions and id of each entry.
fn acl(entries: &[(u16, u16, u32)]) -> Vec<u8> {
    let mut bytes = 2_u32.to_le_bytes().to_vec();
    for (tag, permissions, id) in entries {
        bytes.extend(tag.to_le_bytes());
        bytes.extend(permissions.to_le_bytes());
        bytes.extend(id.to_le_bytes());
    }
    bytes
}

const NONE: u32 = u32::MAX;

fn create(guest: &Guest, parent: u64, name: &str, mode: u32, umask: u32) -> (Entry, u64) {
    let flags = (libc::O_RDWR | libc::O_EXCL).cast_unsigned();
    let body = record![flags, libc::S_IFREG | mode, umask, 0_u32, name];
    let reply = guest.call(CREATE, parent, &body).unwrap();
    (Entry::parse(&reply[..128]), u64_at(&reply, 128))
}

#[test]
fn new_files_belong_to_the_caller_and_have_its_umask() {
    let mut guest = Guest::new(EXCLUSIVE);
    // What the directory allows is the guest's to check: a process of the guest may have the
    // capability to ignore it.
    (guest.uid, guest.gid) = (1000, 2000);
    let made = [
        guest.mkdir(guest.share, "dir", 0o777, 0o027).unwrap(),
        guest.symlink(guest.share, "link", "x").unwrap(),
        guest
            .mknod(guest.share, "pipe", libc::S_IFIFO | 0o666, 0)
            .unwrap(),
        guest
            .mknod(guest.share, "null", libc::S_IFCHR | 0o666, 0x103)
            .unwrap(),
        create(&guest, guest.share, "file", 0o666, 0o077).0,
    ];
    for entry in made {
        assert_eq!((entry.attr.uid, entry.attr.gid), (1000, 2000), "{entry:?}");
    }
    assert_eq!(made[0].attr.mode & 0o7777, 0o750);
    assert_eq!(made[4].attr.mode & 0o7777, 0o600);
    // The next caller is somebody else, and the thread is itself again.
    (guest.uid, guest.gid) = (0, 0);
    let entry = create(&guest, guest.share, "root", 0o666, 0).0;
    assert_eq!(
        (entry.attr.uid, entry.attr.gid, entry.attr.mode & 0o777),
        (0, 0, 0o666)
    );
    (guest.uid, guest.gid) = (u32::MAX, 0);
    assert_eq!(
        guest.mkdir(guest.share, "nobody", 0o755, 0),
        Err(libc::EINVAL)
    );
    assert!(!guest.host("nobody").exists());
}

#[test]
fn a_whiteout_belongs_to_the_caller() {
    let mut guest = Guest::new(EXCLUSIVE);
    guest.file(guest.share, "file", b"");
    (guest.uid, guest.gid) = (1000, 2000);
    let body = record![guest.share, libc::RENAME_WHITEOUT, 0_u32, "file", "moved"];
    guest.call(RENAME2, guest.share, &body).unwrap();
    let whiteout = guest.lookup(guest.share, "file").unwrap().attr;
    assert_eq!((whiteout.uid, whiteout.gid), (1000, 2000));
}

#[test]
fn a_set_group_id_directory_hands_down_its_group() {
    let mut guest = Guest::new(EXCLUSIVE);
    let directory = guest.mkdir(guest.share, "dir", 0o755, 0).unwrap().node;
    let set = Setattr {
        valid: 0b101,
        mode: 0o2777,
        gid: 3000,
        ..Setattr::default()
    };
    guest.setattr(directory, &set).unwrap();
    (guest.uid, guest.gid) = (1000, 2000);
    let below = guest.mkdir(directory, "below", 0o755, 0).unwrap();
    assert_eq!((below.attr.uid, below.attr.gid), (1000, 3000));
    assert_eq!(below.attr.mode & 0o7777, 0o2755);
    let file = create(&guest, directory, "file", 0o644, 0).0;
    assert_eq!((file.attr.uid, file.attr.gid), (1000, 3000));
    assert_eq!(file.attr.mode & 0o7777, 0o644);
}

#[test]
fn a_default_acl_takes_the_place_of_the_umask() {
    let guest = Guest::new(EXCLUSIVE);
    let directory = guest.mkdir(guest.share, "dir", 0o755, 0).unwrap().node;
    // u::rwx,u:1234:rwx,g::rwx,m::rwx,o::r-x
    let default = acl(&[
        (1, 7, NONE),
        (2, 7, 1234),
        (4, 7, NONE),
        (0x10, 7, NONE),
        (0x20, 5, NONE),
    ]);
    guest
        .setxattr(directory, "system.posix_acl_default", &default)
        .unwrap();
    let (file, _) = create(&guest, directory, "file", 0o666, 0o077);
    assert_eq!(file.attr.mode & 0o7777, 0o664);
    let inherited = guest
        .getxattr(file.node, "system.posix_acl_access", 4096)
        .unwrap();
    assert!(inherited.windows(4).any(|id| id == 1234_u32.to_le_bytes()));
    let below = guest.mkdir(directory, "below", 0o777, 0o077).unwrap();
    assert_eq!(below.attr.mode & 0o777, 0o775);
    assert_eq!(
        guest
            .getxattr(below.node, "system.posix_acl_default", 4096)
            .unwrap(),
        default
    );
    assert_eq!(
        guest.getxattr(guest.share, "system.posix_acl_access", 4096),
        Err(libc::ENODATA)
    );
}

#[test]
fn setting_an_acl_clears_set_group_id_when_the_guest_says_so() {
    let guest = Guest::new(EXCLUSIVE);
    let node = guest.file(guest.share, "file", b"");
    let access = acl(&[(1, 7, NONE), (4, 5, NONE), (0x20, 5, NONE)]);
    let size = u32::try_from(access.len()).unwrap();
    for (flags, expected) in [(0_u32, 0o2755), (1, 0o755)] {
        let set = Setattr {
            valid: 1,
            mode: 0o2755,
            ..Setattr::default()
        };
        guest.setattr(node, &set).unwrap();
        let name = "system.posix_acl_access";
        let body = record![size, 0_u32, flags, 0_u32, name, &access[..]];
        guest.call(guest::SETXATTR, node, &body).unwrap();
        assert_eq!(guest.getattr(node).unwrap().mode & 0o7777, expected);
    }
}

#[test]
fn writing_clears_set_user_id_unless_the_caller_may_keep_it() {
    let guest = Guest::new(EXCLUSIVE);
    let node = guest.file(guest.share, "file", b"content");
    let fh = guest.open(node, libc::O_RDWR).unwrap();
    let arm = || {
        let set = Setattr {
            valid: 1,
            mode: 0o6755,
            ..Setattr::default()
        };
        assert_eq!(guest.setattr(node, &set).unwrap().mode & 0o7777, 0o6755);
    };
    let mode = || guest.getattr(node).unwrap().mode & 0o7777;
    arm();
    guest.write(fh, 0, b"x").unwrap();
    assert_eq!(mode(), 0o6755, "the guest's root keeps them");
    guest.write_with(fh, 0, b"x", 1 << 2, 0).unwrap();
    assert_eq!(mode(), 0o755);
    arm();
    let truncate = |kill: u32| Setattr {
        valid: (1 << 3) | kill,
        size: 3,
        ..Setattr::default()
    };
    guest.setattr(node, &truncate(0)).unwrap();
    assert_eq!(mode(), 0o6755);
    guest.setattr(node, &truncate(1 << 11)).unwrap();
    assert_eq!(mode(), 0o755);
    arm();
    let flags = (libc::O_WRONLY | libc::O_TRUNC).cast_unsigned();
    guest
        .call(guest::OPEN, node, &record![flags, 0_u32])
        .unwrap();
    assert_eq!(mode(), 0o6755);
    guest
        .call(guest::OPEN, node, &record![flags, 1_u32])
        .unwrap();
    assert_eq!(mode(), 0o755);
    // File capabilities go with any write.
    let capability = [1_u32, 0, 0, 0, 0].map(u32::to_le_bytes).concat();
    let capability = [&(0x0200_0000_u32).to_le_bytes()[..], &capability[4..]].concat();
    guest
        .setxattr(node, "security.capability", &capability)
        .unwrap();
    guest.write(fh, 0, b"x").unwrap();
    assert_eq!(
        guest.getxattr(node, "security.capability", 64),
        Err(libc::ENODATA)
    );
}

#[test]
fn allocating_clears_set_user_id_for_everybody_but_root() {
    let mut guest = Guest::new(EXCLUSIVE);
    let node = guest.file(guest.share, "file", b"content");
    let fh = guest.open(node, libc::O_RDWR).unwrap();
    for (uid, expected) in [(0, 0o6755), (1000, 0o755)] {
        let set = Setattr {
            valid: 1,
            mode: 0o6755,
            ..Setattr::default()
        };
        guest.setattr(node, &set).unwrap();
        guest.uid = uid;
        let body = record![fh, 0_u64, 100_u64, 0_u32, 0_u32];
        guest.call(guest::FALLOCATE, node, &body).unwrap();
        assert_eq!(guest.getattr(node).unwrap().mode & 0o7777, expected);
    }
    assert!(fs::metadata(guest.host("file")).unwrap().len() == 100);
}
