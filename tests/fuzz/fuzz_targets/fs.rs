#![no_main]
//! The file system device's queues against a driver that keeps to no rules, with a file server behind
//! them.

use std::sync::Arc;

use bulkhead_fuzz::{Rig, Step, file_server};
use bulkhead_vmm::devices::virtio::fs::{Fs, FsHandler, Limits};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|steps: Vec<Step>| {
    let (server, _directory) = file_server();
    let mut rig = Rig::start(Fs::new("tag"));
    let handler = FsHandler::new(rig.transport.clone(), Arc::new(server), Limits::default());
    for step in &steps {
        rig.step(step);
        if matches!(step, Step::Kick | Step::Send { .. }) {
            handler.serve(|| {});
        }
    }
    let state = handler.save();
    let after = Rig::start(Fs::new("tag"));
    let (server, _directory) = file_server();
    let handler = FsHandler::new(after.transport.clone(), Arc::new(server), Limits::default());
    if handler.restore(&state).is_ok() {
        handler.serve(|| {});
    }
});
