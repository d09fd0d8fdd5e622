//! The streams that the guest dials, matched to the processes that wait for them by their tokens.

use std::{
    collections::HashMap,
    io,
    sync::{Arc, Mutex, MutexGuard, PoisonError, Weak},
    time::Duration,
};

use bulkhead_agent_api::TOKEN_LEN;
use rustix::rand::{GetRandomFlags, getrandom};
use tokio::{
    io::AsyncReadExt,
    net::UnixStream,
    sync::{Semaphore, oneshot},
};

use crate::deadline::timeout;

/// How long a connection may take to send its token.
const TOKEN_DEADLINE: Duration = Duration::from_secs(60);

/// The most connections at a time that have not sent their token.
const MAX_UNIDENTIFIED: usize = 64;

type Token = [u8; TOKEN_LEN];
type Waiting = HashMap<Token, oneshot::Sender<UnixStream>>;

/// The streams that a pod's processes wait for.
#[derive(Debug)]
pub struct Streams {
    waiting: Mutex<Waiting>,
    unidentified: Arc<Semaphore>,
}

/// A stream that is waited for, until this is dropped.
#[derive(Debug)]
pub struct Expected {
    token: Token,
    streams: Weak<Streams>,
    arrival: oneshot::Receiver<UnixStream>,
}

impl Streams {
    /// No stream is waited for.
    pub fn new() -> Arc<Self> {
        Arc::new(Self {
            waiting: Mutex::default(),
            unidentified: Arc::new(Semaphore::new(MAX_UNIDENTIFIED)),
        })
    }

    fn waiting(&self) -> MutexGuard<'_, Waiting> {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Starts to wait for a stream with a new token.
    pub fn expect(self: &Arc<Self>) -> io::Result<Expected> {
        let mut token = [0; TOKEN_LEN];
        let filled = getrandom(&mut token, GetRandomFlags::empty())?;
        if filled != TOKEN_LEN {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        let (sender, arrival) = oneshot::channel();
        self.waiting().insert(token, sender);
        Ok(Expected {
            token,
            streams: Arc::downgrade(self),
            arrival,
        })
    }

    /// Takes a connection from the guest. It is closed when it does not begin with the token of a
    /// stream that is waited for, or when too many others have not told theirs.
    pub fn accept(self: &Arc<Self>, mut stream: UnixStream) {
        let Ok(permit) = self.unidentified.clone().try_acquire_owned() else {
            tracing::warn!("The guest opened too many streams at once; one is closed");
            return;
        };
        let streams = self.clone();
        tokio::spawn(async move {
            let mut token = [0; TOKEN_LEN];
            let read = timeout(TOKEN_DEADLINE, stream.read_exact(&mut token)).await;
            drop(permit);
            match read {
                Ok(Ok(_)) => {}
                // A process that could not be started has no use for its streams.
                Ok(Err(_)) => return,
                Err(_) => {
                    tracing::warn!("A stream of the guest had no token; it is closed");
                    return;
                }
            }
            let waiter = streams.waiting().remove(&token);
            match waiter {
                Some(waiter) => drop(waiter.send(stream)),
                None => tracing::warn!("A stream of the guest had an unknown token; it is closed"),
            }
        });
    }
}

impl Expected {
    /// What the guest must send first.
    pub fn token(&self) -> Vec<u8> {
        self.token.to_vec()
    }

    /// The stream, once the guest has dialled it.
    pub async fn arrived(mut self) -> Option<UnixStream> {
        (&mut self.arrival).await.ok()
    }
}

impl Drop for Expected {
    fn drop(&mut self) {
        if let Some(streams) = self.streams.upgrade() {
            streams.waiting().remove(&self.token);
        }
    }
}

#[cfg(test)]
mod tests {
    use tokio::io::AsyncWriteExt;

    use super::*;

    #[tokio::test]
    async fn a_stream_finds_its_waiter_by_token() {
        let streams = Streams::new();
        let (first, second) = (streams.expect().unwrap(), streams.expect().unwrap());
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        theirs.write_all(&second.token()).await.unwrap();
        theirs.write_all(b"payload").await.unwrap();
        drop(theirs);
        streams.accept(ours);
        let mut stream = second.arrived().await.unwrap();
        let mut text = String::new();
        stream.read_to_string(&mut text).await.unwrap();
        assert_eq!(text, "payload");
        drop(first);
        assert!(streams.waiting().is_empty());
    }

    #[tokio::test]
    async fn an_unknown_token_closes_the_stream() {
        let streams = Streams::new();
        let _waiting = streams.expect().unwrap();
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        theirs.write_all(&[7; TOKEN_LEN]).await.unwrap();
        streams.accept(ours);
        let mut byte = [0];
        assert_eq!(theirs.read(&mut byte).await.unwrap(), 0);
    }

    #[tokio::test]
    async fn a_flood_without_tokens_is_bounded() {
        let streams = Streams::new();
        let mut silent = Vec::new();
        for _ in 0..MAX_UNIDENTIFIED {
            let (ours, theirs) = UnixStream::pair().unwrap();
            streams.accept(ours);
            silent.push(theirs);
        }
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        streams.accept(ours);
        let mut byte = [0];
        assert_eq!(theirs.read(&mut byte).await.unwrap(), 0);
    }
}
