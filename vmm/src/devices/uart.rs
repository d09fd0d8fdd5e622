//! The first serial port of a PC as far as `earlyprintk=serial` uses it: a transmitter that is
//! always ready, whose bytes go to the crash console.

use std::sync::{
    Arc,
    atomic::{AtomicU8, Ordering::Relaxed},
};

use super::crash_console::CrashConsole;

/// First I/O port of COM1.
pub const PORT: u16 = 0x3f8;
/// Number of its ports.
pub const PORTS: u16 = 8;

const TRANSMIT: u16 = 0;
const LINE_CONTROL: u16 = 3;
const LINE_STATUS: u16 = 5;
/// While set, the transmit register is half of the baud rate's divisor.
const DIVISOR_LATCH: u8 = 0x80;
const TRANSMITTER_EMPTY: u8 = 0x60;

/// The port.
pub struct Uart {
    line_control: AtomicU8,
    sink: Arc<CrashConsole>,
}

impl Uart {
    /// A port that writes to `sink`.
    pub fn new(sink: Arc<CrashConsole>) -> Self {
        Self {
            line_control: AtomicU8::new(0),
            sink,
        }
    }

    /// Reads register `register`, counted from [`PORT`].
    pub fn read(&self, register: u16) -> u8 {
        match register {
            LINE_CONTROL => self.line_control.load(Relaxed),
            LINE_STATUS => TRANSMITTER_EMPTY,
            _ => 0,
        }
    }

    /// Writes `data`, one byte after the other, to the same register.
    pub fn write(&self, register: u16, data: &[u8]) {
        match register {
            TRANSMIT if self.line_control.load(Relaxed) & DIVISOR_LATCH == 0 => {
                self.sink.push(data);
            }
            LINE_CONTROL => {
                if let Some(value) = data.last() {
                    self.line_control.store(*value, Relaxed);
                }
            }
            _ => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn text_reaches_the_console_and_the_divisor_does_not() {
        let sink = Arc::new(CrashConsole::default());
        let uart = Uart::new(sink.clone());
        uart.write(LINE_CONTROL, &[0x83]);
        uart.write(TRANSMIT, b"!");
        assert_eq!(uart.read(LINE_CONTROL), 0x83);
        uart.write(LINE_CONTROL, &[0x03]);
        uart.write(TRANSMIT, b"panic");
        assert_eq!(uart.read(LINE_STATUS) & 0x20, 0x20);
        assert_eq!(sink.report(), "panic");
    }
}
