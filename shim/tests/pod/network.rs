//! What containers have of the network namespaces that others set up, with real namespaces, veth pairs
//! and taps. The VMM sends some frames back; the agent tells what it was told.

use std::{
    io::{Read, Write},
    net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream, UdpSocket},
    thread,
    time::Duration,
};

use bulkhead_shim::network::{
    namespace::Namespace,
    netlink::{attribute, number32},
};
use containerd_shim_protos::shim_async::TaskClient;
use nix::sys::signal::Signal;
use serde_json::Value;
use tokio::{
    io::{AsyncBufReadExt, BufReader, Lines},
    net::unix::pipe,
    time::timeout,
};

use crate::{
    containerd::{Containerd, deadline, delete, start, wait, wait_gone},
    crashes::signal,
    fake_agent::{NETWORK, OPEN_PORT, QUESTIONS},
    lifecycle::{connect, kill, shut_down},
    net::*,
};

/// No event is this long on its way.
const LIMIT: Duration = Duration::from_secs(30);

/// What the agent was told.
struct Told(Lines<BufReader<pipe::Receiver>>);

impl Told {
    fn new(containerd: &Containerd) -> Self {
        let fifo = containerd.fifo(NETWORK);
        let mut options = pipe::OpenOptions::new();
        let receiver = options.read_write(true).open_receiver(fifo).unwrap();
        Self(BufReader::new(receiver).lines())
    }

    async fn next(&mut self) -> Value {
        let line = timeout(LIMIT, self.0.next_line()).await;
        let line = line.expect("the agent is told nothing").unwrap().unwrap();
        serde_json::from_str(&line).unwrap()
    }

    /// The next network with interfaces of these names.
    async fn next_with(&mut self, names: &[&str]) -> Value {
        loop {
            let told = self.next().await;
            if names_of(&told) == names {
                return told;
            }
        }
    }
}

fn names_of(told: &Value) -> Vec<&str> {
    let interfaces = told["interfaces"].as_array().into_iter().flatten();
    interfaces
        .map(|interface| interface["name"].as_str().unwrap())
        .collect()
}

fn bytes(value: &Value) -> Vec<u8> {
    serde_json::from_value(value.clone()).unwrap()
}

async fn create(containerd: &Containerd, id: &str, path: &str) -> (TaskClient, u32) {
    containerd.add_bundle(id, Some("pod"), &["sleep"]);
    if !path.is_empty() {
        containerd.set_network(id, path);
    }
    let (client, _) = containerd.start_shim(id).await;
    let request = containerd.create_request(id);
    let anchor = client.create(deadline(), &request).await.unwrap().pid;
    (client, anchor)
}

async fn run(containerd: &Containerd, id: &str, path: &str) -> TaskClient {
    let (client, _) = create(containerd, id, path).await;
    client.start(deadline(), &start(id, "")).await.unwrap();
    client
}

async fn end(client: &TaskClient, id: &str) {
    client.kill(deadline(), &kill(id, "", 9)).await.unwrap();
    client.wait(deadline(), &wait(id, "")).await.unwrap();
    client.delete(deadline(), &delete(id, "")).await.unwrap();
}

