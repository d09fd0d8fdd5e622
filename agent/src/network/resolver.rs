//! A name server in a network namespace that passes questions on to the host, as Docker's does.
//!
//! Questions go to the host over one stream, answers come back over it in any order: see
//! [`RESOLVER_HEADER`]. The resolver lives as long as that stream. A question that stays without
//! an answer is forgotten when so many others came after it.

use std::{
    collections::VecDeque,
    io,
    net::{Ipv4Addr, SocketAddr, TcpListener as StdListener, UdpSocket as StdUdp},
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use bulkhead_agent_api::{RESOLVER_HEADER, RESOLVER_TCP, RESOLVER_UDP};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{
        TcpListener, TcpStream, UdpSocket,
        tcp::{OwnedReadHalf, OwnedWriteHalf},
    },
    sync::{Semaphore, mpsc},
    task::{AbortHandle, JoinHandle, JoinSet},
    time::timeout,
};

use crate::transport::Stream;

/// Where Docker tells containers that their name server is.
const ADDRESS: (Ipv4Addr, u16) = (Ipv4Addr::new(127, 0, 0, 11), 53);

/// Questions of each protocol that wait for an answer.
const QUESTIONS_MAX: usize = 64;

/// TCP connections at one time.
const CONNECTIONS_MAX: usize = 64;

/// For a TCP client to ask again, or to take an answer. As RFC 7766, 6.2.3, wants it: seconds.
const IDLE: Duration = Duration::from_secs(30);

/// The longest message: its length has two bytes.
const MESSAGE_MAX: usize = 65_535;

/// The sockets of a resolver, in its namespace.
pub struct Sockets {
    udp: StdUdp,
    tcp: StdListener,
}

impl Sockets {
    /// Makes them in the calling thread's network namespace.
    pub fn bind() -> io::Result<Self> {
        let (udp, tcp) = (StdUdp::bind(ADDRESS)?, StdListener::bind(ADDRESS)?);
        udp.set_nonblocking(true)?;
        tcp.set_nonblocking(true)?;
        Ok(Self { udp, tcp })
    }
}

/// A running resolver. It ends when it is dropped, or with the host's stream.
#[derive(Debug)]
pub struct Resolver {
    token: Vec<u8>,
    task: JoinHandle<()>,
    abort: AbortHandle,
}

impl Resolver {
    /// Starts to answer. `host` is the stream that the host knows by `token`.
    pub fn start(sockets: Sockets, host: Stream, token: Vec<u8>) -> io::Result<Self> {
        let udp = Arc::new(UdpSocket::from_std(sockets.udp)?);
        let tcp = TcpListener::from_std(sockets.tcp)?;
        let task = tokio::spawn(run(udp, tcp, host));
        let abort = task.abort_handle();
        Ok(Self { token, task, abort })
    }

    /// Whether it runs, with the stream of this token.
    pub fn is_for(&self, token: &[u8]) -> bool {
        self.token == token && !self.task.is_finished()
    }

    /// Ends it. Returns when its sockets are closed.
    pub async fn end(mut self) {
        self.abort.abort();
        // It was aborted, or ended before.
        let _ = (&mut self.task).await;
    }
}

impl Drop for Resolver {
    fn drop(&mut self) {
        self.abort.abort();
    }
}

/// Questions of one protocol without an answer yet: their numbers, and where answers go.
struct Questions<T> {
    waiting: VecDeque<(u16, T)>,
    next: u16,
}

impl<T> Default for Questions<T> {
    fn default() -> Self {
        Self {
            waiting: VecDeque::new(),
            next: 0,
        }
    }
}

impl<T> Questions<T> {
    /// Gives a question its number. The oldest one is forgotten when there are too many; so numbers
    /// do not come round to one that waits.
    fn ask(&mut self, asker: T) -> u16 {
        if self.waiting.len() == QUESTIONS_MAX {
            self.waiting.pop_front();
        }
        let number = self.next;
        self.next = number.wrapping_add(1);
        self.waiting.push_back((number, asker));
        number
    }

    /// Who asked what is answered now.
    fn answered(&mut self, number: u16) -> Option<T> {
        let at = self.waiting.iter().position(|(one, _)| *one == number)?;
        self.waiting.remove(at).map(|(_, asker)| asker)
    }
}

/// What all parts of a resolver know.
struct Shared {
    udp: Mutex<Questions<SocketAddr>>,
    tcp: Mutex<Questions<mpsc::Sender<Vec<u8>>>>,
    /// Frames for the host.
    frames: mpsc::Sender<Vec<u8>>,
}

fn lock<T>(questions: &Mutex<Questions<T>>) -> std::sync::MutexGuard<'_, Questions<T>> {
    questions.lock().unwrap_or_else(PoisonError::into_inner)
}

fn frame(kind: u8, number: u16, message: &[u8]) -> Vec<u8> {
    let length = u16::try_from(message.len()).unwrap_or(u16::MAX);
    let mut frame = Vec::with_capacity(RESOLVER_HEADER + message.len());
    frame.push(kind);
    frame.extend(number.to_be_bytes());
    frame.extend(length.to_be_bytes());
    frame.extend(&message[..usize::from(length)]);
    frame
}

