//! A mistake of QEMU's that its program is freed of; `docs/decisions/0006` has the story.
//!
//! For each interrupt that a hypervisor injects with VMRUN, `helper_vmrun` notes the vector in the
//! processor's `exception_index`, delivers the interrupt itself, and leaves the note. When QEMU next
//! leaves its inner loop, for a timer or another thread, and the guest has not exited by then, it takes
//! the note for an exception that is still to be delivered: the guest gets the interrupt twice, the
//! second time in the middle of whatever it does, also with interrupts disabled. The delivery does not
//! read the note, so it is not written any more.

use std::fs;
use std::path::Path;

use crate::error::{Context, Error};

/// The case of an external interrupt, in the program of Debian 13.
#[rustfmt::skip]
pub(crate) const CASE: [u8; 27] = [
    0x41, 0x0f, 0xb6, 0xf4,                         // movzbl %r12b,%esi: the vector
    0x44, 0x89, 0xab, 0xe0, 0x33, 0x00, 0x00,       // mov %r13d,env->error_code
    0x89, 0xb3, 0x10, 0xd7, 0xff, 0xff,             // mov %esi,cs->exception_index
    0xc7, 0x83, 0xe4, 0x33, 0x00, 0x00, 0, 0, 0, 0, // movl $0,env->exception_is_int
];

/// Where in it the note is written.
const NOTE: std::ops::Range<usize> = 11..17;

/// An instruction of that length that does nothing.
const NOTHING: [u8; NOTE.end - NOTE.start] = [0x66, 0x0f, 0x1f, 0x44, 0x00, 0x00];

/// Mends a program of QEMU's. Returns whether it is one with the mistake where it is expected; another is
/// left as it is.
pub(crate) fn mend(path: &Path) -> Result<bool, Error> {
    let mut program = fs::read(path).context(|| format!("read {}", path.display()))?;
    let mended = without_note(&mut program);
    if mended {
        fs::write(path, program).context(|| format!("write {}", path.display()))?;
    }
    Ok(mended)
}

fn without_note(program: &mut [u8]) -> bool {
    let is_case = |&at: &usize| program[at..].starts_with(&CASE);
    let mut found = (0..program.len()).filter(is_case);
    let (Some(at), None) = (found.next(), found.next()) else {
        return false;
    };
    program[at..][NOTE].copy_from_slice(&NOTHING);
    true
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_note_is_taken_out_of_the_one_case() {
        let around = |cases: usize| [&[0x90; 9][..], &CASE.repeat(cases), &[0xc3; 5]].concat();
        let mut program = around(1);
        assert!(without_note(&mut program));
        let mut expected = around(1);
        expected[9 + 11..9 + 17].copy_from_slice(&NOTHING);
        assert_eq!(program, expected);
        for cases in [0, 2] {
            let mut program = around(cases);
            assert!(!without_note(&mut program));
            assert_eq!(program, around(cases));
        }
    }
}
