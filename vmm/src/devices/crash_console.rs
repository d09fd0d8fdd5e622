//! The last words of a guest.

use std::{
    collections::VecDeque,
    sync::{Mutex, PoisonError},
};

/// Bytes that are kept.
const CAPACITY: usize = 64 * 1024;
/// The longest report in bytes: with its message around it, it must fit a control packet.
const REPORT_MAX: usize = 16 * 1024;

/// A ring of what was written to the guest's consoles.
#[derive(Debug, Default)]
pub struct CrashConsole {
    ring: Mutex<VecDeque<u8>>,
}

impl CrashConsole {
    /// Appends, and forgets the oldest.
    pub fn push(&self, bytes: &[u8]) {
        let bytes = &bytes[bytes.len().saturating_sub(CAPACITY)..];
        let mut ring = self.ring.lock().unwrap_or_else(PoisonError::into_inner);
        let excess = (ring.len() + bytes.len()).saturating_sub(CAPACITY);
        ring.drain(..excess);
        ring.extend(bytes);
    }

    /// The last whole lines. The bytes are the guest's: whatever is not printable becomes a dot, so
    /// that they can be shown on a terminal.
    pub fn report(&self) -> String {
        let ring = self.ring.lock().unwrap_or_else(PoisonError::into_inner);
        let cut = ring.len().saturating_sub(REPORT_MAX);
        let start = match cut {
            0 => 0,
            _ => (cut..ring.len())
                .find(|at| ring[*at] == b'\n')
                .map_or(cut, |newline| newline + 1),
        };
        let text: String = ring
            .range(start..)
            .filter(|byte| **byte != b'\r')
            .map(|byte| match byte {
                b'\n' => '\n',
                b'\t' => ' ',
                byte if byte.is_ascii_graphic() || *byte == b' ' => char::from(*byte),
                _ => '.',
            })
            .collect();
        text.trim().to_owned()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_lines_are_reported_and_the_first_forgotten() {
        let console = CrashConsole::default();
        for line in 0..100_000 {
            console.push(format!("line {line}\r\n").as_bytes());
        }
        let report = console.report();
        assert!(report.ends_with("line 99998\nline 99999"));
        assert!(report.starts_with("line "));
        assert!(report.len() <= REPORT_MAX);
        assert!(console.ring.lock().unwrap().len() <= CAPACITY);
    }

    #[test]
    fn control_characters_do_not_reach_a_terminal() {
        let console = CrashConsole::default();
        console.push(b"\x1b[2Jpanic\x00\xff\n");
        assert_eq!(console.report(), ".[2Jpanic..");
        console.push(&vec![b'x'; 10 * CAPACITY]);
        assert_eq!(console.report().len(), REPORT_MAX);
    }
}
