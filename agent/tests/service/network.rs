//! The network of containers: interfaces, streams to ports, and names.

use std::{fs, os::unix::fs::symlink, process::Command};

use bulkhead_agent_api::{
    RESOLVER_HEADER, RESOLVER_TCP, RESOLVER_UDP,
    messages::{ConnectRequest, Interface, NetworkRequest, SignalRequest},
};
use nix::sched::{CloneFlags, setns, unshare};
use serde_json::json;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpStream, UdpSocket, UnixStream},
    time::timeout,
};
use ttrpc::Code;

use super::host::{DEADLINE, Ends, Host, deadline, spec, status};

const RESOLVER: &str = "127.0.0.11:53";

fn request(id: &str) -> NetworkRequest {
    NetworkRequest {
        container_id: id.to_owned(),
        ..NetworkRequest::default()
    }
}

/// A container that runs a script after it has been told to go on.
async fn started(host: &Host, script: &str) -> Ends {
    let mut spec = spec(&format!("echo up; {script}"));
    // Of an interface that comes later, or never.
    spec["linux"]["sysctl"] = json!({"net.ipv4.conf.eth0.rp_filter": "2"});
    let mut ends = host.create("c1", &spec).await.unwrap();
    host.start_container("c1").await.unwrap();
    ends.expect("up\n").await;
    ends
}

fn run(command: &str) {
    let status = Command::new("sh").args(["-ec", command]).status().unwrap();
    assert!(status.success(), "{command}");
}

/// `struct ifaddrmsg` with one attribute, `IFA_LOCAL`.
fn address(index: u32, address: [u8; 4], length: u8) -> Vec<u8> {
    let mut bytes = vec![2, length, 0x80, 0];
    bytes.extend(index.to_ne_bytes());
    for kind in [1_u8, 2] {
        bytes.extend([8, 0, kind, 0]);
        bytes.extend(address);
    }
    bytes
}

#[tokio::test]
async fn an_interface_gets_into_its_container() {
    // The agent's namespace, of this thread and its children.
    unshare(CloneFlags::CLONE_NEWNET).expect("tests need root");
    let host = Host::start().await;
    let platform = host.dir.path().join("platform");
    fs::create_dir_all(platform.join("devices/virtio-mmio.3/virtio7/net/card")).unwrap();
    fs::create_dir_all(platform.join("drivers/virtio-mmio")).unwrap();
    fs::write(platform.join("drivers/virtio-mmio/bind"), "").unwrap();
    run("ip link add card type veth peer name peer && ip link set peer up");
    let _ends = started(&host, "exec sleep 1000").await;
    let mut network = request("c1");
    network.interfaces.push(Interface {
        index: 5,
        name: "eth0".to_owned(),
        device: "virtio-mmio.3".to_owned(),
        mtu: 1400,
        up: true,
        ..Interface::default()
    });
    network.addresses.push(address(5, [10, 0, 0, 2], 24));
    for _ in 0..2 {
        host.client.set_network(deadline(), &network).await.unwrap();
        let bound = fs::read_to_string(platform.join("drivers/virtio-mmio/bind")).unwrap();
        assert_eq!(bound, "virtio-mmio.3");
    }
    let process = json!({"user": {"uid": 0, "gid": 0}, "cwd": "/",
        "args": ["/bin/ip", "addr", "show", "dev", "eth0"]});
    let (out, _) = host
        .exec("c1", "look", &process)
        .await
        .unwrap()
        .output()
        .await;
    assert!(
        out.contains("inet 10.0.0.2/24") && out.contains("mtu 1400"),
        "{out}"
    );
    let filter = inside(&host, || {
        fs::read_to_string("/proc/sys/net/ipv4/conf/eth0/rp_filter")
    });
    assert_eq!(filter.unwrap(), "2\n");
    network.interfaces[0].device = "../../x".to_owned();
    let (code, text) = status(host.client.set_network(deadline(), &network).await);
    assert_eq!(code, Code::INVALID_ARGUMENT, "{text}");
    network.interfaces[0].device = "virtio-mmio.3".to_owned();
    // After the end of its process it can only lose its interfaces.
    symlink("..", platform.join("devices/virtio-mmio.3/driver")).unwrap();
    fs::write(platform.join("drivers/virtio-mmio/unbind"), "").unwrap();
    let kill = SignalRequest {
        container_id: "c1".to_owned(),
        signal: 9,
        ..SignalRequest::default()
    };
    host.client.signal(deadline(), &kill).await.unwrap();
    host.wait("c1", "").await;
    let (code, text) = status(host.client.set_network(deadline(), &network).await);
    assert_eq!(code, Code::FAILED_PRECONDITION, "{text}");
    let none = request("c1");
    host.client.set_network(deadline(), &none).await.unwrap();
    let unbound = fs::read_to_string(platform.join("drivers/virtio-mmio/unbind")).unwrap();
    assert_eq!(unbound, "virtio-mmio.3");
    host.delete("c1").await;
    let (code, _) = status(host.client.set_network(deadline(), &request("c1")).await);
    assert_eq!(code, Code::NOT_FOUND);
}

