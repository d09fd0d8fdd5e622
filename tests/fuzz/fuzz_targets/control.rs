#![no_main]
//! The control socket against any packet, in both directions.

use std::os::fd::{AsRawFd, OwnedFd};

use bulkhead_vmm_control::{Channel, FromVmm, Request};
use libfuzzer_sys::fuzz_target;
use nix::sys::socket::{AddressFamily, MsgFlags, SockFlag, SockType, send, socketpair};

fuzz_target!(|bytes: &[u8]| {
    let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
    let pair =
        || socketpair(AddressFamily::Unix, SockType::SeqPacket, None, flags).expect("a pair");
    let deliver = |ours: &OwnedFd| {
        let _ = send(ours.as_raw_fd(), bytes, MsgFlags::MSG_NOSIGNAL);
    };
    let (ours, theirs) = pair();
    deliver(&ours);
    if let Ok(Some(packet)) = Channel::from(theirs).receive::<Request>() {
        // What was understood can be said again.
        let again = serde_json::to_vec(&packet.message).expect("JSON");
        serde_json::from_slice::<Request>(&again).expect("the same message");
    }
    let (ours, theirs) = pair();
    deliver(&ours);
    let _ = Channel::from(theirs).receive::<FromVmm>();
});
