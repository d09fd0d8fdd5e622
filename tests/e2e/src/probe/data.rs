//! What happens to the contents of files: holes, large sizes, shared mappings, locks, copies,
//! notifications.

use std::fs::{self, File, OpenOptions};
use std::io::{Read, Seek, SeekFrom, Write};
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt};
use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result, ensure};
use nix::fcntl::{FcntlArg, Flock, FlockArg, fcntl};
use rustix::fs::{FallocateFlags, fallocate};
use rustix::mm::{MapFlags, MsyncFlags, ProtFlags, mmap, msync, munmap};

use super::{Answer, outcome};
use crate::pattern::{Pattern, compare};

const GIB: u64 = 1 << 30;

pub(super) const QUESTIONS: [(&str, Answer); 12] = [
    ("holes", holes),
    ("files over 4 GiB", large_files),
    ("shared mappings", shared_mappings),
    ("locks on open files", locks_on_open_files),
    ("locks of processes", locks_of_processes),
    ("appending", appending),
    ("odd sizes", odd_sizes),
    ("copies in the kernel", copies_in_the_kernel),
    ("syncing", syncing),
    ("notifications", notifications),
    ("changes by another process", changes_by_another_process),
    ("file system", file_system),
];

fn create(path: &Path) -> Result<File> {
    let mut options = OpenOptions::new();
    Ok(options.read(true).write(true).create_new(true).open(path)?)
}

fn holes(dir: &Path) -> Result<String> {
    let file = create(&dir.join("file"))?;
    file.set_len(8 << 20)?;
    file.write_all_at(&[1; 4096], 4 << 20)?;
    let blocks = file.metadata()?.blocks();
    let seek = |from| {
        rustix::fs::seek(&file, from)
            .map_or_else(|error| outcome::<(), _>(Err(error)), |at| at.to_string())
    };
    let data = seek(rustix::fs::SeekFrom::Data(0));
    let hole = seek(rustix::fs::SeekFrom::Hole(4 << 20));
    let past = seek(rustix::fs::SeekFrom::Data(5 << 20));
    let mut zeros = [1; 100];
    file.read_exact_at(&mut zeros, 1 << 20)?;
    let reserve = outcome(fallocate(&file, FallocateFlags::KEEP_SIZE, 0, 16 << 20));
    let punch = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
    let punched = outcome(fallocate(&file, punch, 4 << 20, 4096));
    let mut byte = [9];
    file.read_exact_at(&mut byte, 4 << 20)?;
    let zeroed = outcome(fallocate(&file, FallocateFlags::ZERO_RANGE, 0, 4096));
    let collapsed = outcome(fallocate(&file, FallocateFlags::COLLAPSE_RANGE, 0, 4096));
    let extended = outcome(fallocate(&file, FallocateFlags::empty(), 0, 20 << 20));
    Ok(format!(
        "{blocks} blocks, data at {data}, hole at {hole}, past {past}, zeros {}, reserve {reserve}, \
         punch {punched} {byte:?}, zero {zeroed}, collapse {collapsed}, extend {extended} to {}",
        zeros.iter().all(|&byte| byte == 0),
        file.metadata()?.size()
    ))
}

fn large_files(dir: &Path) -> Result<String> {
    let mut file = create(&dir.join("file"))?;
    file.write_all_at(b"start", 0)?;
    file.write_all_at(b"beyond", 4 * GIB - 3)?;
    file.write_all_at(b"end", 6 * GIB)?;
    let metadata = file.metadata()?;
    let mut across = [0; 6];
    file.read_exact_at(&mut across, 4 * GIB - 3)?;
    file.seek(SeekFrom::End(-3))?;
    let mut end = String::new();
    file.read_to_string(&mut end)?;
    let small = metadata.blocks() < 1000;
    let reopened = fs::metadata(dir.join("file"))?.size();
    file.set_len(4 * GIB + 1)?;
    let cut = file.metadata()?.size();
    let far = outcome(file.set_len(1 << 43));
    file.set_len(0)?;
    Ok(format!(
        "size {} {reopened}, few blocks {small}, across {}, {end}, cut to {cut}, 8 TiB {far}",
        metadata.size(),
        across.escape_ascii()
    ))
}

