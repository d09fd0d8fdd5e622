//! What a container notices of others that use the same files.

use std::fs::{File, OpenOptions};
use std::io::Write;
use std::path::Path;
use std::ptr;
use std::sync::atomic::{AtomicU8, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use nix::sys::inotify::{AddWatchFlags, InitFlags, Inotify};
use rustix::fs::{FlockOperation, flock};
use rustix::mm::{MapFlags, ProtFlags, mmap};

/// For the other process to come.
const LIMIT: Duration = Duration::from_secs(120);

const LENGTH: usize = 4096;

/// Prints what happens to a file or in a directory, an event a line, until it is killed.
pub fn events(path: &Path) -> Result<()> {
    let inotify = Inotify::init(InitFlags::empty())?;
    inotify
        .add_watch(path, AddWatchFlags::IN_ALL_EVENTS)
        .with_context(|| format!("watch {}", path.display()))?;
    say("watching")?;
    loop {
        for event in inotify.read_events()? {
            let name = event.name.unwrap_or_default();
            say(&format!("{:?} {}", event.mask, name.display()))?;
        }
    }
}

/// Locks a file, and changes it in memory until [`answer`] has done so in another process.
pub fn call(path: &Path) -> Result<()> {
    let file = File::create_new(path)?;
    file.set_len(LENGTH as u64)?;
    drop(file);
    let file = open(path)?;
    flock(&file, FlockOperation::NonBlockingLockExclusive)?;
    let bytes = map(&file)?;
    bytes[0].store(1, Ordering::SeqCst);
    say("called")?;
    wait_for(&bytes[1])?;
    say("answered")
}

/// Finds the file locked and changed in memory.
pub fn answer(path: &Path) -> Result<()> {
    let file = open(path)?;
    ensure!(
        flock(&file, FlockOperation::NonBlockingLockExclusive).is_err(),
        "two have locked the file"
    );
    let bytes = map(&file)?;
    wait_for(&bytes[0])?;
    bytes[1].store(1, Ordering::SeqCst);
    Ok(())
}

fn open(path: &Path) -> Result<File> {
    let file = OpenOptions::new().read(true).write(true).open(path);
    file.with_context(|| format!("open {}", path.display()))
}

/// The file's first page, for as long as the process lives.
fn map(file: &File) -> Result<&'static [AtomicU8]> {
    let (rights, kind) = (ProtFlags::READ | ProtFlags::WRITE, MapFlags::SHARED);
    // SAFETY: the kernel chooses a range that nothing else uses.
    let start = unsafe { mmap(ptr::null_mut(), LENGTH, rights, kind, file, 0) }?;
    // SAFETY: the range has this length and is never unmapped; all access to it is atomic.
    Ok(unsafe { std::slice::from_raw_parts(start.cast(), LENGTH) })
}

fn wait_for(byte: &AtomicU8) -> Result<()> {
    let begun = Instant::now();
    while byte.load(Ordering::SeqCst) == 0 {
        ensure!(begun.elapsed() < LIMIT, "the other process does not come");
        thread::sleep(Duration::from_millis(10));
    }
    Ok(())
}

fn say(line: &str) -> Result<()> {
    let mut out = std::io::stdout();
    writeln!(out, "{line}")?;
    Ok(out.flush()?)
}
