//! Takes a vCPU's port and memory accesses to the devices.

use std::sync::Arc;

use crate::{
    arch::layout::IOAPIC,
    devices::uart::{self, Uart},
};

/// Bytes of the I/O APIC's registers.
const IOAPIC_SIZE: u64 = 0x1000;

/// A device with registers in memory. Called on vCPU threads, so it must not wait for the outside.
pub trait MmioDevice: Send + Sync {
    /// The guest reads `data.len()` bytes at `offset` of the device. What is not written to `data`
    /// reads as zero. A device that the guest reads without an exit is never asked.
    fn read(&self, _offset: u64, _data: &mut [u8]) {}
    /// The guest writes `data` at `offset` of the device.
    fn write(&self, offset: u64, data: &[u8]);
}

/// Where a device's registers are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Place {
    /// Address of the first.
    pub address: u64,
    /// Their bytes.
    pub size: u64,
}

/// All devices that a vCPU can reach.
pub struct Bus {
    uart: Uart,
    ioapic: Arc<dyn MmioDevice>,
    virtio: Vec<(Place, Arc<dyn MmioDevice>)>,
}

impl Bus {
    /// A bus with the serial port, the I/O APIC, and virtio devices at their places.
    pub fn new(
        uart: Uart,
        ioapic: Arc<dyn MmioDevice>,
        virtio: Vec<(Place, Arc<dyn MmioDevice>)>,
    ) -> Self {
        Self {
            uart,
            ioapic,
            virtio,
        }
    }

    /// IN. A port where nothing answers reads as all ones, as on a PC.
    pub fn port_in(&self, port: u16, data: &mut [u8]) {
        match port.checked_sub(uart::PORT) {
            Some(register) if register < uart::PORTS => {
                data.fill_with(|| self.uart.read(register));
            }
            _ => data.fill(0xff),
        }
    }

    /// OUT.
    pub fn port_out(&self, port: u16, data: &[u8]) {
        if let Some(register) = port.checked_sub(uart::PORT)
            && register < uart::PORTS
        {
            self.uart.write(register, data);
        }
    }

    /// A read from memory that is not RAM. Where nothing answers it reads as zero.
    pub fn mmio_read(&self, address: u64, data: &mut [u8]) {
        data.fill(0);
        if let Some((device, offset)) = self.find(address) {
            device.read(offset, data);
        }
    }

    /// A write to memory that is not RAM.
    pub fn mmio_write(&self, address: u64, data: &[u8]) {
        if let Some((device, offset)) = self.find(address) {
            device.write(offset, data);
        }
    }

    fn find(&self, address: u64) -> Option<(&Arc<dyn MmioDevice>, u64)> {
        if let Some(offset) = address.checked_sub(IOAPIC.into())
            && offset < IOAPIC_SIZE
        {
            return Some((&self.ioapic, offset));
        }
        self.virtio.iter().find_map(|(place, device)| {
            let offset = address.checked_sub(place.address)?;
            (offset < place.size).then_some((device, offset))
        })
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Mutex;

    use super::*;
    use crate::devices::crash_console::CrashConsole;

    #[derive(Default)]
    struct Recorder(Mutex<Vec<(u64, Vec<u8>)>>);

    impl MmioDevice for Recorder {
        fn read(&self, offset: u64, data: &mut [u8]) {
            data.fill(u8::try_from(offset).unwrap_or(0xee));
        }
        fn write(&self, offset: u64, data: &[u8]) {
            self.0.lock().unwrap().push((offset, data.to_vec()));
        }
    }

    #[test]
    fn accesses_reach_the_device_at_their_address() {
        let devices = [Arc::new(Recorder::default()), Arc::new(Recorder::default())];
        let bus = Bus::new(
            Uart::new(Arc::new(CrashConsole::default())),
            Arc::new(Recorder::default()),
            [0x1000, 0x1200]
                .map(|address| Place {
                    address,
                    size: 0x200,
                })
                .into_iter()
                .zip(devices.iter().map(|device| device.clone() as _))
                .collect(),
        );
        bus.mmio_write(0x1250, &[1, 2]);
        assert_eq!(*devices[1].0.lock().unwrap(), [(0x50, vec![1, 2])]);
        let mut data = [9; 4];
        bus.mmio_read(0x1008, &mut data);
        assert_eq!(data, [8; 4]);
        bus.mmio_read(0x1400, &mut data);
        assert_eq!(data, [0; 4]);
        bus.mmio_write(0, &[0]);
        bus.mmio_write(u64::MAX, &[0]);
        bus.port_out(0x80, &[0]);
        bus.port_in(0x71, &mut data);
        assert_eq!(data, [0xff; 4]);
    }
}