fn shared_mappings(dir: &Path) -> Result<String> {
    let path = dir.join("file");
    let file = create(&path)?;
    file.set_len(2 * 4096 + 100)?;
    let map = |flags| {
        // SAFETY: a new mapping at an address that the kernel chooses; the file stays at least
        // this long until munmap below.
        unsafe {
            mmap(
                std::ptr::null_mut(),
                3 * 4096,
                ProtFlags::READ | ProtFlags::WRITE,
                flags,
                &file,
                0,
            )
        }
    };
    let shared = map(MapFlags::SHARED)?.cast::<u8>();
    let second = map(MapFlags::SHARED)?.cast::<u8>();
    let private = map(MapFlags::PRIVATE)?.cast::<u8>();
    let store = |base: *mut u8, at: usize, value: u8| {
        // SAFETY: `base` is one of the mappings above and `at` lies within the file's size.
        unsafe { base.add(at).write_volatile(value) }
    };
    let load = |base: *mut u8, at: usize| -> u8 {
        // SAFETY: as for `store`.
        unsafe { base.add(at).read_volatile() }
    };
    let mut byte = [0];
    store(shared, 0, 1);
    file.read_exact_at(&mut byte, 0)?;
    let by_read = byte[0];
    file.write_all_at(&[2], 5000)?;
    let by_write = (load(shared, 5000), load(second, 5000));
    store(private, 1, 3);
    let kept_private = (load(private, 1), load(shared, 1));
    store(shared, 8200, 4);
    // SAFETY: exactly the mapping made above.
    let synced = outcome(unsafe { msync(shared.cast(), 3 * 4096, MsyncFlags::SYNC) });
    let on_disk = fs::read(&path)?;
    let own = std::env::current_exe()?;
    ensure!(
        Command::new(own)
            .args(["probe", "overwrite"])
            .arg(&path)
            .status()?
            .success()
    );
    let by_another = load(shared, 0);
    // It stays valid when the file is gone.
    fs::remove_file(&path)?;
    store(shared, 2, 5);
    let unlinked = load(second, 2);
    for base in [shared, second, private] {
        // SAFETY: exactly the mappings made above, not used after this.
        unsafe { munmap(base.cast(), 3 * 4096) }?;
    }
    Ok(format!(
        "read {by_read}, write {by_write:?}, private {kept_private:?}, synced {synced} {:?} of {}, \
         another process {by_another}, unlinked {unlinked}",
        on_disk.get(8200),
        on_disk.len()
    ))
}

/// The other side of [`shared_mappings`] and [`changes_by_another_process`].
pub(super) fn overwrite_as_another(file: &Path) -> Result<()> {
    OpenOptions::new().write(true).open(file)?.write_all(b"Z")?;
    Ok(())
}

fn locks_on_open_files(dir: &Path) -> Result<String> {
    let path = dir.join("file");
    let open = || {
        OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .open(&path)
    };
    let try_lock = |file: File, kind| {
        Flock::lock(file, kind).map_err(|(_, error)| std::io::Error::from(error))
    };
    let exclusive = try_lock(open()?, FlockArg::LockExclusiveNonblock)?;
    let second = outcome(try_lock(open()?, FlockArg::LockSharedNonblock));
    drop(exclusive);
    let shared = try_lock(open()?, FlockArg::LockSharedNonblock)?;
    let also_shared = outcome(try_lock(open()?, FlockArg::LockSharedNonblock));
    drop(shared);
    let (first, other) = (open()?, open()?);
    let range = lock(libc::F_WRLCK, 10, 10);
    let set = |file: &File, range: libc::flock| {
        outcome(fcntl(file, FcntlArg::F_OFD_SETLK(&range)).map_err(std::io::Error::from))
    };
    let (taken, conflict) = (set(&first, range), set(&other, lock(libc::F_RDLCK, 15, 1)));
    let beside = set(&other, lock(libc::F_WRLCK, 20, 0));
    let unlocked = set(&first, lock(libc::F_UNLCK, 0, 0));
    let now_free = set(&other, range);
    Ok(format!(
        "flock {second}, shared {also_shared}, open file {taken}, conflict {conflict}, beside \
         {beside}, unlocked {unlocked} {now_free}"
    ))
}

