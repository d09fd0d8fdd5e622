#![no_main]
//! The console against a driver that keeps to no rules.

use std::{fs::File, sync::Arc};

use bulkhead_fuzz::{Rig, Step};
use bulkhead_vmm::devices::{
    crash_console::CrashConsole,
    event_loop::EventHandler,
    virtio::console::{Console, ConsoleHandler},
};
use libfuzzer_sys::fuzz_target;
use vmm_sys_util::epoll::EventSet;

fuzz_target!(|steps: Vec<Step>| {
    let mut rig = Rig::start(Console);
    let file = File::options()
        .write(true)
        .open("/dev/null")
        .expect("/dev/null");
    let crash_console = Arc::new(CrashConsole::default());
    let handler = ConsoleHandler::new(rig.transport.clone(), file, crash_console.clone());
    for step in &steps {
        rig.step(step);
        if matches!(step, Step::Kick | Step::Send { .. }) {
            handler.handle(0, EventSet::IN);
        }
    }
    let _ = (handler.save(), crash_console.report());
});
