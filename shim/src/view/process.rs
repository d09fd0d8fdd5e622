//! The view's own process: a FUSE server with one thread.

use std::{
    fs::File,
    io::{self, Read, Write},
    os::fd::{AsFd, FromRawFd, OwnedFd},
    process::ExitCode,
};

use bulkhead_fs::{FileServer, ShareOptions};
use nix::sys::{prctl, signal::Signal};
use rustix::{
    fs::{Mode, OFlags, open},
    process::getppid,
    thread::{
        CapabilitySet, LinkNameSpaceType, move_into_link_name_space, set_thread_groups,
        set_thread_res_gid, set_thread_res_uid,
    },
};
use vm_memory::VolatileSlice;

use super::{DEVICE_FD, NAMESPACE_FD, SHARE, TREE_FD};
use crate::{anchor::process::empty_root, privileges};

/// What `ps` shows; the kernel keeps 15 bytes.
const NAME: &std::ffi::CStr = c"bulkhead-view";

/// The longest request: the most that is written at once, and its header.
const BUFFER: usize = (1 << 20) + 8192;

/// What it takes to do to files what their owners may ask for.
const CAPABILITIES: CapabilitySet = CapabilitySet::CHOWN
    .union(CapabilitySet::DAC_OVERRIDE)
    .union(CapabilitySet::DAC_READ_SEARCH)
    .union(CapabilitySet::FOWNER)
    .union(CapabilitySet::FSETID)
    .union(CapabilitySet::SETFCAP)
    .union(CapabilitySet::SETGID)
    .union(CapabilitySet::SETUID);

/// Runs the server of a view until its mount or the shim is gone.
pub fn main() -> ExitCode {
    let [device, tree, namespace] = [DEVICE_FD, TREE_FD, NAMESPACE_FD].map(inherited);
    let parent = getppid();
    let server = match set_up(tree, &namespace) {
        // A shim that ended meanwhile is not the parent any more.
        Ok(server) if getppid() == parent => server,
        Ok(_) => return ExitCode::FAILURE,
        Err(error) => {
            // The log of the shim.
            eprintln!("bulkhead-view: {error}");
            return ExitCode::FAILURE;
        }
    };
    drop(namespace);
    serve(&server, &File::from(device));
    ExitCode::SUCCESS
}

fn inherited(number: i32) -> OwnedFd {
    // SAFETY: the shim starts this process with these descriptors, and nothing else in it knows them.
    unsafe { OwnedFd::from_raw_fd(number) }
}

fn set_up(tree: OwnedFd, namespace: &OwnedFd) -> Result<FileServer, Box<dyn std::error::Error>> {
    let _ = prctl::set_name(NAME);
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let proc_self_fd = open("/proc/self/fd", flags, Mode::empty())?;
    // Before the limit of open files can no longer be raised.
    let server = FileServer::new(proc_self_fd)?;
    empty_root()?;
    move_into_link_name_space(namespace.as_fd(), Some(LinkNameSpaceType::User))?;
    let (uid, gid) = (rustix::fs::Uid::ROOT, rustix::fs::Gid::ROOT);
    set_thread_groups(&[])?;
    set_thread_res_gid(gid, gid, gid)?;
    set_thread_res_uid(uid, uid, uid)?;
    privileges::keep_only(CAPABILITIES)?;
    // Last, since the kernel forgets it when the ids change (PR_SET_PDEATHSIG(2const)).
    prctl::set_pdeathsig(Signal::SIGKILL)?;
    let options = ShareOptions {
        read_only: false,
        // The container changes the files as well.
        exclusive: false,
    };
    server.share(SHARE, tree, options)?;
    server.prepare_thread()?;
    Ok(server)
}

fn serve(server: &FileServer, mut device: &File) {
    let mut request = vec![0; BUFFER];
    let mut reply = vec![0; BUFFER];
    loop {
        let length = match device.read(&mut request) {
            Ok(length) => length,
            // A request that was withdrawn.
            Err(error) if matches!(error.kind(), io::ErrorKind::NotFound) => continue,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
            // Nothing is mounted any more (ENODEV), or nothing can be.
            Err(_) => return,
        };
        let length = server.handle(
            &[VolatileSlice::from(&mut request[..length])],
            &[VolatileSlice::from(&mut reply[..])],
        );
        if length > 0 {
            // The kernel refuses the reply to a request that was interrupted.
            let _ = device.write(&reply[..length]);
        }
    }
}
