//! Docker's name server, which listens at 127.0.0.11 in the namespace on the host, for processes in
//! the guest: the agent listens there in the guest, and questions and answers go over a stream. How
//! they are framed is said at [`bulkhead_agent_api::RESOLVER_HEADER`].

use std::{
    io,
    net::{Ipv4Addr, SocketAddr, UdpSocket},
    os::fd::OwnedFd,
    sync::Arc,
    time::Duration,
};

use bulkhead_agent_api::{RESOLVER_HEADER, RESOLVER_TCP, RESOLVER_UDP};
use thiserror::Error;
use tokio::{
    io::{AsyncRead, AsyncReadExt, AsyncWriteExt},
    net::{TcpSocket, UdpSocket as AsyncUdpSocket, UnixStream},
    sync::{Semaphore, mpsc},
    task::JoinSet,
};

use super::namespace::Namespace;
use crate::deadline::timeout;

/// Where Docker's name server is; it has the kernel change the port of what is sent there.
const SERVER: SocketAddr = SocketAddr::new(std::net::IpAddr::V4(Ipv4Addr::new(127, 0, 0, 11)), 53);

/// How long an answer may take. Whoever asked has asked again by then.
const ANSWER_DEADLINE: Duration = Duration::from_secs(20);

/// Questions without an answer at a time; more are not asked.
const MAX_QUESTIONS: usize = 128;

/// A frame that is none.
#[derive(Debug, Error, PartialEq, Eq)]
pub enum FrameError {
    /// Carried by neither UDP nor TCP.
    #[error("the guest sent a question of the unknown kind {0}")]
    Kind(u8),
    /// Without a message.
    #[error("the guest sent an empty question")]
    Empty,
}

/// What the guest asks.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Question {
    /// By TCP rather than UDP.
    pub tcp: bool,
    /// By which the guest finds the answer.
    pub number: [u8; 2],
    /// The message.
    pub message: Vec<u8>,
}

/// Reads the next question; `None` at the end of the stream.
pub async fn read_question(
    stream: &mut (impl AsyncRead + Unpin),
) -> io::Result<Option<Result<Question, FrameError>>> {
    let mut header = [0; RESOLVER_HEADER];
    match stream.read_exact(&mut header).await {
        Ok(_) => {}
        Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => return Ok(None),
        Err(error) => return Err(error),
    }
    let [kind, first, second, high, low] = header;
    if kind != RESOLVER_UDP && kind != RESOLVER_TCP {
        return Ok(Some(Err(FrameError::Kind(kind))));
    }
    let length = u16::from_be_bytes([high, low]);
    if length == 0 {
        return Ok(Some(Err(FrameError::Empty)));
    }
    let mut message = vec![0; length.into()];
    match stream.read_exact(&mut message).await {
        Ok(_) => {}
        Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => return Ok(None),
        Err(error) => return Err(error),
    }
    Ok(Some(Ok(Question {
        tcp: kind == RESOLVER_TCP,
        number: [first, second],
        message,
    })))
}

/// The frame of an answer; `None` if it does not fit into one.
pub fn answer_frame(question: &Question, answer: &[u8]) -> Option<Vec<u8>> {
    let length = u16::try_from(answer.len()).ok()?.to_be_bytes();
    let kind = if question.tcp {
        RESOLVER_TCP
    } else {
        RESOLVER_UDP
    };
    let mut frame = vec![kind];
    frame.extend(question.number);
    frame.extend(length);
    frame.extend(answer);
    Some(frame)
}

