//! The second processor, which changes what the first has just handed to a device.

use core::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering::SeqCst};

use crate::{
    attack::{address, descriptor},
    driver::{BUFFERS, Device, Queue, register},
    machine::{self, PAGE, start_second, store, store_bytes, store16, wait},
    random::{Random, low, low16},
    requests::ROOM,
};

/// Where the second processor's first instructions are copied: a page below 1 MiB.
pub const TRAMPOLINE: u64 = 0x9_0000;
/// Requests that lie in memory at a time.
pub const SLOTS: u64 = 32;
/// Cycles for which the second processor is waited for: about ten seconds.
const SECOND_PATIENCE: u64 = 1 << 35;

/// In the place of a number of steps: the end of the VM.
const RESET: u64 = u64::MAX;

static PLACE: AtomicU64 = AtomicU64::new(0);
static INDEX: AtomicU32 = AtomicU32::new(0);
static SIZE: AtomicU32 = AtomicU32::new(0);
static SEED: AtomicU64 = AtomicU64::new(0);
static STEPS: AtomicU64 = AtomicU64::new(0);
static DONE: AtomicBool = AtomicBool::new(true);

/// The second processor, if this machine has one that can be started.
pub struct Second {
    code: &'static [u8],
    works: bool,
}

impl Second {
    /// Tries whether it starts. `code` is position-dependent, for [`TRAMPOLINE`].
    pub fn find(code: &'static [u8]) -> Self {
        assert!(code.len() as u64 <= PAGE, "the trampoline is too long");
        let mut second = Self { code, works: true };
        second.start(Device::at(0), &Queue::new(0, 0, 8), 0, 0);
        second.works = second.wait();
        second
    }

    /// How many processors there are.
    pub fn processors(&self) -> u32 {
        1 + u32::from(self.works)
    }

    /// Lets it take `steps` against a queue, from wherever it is at the moment. Without it, this
    /// processor takes them.
    pub fn start(&self, device: Device, queue: &Queue, seed: u64, steps: u64) {
        if !self.works {
            let mut random = Random::new(seed);
            (0..steps).for_each(|_| step(&mut random, device, queue));
            return;
        }
        PLACE.store(device.base, SeqCst);
        INDEX.store(queue.index, SeqCst);
        SIZE.store(queue.size.into(), SeqCst);
        SEED.store(seed, SeqCst);
        STEPS.store(steps, SeqCst);
        DONE.store(false, SeqCst);
        store_bytes(TRAMPOLINE, self.code);
        start_second(TRAMPOLINE);
    }

    /// Lets it reset the VM at the very time at which this processor goes on.
    pub fn reset(&self) {
        if self.works {
            self.start(Device::at(0), &Queue::new(0, 0, 8), 0, RESET);
            self.wait();
            DONE.store(false, SeqCst);
        }
    }

    /// Waits until it has taken its steps; false when it never does.
    pub fn wait(&self) -> bool {
        wait(SECOND_PATIENCE, || DONE.load(SeqCst))
    }
}

/// What the second processor does each time it is started.
pub fn run() {
    let mut random = Random::new(SEED.load(SeqCst));
    let device = Device {
        base: PLACE.load(SeqCst),
    };
    let size = low16(SIZE.load(SeqCst).into());
    let queue = Queue::new(0, INDEX.load(SeqCst), size);
    let steps = STEPS.load(SeqCst);
    if steps == RESET {
        DONE.store(true, SeqCst);
        while DONE.load(SeqCst) {
            core::hint::spin_loop();
        }
        machine::reset();
    }
    for _ in 0..steps {
        step(&mut random, device, &queue);
    }
    DONE.store(true, SeqCst);
}

/// One change behind the device's back.
fn step(random: &mut Random, device: Device, queue: &Queue) {
    let size = u64::from(queue.size);
    let entry = random.below(size);
    match random.below(24) {
        // The start of a request: its header.
        0..=9 => {
            let at = BUFFERS + random.below(SLOTS) * 2 * ROOM + random.below(64);
            store(at, random.number(), random.pick(&[1, 2, 4, 8]));
        }
        10..=12 => store(queue.descriptors + entry * 16, address(random), 8),
        13..=15 => {
            let at = queue.descriptors + entry * 16;
            store(at + 8, descriptor(random, queue.size), 8);
        }
        16 => store16(
            queue.available + 4 + entry * 2,
            low16(random.below(size + 2)),
        ),
        17 => store16(queue.available + 2, low16(random.number())),
        18 => store(queue.used + random.below(size * 8), random.number(), 2),
        19 => device.set(register::QUEUE_SEL, low(random.below(4))),
        20 if random.once_in(8) => {
            device.set(register::STATUS, random.pick(&[0, 0, 4, 15, 128]));
        }
        _ => device.kick(low(random.number())),
    }
}
