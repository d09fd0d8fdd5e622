//! Where network interfaces come from: platform devices of the guest.

use std::{
    fs::{self, DirEntry, OpenOptions},
    io::{self, Write},
    path::{Path, PathBuf},
};

/// The driver of the devices, as in /sys/bus/platform/drivers.
const DRIVER: &str = "virtio-mmio";

/// Devices that become network interfaces when a driver is bound to them.
pub trait Devices {
    /// Whether a driver is bound to it.
    fn is_attached(&self, device: &str) -> bool;
    /// Binds its driver, if none is bound. Returns the name of its interface, which is in the
    /// network namespace of the agent.
    fn attach(&self, device: &str) -> io::Result<String>;
    /// Unbinds its driver, if one is bound. Its interface is gone then, wherever it was.
    fn detach(&self, device: &str) -> io::Result<()>;
}

/// Those of the platform bus.
#[derive(Clone, Debug)]
pub struct PlatformDevices {
    bus: PathBuf,
}

impl PlatformDevices {
    /// Those of the bus that has this directory in sysfs.
    pub fn new(bus: PathBuf) -> Self {
        Self { bus }
    }

    fn device(&self, device: &str) -> PathBuf {
        self.bus.join("devices").join(device)
    }

    fn tell_driver(&self, file: &str, device: &str) -> io::Result<()> {
        let path = self.bus.join("drivers").join(DRIVER).join(file);
        OpenOptions::new()
            .write(true)
            .open(path)?
            .write_all(device.as_bytes())
    }
}

/// Lets each flow of packets keep to one of an interface's queues. By default a packet leaves by the
/// queue of the CPU that sends it, and the host then answers by that queue: a flow would move whenever
/// its process does, and its packets overtake each other.
fn spread_by_flow(interface: &Path) -> io::Result<()> {
    let Ok(queues) = fs::read_dir(interface.join("queues")) else {
        return Ok(());
    };
    let queues = queues.collect::<io::Result<Vec<_>>>()?;
    let sends = |entry: &&DirEntry| entry.file_name().to_string_lossy().starts_with("tx-");
    let sending: Vec<_> = queues.iter().filter(sends).collect();
    // One alone has no such setting.
    if sending.len() > 1 {
        for queue in sending {
            fs::write(queue.path().join("xps_cpus"), "0")?;
        }
    }
    Ok(())
}

impl Devices for PlatformDevices {
    fn is_attached(&self, device: &str) -> bool {
        self.device(device).join("driver").exists()
    }

    fn attach(&self, device: &str) -> io::Result<String> {
        if !self.is_attached(device) {
            self.tell_driver("bind", device)?;
        }
        for child in fs::read_dir(self.device(device))? {
            let child = child?;
            if !child.file_name().to_string_lossy().starts_with("virtio") {
                continue;
            }
            // Absent where it is another kind of device, empty for an interface elsewhere.
            let Ok(mut interfaces) = fs::read_dir(child.path().join("net")) else {
                continue;
            };
            if let Some(interface) = interfaces.next() {
                let interface = interface?;
                spread_by_flow(&interface.path())?;
                return Ok(interface.file_name().to_string_lossy().into_owned());
            }
        }
        Err(io::Error::new(
            io::ErrorKind::NotFound,
            format!("no network interface at {device}"),
        ))
    }

    fn detach(&self, device: &str) -> io::Result<()> {
        if self.is_attached(device) {
            self.tell_driver("unbind", device)?;
        }
        Ok(())
    }
}
