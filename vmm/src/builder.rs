//! The boot recipe: [`build`] reads from top to bottom as what happens.

use std::{
    fs::File,
    io,
    os::fd::{FromRawFd, IntoRawFd, OwnedFd},
    sync::{Arc, atomic::Ordering},
};

use bulkhead_fs::{FileServer, FsError, ShareOptions};
use bulkhead_vmm_control::{Counters, FIRST_NIC, JailTimes, NEEDED_CAPABILITIES, NICS, VmConfig};
use kvm_bindings::{
    CpuId, KVM_API_VERSION, KVM_CAP_SPLIT_IRQCHIP, KVM_MAX_CPUID_ENTRIES, kvm_enable_cap,
};
use kvm_ioctls::{Cap, IoEventAddress, Kvm, NoDatamatch, VcpuFd, VmFd};
use thiserror::Error;
use vm_memory::GuestMemoryBackend;
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use crate::{
    arch::{
        boot_params::{self, BootParamsError, SEED_LEN},
        cpuid::{self, TooManyLeaves},
        layout::{KVM_TSS, NIC_MMIO_SIZE, VIRTIO_IRQ_START, VIRTIO_MMIO_SIZE, VIRTIO_MMIO_START},
        mptable::{self, MpTableError},
        registers::{self, RegistersError},
    },
    bus::{Bus, MmioDevice, Place},
    command_line,
    counters::{DeviceStats, ExitCounter},
    devices::{
        crash_console::CrashConsole,
        event_loop::{EventLoop, EventLoopBuilder, EventLoopError},
        ioapic::{self, IoApic},
        uart::Uart,
        virtio::{
            CALM, Device,
            console::{Console, ConsoleHandler},
            fs::{Fs, FsHandler, FsWorkers, Limits},
            mmio::Transport,
            net::{self, Interface, Net, NetHandler, NetWorkers, NicError},
            registers::{Registers, register},
            rng::{Rng, RngHandler},
            vsock::{Vsock, VsockHandler},
        },
    },
    kernel::{self, KernelError},
    memory::{self, GuestMemory, MemoryError},
    vcpu::{self, Stop, Vcpu, VcpuError, VcpuStats},
};
use vmm_sys_util::epoll::EventSet;

/// Tag by which the guest mounts the shared file system.
const FS_TAG: &str = "bulkhead";

/// What the network devices are called among the counters.
const NIC_NAMES: [&str; NICS as usize] = [
    "net0", "net1", "net2", "net3", "net4", "net5", "net6", "net7",
];

/// The most threads that serve files.
const MAX_FS_THREADS: usize = 4;