fn lock(kind: i32, start: i64, length: i64) -> libc::flock {
    libc::flock {
        l_type: i16::try_from(kind).unwrap_or(i16::MAX),
        l_whence: 0,
        l_start: start,
        l_len: length,
        l_pid: 0,
    }
}

fn locks_of_processes(dir: &Path) -> Result<String> {
    let path = dir.join("file");
    let file = create(&path)?;
    fcntl(&file, FcntlArg::F_SETLK(&lock(libc::F_WRLCK, 0, 0)))?;
    let held = Flock::lock(File::open(&path)?, FlockArg::LockExclusiveNonblock)
        .map_err(|(_, error)| std::io::Error::from(error))?;
    let other = || -> Result<String> {
        let output = Command::new(std::env::current_exe()?)
            .args(["probe", "lock"])
            .arg(&path)
            .output()?;
        Ok(String::from_utf8_lossy(&output.stdout)
            .trim_end()
            .to_owned())
    };
    let while_held = other()?;
    drop(held);
    fcntl(&file, FcntlArg::F_SETLK(&lock(libc::F_UNLCK, 0, 0)))?;
    Ok(format!("held: {while_held}; released: {}", other()?))
}

/// The other side of [`locks_of_processes`].
pub(super) fn lock_as_another(path: &Path) -> Result<()> {
    let file = OpenOptions::new().read(true).write(true).open(path)?;
    let mut found = lock(libc::F_WRLCK, 5, 5);
    fcntl(&file, FcntlArg::F_GETLK(&mut found))?;
    let by_parent = i64::from(found.l_pid) == i64::from(std::os::unix::process::parent_id());
    let taken = fcntl(&file, FcntlArg::F_SETLK(&lock(libc::F_WRLCK, 0, 0)));
    let taken = outcome(taken.map_err(std::io::Error::from));
    let whole = Flock::lock(file, FlockArg::LockExclusiveNonblock);
    let whole = outcome(whole.map_err(|(_, error)| std::io::Error::from(error)));
    println!(
        "fcntl {taken} (type {}, of the parent {by_parent}), flock {whole}",
        found.l_type
    );
    Ok(())
}

fn appending(dir: &Path) -> Result<String> {
    let path = dir.join("file");
    let open = || OpenOptions::new().append(true).create(true).open(&path);
    let (mut first, mut second) = (open()?, open()?);
    for _ in 0..50 {
        first.write_all(b"first ")?;
        second.write_all(b"second ")?;
    }
    let content = fs::read_to_string(&path)?;
    Ok(format!(
        "in order {}",
        content == "first second ".repeat(50)
    ))
}

fn odd_sizes(dir: &Path) -> Result<String> {
    const LENGTH: u64 = 3_333_333;
    let path = dir.join("file");
    let pattern = Pattern::new(7, LENGTH).bytes()?;
    let file = create(&path)?;
    // Pieces of every size, from the end to the start, so that the file grows holes and fills them.
    let mut end = pattern.len();
    let mut size = 1;
    while end > 0 {
        let start = end.saturating_sub(size);
        file.write_all_at(&pattern[start..end], u64::try_from(start)?)?;
        end = start;
        size = size * 2 % 100_003;
    }
    compare("the file", &fs::read(&path)?, 7, LENGTH)?;
    let mut piece = vec![0; 77_777];
    file.read_exact_at(&mut piece, 12_345)?;
    ensure!(piece == pattern[12_345..12_345 + 77_777], "a piece differs");
    let short = file.read_at(&mut piece, LENGTH - 10)?;
    let none = file.read_at(&mut piece, LENGTH)?;
    Ok(format!("same, {short} at the end, {none} past it"))
}

