//! What happens to tasks, told to containerd in order.

use std::{
    collections::VecDeque,
    env, io,
    time::{Duration, SystemTime},
};

use containerd_shim_protos::{
    events::task as messages,
    shim::{event::Envelope, events::ForwardRequest},
    shim_async::EventsClient,
};
use protobuf::{Message, MessageField, well_known_types::any::Any};
use thiserror::Error;
use tokio::{
    net::UnixStream,
    sync::{mpsc, oneshot},
    time::{sleep, timeout},
};
use ttrpc::{
    asynchronous::{Client, transport::Socket},
    context,
};

use crate::errors::timestamp;

/// containerd's ttrpc address, in the environment of every shim.
const ADDRESS_VARIABLE: &str = "TTRPC_ADDRESS";

/// How long one attempt may take.
const FORWARD_DEADLINE: Duration = Duration::from_secs(5);

/// How often an event is tried again, each time after one second more.
const RETRIES: u32 = 5;

/// The most events that wait for containerd; beyond, the oldest is dropped.
const MAX_QUEUED: usize = 2048;

/// An event, with containerd's own message.
#[derive(Debug, Clone)]
pub enum Event {
    /// A container was created.
    Create(messages::TaskCreate),
    /// A container's process was started.
    Start(messages::TaskStart),
    /// A process has ended.
    Exit(messages::TaskExit),
    /// A process was released.
    Delete(messages::TaskDelete),
    /// A further process was registered.
    ExecAdded(messages::TaskExecAdded),
    /// A further process was started.
    ExecStarted(messages::TaskExecStarted),
    /// A container's processes stand still.
    Paused(messages::TaskPaused),
    /// They go on.
    Resumed(messages::TaskResumed),
    /// The kernel has ended a process of a container for lack of memory.
    Oom(messages::TaskOOM),
}