pub async fn follows() {
    let containerd = Containerd::new("normal").await;
    let mut told = Told::new(&containerd);
    let net = Net::new();
    net.add_veth(&net.inside, "eth0", 1400);
    net.configure(&net.inside, "eth0");
    let client = run(&containerd, "pod", &net.path()).await;

    let first = told.next().await;
    let eth0 = index(&net.inside, "eth0");
    assert_eq!(
        first["interfaces"],
        serde_json::json!([{
            "index": eth0, "name": "eth0", "device": "virtio-mmio.3", "mtu": 1400, "up": true,
        }])
    );
    assert_eq!(first["container"], "pod");
    let address = first["addresses"]
        .as_array()
        .unwrap()
        .iter()
        .map(bytes)
        .find(|address| address[0] == 2)
        .unwrap();
    assert_eq!((address[1], number32(&address, 4)), (24, Some(eth0)));
    assert_eq!(
        attribute(&address[8..], IFA_LOCAL),
        Some(&[10, 9, 0, 2][..])
    );
    // Those of IPv6 come when the kernel has made an address for the interface.
    let routes = first["routes"].as_array().unwrap().iter().map(bytes);
    let routes: Vec<_> = routes.filter(|route| route[0] == 2).collect();
    let by_kernel = |route: &&Vec<u8>| route[5] == libc::RTPROT_KERNEL;
    assert_eq!(routes.iter().filter(by_kernel).count(), 1);
    let [route] = &routes
        .iter()
        .filter(|route| !by_kernel(route))
        .collect::<Vec<_>>()[..]
    else {
        panic!("not one configured route: {first}");
    };
    assert_eq!(
        attribute(&route[12..], RTA_GATEWAY),
        Some(&[10, 9, 0, 1][..])
    );
    let [neighbour] = &first["neighbours"].as_array().unwrap()[..] else {
        panic!("not one neighbour: {first}");
    };
    let neighbour = bytes(neighbour);
    assert_eq!(
        attribute(&neighbour[12..], NDA_DST),
        Some(&[10, 9, 0, 77][..])
    );
    assert_eq!(
        (first["rules"].as_array().unwrap().len(), &first["resolver"]),
        (0, &false.into())
    );
    assert_guest_answers(&net, "eth0");

    // docker network connect, and disconnect
    net.add_veth(&net.inside, "eth1", 1500);
    let both = told.next_with(&["eth0", "eth1"]).await;
    assert_eq!(both["interfaces"][1]["device"], "virtio-mmio.4");
    assert_guest_answers(&net, "eth1");
    net.remove("eth0");
    told.next_with(&["eth1"]).await;
    assert_guest_answers(&net, "eth1");
    // The place of the first one is free.
    net.add_veth(&net.inside, "eth2", 1500);
    let both = told.next_with(&["eth1", "eth2"]).await;
    assert_eq!(both["interfaces"][1]["device"], "virtio-mmio.3");
    net.configure(&net.inside, "eth1");
    // A device's MTU does not grow, so it becomes another one.
    let request = link(index(&net.inside, "eth1"), 0).with(IFLA_MTU, &9000u32.to_ne_bytes());
    order(&net.inside, libc::RTM_SETLINK, 0, request);
    told.next_with(&["eth2"]).await;
    let both = told.next_with(&["eth1", "eth2"]).await;
    assert_eq!(both["interfaces"][0]["mtu"], 9000);
    assert_guest_answers(&net, "eth1");

    end(&client, "pod").await;
    shut_down(&client).await;
    net.assert_nothing_left();
    containerd.assert_nothing_left("pod");
}

/// As Docker 28 and nerdctl attach networks.
pub async fn before_the_start() {
    let containerd = Containerd::new("normal").await;
    let mut told = Told::new(&containerd);
    let net = Net::new();
    let (client, anchor) = create(&containerd, "pod", "").await;
    let inside = Namespace::of(anchor).unwrap();
    net.add_veth(&inside, "eth0", 1500);
    net.configure(&inside, "eth0");
    client.start(deadline(), &start("pod", "")).await.unwrap();
    assert_eq!(names_of(&told.next().await), ["eth0"]);
    assert_guest_answers(&net, "eth0");
    // Whoever has the namespace's loopback interface to themselves has it up.
    let bound = inside.enter(|| TcpStream::connect((Ipv4Addr::LOCALHOST, 7)).is_ok());
    assert!(bound.unwrap());
    end(&client, "pod").await;
    shut_down(&client).await;
    containerd.assert_nothing_left("pod");
}

async fn start_fails(containerd: &Containerd, net: &Net, wanted: &str) {
    let (client, _) = create(containerd, "pod", &net.path()).await;
    let error = client
        .start(deadline(), &start("pod", ""))
        .await
        .unwrap_err();
    let ttrpc::Error::RpcStatus(status) = error else {
        panic!("{error}");
    };
    let message = status.message();
    assert!(message.contains(wanted), "{message}");
    assert!(!message.contains('\n'), "{message}");
    net.assert_nothing_left();
    client.delete(deadline(), &delete("pod", "")).await.unwrap();
    shut_down(&client).await;
    containerd.assert_nothing_left("pod");
}

pub async fn refused() {
    let containerd = Containerd::new("no nics").await;
    let net = Net::new();
    net.add_veth(&net.inside, "eth0", 1500);
    let wanted = "Cannot give the network interface eth0 to the VM: no device for it";
    start_fails(&containerd, &net, wanted).await;
}

pub async fn unsupported() {
    let net = Net::new();
    net.add_veth(&net.inside, "eth0", 1500);
    net.add_macvlan("eth0", "above");
    let containerd = Containerd::new("normal").await;
    let wanted = "The network interface above cannot be given to a guest: it is built on another";
    start_fails(&containerd, &net, wanted).await;
    net.remove("above");
    for number in 1..9 {
        net.add_veth(&net.inside, &format!("eth{number}"), 1500);
    }
    let containerd = Containerd::new("normal").await;
    let wanted = "A pod has 8 network interfaces at most; there is none left for eth8";
    start_fails(&containerd, &net, wanted).await;
}

