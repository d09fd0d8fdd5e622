#![no_main]
//! The vsock device against a driver that keeps to no rules. Connections that it opens are accepted;
//! the host's ends are written to, read from and closed at the fuzzer's will.

use std::{
    io::{Read, Write},
    os::{fd::OwnedFd, unix::net::UnixStream},
    sync::{Arc, Mutex},
};

use bulkhead_fuzz::{Rig, Step};
use bulkhead_vmm::devices::{
    event_loop::{EventHandler, EventLoopBuilder},
    virtio::vsock::{Vsock, VsockHandler},
};
use libfuzzer_sys::fuzz_target;
use vmm_sys_util::epoll::EventSet;

const KICK: u32 = u32::MAX;
/// Connections of the host that are kept; the next one replaces the first.
const KEPT: usize = 16;

fuzz_target!(|steps: Vec<Step>| {
    let accepted = Arc::new(Mutex::new(Vec::<UnixStream>::new()));
    let watcher = EventLoopBuilder::new().expect("epoll").next_watcher();
    let kept = accepted.clone();
    let mut rig = Rig::start(Vsock::new(watcher, move |port, socket: OwnedFd| {
        let mut kept = kept.lock().expect("no panic");
        if kept.len() == KEPT {
            kept.remove(0);
        }
        let stream = UnixStream::from(socket);
        stream.set_nonblocking(true).expect("a socket");
        kept.push(stream);
        port % 3 != 0
    }));
    let handler = VsockHandler::new(rig.transport.clone());
    for step in &steps {
        rig.step(step);
        match step {
            Step::Kick | Step::Send { .. } => handler.handle(KICK, EventSet::IN),
            Step::Event { token, events } => {
                use_host(&accepted, *token, *events);
                let set = EventSet::from_bits_truncate((*events).into());
                handler.handle(u32::from(*token), set);
            }
            Step::Register { .. } | Step::Memory { .. } => {}
        }
    }
    let _ = handler.save();
});

fn use_host(accepted: &Mutex<Vec<UnixStream>>, token: u8, events: u8) {
    let mut kept = accepted.lock().expect("no panic");
    if kept.is_empty() {
        return;
    }
    let index = usize::from(token) % kept.len();
    match events % 4 {
        0 => drop(kept.remove(index)),
        1 => drop(kept[index].read(&mut [0; 5000])),
        2 => drop(kept[index].write(&[b'x'; 3000])),
        _ => drop(kept[index].shutdown(std::net::Shutdown::Write)),
    }
}
