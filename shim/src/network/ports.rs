//! TCP ports of a container's loopback interface, reached from the host.
//!
//! Kubernetes' port-forward dials localhost in the pod's network namespace on the host. There, the shim
//! listens at one port of each loopback address, and a program of the kernel (`SK_LOOKUP`, Linux 5.9)
//! hands it every connection to those two addresses, whatever its port. Others stay as they are:
//! Docker's name server has 127.0.0.11.

use std::{
    io,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener},
    os::fd::OwnedFd,
    sync::Arc,
    time::Duration,
};

use bulkhead_agent_api::messages::ConnectRequest;
use bulkhead_bpf::{FRAME, Kind, Program, Size};
use tokio::{
    io::copy_bidirectional,
    net::{self, TcpStream, UnixStream},
    sync::Semaphore,
    task::JoinSet,
};
use ttrpc::Code;

use super::{Members, Task, namespace::Namespace};
use crate::{
    agent_client::{AgentClient, AgentError},
    deadline::timeout,
    pod::Pod,
    text,
};

/// Connections at a time. More of them wait.
const MAX_CONNECTIONS: usize = 256;

/// How long a stream may be on its way that the agent has dialled.
const STREAM_DEADLINE: Duration = Duration::from_secs(10);

// linux/bpf.h: functions of the kernel, and offsets in `struct bpf_sk_lookup`
const MAP_LOOKUP: i32 = 1;
const RELEASE: i32 = 86;
const ASSIGN: i32 = 124;
const FAMILY: i16 = 8;
const PROTOCOL: i16 = 12;
const LOCAL_IP4: i16 = 40;
const LOCAL_IP6: i16 = 44;
const PASS: i32 = 1;

/// 127.0.0.1, and the last quarter of ::1, as a little-endian processor loads them.
const LOCALHOST_IP4: i32 = 0x0100_007f;
const LOCALHOST_IP6: i32 = 0x0100_0000;

/// The listeners, and the program that leads to them.
#[derive(Debug)]
pub struct Ports {
    _program: OwnedFd,
    _tasks: Vec<Task>,
}

impl Ports {
    /// Opens the ports of a namespace.
    pub async fn open(
        namespace: &Namespace,
        pod: &Arc<Pod>,
        members: &Arc<Members>,
    ) -> io::Result<Self> {
        let file = namespace.file().clone();
        let (program, listeners) = namespace
            .run(move || {
                let addresses = [IpAddr::V4(Ipv4Addr::LOCALHOST), Ipv6Addr::LOCALHOST.into()];
                let listeners = addresses.map(|address| {
                    let listener = TcpListener::bind(SocketAddr::new(address, 0))?;
                    listener.set_nonblocking(true)?;
                    Ok(listener)
                });
                let listeners = match listeners {
                    [Ok(first), Ok(second)] => vec![first, second],
                    // A host without IPv6.
                    [Ok(first), Err(_)] => vec![first],
                    [Err(error), _] => return Err(error),
                };
                attach(&file, &listeners).map(|program| (program, listeners))
            })
            .await??;
        let permits = Arc::new(Semaphore::new(MAX_CONNECTIONS));
        let tasks = listeners.into_iter().map(|listener| {
            let serving = Serving {
                pod: pod.clone(),
                members: members.clone(),
                permits: permits.clone(),
            };
            let listener = net::TcpListener::from_std(listener)?;
            Ok(Task::spawn(serving.accept(listener)))
        });
        Ok(Self {
            _program: program,
            _tasks: tasks.collect::<io::Result<_>>()?,
        })
    }
}

/// Leads connections to the listeners: the first one is IPv4's, the second one IPv6's.
fn attach(namespace: &std::fs::File, listeners: &[TcpListener]) -> io::Result<OwnedFd> {
    let map = bulkhead_bpf::socket_map(2)?;
    for (key, listener) in (0..).zip(listeners) {
        bulkhead_bpf::put_socket(&map, key, listener)?;
    }
    let program = program(&map).to_kernel(Kind::Sockets, "bulkhead_ports")?;
    bulkhead_bpf::attach(&program, namespace, Kind::Sockets)
}

