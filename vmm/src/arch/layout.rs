//! Where things are in the guest's physical address space.
//!
//! What the VMM writes for the kernel's first instructions is packed into a few pages at the bottom:
//! each page that is touched costs a page fault in the host and in the guest.

/// Page-map level 4 of the identity mapping that the kernel is entered with.
pub const PML4: u64 = 0x1000;
/// Its page directory pointer table.
pub const PDPT: u64 = 0x2000;
/// Its page directory: 512 pages of 2 MiB.
pub const PAGE_DIRECTORY: u64 = 0x3000;
/// `struct boot_params`, one page.
pub const BOOT_PARAMS: u64 = 0x4000;
/// Global descriptor table.
pub const GDT: u64 = 0x5000;
/// `struct setup_data` with the random seed.
pub const SETUP_DATA: u64 = 0x5100;
/// Kernel command line, at most [`COMMAND_LINE_MAX`] bytes with its final zero.
pub const COMMAND_LINE: u64 = 0x5800;
/// `COMMAND_LINE_SIZE` of x86 Linux.
pub const COMMAND_LINE_MAX: usize = 2048;

/// End of the memory below 1 MiB that the guest may use.
pub const LOW_MEMORY_END: u64 = 0x9_fc00;
/// MP table: in the last of the three areas where the MultiProcessor specification says to look,
/// because only this one has room for many CPUs.
pub const MP_TABLE: u64 = 0xf_0000;
/// Room for the MP table in bytes.
pub const MP_TABLE_MAX: usize = 0x1_0000;
/// Memory above the areas of a PC's firmware.
pub const HIMEM_START: u64 = 0x10_0000;

/// Start of the hole that holds the devices, the I/O APIC and the local APICs.
pub const MMIO_HOLE_START: u64 = 0xc000_0000;
/// First virtio device.
pub const VIRTIO_MMIO_START: u64 = 0xd000_0000;
/// Bytes from one virtio device to the next.
pub const VIRTIO_MMIO_SIZE: u64 = 0x1000;
/// Bytes from one network device to the next: all of them lie where one device would.
pub const NIC_MMIO_SIZE: u64 = 0x200;
/// I/O APIC (KVM's, fixed).
pub const IOAPIC: u32 = 0xfec0_0000;
/// Local APIC (KVM's, fixed).
pub const LOCAL_APIC: u32 = 0xfee0_0000;
/// Three pages that KVM on Intel needs for itself (`KVM_SET_TSS_ADDR`).
pub const KVM_TSS: usize = 0xfffb_d000;
/// Where memory goes on behind the hole.
pub const HIGH_MEMORY_START: u64 = 0x1_0000_0000;

/// Interrupt of the first virtio device; the following devices have the following ones, except that
/// network devices have that of the device before them. Linux takes interrupt 0 for none.
pub const VIRTIO_IRQ_START: u32 = 1;
