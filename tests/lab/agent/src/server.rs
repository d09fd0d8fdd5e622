//! Serving the build machine: one task for each session.

use std::io;

use bulkhead_lab::mux::{self, Mode, Session};
use bulkhead_lab::protocol::{Frame, Request};
use tokio::sync::mpsc;

use crate::stream::open_port;
use crate::{Context, Result, boot, exec};

/// Serves until the connection to the build machine breaks.
pub fn run() -> Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .context(|| "start an async runtime".into())?;
    runtime.block_on(async {
        let port = open_port()?;
        let (_never_opens, open) = mpsc::channel(1);
        let (accepted, mut sessions) = mpsc::unbounded_channel();
        let accept = async {
            while let Some(session) = sessions.recv().await {
                tokio::spawn(serve(session));
            }
        };
        tokio::select! {
            result = mux::drive(port, Mode::Server, open, accepted) => {
                result.context(|| "talk to the build machine".into())
            }
            () = accept => Ok(()),
        }
    })
}

async fn serve(mut session: Session) {
    if let Err(error) = handle(&mut session).await {
        // The build machine gave the session up; there is nobody else to tell.
        eprintln!("lab-agent: a session broke off: {error}");
    }
}

async fn handle(session: &mut Session) -> io::Result<()> {
    match Frame::read_async(session).await? {
        Some(Frame::Request(Request::Boot {
            containerd,
            metered,
        })) => {
            let booted = tokio::task::spawn_blocking(move || boot::run(containerd, metered)).await;
            let answer = match booted {
                Ok(Ok(())) => Frame::Exit(0),
                Ok(Err(error)) => Frame::Failed(error.to_string()),
                Err(error) => Frame::Failed(error.to_string()),
            };
            answer.write_async(session).await
        }
        Some(Frame::Request(Request::Exec(request))) => exec::run(request, session).await,
        Some(_) => {
            let message = "a session starts with a request".into();
            Frame::Failed(message).write_async(session).await
        }
        None => Ok(()),
    }?;
    tokio::io::AsyncWriteExt::shutdown(session).await
}
