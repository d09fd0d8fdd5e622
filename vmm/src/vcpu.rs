//! vCPUs: a thread each, which enters the guest and serves its accesses to devices.

use std::{
    io,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU8, AtomicU64, Ordering},
        mpsc,
    },
    thread::JoinHandle,
    time::Duration,
};

use kvm_ioctls::{VcpuExit, VcpuFd};
use nix::time::{ClockId, clock_gettime};
use thiserror::Error;
use vmm_sys_util::signal::{Killable, SIGRTMIN, register_signal_handler};

use crate::{
    bus::Bus,
    seccomp::Filter,
    thread::{self, ThreadError},
};

/// Why a vCPU could not go on, or could not be started.
#[derive(Debug, Error)]
pub enum VcpuError {
    /// `KVM_RUN` itself failed.
    #[error("Cannot run vCPU {index}")]
    Run {
        /// Which vCPU.
        index: u8,
        /// What the ioctl said.
        #[source]
        source: io::Error,
    },
    /// The processor refused the guest's state.
    #[error("The processor refused to enter the guest on vCPU {index}: reason {reason:#x}")]
    FailEntry {
        /// Which vCPU.
        index: u8,
        /// The processor's code.
        reason: u64,
    },
    /// KVM met something that it cannot emulate.
    #[error("KVM gave up on vCPU {index} at instruction {rip:#x}: internal error {suberror}")]
    Internal {
        /// Which vCPU.
        index: u8,
        /// `KVM_INTERNAL_ERROR_…`.
        suberror: u32,
        /// The guest's instruction pointer.
        rip: u64,
    },
    /// An exit that this VMM has not asked for.
    #[error("vCPU {index} left the guest for a reason that is not expected: {exit}")]
    Unexpected {
        /// Which vCPU.
        index: u8,
        /// The exit.
        exit: String,
    },
    /// The thread could not be started.
    #[error(transparent)]
    Thread(#[from] ThreadError),
    /// The signal that interrupts `KVM_RUN` could not be prepared.
    #[error("Cannot install the signal handler of vCPUs")]
    Signal(#[source] io::Error),
}

/// How a vCPU came to its end by itself.
#[derive(Debug)]
pub enum Stop {
    /// The guest reset itself: a reboot, a panic or a triple fault.
    Reset,
    /// It cannot go on.
    Failed(VcpuError),
}

/// What all vCPUs of a VM count.
#[derive(Debug, Default)]
pub struct VcpuStats {
    /// Returns of `KVM_RUN`.
    pub user_exits: AtomicU64,
    /// `CLOCK_MONOTONIC` in nanoseconds just before the first `KVM_RUN`, or 0.
    pub entered_ns: AtomicU64,
}

/// A vCPU on its thread. Dropping it takes the vCPU out of the guest and ends the thread.
pub struct Vcpu {
    /// A message starts the vCPU; until this is closed the thread keeps what it shares with KVM.
    start: Option<mpsc::Sender<()>>,
    stopping: Arc<AtomicBool>,
    immediate_exit: ImmediateExit,
    thread: Option<JoinHandle<()>>,
}

/// `kvm_run.immediate_exit` in the page that a vCPU shares with KVM.
struct ImmediateExit(*const AtomicU8);

// SAFETY: the byte is only accessed atomically.
unsafe impl Send for ImmediateExit {}

impl Vcpu {
    /// Starts the thread of vCPU `index`, which waits for [`Self::start`]. `on_stop` is called on it
    /// if the vCPU comes to its end by itself.
    pub fn spawn(
        index: u8,
        mut fd: VcpuFd,
        bus: Arc<Bus>,
        stats: Arc<VcpuStats>,
        on_stop: impl FnOnce(Stop) + Send + 'static,
    ) -> Result<Self, VcpuError> {
        let immediate_exit = &raw mut fd.get_kvm_run().immediate_exit;
        let immediate_exit = ImmediateExit(immediate_exit.cast::<AtomicU8>());
        let stopping = Arc::new(AtomicBool::new(false));
        let stop = stopping.clone();
        let (start, started) = mpsc::channel();
        let work = move || {
            if started.recv().is_ok()
                && let Some(reason) = run(index, &mut fd, &bus, &stats, &stop)
            {
                on_stop(reason);
            }
            while started.recv().is_ok() {}
            drop(fd);
        };
        let thread = thread::start(format!("vcpu{index}"), Filter::Vcpu, || Ok(()), work)?;
        Ok(Self {
            start: Some(start),
            stopping,
            immediate_exit,
            thread: Some(thread),
        })
    }

    /// Lets the vCPU run.
    pub fn start(&self) {
        if let Some(start) = &self.start {
            // The thread listens as long as this end is open.
            let _ = start.send(());
        }
    }
}

impl Drop for Vcpu {
    fn drop(&mut self) {
        let Some(thread) = self.thread.take() else {
            return;
        };
        self.stopping.store(true, Ordering::SeqCst);
        // SAFETY: the page is mapped as long as the thread has the vCPU, which it keeps until
        // `start` is closed below.
        unsafe { &*self.immediate_exit.0 }.store(1, Ordering::SeqCst);
        // KVM looks at the byte when it enters the guest; the signal is for a vCPU that is in it.
        // It fails only for a thread that has ended.
        let _ = thread.kill(SIGRTMIN());
        self.start = None;
        // A panic of the thread has been reported by the panic hook.
        let _ = thread.join();
    }
}

/// Installs the handler of the signal that takes a vCPU out of `KVM_RUN`: it has nothing to do but
/// to exist.
pub fn prepare() -> Result<(), VcpuError> {
    extern "C" fn nothing(_: libc::c_int, _: *mut libc::siginfo_t, _: *mut libc::c_void) {}
    register_signal_handler(SIGRTMIN(), nothing).map_err(|error| VcpuError::Signal(error.into()))
}

/// Runs until the vCPU ends by itself, or returns nothing when it was told to stop.
fn run(
    index: u8,
    fd: &mut VcpuFd,
    bus: &Bus,
    stats: &VcpuStats,
    stopping: &AtomicBool,
) -> Option<Stop> {
    if index == 0 {
        stats.entered_ns.store(monotonic_ns(), Ordering::Relaxed);
    }
    while !stopping.load(Ordering::SeqCst) {
        let exit = fd.run();
        stats.user_exits.fetch_add(1, Ordering::Relaxed);
        #[cfg(feature = "back-door")]
        crate::back_door::visit();
        match exit {
            Ok(VcpuExit::MmioWrite(address, data)) => bus.mmio_write(address, data),
            Ok(VcpuExit::MmioRead(address, data)) => bus.mmio_read(address, data),
            Ok(VcpuExit::IoOut(port, data)) => bus.port_out(port, data),
            Ok(VcpuExit::IoIn(port, data)) => bus.port_in(port, data),
            Ok(VcpuExit::Shutdown | VcpuExit::SystemEvent(..)) => return Some(Stop::Reset),
            Ok(VcpuExit::Intr) => {}
            Ok(VcpuExit::InternalError) => return Some(Stop::Failed(internal_error(index, fd))),
            Ok(VcpuExit::FailEntry(reason, _)) => {
                return Some(Stop::Failed(VcpuError::FailEntry { index, reason }));
            }
            Ok(exit) => {
                let exit = format!("{exit:?}");
                return Some(Stop::Failed(VcpuError::Unexpected { index, exit }));
            }
            // A signal; or another vCPU has not been started by the guest yet.
            Err(error) if [libc::EINTR, libc::EAGAIN].contains(&error.errno()) => {}
            Err(error) => {
                let source = error.into();
                return Some(Stop::Failed(VcpuError::Run { index, source }));
            }
        }
    }
    None
}

fn internal_error(index: u8, fd: &mut VcpuFd) -> VcpuError {
    let rip = fd.get_regs().map_or(0, |regs| regs.rip);
    // SAFETY: the exit reason is KVM_EXIT_INTERNAL_ERROR, so this is the member that KVM has set,
    // and any bytes are a valid integer.
    let suberror = unsafe { fd.get_kvm_run().__bindgen_anon_1.internal.suberror };
    VcpuError::Internal {
        index,
        suberror,
        rip,
    }
}

/// `CLOCK_MONOTONIC` in nanoseconds.
pub(crate) fn monotonic_ns() -> u64 {
    // Not rustix's, which looks for the vDSO at the first call, by way of a file if need be.
    let now = clock_gettime(ClockId::CLOCK_MONOTONIC).map_or(Duration::ZERO, Duration::from);
    u64::try_from(now.as_nanos()).unwrap_or(u64::MAX)
}
