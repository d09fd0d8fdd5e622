//! Streams of the host to ports of a container.

use std::{
    io,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    os::fd::{AsRawFd, OwnedFd},
    time::Duration,
};

use bulkhead_agent_api::messages::ConnectRequest;
use nix::{
    errno::Errno,
    sys::socket::{
        AddressFamily, SockFlag, SockType, SockaddrStorage, connect as begin_connect, socket,
    },
};
use tokio::time::timeout;

use super::inside::inside;
use crate::{
    error::ServiceError,
    stream::{both_ways, dial},
    transport::{Stream, Transport, connected},
};

/// For a program in the container to have its kernel take the connection.
const CONNECT_DEADLINE: Duration = Duration::from_secs(10);

/// Connects a stream to the host with a port of the loopback interface of a namespace.
pub async fn forward(
    transport: &Transport,
    namespace: OwnedFd,
    request: &ConnectRequest,
) -> Result<(), ServiceError> {
    let port = u16::try_from(request.port).ok().filter(|port| *port != 0);
    let port = port.ok_or_else(|| ServiceError::BadRequest {
        what: "port",
        value: request.port.to_string(),
    })?;
    let (address, family) = match request.ipv6 {
        true => (IpAddr::from(Ipv6Addr::LOCALHOST), AddressFamily::Inet6),
        false => (IpAddr::from(Ipv4Addr::LOCALHOST), AddressFamily::Inet),
    };
    let connected = timeout(
        CONNECT_DEADLINE,
        connect(namespace, SocketAddr::new(address, port), family),
    );
    let container = connected
        .await
        .map_err(|_| ServiceError::Deadline("connecting to a port of the container"))?
        .map_err(|error| match error.raw_os_error() {
            // The last two: there is no such address, as without IPv6.
            Some(libc::ECONNREFUSED | libc::EADDRNOTAVAIL | libc::ENETUNREACH) => {
                ServiceError::NobodyListens {
                    port,
                    container: request.container_id.clone(),
                }
            }
            _ => ServiceError::system(format!("connect to port {port} of the container"))(error),
        })?;
    let host = dial(transport, &request.token).await?;
    tokio::spawn(async move {
        // Both sides see the end, also that of a broken connection.
        let _ = both_ways(&container, &host).await;
    });
    Ok(())
}

async fn connect(
    namespace: OwnedFd,
    address: SocketAddr,
    family: AddressFamily,
) -> io::Result<Stream> {
    let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
    let made = inside(namespace, move |_| {
        socket(family, SockType::Stream, flags, None)
    });
    let socket = made.await??;
    match begin_connect(socket.as_raw_fd(), &SockaddrStorage::from(address)) {
        Ok(()) | Err(Errno::EINPROGRESS) => connected(socket).await,
        Err(error) => Err(error.into()),
    }
}
