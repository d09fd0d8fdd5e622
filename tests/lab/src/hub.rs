//! Supervising one lab: its QEMU, and the way from local sockets to sessions in it.

use std::future::Future;
use std::io;
use std::time::Duration;

use tokio::io::copy_bidirectional;
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::{mpsc, oneshot};

use crate::error::{Context, Error};
use crate::lab::{LabOptions, LabState};
use crate::machine::Machine;
use crate::mux::{self, Mode, Open, Session};
use crate::protocol::{Frame, Request};

/// How long a lab may take from QEMU's start to ready; about 15 s is usual on 2 cores.
const BOOT_LIMIT: Duration = Duration::from_secs(240);

/// Runs a lab until `stop` resolves or it dies. `ready` is called once it can be used.
pub(crate) async fn supervise(
    state: &LabState,
    options: &LabOptions,
    machine: &Machine,
    ready: impl FnOnce(),
    stop: impl Future<Output = ()>,
) -> Result<(), Error> {
    let listener = UnixListener::bind(state.socket())
        .context(|| format!("listen on {}", state.socket().display()))?;
    let (ours, theirs) = UnixStream::pair().context(|| "create a socket pair")?;
    let theirs = theirs
        .into_std()
        .and_then(|stream| stream.set_nonblocking(false).map(|()| stream))
        .context(|| "hand a socket to QEMU")?;
    let mut qemu = machine.spawn(options, state, theirs)?;

    let (open, requests) = mpsc::channel(16);
    let (accepted, _never_accepts) = mpsc::unbounded_channel();
    let sessions = mux::drive(ours, Mode::Client, requests, accepted);
    let work = async {
        let boot = tokio::time::timeout(BOOT_LIMIT, boot(&open, options));
        match boot.await {
            Err(_) => return Err(state.timed_out("starting the lab", BOOT_LIMIT)),
            Ok(Err(BootError::Broken)) => return Err(state.died("it was starting")),
            Ok(Err(BootError::Refused(message))) => {
                return Err(Error::Refused {
                    doing: "get ready".into(),
                    message,
                });
            }
            Ok(Ok(())) => ready(),
        }
        loop {
            let (client, _) = listener
                .accept()
                .await
                .context(|| "accept a connection to the lab")?;
            tokio::spawn(bridge(client, open.clone()));
        }
    };
    let result = tokio::select! {
        result = work => result,
        _ = sessions => Err(state.died("in use")),
        _ = qemu.wait() => Err(state.died("in use")),
        () = stop => Ok(()),
    };
    // QEMU may have ended already.
    let _ = qemu.kill().await;
    result
}

enum BootError {
    Broken,
    Refused(String),
}

async fn boot(open: &mpsc::Sender<Open>, options: &LabOptions) -> Result<(), BootError> {
    let exchange = async {
        let mut session = session(open).await?;
        let request = Frame::Request(Request::Boot {
            containerd: options.containerd,
            metered: options.metered,
        });
        request.write_async(&mut session).await?;
        Frame::read_async(&mut session).await
    };
    match exchange.await.map_err(|_: io::Error| BootError::Broken)? {
        Some(Frame::Exit(0)) => Ok(()),
        Some(Frame::Failed(message)) => Err(BootError::Refused(message)),
        _ => Err(BootError::Broken),
    }
}

async fn session(open: &mpsc::Sender<Open>) -> io::Result<Session> {
    let (reply, session) = oneshot::channel();
    let gone = |_| io::Error::from(io::ErrorKind::BrokenPipe);
    open.send(reply).await.map_err(|_| gone(()))?;
    session.await.map_err(|_| gone(()))
}

/// Joins one client's connection with a session of its own. Either end's failure closes both,
/// which is all there is to report.
async fn bridge(mut client: UnixStream, open: mpsc::Sender<Open>) {
    if let Ok(mut session) = session(&open).await {
        let _ = copy_bidirectional(&mut client, &mut session).await;
    }
}
