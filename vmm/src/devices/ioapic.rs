//! The I/O APIC (Intel 82093AA), which takes devices' interrupts to local APICs.
//!
//! Only the local APICs are KVM's (`KVM_CAP_SPLIT_IRQCHIP`). With KVM's whole set comes a pair of
//! 8259s, and a kernel that finds those looks for them on each of 24 pins: hundreds of exits at
//! every boot. This I/O APIC has no more pins than there are devices, and an unmasked pin is a route in KVM from
//! the device's irqfd to a message, so an interrupt does not pass through here.
//!
//! All pins are edge-triggered, as the MP table says.

use std::sync::{Arc, Mutex, PoisonError};

use kvm_bindings::{
    KVM_IRQ_ROUTING_MSI, KvmIrqRouting, kvm_irq_routing_entry, kvm_irq_routing_entry__bindgen_ty_1,
    kvm_irq_routing_msi,
};
use kvm_ioctls::VmFd;
use serde::{Deserialize, Serialize};

use crate::bus::MmioDevice;

/// The most pins: a register of eight bits selects half of an entry.
pub const MAX_PINS: u8 = 120;

/// The register that selects, and the window to what is selected.
const SELECT: u64 = 0x00;
const WINDOW: u64 = 0x10;

const ID: u8 = 0;
const VERSION: u8 = 1;
const FIRST_ENTRY: u8 = 0x10;
const VERSION_NUMBER: u32 = 0x11;
const ID_MASK: u32 = 0x0f00_0000;

const MASKED: u64 = 1 << 16;
/// Delivery status and remote IRR.
const READ_ONLY: u64 = 1 << 12 | 1 << 14;
const LOGICAL: u64 = 1 << 11;
/// Vectors below are the processor's exceptions.
const FIRST_VECTOR: u64 = 16;
const MSI_ADDRESS: u64 = 0xfee0_0000;

/// Where KVM takes interrupts; a mock in tests.
pub trait Router: Send + Sync {
    /// Replaces all routes: pin, address and data of each.
    fn route(&self, routes: &[Route]);
}

/// An interrupt as a message (Intel SDM volume 3, "Message Signalled Interrupts").
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Route {
    /// The pin, which is the irqfd's GSI.
    pub pin: u8,
    /// Address of the message.
    pub address: u32,
    /// Its data.
    pub data: u32,
}

impl Router for VmFd {
    fn route(&self, routes: &[Route]) {
        let entries: Vec<_> = routes
            .iter()
            .map(|route| kvm_irq_routing_entry {
                gsi: route.pin.into(),
                type_: KVM_IRQ_ROUTING_MSI,
                u: kvm_irq_routing_entry__bindgen_ty_1 {
                    msi: kvm_irq_routing_msi {
                        address_lo: route.address,
                        data: route.data,
                        ..Default::default()
                    },
                },
                ..Default::default()
            })
            .collect();
        // A few routes of a kind that KVM always takes; without them the guest would wait for
        // interrupts in vain, which is its own loss.
        if let Ok(routing) = KvmIrqRouting::from_entries(&entries) {
            let _ = self.set_gsi_routing(&routing);
        }
    }
}

/// The registers as they are saved.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct State {
    select: u8,
    id: u32,
    entries: Vec<u64>,
}

/// The device.
pub struct IoApic {
    router: Arc<dyn Router>,
    state: Mutex<State>,
}

impl IoApic {
    /// An I/O APIC with `pins` pins, at most [`MAX_PINS`], all masked.
    pub fn new(router: Arc<dyn Router>, pins: u8) -> Self {
        let state = State {
            select: 0,
            id: 0,
            entries: vec![MASKED; pins.min(MAX_PINS).into()],
        };
        Self {
            router,
            state: Mutex::new(state),
        }
    }

    /// Takes down the registers.
    pub fn save(&self) -> State {
        self.lock().clone()
    }

    /// Puts saved registers into place, and the routes that they describe.
    pub fn restore(&self, state: &State) {
        let mut current = self.lock();
        *current = state.clone();
        self.router.route(&routes(&current.entries));
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn write_entry(&self, state: &mut State, pin: usize, high: bool, value: u32) {
        let Some(entry) = state.entries.get_mut(pin) else {
            return;
        };
        let old = *entry;
        *entry = if high {
            old & u64::from(u32::MAX) | u64::from(value) << 32
        } else {
            old & !u64::from(u32::MAX) | u64::from(value) & !READ_ONLY
        };
        // A change of routes makes KVM wait for its readers.
        if message(old) != message(*entry) {
            self.router.route(&routes(&state.entries));
        }
    }
}

impl MmioDevice for IoApic {
    fn read(&self, offset: u64, data: &mut [u8]) {
        let state = self.lock();
        let value = match (offset, state.select) {
            (SELECT, select) => select.into(),
            (WINDOW, ID) => state.id,
            (WINDOW, VERSION) => VERSION_NUMBER | last_pin(&state.entries) << 16,
            (WINDOW, select) => half(&state.entries, select).unwrap_or_default(),
            _ => 0,
        };
        for (byte, value) in data.iter_mut().zip(value.to_le_bytes()) {
            *byte = value;
        }
    }