/// Failures of an attempt to tell containerd.
#[derive(Debug, Error)]
enum ForwardError {
    #[error("Cannot connect to {address}")]
    Connect {
        address: String,
        #[source]
        source: io::Error,
    },
    #[error("containerd did not answer in time")]
    Deadline,
    #[error("containerd refused the event")]
    Refused(#[source] ttrpc::Error),
    #[error("Cannot encode the event")]
    Encode(#[source] protobuf::Error),
}

impl Event {
    fn pack(&self, namespace: &str, now: SystemTime) -> Result<Envelope, protobuf::Error> {
        fn any<M: Message>(message: &M) -> Result<Any, protobuf::Error> {
            Ok(Any {
                // containerd resolves bare names, without the usual "type.googleapis.com/".
                type_url: format!("containerd.events.{}", M::NAME),
                value: message.write_to_bytes()?,
                ..Any::default()
            })
        }
        let (topic, event) = match self {
            Self::Create(message) => ("/tasks/create", any(message)),
            Self::Start(message) => ("/tasks/start", any(message)),
            Self::Exit(message) => ("/tasks/exit", any(message)),
            Self::Delete(message) => ("/tasks/delete", any(message)),
            Self::ExecAdded(message) => ("/tasks/exec-added", any(message)),
            Self::ExecStarted(message) => ("/tasks/exec-started", any(message)),
            Self::Paused(message) => ("/tasks/paused", any(message)),
            Self::Resumed(message) => ("/tasks/resumed", any(message)),
            Self::Oom(message) => ("/tasks/oom", any(message)),
        };
        Ok(Envelope {
            timestamp: MessageField::some(timestamp(now)),
            namespace: namespace.to_owned(),
            topic: topic.to_owned(),
            event: MessageField::some(event?),
            ..Envelope::default()
        })
    }
}

/// The queue of events.
#[derive(Debug, Clone)]
pub struct Events {
    sender: mpsc::UnboundedSender<Item>,
}

#[derive(Debug)]
enum Item {
    Event(Event, SystemTime),
    /// Answered when everything before it is done with.
    Mark(oneshot::Sender<()>),
}

impl Events {
    /// Starts to forward events of `namespace`.
    pub fn start(namespace: String) -> Self {
        let (sender, receiver) = mpsc::unbounded_channel();
        let address = env::var(ADDRESS_VARIABLE).unwrap_or_default();
        let forwarder = Forwarder {
            address: address.trim_start_matches("unix://").to_owned(),
            namespace,
            client: None,
        };
        tokio::spawn(forwarder.run(receiver));
        Self { sender }
    }

    /// Queues an event that happened now.
    pub fn publish(&self, event: Event) {
        // The receiver lives as long as there is a sender.
        let _ = self.sender.send(Item::Event(event, SystemTime::now()));
    }

    /// Waits until every event so far was forwarded or given up, but no longer than `deadline`.
    pub async fn drain(&self, deadline: Duration) {
        let (sender, done) = oneshot::channel();
        let _ = self.sender.send(Item::Mark(sender));
        if timeout(deadline, done).await.is_err() {
            tracing::error!("Events are left that containerd did not take");
        }
    }
}

struct Forwarder {
    address: String,
    namespace: String,
    client: Option<EventsClient>,
}

impl Forwarder {
    async fn run(mut self, mut receiver: mpsc::UnboundedReceiver<Item>) {
        let mut queue = VecDeque::new();
        loop {
            if queue.is_empty() {
                match receiver.recv().await {
                    Some(event) => queue.push_back(event),
                    None => return,
                }
            }
            while let Ok(event) = receiver.try_recv() {
                queue.push_back(event);
            }
            if queue.len() > MAX_QUEUED {
                tracing::error!(dropped = queue.len() - MAX_QUEUED, "Too many events wait");
                queue.drain(..queue.len() - MAX_QUEUED);
            }
            match queue.pop_front() {
                Some(Item::Event(event, time)) => self.deliver(&event, time).await,
                Some(Item::Mark(done)) => drop(done.send(())),
                None => {}
            }
        }
    }

    async fn deliver(&mut self, event: &Event, time: SystemTime) {
        if self.address.is_empty() {
            return;
        }
        for attempt in 0..=RETRIES {
            // Time for containerd to come back, not for anything here.
            sleep(Duration::from_secs(attempt.into())).await;
            match self.forward(event, time).await {
                Ok(()) => return,
                Err(error) => {
                    self.client = None;
                    let error = crate::text::chain(&error);
                    tracing::warn!(attempt, error, "Cannot forward an event");
                }
            }
        }
        tracing::error!("An event is given up");
    }

    async fn forward(&mut self, event: &Event, time: SystemTime) -> Result<(), ForwardError> {
        let envelope = event
            .pack(&self.namespace, time)
            .map_err(ForwardError::Encode)?;
        let client = match &self.client {
            Some(client) => client.clone(),
            None => {
                let connecting = UnixStream::connect(&self.address);
                let stream = timeout(FORWARD_DEADLINE, connecting)
                    .await
                    .map_err(|_| ForwardError::Deadline)?
                    .map_err(|source| ForwardError::Connect {
                        address: self.address.clone(),
                        source,
                    })?;
                let client = EventsClient::new(Client::new(Socket::from(stream)));
                self.client.insert(client).clone()
            }
        };
        let request = ForwardRequest {
            envelope: MessageField::some(envelope),
            ..ForwardRequest::default()
        };
        let context = context::with_duration(FORWARD_DEADLINE);
        timeout(FORWARD_DEADLINE, client.forward(context, &request))
            .await
            .map_err(|_| ForwardError::Deadline)?
            .map_err(ForwardError::Refused)?;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_type_is_the_bare_name() {
        let event = Event::Exit(messages::TaskExit {
            container_id: "c".into(),
            ..Default::default()
        });
        let envelope = event.pack("ns", SystemTime::UNIX_EPOCH).unwrap();
        assert_eq!(envelope.topic, "/tasks/exit");
        assert_eq!(envelope.namespace, "ns");
        assert_eq!(envelope.event.type_url, "containerd.events.TaskExit");
    }
}