#[tokio::test]
async fn a_stream_reaches_a_port_of_a_container() {
    let host = Host::start().await;
    // Answers at the end of what it is sent.
    let script = "nc -l -p 80 -e sh -c 'wc -c; echo bye' & sleep 1000";
    let _ends = started(&host, script).await;
    let connect = async |port: u32, ipv6: bool| {
        let (token, stream) = host.token();
        let request = ConnectRequest {
            container_id: "c1".to_owned(),
            port,
            ipv6,
            token,
            ..ConnectRequest::default()
        };
        (host.client.connect(deadline(), &request).await, stream)
    };
    let (refused, _) = connect(81, false).await;
    let (code, text) = status(refused);
    assert_eq!(code, Code::UNAVAILABLE);
    assert_eq!(text, "Nobody listens on port 81 of container c1");
    let (code, _) = status(connect(81, true).await.0);
    assert_eq!(code, Code::UNAVAILABLE);
    let (code, _) = status(connect(70_000, false).await.0);
    assert_eq!(code, Code::INVALID_ARGUMENT);
    // The program may not listen yet.
    let talk = async {
        loop {
            let (result, stream) = connect(80, false).await;
            match result {
                Ok(_) => return stream.await.unwrap(),
                Err(error) => assert_eq!(status::<()>(Err(error)).0, Code::UNAVAILABLE),
            }
        }
    };
    let mut stream = timeout(DEADLINE, talk).await.unwrap();
    let sent = vec![b'x'; 3_000_000];
    stream.write_all(&sent).await.unwrap();
    stream.shutdown().await.unwrap();
    let mut answer = String::new();
    let read = stream.read_to_string(&mut answer);
    timeout(DEADLINE, read).await.unwrap().unwrap();
    assert_eq!(answer, "3000000\nbye\n");
    host.end("c1").await;
}

/// Does something in the network namespace of the container.
fn inside<T: Send + 'static>(host: &Host, work: fn() -> T) -> T {
    let processes = host.dir.path().join("cgroup/container-c1/cgroup.procs");
    let processes = fs::read_to_string(processes).unwrap();
    let pid = processes.lines().next().unwrap();
    let namespace = fs::File::open(format!("/proc/{pid}/ns/net")).unwrap();
    let thread = std::thread::spawn(move || {
        setns(namespace, CloneFlags::CLONE_NEWNET).unwrap();
        work()
    });
    thread.join().unwrap()
}

fn udp(host: &Host) -> UdpSocket {
    let socket = inside(host, || {
        let socket = std::net::UdpSocket::bind("127.0.0.1:0").unwrap();
        socket.connect(RESOLVER).unwrap();
        socket
    });
    socket.set_nonblocking(true).unwrap();
    UdpSocket::from_std(socket).unwrap()
}

fn tcp(host: &Host) -> std::io::Result<TcpStream> {
    let socket = inside(host, || std::net::TcpStream::connect(RESOLVER))?;
    socket.set_nonblocking(true)?;
    TcpStream::from_std(socket)
}

/// The next frame of a resolver: protocol, number, message.
async fn frame(stream: &mut UnixStream) -> (u8, u16, Vec<u8>) {
    let read = async {
        let mut header = [0; RESOLVER_HEADER];
        stream.read_exact(&mut header).await.unwrap();
        let length = u16::from_be_bytes([header[3], header[4]]);
        let mut message = vec![0; usize::from(length)];
        stream.read_exact(&mut message).await.unwrap();
        (
            header[0],
            u16::from_be_bytes([header[1], header[2]]),
            message,
        )
    };
    timeout(DEADLINE, read).await.expect("no question")
}

