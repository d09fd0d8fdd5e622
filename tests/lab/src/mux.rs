//! Many sessions over the one byte stream between the build machine and the lab.

use std::future::poll_fn;
use std::io;
use std::task::Poll;

use tokio::io::{AsyncRead, AsyncWrite};
use tokio::sync::{mpsc, oneshot};
use tokio_util::compat::{Compat, FuturesAsyncReadCompatExt, TokioAsyncReadCompatExt};

/// One session's byte stream, with its own flow control.
pub type Session = Compat<yamux::Stream>;

/// Asks for a new session; the answer comes through the sender it carries.
pub type Open = oneshot::Sender<Session>;

/// Serves one end of the connection until it breaks or, on the opening end, until nobody can ask
/// for sessions any more.
///
/// The build machine opens sessions (`open` has its requests), the lab accepts them (`accepted`
/// gets them); each end passes a channel it does not use. Nothing moves on any session unless this
/// future is polled.
pub async fn drive(
    transport: impl AsyncRead + AsyncWrite + Unpin,
    mode: yamux::Mode,
    mut open: mpsc::Receiver<Open>,
    accepted: mpsc::UnboundedSender<Session>,
) -> io::Result<()> {
    let mut connection = yamux::Connection::new(transport.compat(), yamux::Config::default(), mode);
    let mut waiting: Option<Open> = None;
    let mut opening_ended = false;
    poll_fn(|cx| {
        loop {
            if waiting.is_some() {
                if let Poll::Ready(stream) = connection.poll_new_outbound(cx) {
                    let stream = stream.map_err(io::Error::other)?;
                    if let Some(reply) = waiting.take() {
                        // A requester that has given up drops the session with its receiver.
                        let _ = reply.send(stream.compat());
                    }
                    continue;
                }
            } else if !opening_ended {
                match open.poll_recv(cx) {
                    Poll::Ready(Some(reply)) => {
                        waiting = Some(reply);
                        continue;
                    }
                    Poll::Ready(None) => opening_ended = true,
                    Poll::Pending => {}
                }
            }
            match connection.poll_next_inbound(cx) {
                Poll::Ready(Some(Ok(stream))) => {
                    if accepted.send(stream.compat()).is_err() {
                        return Poll::Ready(Ok(()));
                    }
                }
                Poll::Ready(Some(Err(error))) => return Poll::Ready(Err(io::Error::other(error))),
                Poll::Ready(None) => return Poll::Ready(Ok(())),
                Poll::Pending => return Poll::Pending,
            }
        }
    })
    .await
}

/// Which end of the connection this is.
pub use yamux::Mode;
