//! The queue for commands (section 5.1.6.5), of which there is one: how many lanes the driver uses.

use virtio_queue::{Queue, QueueT};

use super::{NetHandler, Nic, feature};
use crate::{
    devices::virtio::{
        Work,
        mmio::Inner,
        queue::{self, Chain, QueueError},
    },
    memory::GuestMemory,
};

/// `VIRTIO_NET_CTRL_MQ` with `VIRTIO_NET_CTRL_MQ_VQ_PAIRS_SET`.
const SET_PAIRS: [u8; 2] = [4, 0];
const OK: u8 = 0;
const ERROR: u8 = 1;
/// Commands before it is somebody else's turn.
const COMMANDS_AT_ONCE: usize = 16;

impl NetHandler {
    /// Carries out the driver's commands.
    pub(super) fn obey(&self) {
        let transport = &self.transport;
        let memory = &transport.memory;
        let mut inner = transport.lock();
        match commands(&mut inner) {
            // Nearly always there are none.
            Some((_, queue)) => match queue::enable_notification(queue, memory) {
                Ok(true) => {}
                Ok(false) => return,
                Err(_) => return transport.stop(&mut inner),
            },
            None => return,
        }
        // Once the driver knows that a lane is not used, no packet comes by it any more.
        let inner = transport.when_idle(inner, |inner| {
            let result = commands(inner).map_or(Ok(()), |(nic, queue)| {
                let before = queue.next_used();
                for _ in 0..COMMANDS_AT_ONCE {
                    let Some(chain) = queue::pop(queue, memory)? else {
                        break;
                    };
                    carry_out(&chain, nic, queue, memory)?;
                }
                queue::notify_since(queue, memory, &transport.interrupt, before)
            });
            if result.is_err() {
                transport.stop(inner);
            }
        });
        // Packets may have another way now, there may be more commands, and whoever was turned away
        // meanwhile must come again.
        inner.device.wake_all();
    }
}

/// The queue for commands, if there is one and the driver uses it.
fn commands(inner: &mut Inner<super::Net>) -> Option<(&mut Nic, &mut Queue)> {
    if !inner.is_running() || !inner.has_features(feature::SEVERAL) {
        return None;
    }
    let nic = inner.device.nic.as_mut()?;
    let queue = inner.queues.last_mut()?;
    queue.ready().then_some((nic, queue))
}

fn carry_out(chain: &Chain<'_>, nic: &mut Nic, queue: &mut Queue, memory: &GuestMemory) -> Work {
    let mut command = [0; 5];
    let length = queue::gather(&chain.readable, &mut command);
    let pairs = u16::from_le_bytes([command[2], command[3]]).into();
    let valid = length == 4 && command[..2] == SET_PAIRS && (1..=nic.taps.len()).contains(&pairs);
    if valid {
        nic.active = pairs;
    }
    let answer = if valid { OK } else { ERROR };
    if queue::scatter(&chain.writable, &[answer]) != 1 {
        return Err(QueueError::TooSmall);
    }
    queue::push(queue, memory, chain.head, 1)
}
