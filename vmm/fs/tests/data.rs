//! What is in files: reading, writing, sizes, holes. Needs root.
#![allow(missing_docs, reason = "the names of the tests say it")]

mod guest;

use std::fs;

use guest::{
    COPY_FILE_RANGE, EXCLUSIVE, FALLOCATE, FSYNC, Guest, LSEEK, OPENDIR, SHARED, SYNCFS, Setattr,
    u32_at, u64_at,
};

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