fn copies_in_the_kernel(dir: &Path) -> Result<String> {
    let source = create(&dir.join("source"))?;
    source.write_all_at(&Pattern::new(8, 300_000).bytes()?, 0)?;
    let range = create(&dir.join("range"))?;
    let (mut from, mut to) = (0, 0);
    while rustix::fs::copy_file_range(&source, Some(&mut from), &range, Some(&mut to), 1 << 20)? > 0
    {
    }
    compare("copy_file_range", &fs::read(dir.join("range"))?, 8, 300_000)?;
    let sent = create(&dir.join("sent"))?;
    let mut offset = 0;
    while rustix::fs::sendfile(&sent, &source, Some(&mut offset), 1 << 20)? > 0 {}
    compare("sendfile", &fs::read(dir.join("sent"))?, 8, 300_000)?;
    let clone = outcome(rustix::fs::ioctl_ficlone(&sent, &source));
    Ok(format!("same, clone {clone}"))
}

fn syncing(dir: &Path) -> Result<String> {
    let file = create(&dir.join("file"))?;
    file.write_all_at(b"x", 0)?;
    let directory = File::open(dir)?;
    let synchronous = OpenOptions::new()
        .write(true)
        .custom_flags(libc::O_SYNC)
        .open(dir.join("file"))?;
    Ok(format!(
        "file {}, data {}, directory {}, file system {}, O_SYNC {}",
        outcome(file.sync_all()),
        outcome(file.sync_data()),
        outcome(directory.sync_all()),
        outcome(rustix::fs::syncfs(&directory)),
        outcome((&synchronous).write_all(b"y"))
    ))
}

fn notifications(dir: &Path) -> Result<String> {
    use nix::sys::inotify::{AddWatchFlags, InitFlags, Inotify};
    let inotify = Inotify::init(InitFlags::IN_NONBLOCK)?;
    inotify.add_watch(dir, AddWatchFlags::IN_ALL_EVENTS)?;
    let file = dir.join("file");
    fs::write(&file, "x")?;
    fs::rename(&file, dir.join("renamed"))?;
    fs::remove_file(dir.join("renamed"))?;
    fs::create_dir(dir.join("below"))?;
    let events = inotify.read_events().context("no notifications")?;
    let events = events.iter().map(|event| {
        format!(
            "{:?} {}",
            event.mask,
            event.name.as_deref().unwrap_or_default().display()
        )
    });
    Ok(events.collect::<Vec<_>>().join(", "))
}

fn changes_by_another_process(dir: &Path) -> Result<String> {
    let path = dir.join("file");
    let file = create(&path)?;
    file.write_all_at(b"abc", 0)?;
    let mut first = [0; 3];
    file.read_exact_at(&mut first, 0)?;
    let own = std::env::current_exe()?;
    ensure!(
        Command::new(own)
            .args(["probe", "overwrite"])
            .arg(&path)
            .status()?
            .success()
    );
    let mut second = [0; 3];
    file.read_exact_at(&mut second, 0)?;
    let number = file.as_raw_fd();
    let through = fs::read_to_string(format!("/proc/self/fd/{number}"))?;
    Ok(format!(
        "{} {} {through}",
        first.escape_ascii(),
        second.escape_ascii()
    ))
}

fn file_system(dir: &Path) -> Result<String> {
    let found = rustix::fs::statvfs(dir)?;
    Ok(format!(
        "names of {}, blocks of {} {}, some free {}, flags {:?}",
        found.f_namemax,
        found.f_bsize,
        found.f_frsize,
        found.f_bavail > 0 && found.f_ffree > 0,
        found.f_flag
    ))
}
