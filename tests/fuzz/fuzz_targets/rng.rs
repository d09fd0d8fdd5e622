#![no_main]
//! The entropy device against a driver that keeps to no rules.

use bulkhead_fuzz::{Rig, Step};
use bulkhead_vmm::devices::{
    event_loop::EventHandler,
    virtio::rng::{Rng, RngHandler},
};
use libfuzzer_sys::fuzz_target;
use vmm_sys_util::epoll::EventSet;

fuzz_target!(|steps: Vec<Step>| {
    let mut rig = Rig::start(Rng);
    let handler = RngHandler::new(rig.transport.clone());
    for step in &steps {
        rig.step(step);
        if matches!(step, Step::Kick | Step::Send { .. }) {
            handler.handle(0, EventSet::IN);
        }
    }
    let _ = handler.save();
});