async fn run(udp: Arc<UdpSocket>, tcp: TcpListener, host: Stream) {
    let (frames, queue) = mpsc::channel(QUESTIONS_MAX);
    let shared = Arc::new(Shared {
        udp: Mutex::default(),
        tcp: Mutex::default(),
        frames,
    });
    // Each of them runs until the stream is lost, or for ever.
    tokio::select! {
        _ = send(&host, queue) => {}
        _ = answer(&host, &udp, &shared) => {}
        _ = take_datagrams(&udp, &shared) => {}
        _ = take_connections(&tcp, &shared) => {}
    }
}

async fn send(host: &Stream, mut queue: mpsc::Receiver<Vec<u8>>) -> io::Result<()> {
    while let Some(frame) = queue.recv().await {
        host.write_all(&frame).await?;
    }
    Ok(())
}

async fn read_all(host: &Stream, buffer: &mut [u8]) -> io::Result<()> {
    let mut filled = 0;
    while filled < buffer.len() {
        match host.read(&mut buffer[filled..]).await? {
            0 => return Err(io::ErrorKind::UnexpectedEof.into()),
            length => filled += length,
        }
    }
    Ok(())
}

async fn answer(host: &Stream, udp: &UdpSocket, shared: &Shared) -> io::Result<()> {
    loop {
        let mut header = [0; RESOLVER_HEADER];
        read_all(host, &mut header).await?;
        let [kind, high, low, length @ ..] = header;
        let number = u16::from_be_bytes([high, low]);
        let mut message = vec![0; usize::from(u16::from_be_bytes(length))];
        read_all(host, &mut message).await?;
        match kind {
            RESOLVER_UDP => {
                let asker = lock(&shared.udp).answered(number);
                if let Some(asker) = asker {
                    // As on any network, an answer may get lost: a full buffer, an asker gone.
                    let _ = udp.try_send_to(&message, asker);
                }
            }
            RESOLVER_TCP => {
                let asker = lock(&shared.tcp).answered(number);
                if let Some(asker) = asker {
                    // One that does not read its answers loses some.
                    let _ = asker.try_send(message);
                }
            }
            _ => return Err(io::ErrorKind::InvalidData.into()),
        }
    }
}

async fn take_datagrams(udp: &UdpSocket, shared: &Shared) -> io::Result<()> {
    let mut buffer = vec![0; MESSAGE_MAX];
    loop {
        // Errors are those of an earlier answer, whose asker has gone.
        let Ok((length, asker)) = udp.recv_from(&mut buffer).await else {
            continue;
        };
        // A host that does not keep up loses questions; askers repeat them.
        if let Ok(room) = shared.frames.try_reserve() {
            let number = lock(&shared.udp).ask(asker);
            room.send(frame(RESOLVER_UDP, number, &buffer[..length]));
        }
    }
}

async fn take_connections(tcp: &TcpListener, shared: &Arc<Shared>) -> io::Result<()> {
    let free = Arc::new(Semaphore::new(CONNECTIONS_MAX));
    // They end with this.
    let mut connections = JoinSet::new();
    loop {
        let permit = Arc::clone(&free).acquire_owned().await;
        let permit = permit.map_err(io::Error::other)?;
        let accepted = tokio::select! {
            accepted = tcp.accept() => accepted,
            Some(_) = connections.join_next() => continue,
        };
        let Ok((connection, _)) = accepted else {
            // A connection that was reset before it was accepted. That there are no descriptors
            // left would come back at once: the next turn is for others first.
            tokio::task::yield_now().await;
            continue;
        };
        let shared = Arc::clone(shared);
        connections.spawn(async move {
            let _ = converse(connection, &shared).await;
            drop(permit);
        });
    }
}

/// Serves one TCP client until it ends its side and has its answers, or is silent for too long.
async fn converse(connection: TcpStream, shared: &Shared) -> io::Result<()> {
    let (mut from, to) = connection.into_split();
    let (answers, queue) = mpsc::channel(QUESTIONS_MAX);
    let ask = async {
        while let Some(message) = question(&mut from).await? {
            let room = shared.frames.reserve().await.map_err(io::Error::other)?;
            let number = lock(&shared.tcp).ask(answers.clone());
            room.send(frame(RESOLVER_TCP, number, &message));
        }
        // What waits for an answer holds the others.
        drop(answers);
        Ok(())
    };
    tokio::try_join!(ask, hand_back(queue, to)).map(drop)
}

/// The next message of a TCP client. `None` at the end, also when the client has been silent.
async fn question(from: &mut OwnedReadHalf) -> io::Result<Option<Vec<u8>>> {
    let read = async {
        let length = match from.read_u16().await {
            Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => return Ok(None),
            length => length?,
        };
        let mut message = vec![0; usize::from(length)];
        from.read_exact(&mut message).await?;
        Ok(Some(message))
    };
    timeout(IDLE, read).await.unwrap_or(Ok(None))
}

/// Hands answers to a TCP client until none can come any more.
async fn hand_back(mut queue: mpsc::Receiver<Vec<u8>>, mut to: OwnedWriteHalf) -> io::Result<()> {
    while let Ok(Some(message)) = timeout(IDLE, queue.recv()).await {
        let length = u16::try_from(message.len()).map_err(io::Error::other)?;
        let mut bytes = length.to_be_bytes().to_vec();
        bytes.extend(message);
        timeout(IDLE, to.write_all(&bytes)).await??;
    }
    to.shutdown().await
}
