//! The connections that the daemon serves.

use std::{
    io,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
};

use futures::stream;
use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    net::{UnixListener, UnixStream},
    sync::watch,
};
use ttrpc::asynchronous::transport::Listener;

/// How many there are.
#[derive(Debug, Clone)]
pub struct Connections(Arc<watch::Sender<usize>>);

impl Default for Connections {
    fn default() -> Self {
        Self(Arc::new(watch::Sender::new(0)))
    }
}

impl Connections {
    /// Those of processes that run as the shim's own user.
    pub fn trusted(&self, listener: UnixListener) -> Listener {
        let own = nix::unistd::geteuid().as_raw();
        let state = (listener, self.clone());
        Listener::new(stream::unfold(state, move |(listener, all)| async move {
            loop {
                let accepted = match listener.accept().await {
                    Ok((stream, _)) if is_of(&stream, own) => Ok(Connection::new(stream, &all)),
                    Ok(_) => {
                        tracing::warn!("A connection of another user is refused");
                        continue;
                    }
                    Err(error) => Err(error),
                };
                return Some((accepted, (listener, all)));
            }
        }))
    }

    /// Waits until there is none, which is when the others have closed theirs.
    pub async fn closed(&self) {
        let mut count = self.0.subscribe();
        // The sender is part of this.
        let _ = count.wait_for(|count| *count == 0).await;
    }
}

fn is_of(connection: &UnixStream, user: u32) -> bool {
    connection
        .peer_cred()
        .is_ok_and(|credentials| credentials.uid() == user)
}

/// A connection that is counted for as long as it is open.
struct Connection {
    stream: UnixStream,
    all: Connections,
}

impl Connection {
    fn new(stream: UnixStream, all: &Connections) -> Self {
        all.0.send_modify(|count| *count += 1);
        Self {
            stream,
            all: all.clone(),
        }
    }
}

impl Drop for Connection {
    fn drop(&mut self) {
        self.all.0.send_modify(|count| *count -= 1);
    }
}

impl AsyncRead for Connection {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_read(context, buffer)
    }
}

impl AsyncWrite for Connection {
    fn poll_write(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write(context, buffer)
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(context)
    }
}
