//! Every kind of request to the file server, served by a thread under its filter.

use std::sync::Arc;

use bulkhead_vmm::{seccomp::Filter, thread};

use crate::{
    guest::{
        BATCH_FORGET, COPY_FILE_RANGE, DESTROY, EXCLUSIVE, FALLOCATE, FSYNC, FSYNCDIR, Guest,
        LSEEK, OFFERED, OPENDIR, READLINK, RELEASEDIR, REMOVEXATTR, RENAME, RMDIR, STATFS, STATX,
        SYNCFS, Setattr, TMPFILE, u64_at,
    },
    record,
};

/// Serves requests for files below `directory`.
pub fn serve(directory: &str) {
    // SAFETY: this is the process's only thread.
    unsafe { std::env::set_var("TMPDIR", directory) };
    let mut guest = Guest::new(EXCLUSIVE);
    (guest.uid, guest.gid) = (1000, 2000);
    let guest = Arc::new(guest);
    Filter::Setup.install().unwrap();
    let (server, client) = (guest.clone(), guest.clone());
    let prepare = move || server.server.prepare_thread();
    let work = move || requests(&client);
    let thread = thread::start("fs".to_owned(), Filter::Fs, prepare, work).unwrap();
    thread.join().unwrap();
    // Its directory cannot be removed from here.
    std::mem::forget(guest);
}

fn requests(guest: &Guest) {
    names(guest);
    attributes(guest);
    content(guest);
    guest.list(guest.share, false, 4096).unwrap();
    guest.list(guest.share, true, 4096).unwrap();
    guest.call(SYNCFS, guest.share, &[0; 8]).unwrap();
    guest.call(STATFS, guest.share, &[]).unwrap();
    guest.call(DESTROY, 0, &[]).unwrap();
    guest.init(OFFERED).unwrap();
}

fn names(guest: &Guest) {
    let share = guest.share;
    let directory = guest.mkdir(share, "directory", 0o777, 0o22).unwrap().node;
    guest
        .mknod(share, "pipe", libc::S_IFIFO | 0o666, 0)
        .unwrap();
    let link = guest.symlink(share, "link", "nowhere").unwrap().node;
    guest.call(READLINK, link, &[]).unwrap();
    let file = guest.file(share, "file", b"content");
    guest.link(file, directory, "other").unwrap();
    let body = record![directory, "other", "moved"];
    guest.call(RENAME, directory, &body).unwrap();
    let (from, to) = ((directory, "moved"), (share, "moved"));
    guest.rename(from, to, libc::RENAME_NOREPLACE).unwrap();
    // Not every file system can.
    let _ = guest.rename(to, from, libc::RENAME_WHITEOUT);
    let _ = guest.unlink(share, "moved");
    let _ = guest.unlink(directory, "moved");
    guest.call(RMDIR, share, &record!["directory"]).unwrap();
    guest.forget(directory, 1);
    guest.tell(BATCH_FORGET, 0, &record![1_u32, 0_u32, link, 1_u64]);
    assert_eq!(guest.lookup(share, "nothing"), Err(libc::ENOENT));
}

fn attributes(guest: &Guest) {
    let file = guest.file(guest.share, "attributes", b"content");
    guest.getattr(file).unwrap();
    let body = record![0_u32, 0_u32, 0_u64, 0_u32, 0_u32];
    guest.call(STATX, file, &body).unwrap();
    let mut set = Setattr {
        // Mode, owner, group, size, both times; set-user-ID goes.
        valid: 0b11_1111 | 1 << 11,
        mode: 0o4755,
        uid: 3000,
        gid: 3000,
        size: 3,
        ..Setattr::default()
    };
    guest.setattr(file, &set).unwrap();
    let fh = guest.open(file, libc::O_RDWR | libc::O_TRUNC).unwrap();
    (set.valid, set.fh) = (1 << 3 | 1 << 6, fh);
    guest.setattr(file, &set).unwrap();
    guest.release(fh);

    // Not every file system has them.
    if guest.setxattr(file, "user.name", b"value").is_ok() {
        guest.getxattr(file, "user.name", 100).unwrap();
        guest
            .call(REMOVEXATTR, file, &record!["user.name"])
            .unwrap();
    }
    guest.listxattr(file, 1000).unwrap();
}

fn content(guest: &Guest) {
    let share = guest.share;
    let body = record![
        libc::O_RDWR.cast_unsigned(),
        libc::S_IFREG | 0o640,
        0_u32,
        0_u32,
        ""
    ];
    let unnamed = u64_at(&guest.call(TMPFILE, share, &body).unwrap(), 128);
    let file = guest.file(share, "data", &[1; 100_000]);
    // A reader is opened again when a writer comes.
    let reader = guest.open(file, libc::O_RDONLY).unwrap();
    let fh = guest.open(file, libc::O_RDWR).unwrap();
    guest
        .write_with(fh, 0, b"end", 1 << 2, libc::O_APPEND)
        .unwrap();
    guest.read(reader, 0, 70_000).unwrap();
    for data_only in [0_u32, 1] {
        guest
            .call(FSYNC, file, &record![fh, data_only, 0_u32])
            .unwrap();
    }
    let body = record![fh, 0_u64, 10_u64, 1_u32, 0_u32];
    guest.call(FALLOCATE, file, &body).unwrap();
    for whence in [libc::SEEK_DATA, libc::SEEK_HOLE] {
        let body = record![fh, 0_u64, whence.cast_unsigned(), 0_u32];
        guest.call(LSEEK, file, &body).unwrap();
    }
    let body = record![fh, 0_u64, file, unnamed, 0_u64, 1000_u64, 0_u64];
    guest.call(COPY_FILE_RANGE, file, &body).unwrap();
    for fh in [unnamed, reader, fh] {
        guest.release(fh);
    }
    let opened = guest.call(OPENDIR, share, &record![0_u32, 0_u32]).unwrap();
    let directory = u64_at(&opened, 0);
    guest
        .call(FSYNCDIR, share, &record![directory, 0_u32, 0_u32])
        .unwrap();
    let body = record![directory, 0_u32, 0_u32, 0_u64];
    guest.call(RELEASEDIR, share, &body).unwrap();
}