pub async fn shim_killed() {
    let containerd = Containerd::new("normal").await;
    let net = Net::new();
    net.add_veth(&net.inside, "eth0", 1500);
    let client = run(&containerd, "pod", &net.path()).await;
    let shim: i32 = connect(&client).await.try_into().unwrap();
    let vmms = containerd.vmm_pids();
    signal(shim, Signal::SIGKILL);
    for pid in vmms.into_iter().chain([shim]) {
        wait_gone(pid);
    }
    assert_eq!(net.queues(), ["eth0"]);
    let output = containerd.run_shim("pod", "delete", || Ok(()));
    assert!(output.status.success(), "{output:?}");
    net.assert_nothing_left();
    containerd.assert_nothing_left("pod");
    // What was left by a shim for which nobody ran delete is in nobody's way.
    for _ in 0..2 {
        let containerd = Containerd::new("normal").await;
        let client = run(&containerd, "pod", &net.path()).await;
        assert_guest_answers(&net, "eth0");
        let shim: i32 = connect(&client).await.try_into().unwrap();
        let vmms = containerd.vmm_pids();
        signal(shim, Signal::SIGKILL);
        for pid in vmms.into_iter().chain([shim]) {
            wait_gone(pid);
        }
    }
}

pub async fn killed_half_way() {
    let (containerd, mut held) = Containerd::held_at("AttachNic").await;
    let net = Net::new();
    net.add_veth(&net.inside, "eth0", 1500);
    let (client, _) = create(&containerd, "pod", &net.path()).await;
    let shim: i32 = connect(&client).await.try_into().unwrap();
    let request = start("pod", "");
    let starting = client.start(deadline(), &request);
    let killing = async {
        held.reached().await;
        assert_eq!(net.queues().len(), 2, "the interface's and the tap's");
        signal(shim, Signal::SIGKILL);
        wait_gone(shim);
    };
    let (started, ()) = tokio::join!(starting, killing);
    assert!(started.is_err());
    let output = containerd.run_shim("pod", "delete", || Ok(()));
    assert!(output.status.success(), "{output:?}");
    net.assert_nothing_left();
    containerd.assert_nothing_left("pod");
}

pub async fn shared() {
    let containerd = Containerd::new("normal").await;
    let mut told = Told::new(&containerd);
    let net = Net::new();
    net.add_veth(&net.inside, "eth0", 1500);
    let client = run(&containerd, "pod", &net.path()).await;
    assert_eq!(told.next().await["container"], "pod");
    run(&containerd, "member", &net.path()).await;
    // Another namespace is another network.
    let other = Net::new();
    other.add_veth(&other.inside, "eth0", 1500);
    run(&containerd, "other", &other.path()).await;
    let second = told.next().await;
    assert_eq!(second["container"], "other");
    assert_eq!(second["interfaces"][0]["device"], "virtio-mmio.4");

    end(&client, "pod").await;
    assert_guest_answers(&net, "eth0");
    net.add_veth(&net.inside, "eth1", 1500);
    let changed = told.next_with(&["eth0", "eth1"]).await;
    assert_eq!(changed["container"], "member");
    assert_guest_answers(&other, "eth0");
    end(&client, "member").await;
    net.assert_nothing_left();
    assert_guest_answers(&other, "eth0");
    end(&client, "other").await;
    other.assert_nothing_left();
    shut_down(&client).await;
    containerd.assert_nothing_left("pod");
}

pub async fn ports() {
    let containerd = Containerd::new("normal").await;
    let net = Net::new();
    let client = run(&containerd, "pod", &net.path()).await;
    let port = u16::try_from(OPEN_PORT).unwrap();
    let forward = move || {
        let docker = TcpListener::bind((Ipv4Addr::new(127, 0, 0, 11), port)).unwrap();
        let mut stream = TcpStream::connect((Ipv4Addr::LOCALHOST, port)).unwrap();
        let data: Vec<u8> = (0..300_000u32).flat_map(u32::to_le_bytes).collect();
        stream.write_all(&data).unwrap();
        stream.shutdown(std::net::Shutdown::Write).unwrap();
        let mut back = Vec::new();
        stream.read_to_end(&mut back).unwrap();
        assert!(back == data, "the bytes differ");

        let mut closed = TcpStream::connect((Ipv4Addr::LOCALHOST, 9)).unwrap();
        let error = closed.read(&mut [0]).unwrap_err();
        assert_eq!(error.kind(), std::io::ErrorKind::ConnectionReset);
        // The guest listens at the address of IPv4 alone.
        let closed = TcpStream::connect(SocketAddr::from(([0u16, 0, 0, 0, 0, 0, 0, 1], port)));
        let error = closed.unwrap().read(&mut [0]).unwrap_err();
        assert_eq!(error.kind(), std::io::ErrorKind::ConnectionReset);

        let mine = TcpStream::connect((Ipv4Addr::new(127, 0, 0, 11), port)).unwrap();
        let (_, peer) = docker.accept().unwrap();
        assert_eq!(peer, mine.local_addr().unwrap());
    };
    let inside = net.inside;
    let forwarded = tokio::task::spawn_blocking(move || {
        inside.enter(forward).unwrap();
        inside
    });
    let inside = forwarded.await.unwrap();
    end(&client, "pod").await;
    shut_down(&client).await;
    let refused = inside.enter(move || TcpStream::connect((Ipv4Addr::LOCALHOST, port)));
    assert!(refused.unwrap().is_err());
}

