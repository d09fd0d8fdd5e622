#![no_main]
//! A network device against a driver that keeps to no rules. Its taps are sockets, from which packets of
//! any length come; interfaces come and go.

use bulkhead_fuzz::{Nic, Step};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|steps: Vec<Step>| {
    let mut nic = Nic::start();
    for step in &steps {
        nic.step(step);
    }
    let state = nic.handler.save();
    let mut after = Nic::start();
    if after.handler.restore(&state).is_ok() {
        after.serve();
    }
});