fn program(map: &OwnedFd) -> Program {
    use std::os::fd::AsRawFd;
    const CONTEXT: u8 = 6;
    const SOCKET: u8 = 7;
    const KEY: i16 = -4;
    let mut program = Program::default();
    program
        .copy(CONTEXT, 1)
        .load(Size::Word, 2, CONTEXT, PROTOCOL)
        .if_not(2, libc::IPPROTO_TCP, "pass")
        .load(Size::Word, 2, CONTEXT, FAMILY)
        .if_equal(2, libc::AF_INET, "ipv4")
        .if_not(2, libc::AF_INET6, "pass");
    for word in 0..3 {
        program
            .load(Size::Word, 2, CONTEXT, LOCAL_IP6 + 4 * word)
            .if_not(2, 0, "pass");
    }
    program
        .load(Size::Word, 2, CONTEXT, LOCAL_IP6 + 12)
        .if_not(2, LOCALHOST_IP6, "pass")
        .set(3, 1)
        .go("found")
        .label("ipv4")
        .load(Size::Word, 2, CONTEXT, LOCAL_IP4)
        .if_not(2, LOCALHOST_IP4, "pass")
        .set(3, 0)
        .label("found")
        .store(KEY, 3)
        .map(1, map.as_raw_fd())
        .copy(2, FRAME)
        .add(2, KEY.into())
        .call(MAP_LOOKUP)
        .if_equal(0, 0, "pass")
        .copy(SOCKET, 0)
        .copy(1, CONTEXT)
        .copy(2, SOCKET)
        .set(3, 0)
        .call(ASSIGN)
        .copy(1, SOCKET)
        .call(RELEASE)
        .label("pass")
        .exit_with(PASS);
    program
}

struct Serving {
    pod: Arc<Pod>,
    members: Arc<Members>,
    permits: Arc<Semaphore>,
}

impl Serving {
    async fn accept(self, listener: net::TcpListener) {
        // Connections end with their listener.
        let mut connections = JoinSet::new();
        while let Ok(permit) = self.permits.clone().acquire_owned().await {
            while connections.try_join_next().is_some() {}
            let connection = match listener.accept().await {
                Ok((connection, _)) => connection,
                Err(error) => {
                    tracing::warn!(%error, "A port of the pod cannot be forwarded any more");
                    return;
                }
            };
            let agent = self.pod.ready_agent();
            let container = self.members.alive();
            let (Some(agent), Some(container)) = (agent, container) else {
                refuse(&connection);
                continue;
            };
            let pod = self.pod.clone();
            connections.spawn(async move {
                if let Err(error) = forward(connection, &pod, &agent, &container).await {
                    tracing::info!(error, "A port of the pod is not forwarded");
                }
                drop(permit);
            });
        }
    }
}

/// Ends a connection as the kernel does where nobody listens.
fn refuse(connection: &TcpStream) {
    let now = socket_linger();
    if let Err(error) = now(connection) {
        tracing::debug!(%error, "A connection ends without a reset");
    }
}

fn socket_linger() -> impl Fn(&TcpStream) -> io::Result<()> {
    |connection| {
        rustix::net::sockopt::set_socket_linger(connection, Some(Duration::ZERO))
            .map_err(io::Error::from)
    }
}

async fn forward(
    mut connection: TcpStream,
    pod: &Pod,
    agent: &AgentClient,
    container: &str,
) -> Result<(), String> {
    let stream = match connect(&connection, pod, agent, container).await {
        Ok(stream) => stream,
        Err(error) => {
            refuse(&connection);
            return Err(error);
        }
    };
    let mut stream = stream;
    // One end's reset is the other's.
    if copy_bidirectional(&mut connection, &mut stream)
        .await
        .is_err()
    {
        refuse(&connection);
    }
    Ok(())
}

/// Connects with the port that was dialled.
async fn connect(
    connection: &TcpStream,
    pod: &Pod,
    agent: &AgentClient,
    container: &str,
) -> Result<UnixStream, String> {
    let dialled = connection.local_addr().map_err(|error| error.to_string())?;
    // Whoever dials localhost is connected with the first address at once, so nobody else tries the
    // second one.
    let families: &[bool] = if dialled.is_ipv4() {
        &[false, true]
    } else {
        &[true]
    };
    let mut last = None;
    for ipv6 in families {
        let expected = pod.streams().expect().map_err(|error| error.to_string())?;
        let request = ConnectRequest {
            container_id: container.to_owned(),
            port: dialled.port().into(),
            ipv6: *ipv6,
            token: expected.token(),
            ..ConnectRequest::default()
        };
        match agent.connect(&request).await {
            Ok(()) => {
                return match timeout(STREAM_DEADLINE, expected.arrived()).await {
                    Ok(Some(stream)) => Ok(stream),
                    Ok(None) | Err(_) => Err("the guest has not dialled the stream".to_owned()),
                };
            }
            Err(error) if error.code() == Code::UNAVAILABLE => last = Some(error),
            Err(error) => return Err(text::chain(&error)),
        }
    }
    Err(last
        .as_ref()
        .map_or_else(String::new, |error: &AgentError| text::chain(error)))
}
