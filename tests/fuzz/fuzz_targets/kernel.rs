#![no_main]
//! The loader of kernel and initramfs, against images whose headers say anything.

use std::{fs::File, io::Write};

use arbitrary::Arbitrary;
use bulkhead_vmm::{kernel, memory};
use libfuzzer_sys::fuzz_target;
use rustix::fs::{MemfdFlags, memfd_create};

/// `Elf64_Ehdr` and `Elf64_Phdr` (elf(5)) in bytes.
const HEADER: u16 = 64;
const PROGRAM_HEADER: u16 = 56;

#[derive(Debug, Arbitrary)]
struct Segment {
    kind: u8,
    offset: Number,
    address: Number,
    in_file: Number,
    in_memory: Number,
    align: u8,
}

/// Mostly something that fits, at times anything.
#[derive(Debug, Arbitrary)]
enum Number {
    Small(u16),
    Megabytes(u8),
    Any(u64),
}

impl Number {
    fn get(&self) -> u64 {
        match self {
            Self::Small(number) => (*number).into(),
            Self::Megabytes(number) => u64::from(*number) << 20,
            Self::Any(number) => *number,
        }
    }
}

#[derive(Debug, Arbitrary)]
struct Image {
    entry: Number,
    segments: Vec<Segment>,
    header_offset: Option<u64>,
    header_size: Option<u16>,
    content: Vec<u8>,
    /// Bytes that are something else in the end.
    spoilt: Vec<(u16, u8)>,
    initramfs: Vec<u8>,
}

fuzz_target!(|image: Image| {
    let memory = memory::allocate(64).expect("memory");
    let file = |content: &[u8]| {
        let memfd = memfd_create("fuzz", MemfdFlags::CLOEXEC).expect("a memfd");
        let mut file = File::from(memfd);
        file.write_all(content).expect("memory");
        file
    };
    let (mut elf, mut initramfs) = (file(&image.bytes()), file(&image.initramfs));
    if let Ok(loaded) = kernel::load(&memory, &mut elf, &mut initramfs) {
        let (start, length) = loaded.initramfs;
        assert!(start.0 + length <= 64 << 20);
        assert_eq!(length, image.initramfs.len() as u64);
    }
});

impl Image {
    fn bytes(&self) -> Vec<u8> {
        let count = u16::try_from(self.segments.len()).unwrap_or(u16::MAX);
        let mut bytes = b"\x7fELF\x02\x01\x01".to_vec();
        bytes.resize(16, 0);
        bytes.extend(2u16.to_le_bytes());
        bytes.extend(62u16.to_le_bytes());
        bytes.extend(1u32.to_le_bytes());
        bytes.extend(self.entry.get().to_le_bytes());
        bytes.extend(self.header_offset.unwrap_or(HEADER.into()).to_le_bytes());
        bytes.extend([0; 12]);
        for number in [
            HEADER,
            self.header_size.unwrap_or(PROGRAM_HEADER),
            count,
            0,
            0,
            0,
        ] {
            bytes.extend(number.to_le_bytes());
        }
        for segment in &self.segments {
            bytes.extend(u32::from(segment.kind % 5).to_le_bytes());
            bytes.extend(7u32.to_le_bytes());
            for number in [
                segment.offset.get(),
                segment.address.get(),
                segment.address.get(),
                segment.in_file.get(),
                segment.in_memory.get(),
                1 << (segment.align % 64),
            ] {
                bytes.extend(number.to_le_bytes());
            }
        }
        bytes.extend(&self.content);
        for (place, byte) in &self.spoilt {
            if let Some(spoilt) = bytes.get_mut(usize::from(*place)) {
                *spoilt = *byte;
            }
        }
        bytes
    }
}
