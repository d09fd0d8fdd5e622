//! bpf(2): `union bpf_attr` of include/uapi/linux/bpf.h, as far as each command reads it.

use std::{
    io,
    os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd},
};

use crate::program::Program;

// include/uapi/linux/bpf.h
const MAP_CREATE: libc::c_int = 0;
const MAP_UPDATE: libc::c_int = 2;
const PROG_LOAD: libc::c_int = 5;
const PROG_ATTACH: libc::c_int = 8;
const LINK_CREATE: libc::c_int = 28;
const MAP_TYPE_SOCKMAP: u32 = 15;
const ALLOW_MULTI: u32 = 2;

/// What a program decides.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Where a packet goes (`BPF_PROG_TYPE_SCHED_CLS`).
    Packets = 3,
    /// Whether a device of a cgroup may be used (`BPF_PROG_TYPE_CGROUP_DEVICE`).
    Devices = 15,
    /// Which socket a connection is for (`BPF_PROG_TYPE_SK_LOOKUP`).
    Sockets = 30,
}

impl Kind {
    /// `enum bpf_attach_type`; programs for packets have none.
    fn attach_type(self) -> u32 {
        match self {
            Self::Packets => 0,
            Self::Devices => 6,
            Self::Sockets => 36,
        }
    }
}

impl Program {
    /// Loads it into the kernel. `name` is for people.
    pub fn to_kernel(&self, kind: Kind, name: &str) -> io::Result<OwnedFd> {
        let mut short = [0; 16];
        for (to, from) in short.iter_mut().zip(name.bytes().take(15)) {
            *to = from;
        }
        let attributes = LoadAttributes {
            program_type: kind as u32,
            instruction_count: u32::try_from(self.code().len()).map_err(io::Error::other)?,
            instructions: self.code().as_ptr() as u64,
            license: c"Apache-2.0".as_ptr() as u64,
            log_level: 0,
            log_size: 0,
            log: 0,
            kernel_version: 0,
            flags: 0,
            name: short,
            interface: 0,
            expected_attach_type: kind.attach_type(),
        };
        // SAFETY: the attributes point to the program and the licence, which outlive the call.
        unsafe { create(PROG_LOAD, &attributes) }
    }
}

#[repr(C)]
struct LoadAttributes {
    program_type: u32,
    instruction_count: u32,
    instructions: u64,
    license: u64,
    log_level: u32,
    log_size: u32,
    log: u64,
    kernel_version: u32,
    flags: u32,
    name: [u8; 16],
    interface: u32,
    expected_attach_type: u32,
}

#[repr(C)]
struct MapAttributes {
    map_type: u32,
    key_size: u32,
    value_size: u32,
    max_entries: u32,
    flags: u32,
}

#[repr(C)]
struct UpdateAttributes {
    map: u32,
    padding: u32,
    key: u64,
    value: u64,
    flags: u64,
}

#[repr(C)]
struct AttachAttributes {
    target: u32,
    program: u32,
    attach_type: u32,
    flags: u32,
}

#[repr(C)]
struct LinkAttributes {
    program: u32,
    target: u32,
    attach_type: u32,
    flags: u32,
}

/// Makes a map of that many sockets.
pub fn socket_map(entries: u32) -> io::Result<OwnedFd> {
    let attributes = MapAttributes {
        map_type: MAP_TYPE_SOCKMAP,
        key_size: 4,
        value_size: 8,
        max_entries: entries,
        flags: 0,
    };
    // SAFETY: the attributes hold no pointer.
    unsafe { create(MAP_CREATE, &attributes) }
}

/// Puts a socket into a map.
pub fn put_socket(map: &OwnedFd, key: u32, socket: &impl AsRawFd) -> io::Result<()> {
    let value = u64::try_from(socket.as_raw_fd()).map_err(io::Error::other)?;
    let attributes = UpdateAttributes {
        map: map.as_raw_fd().cast_unsigned(),
        padding: 0,
        key: &raw const key as u64,
        value: &raw const value as u64,
        flags: 0,
    };
    // SAFETY: key and value have the sizes of the map's, and outlive the call.
    unsafe { bpf(MAP_UPDATE, &attributes) }.map(drop)
}

/// Attaches a program to what `target` is. It is detached when the result is dropped.
pub fn attach(program: &OwnedFd, target: &impl AsRawFd, kind: Kind) -> io::Result<OwnedFd> {
    let attributes = LinkAttributes {
        program: program.as_raw_fd().cast_unsigned(),
        target: target.as_raw_fd().cast_unsigned(),
        attach_type: kind.attach_type(),
        flags: 0,
    };
    // SAFETY: the attributes hold no pointer.
    unsafe { create(LINK_CREATE, &attributes) }
}

/// Attaches a program to a cgroup, beside those of the cgroups above it. The cgroup owns it from then on.
pub fn attach_to_cgroup(program: &OwnedFd, cgroup: &OwnedFd, kind: Kind) -> io::Result<()> {
    let attributes = AttachAttributes {
        target: cgroup.as_raw_fd().cast_unsigned(),
        program: program.as_raw_fd().cast_unsigned(),
        attach_type: kind.attach_type(),
        flags: ALLOW_MULTI,
    };
    // SAFETY: the attributes hold no pointer.
    unsafe { bpf(PROG_ATTACH, &attributes) }.map(drop)
}

/// # Safety
///
/// As for [`bpf`]; the command must be one that makes a descriptor.
unsafe fn create<T>(command: libc::c_int, attributes: &T) -> io::Result<OwnedFd> {
    // SAFETY: the caller vouches for the attributes.
    let created = unsafe { bpf(command, attributes) }?;
    // SAFETY: the kernel returned a new descriptor that nothing else owns.
    Ok(unsafe { OwnedFd::from_raw_fd(created) })
}

/// bpf(2).
///
/// # Safety
///
/// `attributes` must be a prefix of `union bpf_attr` as `command` reads it.
unsafe fn bpf<T>(command: libc::c_int, attributes: &T) -> io::Result<RawFd> {
    // SAFETY: the caller vouches for the attributes; the kernel reads `size` bytes of them.
    let result = unsafe {
        libc::syscall(
            libc::SYS_bpf,
            command,
            std::ptr::from_ref(attributes),
            size_of::<T>(),
        )
    };
    if result < 0 {
        return Err(io::Error::last_os_error());
    }
    RawFd::try_from(result).map_err(io::Error::other)
}
