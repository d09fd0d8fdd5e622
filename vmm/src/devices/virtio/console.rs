//! Console device (section 5.3) with one port: what the guest writes goes to a file and to the
//! crash console. Nothing is ever typed.

use std::{
    fs::File,
    io::Write,
    sync::{Arc, Mutex, PoisonError},
};

use serde::{Deserialize, Serialize};
use virtio_queue::Queue;
use vmm_sys_util::epoll::EventSet;

use super::{
    Device, Work,
    mmio::{RestoreError, Transport, TransportState},
    queue,
};
use crate::devices::{
    crash_console::CrashConsole,
    event_loop::{self, EventHandler},
};

const DEVICE_ID: u32 = 3;
const QUEUE_SIZES: &[u16] = &[16, 16];
/// Bytes copied at once.
const CHUNK: usize = 4096;
/// The largest file. A guest must not be able to fill the host's disk.
const FILE_MAX: usize = 16 << 20;
const FULL: &[u8] = b"\n[the console's file is full; later lines are lost]\n";

/// The device. It has no state of its own.
pub struct Console;

impl Device for Console {
    fn id(&self) -> u32 {
        DEVICE_ID
    }

    fn queue_sizes(&self) -> &'static [u16] {
        QUEUE_SIZES
    }
}

/// The saved device.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct State {
    transport: TransportState,
    written: usize,
}

struct Output {
    file: File,
    written: usize,
}

/// The device at work.
pub struct ConsoleHandler {
    transport: Arc<Transport<Console>>,
    output: Mutex<Output>,
    crash_console: Arc<CrashConsole>,
}

impl ConsoleHandler {
    /// Works for the device behind `transport` and appends to `file`.
    pub fn new(
        transport: Arc<Transport<Console>>,
        file: File,
        crash_console: Arc<CrashConsole>,
    ) -> Self {
        Self {
            transport,
            output: Mutex::new(Output { file, written: 0 }),
            crash_console,
        }
    }

    /// Takes down the device.
    pub fn save(&self) -> State {
        State {
            transport: self.transport.save(),
            written: self.output().written,
        }
    }

    /// Puts a saved device into a new one.
    pub fn restore(&self, state: &State) -> Result<(), RestoreError> {
        self.output().written = state.written;
        self.transport.restore(&state.transport)
    }

    fn output(&self) -> std::sync::MutexGuard<'_, Output> {
        self.output.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn work(&self, queues: &mut [Queue]) -> Work {
        let memory = &self.transport.memory;
        let [_, transmit] = queues else {
            return Ok(());
        };
        let mut output = self.output();
        loop {
            queue::disable_notification(transmit, memory)?;
            while let Some(chain) = queue::pop(transmit, memory)? {
                let mut rest = chain.readable;
                while !rest.is_empty() {
                    let mut bytes = [0; CHUNK];
                    let count = queue::gather(&rest, &mut bytes);
                    self.write(&mut output, &bytes[..count]);
                    rest = queue::skip(&rest, count.max(1));
                }
                queue::push(transmit, memory, chain.head, 0)?;
            }
            if !queue::enable_notification(transmit, memory)? {
                break;
            }
        }
        queue::notify(transmit, memory, &self.transport.interrupt)
    }

    fn write(&self, output: &mut Output, bytes: &[u8]) {
        self.transport.stats.from_guest(bytes.len());
        self.crash_console.push(bytes);
        if output.written >= FILE_MAX {
            return;
        }
        output.written += bytes.len();
        // A console that cannot be written must not stop the guest.
        let _ = output.file.write_all(bytes);
        if output.written >= FILE_MAX {
            let _ = output.file.write_all(FULL);
        }
    }
}

impl EventHandler for ConsoleHandler {
    fn handle(&self, _token: u32, _events: EventSet) {
        let transport = &self.transport;
        transport.stats.kicked(event_loop::take(&transport.kick));
        transport.run(|_, queues| self.work(queues));
    }
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Seek};

    use vm_memory::{Bytes, GuestAddress};

    use super::{
        super::{mmio::tests as mmio, queue::tests::Driver},
        *,
    };
    use crate::memory::GuestMemory;

    fn handler(memory: &GuestMemory, file: &File) -> ConsoleHandler {
        ConsoleHandler::new(
            Arc::new(mmio::transport(Console, memory.clone())),
            file.try_clone().unwrap(),
            Arc::default(),
        )
    }

    #[test]
    fn text_reaches_file_and_crash_console_before_and_after_a_restore() {
        let memory = crate::memory::allocate(1).unwrap();
        let mut file = tempfile::tempfile().unwrap();
        let before = handler(&memory, &file);
        mmio::start(&before.transport, mmio::MODERN, 0x4000);
        let mut driver = Driver::new(&memory, 0x5000);
        let mut say = |handler: &ConsoleHandler, text: &[u8]| {
            memory.write_slice(text, GuestAddress(0x8000)).unwrap();
            let length = u32::try_from(text.len()).unwrap();
            driver.send(&[(0x8000, 2, false), (0x8002, length - 2, false)]);
            handler.handle(0, EventSet::IN);
            assert_eq!(driver.used(), Some(0));
        };
        say(&before, b"hello ");
        let after = handler(&memory, &file);
        after.restore(&before.save()).unwrap();
        say(&after, &[b'x'; 9000]);
        assert!(after.crash_console.report().ends_with("xxx"));
        file.rewind().unwrap();
        let mut text = String::new();
        file.read_to_string(&mut text).unwrap();
        assert_eq!(text, format!("hello {}", "x".repeat(9000)));
    }

    #[test]
    fn the_file_does_not_grow_without_end() {
        let memory = crate::memory::allocate(1).unwrap();
        let file = tempfile::tempfile().unwrap();
        let handler = handler(&memory, &file);
        let mut output = handler.output();
        for _ in 0..2 * FILE_MAX / CHUNK {
            handler.write(&mut output, &[b'x'; CHUNK]);
        }
        let length = file.metadata().unwrap().len();
        assert_eq!(length, (FILE_MAX + FULL.len()) as u64);
    }
}