pub async fn names() {
    let containerd = Containerd::new("normal").await;
    let mut told = Told::new(&containerd);
    let net = Net::new();
    let up = link(1, UP);
    order(&net.inside, libc::RTM_SETLINK, 0, up);
    let server = (Ipv4Addr::new(127, 0, 0, 11), 53);
    let listen = move || {
        (
            UdpSocket::bind(server).unwrap(),
            TcpListener::bind(server).unwrap(),
        )
    };
    let (udp, tcp) = net.inside.enter(listen).unwrap();
    let answering = thread::spawn(move || {
        let mut question = [0; 512];
        let (length, asker) = udp.recv_from(&mut question).unwrap();
        let answer = [&question[..length], b", answered"].concat();
        udp.send_to(&answer, asker).unwrap();

        let (mut stream, _) = tcp.accept().unwrap();
        let mut length = [0; 2];
        stream.read_exact(&mut length).unwrap();
        let mut question = vec![0; u16::from_be_bytes(length).into()];
        stream.read_exact(&mut question).unwrap();
        let answer = [&question[..], b", answered"].concat();
        let length = u16::try_from(answer.len()).unwrap().to_be_bytes();
        stream.write_all(&[&length[..], &answer].concat()).unwrap();
    });
    let client = run(&containerd, "pod", &net.path()).await;
    assert_eq!(told.next().await["resolver"], true);
    let mut answers = [told.next().await, told.next().await];
    answers.sort_by_key(|answer| answer["tcp"].as_bool());
    for (number, (answer, question)) in answers.iter().zip(QUESTIONS).enumerate() {
        let question = str::from_utf8(question).unwrap();
        assert_eq!(answer["answer"], format!("{question}, answered"));
        assert_eq!(answer["number"], number);
    }
    answering.join().unwrap();
    end(&client, "pod").await;
    shut_down(&client).await;
}

/// Docker's name server asks others from the container's namespace on the host.
pub async fn hosts_sockets() {
    let containerd = Containerd::new("normal").await;
    let net = Net::new();
    net.add_veth(&net.inside, "eth0", 1500);
    net.configure(&net.inside, "eth0");
    let client = run(&containerd, "pod", &net.path()).await;
    let bind = || {
        let server = (Ipv4Addr::new(10, 9, 0, 1), 53);
        (
            UdpSocket::bind(server).unwrap(),
            TcpListener::bind(server).unwrap(),
        )
    };
    let (udp, tcp) = net.outside.enter(bind).unwrap();
    let answering = thread::spawn(move || {
        let mut question = [0; 512];
        let (length, asker) = udp.recv_from(&mut question).unwrap();
        udp.send_to(&question[..length], asker).unwrap();
        tcp.accept().unwrap().0.write_all(b"by TCP").unwrap();
    });
    let ask = || {
        let server = (Ipv4Addr::new(10, 9, 0, 1), 53);
        let udp = UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 0)).unwrap();
        udp.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
        udp.connect(server).unwrap();
        udp.send(b"by UDP").unwrap();
        let mut answer = [0; 512];
        let length = udp.recv(&mut answer).unwrap();
        assert_eq!(&answer[..length], b"by UDP");
        let mut answer = Vec::new();
        let mut tcp = TcpStream::connect(server).unwrap();
        tcp.read_to_end(&mut answer).unwrap();
        assert_eq!(answer, b"by TCP");
    };
    net.inside.enter(ask).unwrap();
    answering.join().unwrap();
    assert_guest_answers(&net, "eth0");
    end(&client, "pod").await;
    shut_down(&client).await;
    net.assert_nothing_left();
}
