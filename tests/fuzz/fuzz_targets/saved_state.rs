#![no_main]
//! Devices that are restored from any state, and then used.

use arbitrary::Arbitrary;
use bulkhead_fuzz::{Nic, Rig, Step};
use bulkhead_vmm::devices::{
    event_loop::{EventHandler, EventLoopBuilder},
    virtio::{
        rng::{Rng, RngHandler},
        vsock::{Vsock, VsockHandler},
    },
};
use libfuzzer_sys::fuzz_target;
use serde::{Serialize, de::DeserializeOwned};
use serde_json::Value;
use vmm_sys_util::epoll::EventSet;

/// Another value for one number or flag of a saved state.
#[derive(Debug, Arbitrary)]
struct Change {
    leaf: u8,
    value: u64,
    bits: u8,
}

#[derive(Debug, Arbitrary)]
struct Input {
    changes: Vec<Change>,
    steps: Vec<Step>,
}

fuzz_target!(|input: Input| {
    let handler = RngHandler::new(Rig::start(Rng).transport.clone());
    let state = changed(&handler.save(), &input.changes);
    let mut rig = Rig::start(Rng);
    let handler = RngHandler::new(rig.transport.clone());
    if let Some(state) = state
        && handler.restore(&state).is_ok()
    {
        for step in &input.steps {
            rig.step(step);
            handler.handle(0, EventSet::IN);
        }
    }

    let device = || {
        let watcher = EventLoopBuilder::new().expect("epoll").next_watcher();
        Rig::start(Vsock::new(watcher, |_, _| true))
    };
    let handler = VsockHandler::new(device().transport.clone());
    let state = changed(&handler.save(), &input.changes);
    let mut rig = device();
    let handler = VsockHandler::new(rig.transport.clone());
    if let Some(state) = state
        && handler.restore(&state).is_ok()
    {
        for step in &input.steps {
            rig.step(step);
            handler.handle(u32::MAX, EventSet::IN);
        }
    }

    let state = changed(&Nic::start().handler.save(), &input.changes);
    let mut nic = Nic::start();
    if let Some(state) = state
        && nic.handler.restore(&state).is_ok()
    {
        for step in &input.steps {
            nic.step(step);
        }
    }
});

/// The state with other values, if it still is one.
fn changed<S: Serialize + DeserializeOwned>(state: &S, changes: &[Change]) -> Option<S> {
    let mut value = serde_json::to_value(state).expect("JSON");
    for change in changes {
        let mut leaves = Vec::new();
        collect(&mut value, &mut leaves);
        let index = usize::from(change.leaf) % leaves.len();
        let number = change.value >> (change.bits % 64);
        let leaf = leaves.swap_remove(index);
        *leaf = match leaf {
            Value::Bool(_) => Value::from(number & 1 == 1),
            _ => Value::from(number),
        };
    }
    serde_json::from_value(value).ok()
}

fn collect<'v>(value: &'v mut Value, leaves: &mut Vec<&'v mut Value>) {
    match value {
        Value::Object(map) => map.values_mut().for_each(|value| collect(value, leaves)),
        Value::Array(list) => list.iter_mut().for_each(|value| collect(value, leaves)),
        leaf => leaves.push(leaf),
    }
}
