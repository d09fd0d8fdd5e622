//! The kernel's command line.

use std::fmt::Write;

use bulkhead_vmm_control::VmConfig;

use crate::{builder::place, bus::Place};

/// Errors go to the crash console from the first instructions on, and nothing else does.
const CRASH_CONSOLE: &str = "quiet loglevel=4 earlyprintk=serial,ttyS0,115200,keep";
/// Everything goes to the virtio console, and to the crash console until that is there.
const FULL_CONSOLE: &str = "loglevel=7 earlyprintk=serial,ttyS0,115200 console=hvc0";
/// A panic or a reboot is a triple fault, which ends the VM at once. The agent's messages are not
/// rate-limited. No DMA needs bounce buffers. The rest is not done at boot because it costs time
/// and nobody misses it, see guest-kernel/README.md: lock prefixes are not rewritten for one
/// processor, /sys/kernel/slab is not filled, and there is no dummy0.
const ALWAYS: &str = "panic=-1 reboot=t printk.devkmsg=on swiotlb=noforce noreplace-smp \
                      initcall_blacklist=slab_late_init dummy.numdummies=0";

/// The command line for a VM with `devices` virtio devices. The configuration's arguments come
/// last, so that they win.
pub fn build(devices: usize, config: &VmConfig) -> String {
    let console = if config.console {
        FULL_CONSOLE
    } else {
        CRASH_CONSOLE
    };
    let mut text = format!("{console} {ALWAYS}");
    for (Place { address, size }, irq) in (0..devices).map(place) {
        // Writing to a String does not fail.
        let _ = write!(text, " virtio_mmio.device={size}@{address:#x}:{irq}");
    }
    if !config.kernel_args.is_empty() {
        text.push(' ');
        text.push_str(&config.kernel_args);
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn devices_and_arguments_are_on_the_command_line() {
        let config = VmConfig {
            vcpus: 1,
            memory_mib: 512,
            kernel_args: "a=b".to_owned(),
            fs_requests_per_second: 0,
            fs_bytes_per_second: 0,
            net_packets_per_second: 0,
            net_bytes_per_second: 0,
            console: false,
        };
        let text = build(5, &config);
        assert!(text.starts_with("quiet loglevel=4 earlyprintk"));
        assert!(text.ends_with(
            "virtio_mmio.device=4096@0xd0001000:2 virtio_mmio.device=4096@0xd0002000:3 \
             virtio_mmio.device=512@0xd0003000:3 virtio_mmio.device=512@0xd0003200:3 a=b"
        ));
        let config = VmConfig {
            console: true,
            kernel_args: String::new(),
            fs_requests_per_second: 0,
            fs_bytes_per_second: 0,
            net_packets_per_second: 0,
            net_bytes_per_second: 0,
            ..config
        };
        assert!(build(0, &config).contains("console=hvc0"));
    }
}
