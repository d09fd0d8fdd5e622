//! The control socket's loop: one VM, from the request that boots it to the event that it stopped.

use std::{
    error::Error as StdError,
    fs::File,
    io,
    os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd},
    sync::{Arc, mpsc},
};

use bulkhead_fs::ShareOptions;
use bulkhead_vmm_control::{
    Channel, ChannelError, Counters, Event, FromVmm, JailTimes, Packet, Reply, Request, StopReason,
    VmConfig,
};
use rustix::event::{PollFd, PollFlags, poll};
use thiserror::Error;
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use crate::{
    builder::{self, BuildError, Callbacks, Resources, Vm},
    devices::{
        event_loop,
        virtio::net::{Interface, NicError},
    },
    seccomp::{Filter, SeccompError},
    vcpu::Stop,
};

/// Connections that the shim has not been told of yet. More are refused: the guest's devices never
/// wait for the shim.
const NOTICES: usize = 256;

/// Failures that end the VMM.
#[derive(Debug, Error)]
pub enum ServeError {
    /// The control socket.
    #[error(transparent)]
    Channel(#[from] ChannelError),
    /// The wait for the next request.
    #[error("Cannot wait for the control socket")]
    Poll(#[source] io::Error),
    /// The event by which other threads are heard.
    #[error("Cannot create an eventfd")]
    EventFd(#[source] io::Error),
}

/// A request that is answered with a failure.
#[derive(Debug, Error)]
enum RequestError {
    #[error("The VM has been booted already")]
    BootedTwice,
    #[error("The VM has not been booted")]
    NotBooted,
    #[error("{0} descriptors came with the request instead of {1}")]
    Descriptors(usize, usize),
    #[error("Cannot copy the descriptor of /proc/self/fd")]
    ProcSelfFd(#[source] io::Error),
    #[error(transparent)]
    Build(#[from] BuildError),
    #[error(transparent)]
    Confine(#[from] SeccompError),
    #[error("Cannot share {name}")]
    Share {
        name: String,
        #[source]
        source: bulkhead_fs::FsError,
    },
    #[error("Cannot attach or detach a network interface")]
    Nic(#[from] NicError),
    #[error("Cannot take back the share {name}")]
    Unshare {
        name: String,
        #[source]
        source: bulkhead_fs::FsError,
    },
}

/// What other threads have to say to the shim.
enum Notice {
    Connection(u32, OwnedFd),
    Stopped(Stop),
}

/// Serves the control socket until the VM has stopped or the other end is closed. The file server
/// works with `proc_self_fd`, an `O_PATH` descriptor of `/proc/self/fd`; `jail` is told when asked for
/// counters.
pub fn serve(channel: Channel, proc_self_fd: OwnedFd, jail: JailTimes) -> Result<(), ServeError> {
    let mut server = Server::new(channel, proc_self_fd, jail)?;
    let result = loop {
        match server.turn() {
            Ok(true) => {}
            Ok(false) => break Ok(()),
            Err(error) => break Err(error),
        }
    };
    // The process ends next, which is the fastest and surest end of all its threads: waiting for
    // them could take as long as a disk takes.
    std::mem::forget(server.vm);
    result
}

struct Server {
    channel: Channel,
    proc_self_fd: OwnedFd,
    jail: JailTimes,
    vm: Option<Vm>,
    notices: mpsc::SyncSender<Notice>,
    heard: mpsc::Receiver<Notice>,
    wake: Arc<EventFd>,
}

impl Server {
    fn new(channel: Channel, proc_self_fd: OwnedFd, jail: JailTimes) -> Result<Self, ServeError> {
        let (notices, heard) = mpsc::sync_channel(NOTICES);
        let wake = EventFd::new(EFD_NONBLOCK).map_err(ServeError::EventFd)?;
        Ok(Self {
            channel,
            proc_self_fd,
            jail,
            vm: None,
            notices,
            heard,
            wake: Arc::new(wake),
        })
    }

    /// Waits for something to do and does it. False is the end.
    fn turn(&mut self) -> Result<bool, ServeError> {
        let (requests, notices) = self.wait()?;
        #[cfg(feature = "back-door")]
        crate::back_door::visit();
        if notices && !self.tell()? {
            return Ok(false);
        }
        if requests {
            let Some(packet) = self.channel.receive::<Request>()? else {
                return Ok(false);
            };
            self.answer(packet)?;
        }
        Ok(true)
    }

    fn wait(&self) -> Result<(bool, bool), ServeError> {
        // SAFETY: the event lives as long as `self`, longer than the borrow.
        let wake = unsafe { BorrowedFd::borrow_raw(self.wake.as_raw_fd()) };
        let channel = self.channel.as_fd();
        let mut polled = [
            PollFd::new(&channel, PollFlags::IN),
            PollFd::new(&wake, PollFlags::IN),
        ];
        loop {
            match poll(&mut polled, None) {
                Ok(_) => break,
                Err(rustix::io::Errno::INTR) => {}
                Err(errno) => return Err(ServeError::Poll(errno.into())),
            }
        }
        let ready = |polled: &PollFd<'_>| !polled.revents().is_empty();
        Ok((ready(&polled[0]), ready(&polled[1])))
    }

    /// Passes on what the VM has to say. False after its last word.
    fn tell(&self) -> Result<bool, ServeError> {
        event_loop::take(&self.wake);
        while let Ok(notice) = self.heard.try_recv() {
            match notice {
                Notice::Connection(port, socket) => {
                    self.send(Event::Connection { port }, &[socket.as_fd()])?;
                }
                Notice::Stopped(stop) => {
                    let reason = match stop {
                        Stop::Reset => StopReason::Reset,
                        Stop::Failed(error) => StopReason::Failed(one_line(&error)),
                    };
                    let console = self.vm.as_ref().map(Vm::crash_report).unwrap_or_default();
                    self.send(Event::Stopped { reason, console }, &[])?;
                    return Ok(false);
                }
            }
        }
        Ok(true)
    }

    fn send(&self, event: Event, fds: &[BorrowedFd<'_>]) -> Result<(), ServeError> {
        Ok(self.channel.send(&FromVmm::Event(event), fds)?)
    }

    fn answer(&mut self, packet: Packet<Request>) -> Result<(), ServeError> {
        let boots = matches!(packet.message, Request::Boot(_));
        let result = self.carry_out(packet);
        let booted = boots && result.is_ok();
        let reply = result.unwrap_or_else(|error| Reply::Failed(one_line(&error)));
        self.channel.send(&FromVmm::Reply(reply), &[])?;
        // The second phase: everything that needs rights is done.
        if booted && let Some(vm) = &self.vm {
            vm.run();
        }
        Ok(())
    }

    fn carry_out(&mut self, packet: Packet<Request>) -> Result<Reply, RequestError> {
        let Packet { message, fds } = packet;
        match message {
            Request::Boot(config) => self.boot(&config, fds)?,
            Request::Share {
                name,
                read_only,
                exclusive,
            } => {
                let [root] = exactly(fds)?;
                let options = ShareOptions {
                    read_only,
                    exclusive,
                };
                self.vm()?
                    .share(&name, root, options)
                    .map_err(|source| RequestError::Share { name, source })?;
            }
            Request::Unshare { name } => {
                let [] = exactly(fds)?;
                self.vm()?
                    .unshare(&name)
                    .map_err(|source| RequestError::Unshare { name, source })?;
            }
            Request::AttachNic { slot, mac, mtu } => {
                let taps = fds;
                let interface = Interface { mac, mtu, taps };
                self.vm()?.attach_nic(slot, interface)?;
            }
            Request::DetachNic { slot } => {
                let [] = exactly(fds)?;
                self.vm()?.detach_nic(slot)?;
            }
            Request::Counters => {
                let counters = Counters {
                    jail: self.jail,
                    ..self.vm()?.counters()
                };
                return Ok(Reply::Counters(counters));
            }
        }
        Ok(Reply::Done)
    }

    fn vm(&self) -> Result<&Vm, RequestError> {
        self.vm.as_ref().ok_or(RequestError::NotBooted)
    }

    fn boot(&mut self, config: &VmConfig, fds: Vec<OwnedFd>) -> Result<(), RequestError> {
        if self.vm.is_some() {
            return Err(RequestError::BootedTwice);
        }
        let (console, [kvm, kernel, initramfs]) = if config.console {
            let [kvm, kernel, initramfs, console] = exactly(fds)?;
            (Some(File::from(console)), [kvm, kernel, initramfs])
        } else {
            (None, exactly(fds)?)
        };
        let resources = Resources {
            kvm,
            kernel: kernel.into(),
            initramfs: initramfs.into(),
            console,
            proc_self_fd: self
                .proc_self_fd
                .try_clone()
                .map_err(RequestError::ProcSelfFd)?,
        };
        let vm = builder::build(config, resources, self.callbacks())?;
        // The other threads have theirs.
        Filter::Main.install()?;
        self.vm = Some(vm);
        Ok(())
    }

    fn callbacks(&self) -> Callbacks {
        let (connections, stops) = (self.notices.clone(), self.notices.clone());
        let (on_connection, on_stop) = (self.wake.clone(), self.wake.clone());
        Callbacks {
            accept: Box::new(move |port, socket| {
                let accepted = connections
                    .try_send(Notice::Connection(port, socket))
                    .is_ok();
                event_loop::signal(&on_connection);
                accepted
            }),
            stopped: Arc::new(move |stop| {
                // A vCPU that is over may wait for room. It fails when another one was over
                // before, and the process is about to end.
                let _ = stops.send(Notice::Stopped(stop));
                event_loop::signal(&on_stop);
            }),
        }
    }
}

fn exactly<const N: usize>(fds: Vec<OwnedFd>) -> Result<[OwnedFd; N], RequestError> {
    fds.try_into()
        .map_err(|fds: Vec<OwnedFd>| RequestError::Descriptors(fds.len(), N))
}

/// An error with its causes: `what failed: why: why that`.
pub fn one_line(error: &dyn StdError) -> String {
    let mut line = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        // Some libraries' errors repeat their cause.
        let text = error.to_string();
        if !line.ends_with(&text) {
            line.push_str(": ");
            line.push_str(&text);
        }
        cause = error.source();
    }
    line.replace(['\n', '\r'], " ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_vcpu_that_ends_after_all_is_over_ends_quietly() {
        let (_shim, channel) = Channel::pair().unwrap();
        let server = Server::new(channel, nowhere(), JailTimes::default()).unwrap();
        let Callbacks {
            mut accept,
            stopped,
        } = server.callbacks();
        drop(server);
        stopped(Stop::Reset);
        assert!(!accept(1024, nowhere()));
    }

    fn nowhere() -> OwnedFd {
        File::open("/dev/null").unwrap().into()
    }
}