/// Failures to build a VM.
#[derive(Debug, Error)]
pub enum BuildError {
    /// The descriptor is not that of `/dev/kvm`.
    #[error("Cannot use KVM: its API version is {0} instead of {KVM_API_VERSION}")]
    KvmVersion(i32),
    /// KVM is too old, or built without something.
    #[error("KVM on this host lacks {0}")]
    KvmLacks(&'static str),
    /// Not between 1 and what host and guest can do.
    #[error("Cannot run {0} vCPUs: this host can run 1 to {1} per VM")]
    Vcpus(u8, usize),
    /// A request to KVM failed.
    #[error("Cannot {what}")]
    Kvm {
        /// What was asked for.
        what: &'static str,
        /// What the ioctl said.
        #[source]
        source: io::Error,
    },
    /// Guest memory.
    #[error(transparent)]
    Memory(#[from] MemoryError),
    /// Kernel or initramfs.
    #[error(transparent)]
    Kernel(#[from] KernelError),
    /// The kernel's parameters.
    #[error(transparent)]
    BootParams(#[from] BootParamsError),
    /// The host gives no random numbers.
    #[error("Cannot get a random seed for the guest")]
    Seed(#[source] io::Error),
    /// The MP table.
    #[error(transparent)]
    MpTable(#[from] MpTableError),
    /// CPUID.
    #[error(transparent)]
    Cpuid(#[from] TooManyLeaves),
    /// A vCPU's first state.
    #[error(transparent)]
    Registers(#[from] RegistersError),
    /// A vCPU's thread.
    #[error(transparent)]
    Vcpu(#[from] VcpuError),
    /// The devices' threads.
    #[error(transparent)]
    EventLoop(#[from] EventLoopError),
    /// The file server.
    #[error("Cannot start the file server")]
    FileServer(#[source] FsError),
    /// An eventfd.
    #[error("Cannot create an eventfd")]
    EventFd(#[source] io::Error),
}

/// The descriptors that a VM is made of. Nothing else is opened.
#[derive(Debug)]
pub struct Resources {
    /// `/dev/kvm`, read and write.
    pub kvm: OwnedFd,
    /// The uncompressed ELF kernel.
    pub kernel: File,
    /// The initramfs.
    pub initramfs: File,
    /// Where the guest's console is written to, if it has one.
    pub console: Option<File>,
    /// `/proc/self/fd`, `O_PATH`, for the file server.
    pub proc_self_fd: OwnedFd,
}

/// What a VM tells its owner. Both are called on its threads and must not block.
pub struct Callbacks {
    /// The guest has dialled a port. False refuses the connection.
    pub accept: Box<dyn FnMut(u32, OwnedFd) -> bool + Send>,
    /// A vCPU came to its end by itself; the others may still run.
    pub stopped: Arc<dyn Fn(Stop) + Send + Sync>,
}

/// A VM. Fields are dropped in this order: whatever uses guest memory goes before it.
pub struct Vm {
    vcpus: Vec<Vcpu>,
    _event_loop: EventLoop,
    _fs_workers: FsWorkers,
    net_workers: NetWorkers,
    file_server: Arc<FileServer>,
    crash_console: Arc<CrashConsole>,
    vcpu_stats: Arc<VcpuStats>,
    exit_counters: Vec<ExitCounter>,
    device_stats: Vec<(&'static str, Arc<DeviceStats>)>,
    _vm: Arc<VmFd>,
    _memory: GuestMemory,
}

/// Builds a VM up to the point where its vCPUs can run. All threads exist afterwards, each under the
/// system call filter that it works with, and all of them wait, so that the process can give up
/// rights before [`Vm::run`].
pub fn build(
    config: &VmConfig,
    resources: Resources,
    callbacks: Callbacks,
) -> Result<Vm, BuildError> {
    let kvm = open_kvm(resources.kvm, config.vcpus)?;
    let memory = memory::allocate(config.memory_mib)?;
    let vm = Arc::new(kvm.create_vm().map_err(failed("create a VM"))?);
    memory::register(&vm, &memory)?;
    vm.set_tss_address(KVM_TSS)
        .map_err(failed("set the VM's TSS address"))?;
    // No PIT: with kvmclock and the TSC deadline timer Linux calibrates nothing.
    split_irqchip(&vm)?;

    let (mut kernel, mut initramfs) = (resources.kernel, resources.initramfs);
    let loaded = kernel::load(&memory, &mut kernel, &mut initramfs)?;

    let crash_console = Arc::new(CrashConsole::default());
    let file_server =
        Arc::new(FileServer::new(resources.proc_self_fd).map_err(BuildError::FileServer)?);
    let mut devices = Devices::new(&vm, &memory)?;
    devices.add_vsock(callbacks.accept)?;
    let fs_workers = devices.add_fs(file_server.clone(), config)?;
    devices.add_rng()?;
    let net_workers = devices.add_nics(config)?;
    if let Some(file) = resources.console {
        devices.add_console(file, crash_console.clone())?;
    }

    let text = command_line::build(devices.count(), config);
    boot_params::write(
        &memory,
        u64::from(config.memory_mib) << 20,
        &text,
        loaded.initramfs,
        &seed()?,
    )?;
    let mut irqs: Vec<u32> = (0..devices.count()).map(|index| place(index).1).collect();
    irqs.dedup();
    mptable::write(&memory, config.vcpus, &irqs)?;
    registers::write_tables(&memory)?;

    let vcpu_fds = create_vcpus(&kvm, &vm, config.vcpus)?;
    registers::set_boot_cpu(&vcpu_fds[0], loaded.entry)?;
    let exit_counters = vcpu_fds.iter().filter_map(ExitCounter::new).collect();

    // Up to the pin of the last device.
    let pins = irqs.last().map_or(0, |irq| irq + 1);
    let pins = u8::try_from(pins).unwrap_or(ioapic::MAX_PINS);
    let bus = Arc::new(Bus::new(
        Uart::new(crash_console.clone()),
        Arc::new(IoApic::new(vm.clone(), pins)),
        devices.registers,
    ));
    let vcpu_stats = Arc::new(VcpuStats::default());
    vcpu::prepare()?;
    let vcpus = (0..)
        .zip(vcpu_fds)
        .map(|(index, fd)| {
            let stopped = callbacks.stopped.clone();
            let on_stop = move |reason| stopped(reason);
            Vcpu::spawn(index, fd, bus.clone(), vcpu_stats.clone(), on_stop)
        })
        .collect::<Result<_, _>>()?;
    Ok(Vm {
        vcpus,
        _event_loop: devices.event_loop.spawn("devices")?,
        _fs_workers: fs_workers,
        net_workers,
        file_server,
        crash_console,
        vcpu_stats,
        exit_counters,
        device_stats: devices.stats,
        _vm: vm,
        _memory: memory,
    })
}

impl Vm {
    /// Lets the vCPUs run.
    pub fn run(&self) {
        for vcpu in &self.vcpus {
            vcpu.start();
        }
    }

    /// Shows a directory or file in the shared file system.
    pub fn share(&self, name: &str, root: OwnedFd, options: ShareOptions) -> Result<(), FsError> {
        self.file_server.share(name, root, options)
    }

    /// Takes a share away and closes everything below it.
    pub fn unshare(&self, name: &str) -> Result<(), FsError> {
        self.file_server.unshare(name)
    }

    /// Makes a slot for a network device one.
    pub fn attach_nic(&self, slot: u8, interface: Interface) -> Result<(), NicError> {
        self.net_workers.attach(slot, interface)
    }

    /// Empties a slot and closes its taps.
    pub fn detach_nic(&self, slot: u8) -> Result<(), NicError> {
        self.net_workers.detach(slot)
    }

    /// The counts of this moment. Of the process's jail the VM knows nothing.
    pub fn counters(&self) -> Counters {
        Counters {
            jail: JailTimes::default(),
            exits: self.exit_counters.iter().map(ExitCounter::read).sum(),
            user_exits: self.vcpu_stats.user_exits.load(Ordering::Relaxed),
            entered_ns: self.vcpu_stats.entered_ns.load(Ordering::Relaxed),
            devices: self
                .device_stats
                .iter()
                .map(|(name, stats)| ((*name).to_owned(), stats.snapshot()))
                .collect(),
        }
    }

    /// The last lines of the guest's console.
    pub fn crash_report(&self) -> String {
        self.crash_console.report()
    }
}

/// The virtio devices as they are added, each at the next place.
struct Devices<'v> {
    vm: &'v VmFd,
    memory: &'v GuestMemory,
    event_loop: EventLoopBuilder,
    /// Takes acknowledgements of interrupts, which nobody waits for.
    acknowledged: EventFd,
    registers: Vec<(Place, Arc<dyn MmioDevice>)>,
    last_interrupt: Option<(u32, Arc<EventFd>)>,
    stats: Vec<(&'static str, Arc<DeviceStats>)>,
}

impl<'v> Devices<'v> {
    fn new(vm: &'v VmFd, memory: &'v GuestMemory) -> Result<Self, BuildError> {
        Ok(Self {
            vm,
            memory,
            event_loop: EventLoopBuilder::new()?,
            acknowledged: EventFd::new(EFD_NONBLOCK).map_err(BuildError::EventFd)?,
            registers: Vec::new(),
            last_interrupt: None,
            stats: Vec::new(),
        })
    }

    fn count(&self) -> usize {
        self.registers.len()
    }

    fn add_vsock(
        &mut self,
        accept: Box<dyn FnMut(u32, OwnedFd) -> bool + Send>,
    ) -> Result<(), BuildError> {
        let watcher = self.event_loop.next_watcher();
        let transport = self.add("vsock", Vsock::new(watcher.clone(), accept))?;
        let handler = VsockHandler::new(transport);
        handler.watch(&watcher)?;
        self.event_loop.add(Arc::new(handler));
        Ok(())
    }

    fn add_fs(
        &mut self,
        server: Arc<FileServer>,
        config: &VmConfig,
    ) -> Result<FsWorkers, BuildError> {
        let transport = self.add("fs", Fs::new(FS_TAG))?;
        // One for each request that the guest's CPUs can wait for, and one more for what it writes
        // back meanwhile; beyond a few they only wait for the same disk.
        let threads = usize::from(config.vcpus).min(MAX_FS_THREADS - 1) + 1;
        let limits = Limits::new(config.fs_requests_per_second, config.fs_bytes_per_second);
        let handler = FsHandler::new(transport, server, limits);
        Ok(FsWorkers::spawn(handler, threads)?)
    }

    fn add_rng(&mut self) -> Result<(), BuildError> {
        let watcher = self.event_loop.next_watcher();
        let transport = self.add("rng", Rng)?;
        watcher.watch(&transport.kick, 0, EventSet::IN)?;
        self.event_loop.add(Arc::new(RngHandler::new(transport)));
        Ok(())
    }

    /// Slots without devices, with all that KVM needs for them: later there is no right to add it.
    fn add_nics(&mut self, config: &VmConfig) -> Result<NetWorkers, BuildError> {
        debug_assert_eq!(self.count(), usize::from(FIRST_NIC));
        let lanes = usize::from(config.queue_pairs());
        let (packets, bytes) = (config.net_packets_per_second, config.net_bytes_per_second);
        let mut slots = Vec::new();
        for (name, registers) in NIC_NAMES.iter().zip(Registers::sharing(NIC_MMIO_SIZE)) {
            let kicks = (0..lanes)
                .map(|_| Ok(Arc::new(self.event()?)))
                .collect::<Result<Arc<[_]>, BuildError>>()?;
            let transport = self.connect(name, Net::new(kicks.clone()), registers, &kicks)?;
            slots.push(NetHandler::new(
                transport,
                kicks,
                net::Limits::new(packets, bytes),
            ));
        }
        Ok(NetWorkers::spawn(slots, lanes)?)
    }

    fn add_console(
        &mut self,
        file: File,
        crash_console: Arc<CrashConsole>,
    ) -> Result<(), BuildError> {
        let watcher = self.event_loop.next_watcher();
        let transport = self.add("console", Console)?;
        watcher.watch(&transport.kick, 0, EventSet::IN)?;
        let handler = ConsoleHandler::new(transport, file, crash_console);
        self.event_loop.add(Arc::new(handler));
        Ok(())
    }

    fn event(&self) -> Result<EventFd, BuildError> {
        EventFd::new(EFD_NONBLOCK).map_err(BuildError::EventFd)
    }

    /// Adds a device that one event notifies.
    fn add<D: Device + 'static>(
        &mut self,
        name: &'static str,
        device: D,
    ) -> Result<Arc<Transport<D>>, BuildError> {
        let (Place { address, .. }, _) = place(self.count());
        // Our kernel does not acknowledge, and others not often enough for more than the devices that
        // they always have.
        let acknowledge = IoEventAddress::Mmio(address + register::INTERRUPT_ACK);
        self.vm
            .register_ioevent(&self.acknowledged, &acknowledge, CALM)
            .map_err(failed("register an ioeventfd"))?;
        let kick = Arc::new(self.event()?);
        self.connect(name, device, Registers::default(), &[kick])
    }

    /// Connects a device with KVM: a notification of the guest becomes an event for the device
    /// without waking its vCPU's thread, and an event of the device an interrupt. Nor does the
    /// vCPU's thread wake when the guest reads registers.
    ///
    /// A device with one of `kicks` looks at all of its few queues. One with more has one for each pair
    /// of queues, for the second of the pair: the driver seldom has to notify the first.
    fn connect<D: Device + 'static>(
        &mut self,
        name: &'static str,
        device: D,
        registers: Registers,
        kicks: &[Arc<EventFd>],
    ) -> Result<Arc<Transport<D>>, BuildError> {
        let (place, irq) = place(self.count());
        let notify = IoEventAddress::Mmio(place.address + register::QUEUE_NOTIFY);
        if let [kick] = kicks {
            self.vm
                .register_ioevent(kick, &notify, NoDatamatch)
                .map_err(failed("register an ioeventfd"))?;
        } else {
            for (queue, kick) in (1u32..).step_by(2).zip(kicks) {
                self.vm
                    .register_ioevent(kick, &notify, queue)
                    .map_err(failed("register an ioeventfd"))?;
            }
        }
        let interrupt = self.interrupt(irq)?;
        if place.address % Registers::PAGE_SIZE == 0 {
            let slot = u32::try_from(self.memory.num_regions() + self.count()).unwrap_or(u32::MAX);
            memory::register_readable(self.vm, slot, place.address, &registers)?;
        }
        let (memory, kick) = (self.memory.clone(), kicks[0].clone());
        let transport = Transport::with_registers(device, registers, memory, kick, interrupt);
        let transport = Arc::new(transport);
        self.registers.push((place, transport.clone()));
        self.stats.push((name, transport.stats.clone()));
        Ok(transport)
    }

    /// The event that raises an interrupt, which devices may share.
    fn interrupt(&mut self, irq: u32) -> Result<Arc<EventFd>, BuildError> {
        if let Some((last, event)) = &self.last_interrupt
            && *last == irq
        {
            return Ok(event.clone());
        }
        let event = Arc::new(self.event()?);
        self.vm
            .register_irqfd(&event, irq)
            .map_err(failed("register an irqfd"))?;
        self.last_interrupt = Some((irq, event.clone()));
        Ok(event)
    }
}

/// Place and interrupt of virtio device `index`.
///
/// Those for network devices are most of all and mostly unused, so they cost as little as possible at
/// boot: they share a page of registers, and the interrupt of the device before them, which seldom has
/// any.
pub fn place(index: usize) -> (Place, u32) {
    let nic = index.saturating_sub(FIRST_NIC.into());
    let is_nic = index >= FIRST_NIC.into() && nic < NICS.into();
    // Past the network devices, which are where one would be.
    let page = if is_nic {
        index - nic
    } else {
        index - nic.min(usize::from(NICS) - 1)
    };
    let pin = index
        - (index + 1)
            .saturating_sub(FIRST_NIC.into())
            .min(NICS.into());
    let (offset, size) = if is_nic {
        (nic as u64 * NIC_MMIO_SIZE, NIC_MMIO_SIZE)
    } else {
        (0, VIRTIO_MMIO_SIZE)
    };
    let address = VIRTIO_MMIO_START + page as u64 * VIRTIO_MMIO_SIZE + offset;
    let irq = VIRTIO_IRQ_START + u32::try_from(pin).unwrap_or(0);
    (Place { address, size }, irq)
}

fn open_kvm(fd: OwnedFd, vcpus: u8) -> Result<Kvm, BuildError> {
    // SAFETY: the descriptor is owned and its ownership goes to `Kvm`. If it is no /dev/kvm, every
    // ioctl fails.
    let kvm = unsafe { Kvm::from_raw_fd(fd.into_raw_fd()) };
    let version = kvm.get_api_version();
    if u32::try_from(version) != Ok(KVM_API_VERSION) {
        return Err(BuildError::KvmVersion(version));
    }
    let lacks = |number: u32| kvm.check_extension_raw(number.into()) <= 0;
    if let Some((_, name)) = NEEDED_CAPABILITIES.iter().find(|(cap, _)| lacks(*cap)) {
        return Err(BuildError::KvmLacks(name));
    }
    let most = kvm.get_max_vcpus().min(mptable::MAX_CPUS.into());
    if vcpus == 0 || usize::from(vcpus) > most {
        return Err(BuildError::Vcpus(vcpus, most));
    }
    Ok(kvm)
}

/// Local APICs in KVM, the I/O APIC here.
fn split_irqchip(vm: &VmFd) -> Result<(), BuildError> {
    let mut cap = kvm_enable_cap {
        cap: KVM_CAP_SPLIT_IRQCHIP,
        ..Default::default()
    };
    // The pins whose end of interrupt KVM would report, if they were level-triggered.
    cap.args[0] = ioapic::MAX_PINS.into();
    vm.enable_cap(&cap)
        .map_err(failed("create the local interrupt controllers"))
}

fn create_vcpus(kvm: &Kvm, vm: &VmFd, count: u8) -> Result<Vec<VcpuFd>, BuildError> {
    let supported: CpuId = kvm
        .get_supported_cpuid(KVM_MAX_CPUID_ENTRIES)
        .map_err(failed("read what CPUID can offer"))?;
    let tsc_deadline = kvm.check_extension(Cap::TscDeadlineTimer);
    (0..count)
        .map(|index| {
            let vcpu = vm
                .create_vcpu(index.into())
                .map_err(failed("create a vCPU"))?;
            let cpuid = cpuid::adapt(&supported, index, count, tsc_deadline)?;
            vcpu.set_cpuid2(&cpuid)
                .map_err(failed("set a vCPU's CPUID"))?;
            registers::set_common(&vcpu)?;
            Ok(vcpu)
        })
        .collect()
}

fn seed() -> Result<[u8; SEED_LEN], BuildError> {
    let mut seed = [0; SEED_LEN];
    let flags = rustix::rand::GetRandomFlags::empty();
    match rustix::rand::getrandom(&mut seed, flags) {
        // The kernel returns up to 256 bytes at once, uninterrupted (getrandom(2)).
        Ok(SEED_LEN) => Ok(seed),
        Ok(_) => Err(BuildError::Seed(io::ErrorKind::UnexpectedEof.into())),
        Err(errno) => Err(BuildError::Seed(errno.into())),
    }
}

fn failed(what: &'static str) -> impl FnOnce(kvm_ioctls::Error) -> BuildError {
    move |error| BuildError::Kvm {
        what,
        source: error.into(),
    }
}