async fn answer(stream: &mut UnixStream, kind: u8, number: u16, message: &[u8]) {
    let mut bytes = vec![kind];
    bytes.extend(number.to_be_bytes());
    bytes.extend(u16::try_from(message.len()).unwrap().to_be_bytes());
    bytes.extend(message);
    stream.write_all(&bytes).await.unwrap();
}

#[tokio::test]
async fn questions_reach_the_host_and_answers_their_askers() {
    let host = Host::start().await;
    let _ends = started(&host, "exec sleep 1000").await;
    let (token, stream) = host.token();
    let mut network = request("c1");
    network.resolver = token;
    host.client.set_network(deadline(), &network).await.unwrap();
    let mut stream = timeout(DEADLINE, stream).await.unwrap().unwrap();
    // The same again changes nothing.
    host.client.set_network(deadline(), &network).await.unwrap();

    let (one, other) = (udp(&host), udp(&host));
    one.send(b"who").await.unwrap();
    let (kind, first, message) = frame(&mut stream).await;
    assert_eq!((kind, message.as_slice()), (RESOLVER_UDP, &b"who"[..]));
    other.send(b"what").await.unwrap();
    let (_, second, message) = frame(&mut stream).await;
    assert_eq!(message, b"what");
    answer(&mut stream, RESOLVER_UDP, second, b"of what").await;
    // Nobody has asked that.
    answer(&mut stream, RESOLVER_UDP, 4711, b"nothing").await;
    answer(&mut stream, RESOLVER_UDP, first, b"of who").await;
    for (asker, expected) in [(&one, "of who"), (&other, "of what")] {
        let mut buffer = [0; 100];
        let length = timeout(DEADLINE, asker.recv(&mut buffer)).await.unwrap();
        assert_eq!(&buffer[..length.unwrap()], expected.as_bytes());
    }
    // The first of too many is forgotten.
    let mut numbers = Vec::new();
    for number in 0..65_u8 {
        one.send(&[number]).await.unwrap();
        let (_, given, message) = frame(&mut stream).await;
        assert_eq!(message, [number]);
        numbers.push(given);
    }
    answer(&mut stream, RESOLVER_UDP, numbers[0], b"first").await;
    answer(&mut stream, RESOLVER_UDP, numbers[1], b"second").await;
    let mut buffer = [0; 100];
    let length = timeout(DEADLINE, one.recv(&mut buffer)).await.unwrap();
    assert_eq!(&buffer[..length.unwrap()], b"second");

    // Two questions of one TCP connection, answered the other way round.
    let mut asker = tcp(&host).unwrap();
    asker.write_all(b"\0\x03one\0\x03two").await.unwrap();
    asker.shutdown().await.unwrap();
    let (kind, one, message) = frame(&mut stream).await;
    assert_eq!((kind, message.as_slice()), (RESOLVER_TCP, &b"one"[..]));
    let (_, two, message) = frame(&mut stream).await;
    assert_eq!(message, b"two");
    answer(&mut stream, RESOLVER_TCP, two, b"<2>").await;
    answer(&mut stream, RESOLVER_TCP, one, b"<1>").await;
    let mut answers = Vec::new();
    let read = asker.read_to_end(&mut answers);
    timeout(DEADLINE, read).await.unwrap().unwrap();
    assert_eq!(answers, b"\0\x03<2>\0\x03<1>");

    // Another stream takes the place of this one.
    let (token, next) = host.token();
    network.resolver = token;
    host.client.set_network(deadline(), &network).await.unwrap();
    let mut next = timeout(DEADLINE, next).await.unwrap().unwrap();
    assert_eq!(stream.read(&mut [0; 1]).await.unwrap(), 0);
    other.send(b"again").await.unwrap();
    assert_eq!(frame(&mut next).await.2, b"again");

    // None any more.
    let none = request("c1");
    host.client.set_network(deadline(), &none).await.unwrap();
    assert_eq!(next.read(&mut [0; 1]).await.unwrap(), 0);
    assert!(tcp(&host).is_err());

    // The end of the last container is the end of a resolver.
    let (token, last) = host.token();
    network.resolver = token;
    host.client.set_network(deadline(), &network).await.unwrap();
    let mut last = timeout(DEADLINE, last).await.unwrap().unwrap();
    host.end("c1").await;
    let mut byte = [0; 1];
    let ended = timeout(DEADLINE, last.read(&mut byte)).await;
    assert_eq!(ended.unwrap().unwrap(), 0);
}