    fn write(&self, offset: u64, data: &[u8]) {
        let Ok(data) = <[u8; 4]>::try_from(data) else {
            return;
        };
        let value = u32::from_le_bytes(data);
        let mut state = self.lock();
        match (offset, state.select) {
            (SELECT, _) => state.select = data[0],
            (WINDOW, ID) => state.id = value & ID_MASK,
            (WINDOW, select) => {
                if let Some((pin, high)) = pin(select) {
                    self.write_entry(&mut state, pin, high, value);
                }
            }
            _ => {}
        }
    }
}

/// Pin of a selected register, and whether it is the upper half of the pin's entry.
fn pin(select: u8) -> Option<(usize, bool)> {
    let index = select.checked_sub(FIRST_ENTRY)?;
    Some((usize::from(index / 2), index % 2 == 1))
}

/// The half of an entry that a selected register is.
fn half(entries: &[u64], select: u8) -> Option<u32> {
    let (pin, high) = pin(select)?;
    let entry = entries.get(pin)?;
    u32::try_from(if high {
        entry >> 32
    } else {
        entry & u64::from(u32::MAX)
    })
    .ok()
}

fn last_pin(entries: &[u64]) -> u32 {
    u32::try_from(entries.len().saturating_sub(1)).unwrap_or(0)
}

fn routes(entries: &[u64]) -> Vec<Route> {
    (0..MAX_PINS)
        .zip(entries)
        .filter_map(|(pin, entry)| {
            let (address, data) = message(*entry)?;
            Some(Route { pin, address, data })
        })
        .collect()
}

/// What an interrupt on a pin with this entry sends, if anything.
fn message(entry: u64) -> Option<(u32, u32)> {
    let vector = entry & 0xff;
    if entry & MASKED != 0 || vector < FIRST_VECTOR {
        return None;
    }
    let destination = entry >> 56;
    let logical = u64::from(entry & LOGICAL != 0);
    let delivery_mode = (entry >> 8) & 7;
    let address = MSI_ADDRESS | destination << 12 | logical << 2;
    let data = vector | delivery_mode << 8;
    Some((u32::try_from(address).ok()?, u32::try_from(data).ok()?))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[derive(Default)]
    struct Recorder(Mutex<Vec<Vec<Route>>>);

    impl Router for Recorder {
        fn route(&self, routes: &[Route]) {
            self.0.lock().unwrap().push(routes.to_vec());
        }
    }

    const PINS: u8 = 16;

    fn device() -> (Arc<Recorder>, IoApic) {
        let recorder = Arc::new(Recorder::default());
        (recorder.clone(), IoApic::new(recorder, PINS))
    }

    fn write(device: &IoApic, register: u8, value: u32) {
        device.write(SELECT, &u32::from(register).to_le_bytes());
        device.write(WINDOW, &value.to_le_bytes());
    }

    fn read(device: &IoApic, register: u8) -> u32 {
        device.write(SELECT, &u32::from(register).to_le_bytes());
        let mut data = [0; 4];
        device.read(WINDOW, &mut data);
        u32::from_le_bytes(data)
    }

    #[test]
    fn an_unmasked_pin_is_a_route() {
        let (recorder, device) = device();
        assert_eq!(read(&device, VERSION), 0x000f_0011);
        assert_eq!(read(&device, 0x10 + 2 * 5), 0x1_0000);
        write(&device, 0x11 + 2 * 5, 3 << 24);
        write(&device, 0x10 + 2 * 5, 0x1_0041);
        assert!(recorder.0.lock().unwrap().is_empty(), "still masked");
        write(&device, 0x10 + 2 * 5, 0x0841);
        let route = Route {
            pin: 5,
            address: 0xfee0_3004,
            data: 0x41,
        };
        assert_eq!(*recorder.0.lock().unwrap(), [vec![route]]);
        assert_eq!(read(&device, 0x11 + 2 * 5), 3 << 24);
        write(&device, 0x10 + 2 * 5, 0x1_0841);
        assert_eq!(recorder.0.lock().unwrap().last(), Some(&vec![]));
    }

    #[test]
    fn a_restored_device_routes_as_before() {
        let (_, before) = device();
        write(&before, 0x10, 0x30);
        let (recorder, after) = device();
        after.restore(&before.save());
        assert_eq!(recorder.0.lock().unwrap()[0].len(), 1);
        assert_eq!(after.save(), before.save());
    }

    proptest! {
        #[test]
        fn no_access_breaks_it(accesses in proptest::collection::vec((0u64..0x20, any::<u32>(), 0usize..9), 0..100)) {
            let (recorder, device) = device();
            for (offset, value, length) in accesses {
                let mut data = [0; 8];
                data[..4].copy_from_slice(&value.to_le_bytes());
                device.write(offset & !0xf, &data[..4]);
                device.write(offset, &data[..length]);
                device.read(offset, &mut data[..length]);
            }
            for routes in &*recorder.0.lock().unwrap() {
                prop_assert!(routes.iter().all(|route| route.pin < PINS && route.data >= 16));
            }
        }
    }
}
