//! The registers of a device (section 4.2.2) that a driver reads.

use std::sync::{
    Arc,
    atomic::{AtomicU32, Ordering},
};

/// Register offsets in bytes.
pub(crate) mod register {
    pub const MAGIC: u64 = 0x00;
    pub const VERSION: u64 = 0x04;
    pub const DEVICE_ID: u64 = 0x08;
    pub const VENDOR_ID: u64 = 0x0c;
    pub const DEVICE_FEATURES: u64 = 0x10;
    pub const DEVICE_FEATURES_SEL: u64 = 0x14;
    pub const DRIVER_FEATURES: u64 = 0x20;
    pub const DRIVER_FEATURES_SEL: u64 = 0x24;
    pub const QUEUE_SEL: u64 = 0x30;
    pub const QUEUE_NUM_MAX: u64 = 0x34;
    pub const QUEUE_NUM: u64 = 0x38;
    pub const QUEUE_READY: u64 = 0x44;
    pub const QUEUE_NOTIFY: u64 = 0x50;
    pub const INTERRUPT_STATUS: u64 = 0x60;
    pub const INTERRUPT_ACK: u64 = 0x64;
    pub const STATUS: u64 = 0x70;
    pub const QUEUE_DESC_LOW: u64 = 0x80;
    pub const QUEUE_DESC_HIGH: u64 = 0x84;
    pub const QUEUE_DRIVER_LOW: u64 = 0x90;
    pub const QUEUE_DRIVER_HIGH: u64 = 0x94;
    pub const QUEUE_DEVICE_LOW: u64 = 0xa0;
    pub const QUEUE_DEVICE_HIGH: u64 = 0xa4;
    pub const SHM_LEN_LOW: u64 = 0xb0;
    pub const SHM_LEN_HIGH: u64 = 0xb4;
    pub const SHM_BASE_LOW: u64 = 0xb8;
    pub const SHM_BASE_HIGH: u64 = 0xbc;
    pub const CONFIG: u64 = 0x100;
}

const PAGE: usize = 4096;
const WORD: usize = 4;

/// A page of values, which the guest may read but not write.
#[derive(Debug)]
#[repr(C, align(4096))]
struct Page([AtomicU32; PAGE / WORD]);

/// The values of all registers of a device, in a page: reading one is no exit. The device changes them
/// at any time.
#[derive(Debug)]
pub struct Registers {
    page: Arc<Page>,
    start: u64,
    size: u64,
}

impl Default for Registers {
    /// Those of a device with a page of its own.
    fn default() -> Self {
        Self {
            page: Arc::new(Page([const { AtomicU32::new(0) }; PAGE / WORD])),
            start: 0,
            size: Self::PAGE_SIZE,
        }
    }
}

impl Registers {
    /// The size of a page in bytes.
    pub const PAGE_SIZE: u64 = PAGE as u64;

    /// Those of devices that share a page, with `size` bytes each.
    pub fn sharing(size: u64) -> impl Iterator<Item = Self> {
        let page = Self::default().page;
        (0..Self::PAGE_SIZE / size).map(move |index| Self {
            page: page.clone(),
            start: index * size,
            size,
        })
    }

    /// The address of the page in this process.
    pub fn page(&self) -> u64 {
        self.page.0.as_ptr().addr() as u64
    }

    /// The value that the guest reads at `offset`.
    pub fn get(&self, offset: u64) -> u32 {
        u32::from_le(self.word(offset).load(Ordering::SeqCst))
    }

    /// Changes the value that the guest reads at `offset`.
    pub fn set(&self, offset: u64, value: u32) {
        self.word(offset).store(value.to_le(), Ordering::SeqCst);
    }

    /// Fills in the device's configuration space, as much as there is room for.
    pub fn set_config(&self, config: &[u8]) {
        for (offset, bytes) in (register::CONFIG..self.size)
            .step_by(WORD)
            .zip(config.chunks(WORD))
        {
            let mut word = [0; WORD];
            word[..bytes.len()].copy_from_slice(bytes);
            self.set(offset, u32::from_le_bytes(word));
        }
    }

    fn word(&self, offset: u64) -> &AtomicU32 {
        // No offset fails to convert, and all of them lie inside the page.
        &self.page.0[usize::try_from(self.start + offset).unwrap_or(0) / WORD]
    }
}