/// Passes questions on until the stream ends. A guest that breaks the protocol is not heard any more.
pub async fn serve(stream: UnixStream, namespace: Arc<Namespace>) {
    let (mut questions, mut answers) = stream.into_split();
    let (sender, mut receiver) = mpsc::channel::<Vec<u8>>(MAX_QUESTIONS);
    let writer = async move {
        while let Some(frame) = receiver.recv().await {
            if answers.write_all(&frame).await.is_err() {
                return;
            }
        }
    };
    let reader = async move {
        let permits = Arc::new(Semaphore::new(MAX_QUESTIONS));
        // They end with this.
        let mut asking = JoinSet::new();
        loop {
            let question = match read_question(&mut questions).await {
                Ok(Some(Ok(question))) => question,
                Ok(Some(Err(error))) => {
                    tracing::warn!(%error, "The guest's questions for names are not answered any more");
                    return;
                }
                Ok(None) | Err(_) => return,
            };
            while asking.try_join_next().is_some() {}
            let Ok(permit) = permits.clone().try_acquire_owned() else {
                continue;
            };
            let (sender, namespace) = (sender.clone(), namespace.clone());
            asking.spawn(async move {
                match timeout(ANSWER_DEADLINE, ask(&question, &namespace)).await {
                    Ok(Ok(answer)) => {
                        if let Some(frame) = answer_frame(&question, &answer) {
                            // Nobody waits for an answer when the stream has ended.
                            let _ = sender.send(frame).await;
                        }
                    }
                    Ok(Err(error)) => tracing::debug!(%error, "A name is not resolved"),
                    Err(_) => {}
                }
                drop(permit);
            });
        }
    };
    tokio::select! {
        () = reader => {}
        () = writer => {}
    }
}

async fn ask(question: &Question, namespace: &Namespace) -> io::Result<Vec<u8>> {
    if question.tcp {
        ask_by_tcp(&question.message, namespace).await
    } else {
        ask_by_udp(&question.message, namespace).await
    }
}

async fn ask_by_udp(question: &[u8], namespace: &Namespace) -> io::Result<Vec<u8>> {
    let socket = namespace.run(|| {
        let socket = UdpSocket::bind((Ipv4Addr::LOCALHOST, 0))?;
        socket.set_nonblocking(true)?;
        socket.connect(SERVER)?;
        Ok::<_, io::Error>(socket)
    });
    let socket = AsyncUdpSocket::from_std(socket.await??)?;
    socket.send(question).await?;
    // The memory is taken when there is an answer.
    socket.readable().await?;
    let mut answer = vec![0; usize::from(u16::MAX)];
    let length = socket.recv(&mut answer).await?;
    answer.truncate(length);
    Ok(answer)
}

async fn ask_by_tcp(question: &[u8], namespace: &Namespace) -> io::Result<Vec<u8>> {
    use rustix::net::{AddressFamily, SocketFlags, SocketType, socket_with};
    let socket = namespace.run(|| {
        let flags = SocketFlags::NONBLOCK | SocketFlags::CLOEXEC;
        socket_with(AddressFamily::INET, SocketType::STREAM, flags, None)
    });
    let socket: OwnedFd = socket.await??;
    let mut stream = TcpSocket::from_std_stream(socket.into())
        .connect(SERVER)
        .await?;
    let length = u16::try_from(question.len()).map_err(io::Error::other)?;
    let mut message = length.to_be_bytes().to_vec();
    message.extend(question);
    stream.write_all(&message).await?;
    let mut answer = vec![0; stream.read_u16().await?.into()];
    stream.read_exact(&mut answer).await?;
    Ok(answer)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn read(bytes: &[u8]) -> Option<Result<Question, FrameError>> {
        let mut stream = bytes;
        let runtime = tokio::runtime::Builder::new_current_thread()
            .build()
            .unwrap();
        runtime.block_on(read_question(&mut stream)).unwrap()
    }

    #[test]
    fn what_is_no_question_is_told() {
        assert_eq!(read(&[]), None);
        assert_eq!(read(&[0, 1, 2, 0, 3, 9, 9]), None);
        assert_eq!(read(&[2, 1, 2, 0, 1, 9]), Some(Err(FrameError::Kind(2))));
        assert_eq!(read(&[1, 1, 2, 0, 0]), Some(Err(FrameError::Empty)));
    }

    proptest! {
        #[test]
        fn answers_have_the_frames_of_their_questions(
            tcp: bool,
            number: [u8; 2],
            message in proptest::collection::vec(any::<u8>(), 1..600),
        ) {
            let question = Question { tcp, number, message };
            let frame = answer_frame(&question, &question.message).unwrap();
            prop_assert_eq!(read(&frame), Some(Ok(question.clone())));
            prop_assert_eq!(answer_frame(&question, &[0; 1 << 16]), None);
        }
    }
}
