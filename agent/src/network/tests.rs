//! The whole reconciliation against the kernel: one namespace is the host's, one the agent's, one
//! the container's, and pairs of veth stand in for what a driver makes. Needs root.

use std::{
    cell::RefCell,
    collections::{BTreeMap, HashSet},
    fs::File,
    io,
    os::fd::{AsFd, OwnedFd},
    path::{Path, PathBuf},
    process::Command,
    thread,
};

use bulkhead_agent_api::messages::{Interface, NetworkRequest};
use netlink_packet_core::NLM_F_DUMP;
use nix::sched::{CloneFlags, setns, unshare};

use super::{
    devices::Devices,
    items::Kind,
    netlink::Rtnetlink,
    reconcile::{Made, NetworkError, Place},
    wanted::Wanted,
};

/// A network namespace, kept by its descriptor.
struct Net(OwnedFd);

impl Net {
    fn new() -> Self {
        let made = thread::spawn(|| {
            unshare(CloneFlags::CLONE_NEWNET).expect("tests need root");
            File::open("/proc/thread-self/ns/net").unwrap()
        });
        let net = Self(made.join().unwrap().into());
        net.run("ip link set lo up");
        net
    }

    fn path(&self) -> PathBuf {
        use std::os::fd::AsRawFd;
        format!("/proc/{}/fd/{}", std::process::id(), self.0.as_raw_fd()).into()
    }

    /// Runs commands in it, and returns what they say.
    fn run(&self, commands: &str) -> String {
        run_in(&self.path(), commands)
    }

    fn inside<T: Send>(&self, work: impl FnOnce() -> T + Send) -> T {
        thread::scope(|scope| {
            let thread = scope.spawn(|| {
                setns(self.0.as_fd(), CloneFlags::CLONE_NEWNET).unwrap();
                work()
            });
            thread.join().unwrap()
        })
    }

    /// What the kernel says of it, as the shim sends it, with these interfaces.
    fn dump(&self, interfaces: &[(&str, &str)]) -> NetworkRequest {
        self.inside(|| {
            let socket = Rtnetlink::open().unwrap();
            let interfaces = interfaces.iter().map(|(name, device)| {
                let link = socket.link_named(name).unwrap().unwrap();
                let mtu = run_here(&format!("ip -o link show {name}"));
                let mtu = mtu.split(" mtu ").nth(1).unwrap().split(' ').next();
                Interface {
                    index: link.index,
                    name: link.name,
                    device: (*device).to_owned(),
                    mtu: mtu.unwrap().parse().unwrap(),
                    up: link.up,
                    ..Interface::default()
                }
            });
            let interfaces = interfaces.collect();
            let dump = |kind: Kind| {
                let answers = socket.request(kind.made_by() + 2, NLM_F_DUMP, &[0; 12]);
                answers.unwrap()
            };
            NetworkRequest {
                interfaces,
                addresses: dump(Kind::Address),
                routes: dump(Kind::Route),
                rules: dump(Kind::Rule),
                // The permanent ones: `ndm_state` is NUD_PERMANENT.
                neighbours: dump(Kind::Neighbour)
                    .into_iter()
                    .filter(|one| one[8] & 0x80 != 0)
                    .collect(),
                ..NetworkRequest::default()
            }
        })
    }

    fn state(&self) -> String {
        let state = self.run(
            "ip addr show; ip route show table all; ip -6 route show table all; ip rule; \
             ip -6 rule; ip neigh show nud permanent",
        );
        let noise = ["link-netns", "valid_lft", "qdisc", "link/"];
        let words = |line: &str| {
            // What is told in no order, or differs by nature.
            let line = line.split(" pref medium").next().unwrap();
            line.trim().replace(" tentative", "").replace(" nodad", "")
        };
        let lines = state.lines();
        let lines = lines.filter(|line| !noise.iter().any(|noise| line.contains(noise)));
        lines.map(words).collect::<Vec<_>>().join("\n")
    }
}

fn run_in(net: &Path, commands: &str) -> String {
    let mut command = Command::new("nsenter");
    command.arg(format!("--net={}", net.display()));
    finish(command.args(["sh", "-ec", commands]))
}

fn run_here(commands: &str) -> String {
    finish(Command::new("sh").args(["-ec", commands]))
}

fn finish(command: &mut Command) -> String {
    let output = command.output().unwrap();
    let error = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{command:?}: {error}");
    String::from_utf8(output.stdout).unwrap()
}

/// Pairs of veth: the end `new-N` is what a driver makes of the device N, in the agent's namespace.
struct Pairs {
    agent: PathBuf,
    attached: RefCell<HashSet<String>>,
}

fn add_pair(net: &Path, name: &str, peer: &str, device: &str) {
    run_in(
        net,
        &format!(
            "ip link add {name} address 02:00:00:00:00:0{device} type veth peer name {peer}; \
             ip link set {peer} addrgenmode none up"
        ),
    );
}

impl Devices for Pairs {
    fn is_attached(&self, device: &str) -> bool {
        self.attached.borrow().contains(device)
    }

    fn attach(&self, device: &str) -> io::Result<String> {
        if device == "9" {
            return Err(io::Error::from_raw_os_error(libc::ENODEV));
        }
        let name = format!("new-{device}");
        if self.attached.borrow_mut().insert(device.to_owned()) {
            add_pair(&self.agent, &name, &format!("peer-{device}"), device);
        }
        Ok(name)
    }

    fn detach(&self, device: &str) -> io::Result<()> {
        if self.attached.borrow_mut().remove(device) {
            run_in(&self.agent, &format!("ip link del peer-{device}"));
        }
        Ok(())
    }
}

struct Test {
    host: Net,
    agent: Net,
    container: Net,
    made: Made,
    attached: HashSet<String>,
    elsewhere: HashSet<String>,
    sysctls: BTreeMap<String, String>,
}

impl Test {
    fn new() -> Self {
        Self {
            host: Net::new(),
            agent: Net::new(),
            container: Net::new(),
            made: Made::default(),
            attached: HashSet::new(),
            elsewhere: HashSet::new(),
            sysctls: BTreeMap::new(),
        }
    }

    fn host_interface(&self, name: &str, device: &str) {
        add_pair(&self.host.path(), name, &format!("{name}-peer"), device);
    }

    fn set(&mut self, request: &NetworkRequest) -> Result<(), NetworkError> {
        let wanted = Wanted::read(request)?;
        let outside = self.agent.inside(|| Rtnetlink::open().unwrap());
        let (made, attached) = (&mut self.made, &mut self.attached);
        let (agent, elsewhere) = (self.agent.path(), &self.elsewhere);
        let sysctls = &self.sysctls;
        let namespace = &self.container;
        namespace.inside(move || {
            let inside = Rtnetlink::open().unwrap();
            let devices = Pairs {
                agent,
                attached: RefCell::new(std::mem::take(attached)),
            };
            let place = Place {
                devices: &devices,
                outside: &outside,
                inside: &inside,
                namespace: namespace.0.as_fd(),
                elsewhere,
                sysctls,
            };
            let result = made.reconcile(&place, &wanted);
            *attached = devices.attached.into_inner();
            result
        })
    }
}

const HOST: &str = "
    ip link set eth0 mtu 1400 up
    ip link set net1 up
    ip addr add 10.88.0.5/16 broadcast 10.88.255.255 dev eth0
    ip addr add 10.88.0.6/16 dev eth0
    ip addr add 10.1.1.1/32 dev lo
    ip addr add 2001:db8::5/64 dev eth0 nodad
    ip addr add 192.168.7.2/24 dev net1
    ip route del 192.168.7.0/24 dev net1
    ip route add 192.168.7.1 dev net1 scope link src 192.168.7.2
    ip route add 192.168.7.0/24 via 192.168.7.1 src 192.168.7.2
    ip route add default via 10.88.0.1 metric 7 mtu 1300
    ip -6 route add default via 2001:db8::1 metric 9
    ip route add blackhole 10.99.0.0/16
    ip route add 10.98.0.0/16 nexthop via 10.88.0.2 weight 2 nexthop via 192.168.7.1 weight 3
    ip -6 route add 2001:db8:98::/64 nexthop via 2001:db8::2 nexthop via fe80::9 dev net1
    ip route add 10.97.0.0/16 via 169.254.1.1 dev eth0 onlink table 100
    ip rule add from 10.88.0.5 lookup 100 pref 99
    ip -6 rule add iif eth0 lookup 200 pref 98
    ip neigh add 10.88.0.1 lladdr 02:00:00:00:00:77 dev eth0 nud permanent
";

#[test]
fn a_namespace_gets_what_the_host_has() {
    let mut test = Test::new();
    // Its addresses are the host's at once, for the comparison.
    test.host.inside(|| {
        std::fs::write("/proc/sys/net/ipv6/conf/default/accept_dad", "0").unwrap();
    });
    // Other indices than in the container's namespace.
    test.host
        .run("ip link add other0 type veth peer name other1");
    test.host_interface("net1", "2");
    test.host_interface("eth0", "1");
    test.host.run(HOST);
    test.container
        .run("ip link add own0 type veth peer name own1");
    let request = test.host.dump(&[("eth0", "1"), ("net1", "2")]);
    test.set(&request).unwrap();
    let (host, container) = (test.host.state(), test.container.state());
    let only_there = |line: &str| {
        ["eth0-peer", "net1-peer", "other", "@", "NO-CARRIER"]
            .iter()
            .any(|one| line.contains(one))
    };
    let lines = |text: &str| {
        let mut lines: Vec<String> = text
            .lines()
            .filter(|line| !only_there(line))
            .map(|line| line.to_owned())
            .collect();
        lines.sort();
        lines
    };
    let (host, container) = (lines(&host), lines(&container));
    // 192.168.7.2 has no route of its own there, which only a flag of it tells.
    let container: Vec<String> = container
        .iter()
        .map(|one| one.replace(" noprefixroute", ""))
        .collect();
    assert_eq!(host, container);
    let links = test.container.run("ip addr show");
    assert!(!links.contains("tentative"), "{links}");
    assert!(links.contains("mtu 1400"), "{links}");
    let address = test.container.run("ip addr show dev net1");
    assert!(address.contains("noprefixroute"), "{address}");
    // Nothing happens when nothing changes.
    let before = test
        .container
        .run("ip -d addr show; ip route show table all");
    test.set(&request).unwrap();
    assert_eq!(
        test.container
            .run("ip -d addr show; ip route show table all"),
        before
    );
}

#[test]
fn changes_are_made_one_by_one() {
    let mut test = Test::new();
    test.host_interface("eth0", "1");
    test.host_interface("eth1", "2");
    test.host.run(
        "ip link set eth0 up; ip link set eth1 up
        ip addr add 10.0.0.2/24 dev eth0; ip addr add 10.0.0.3/24 dev eth0
        ip addr add 10.1.0.2/24 dev eth1; ip route add default via 10.0.0.1",
    );
    test.set(&test.host.dump(&[("eth0", "1"), ("eth1", "2")]))
        .unwrap();
    test.container
        .run("ip route add 10.77.0.0/16 dev eth1; ip addr add 10.55.0.1/24 dev eth0");
    test.host.run(
        "ip link set eth0 down; ip link set eth0 name x; ip link set eth1 name eth0
        ip link set x name eth1 mtu 1280; ip link set eth1 up
        ip addr add 10.0.0.9/24 dev eth1; ip route add default via 10.1.0.1",
    );
    test.host.run(
        "ip addr del 10.0.0.2/24 dev eth1; ip addr add 10.0.0.3/24 dev eth1
        ip addr add 10.0.0.9/24 dev eth1",
    );
    test.set(&test.host.dump(&[("eth1", "1"), ("eth0", "2")]))
        .unwrap();
    let state = test.container.run("ip addr show; ip route show");
    for part in [
        "10.0.0.3/24",
        "10.0.0.9/24",
        "mtu 1280",
        "default via 10.1.0.1 dev eth0",
        "10.77.0.0/16 dev eth0",
        "10.55.0.1/24",
        "10.0.0.0/24 dev eth1",
    ] {
        assert!(state.contains(part), "{part} is not in {state}");
    }
    for part in ["10.0.0.2/24", "default via 10.0.0.1", "tentative"] {
        assert!(!state.contains(part), "{part} is in {state}");
    }
    // One goes: its routes with it, the other stays as it is.
    test.set(&NetworkRequest {
        interfaces: test.host.dump(&[("eth1", "1")]).interfaces,
        ..NetworkRequest::default()
    })
    .unwrap();
    let state = test.container.run("ip addr show; ip route show");
    assert!(
        !state.contains("eth0") && !state.contains("10.0.0.3"),
        "{state}"
    );
    assert!(state.contains("10.55.0.1/24"), "{state}");
    assert!(!test.agent.run("ip link").contains("peer-2"));
}

#[test]
fn a_failure_names_the_step_and_leaves_no_interface() {
    let mut test = Test::new();
    test.host_interface("eth0", "1");
    test.host_interface("eth1", "2");
    test.host
        .run("ip link set eth0 up; ip addr add 10.0.0.2/24 dev eth0");
    test.container
        .run("ip link add eth1 type veth peer name own");
    let request = test.host.dump(&[("eth0", "1"), ("eth1", "2")]);
    let error = test.set(&request).unwrap_err();
    assert!(
        matches!(&error, NetworkError::NameTaken { name, .. } if name == "eth1"),
        "{error}"
    );
    assert!(test.attached.is_empty());
    assert!(!test.container.run("ip addr").contains("10.0.0.2"));
    // An empty slot.
    let mut request = test.host.dump(&[("eth0", "9")]);
    let error = crate::log::chain(&test.set(&request).unwrap_err());
    assert_eq!(
        error,
        "failed to bind the driver of interface eth0 (9): No such device (os error 19)"
    );
    // A route that cannot be.
    request = test.host.dump(&[("eth0", "1")]);
    test.host.run("ip route add 10.9.0.0/16 via 10.0.0.1");
    request.routes = test.host.dump(&[]).routes;
    request.addresses.clear();
    let error = crate::log::chain(&test.set(&request).unwrap_err());
    assert!(error.starts_with("failed to make route 10."), "{error}");
    assert!(error.contains(" of interface eth0: "), "{error}");
    assert!(test.attached.is_empty());
    // And all is well after that.
    test.set(&test.host.dump(&[("eth0", "1")])).unwrap();
    assert!(
        test.container
            .run("ip route")
            .contains("10.9.0.0/16 via 10.0.0.1")
    );
}

#[test]
fn what_the_container_does_breaks_nothing() {
    let mut test = Test::new();
    test.host_interface("eth0", "1");
    test.host_interface("eth1", "2");
    test.host.run(
        "ip link set eth0 up; ip link set eth1 up; ip addr add 10.0.0.2/24 dev eth0
        ip addr add 10.1.0.2/24 dev eth1
        ip route add default via 10.0.0.1; ip neigh add 10.0.0.1 lladdr 02:00:00:00:00:77 dev eth0",
    );
    let interfaces = [("eth0", "1"), ("eth1", "2")];
    test.set(&test.host.dump(&interfaces)).unwrap();
    let other = Net::new();
    test.container
        .run("ip link set eth0 name mine; ip route replace default via 10.0.0.7");
    test.container.run(
        &format!("ip link set eth1 netns {}", std::process::id()).replace(
            &format!("netns {}", std::process::id()),
            &format!("netns {}", other.path().display()),
        ),
    );
    test.host
        .run("ip addr add 10.0.0.3/24 dev eth0; ip addr add 10.1.0.3/24 dev eth1");
    test.set(&test.host.dump(&interfaces)).unwrap();
    let state = test.container.run("ip addr; ip route");
    assert!(
        state.contains("mine") && state.contains("10.0.0.3/24"),
        "{state}"
    );
    assert!(state.contains("default via 10.0.0.7"), "{state}");
    assert!(!state.contains("default via 10.0.0.1"), "{state}");
    test.container.run("ip link set mine down");
    test.set(&test.host.dump(&interfaces)).unwrap();
    // The host takes both away, wherever they are.
    test.set(&NetworkRequest::default()).unwrap();
    assert!(!test.container.run("ip addr").contains("mine"));
    assert!(!other.run("ip addr").contains("eth1"));
}

#[test]
fn an_interface_comes_from_a_namespace_that_has_gone() {
    let mut test = Test::new();
    test.host_interface("eth0", "1");
    test.host
        .run("ip link set eth0 up; ip addr add 10.0.0.2/24 dev eth0");
    let request = test.host.dump(&[("eth0", "1")]);
    test.set(&request).unwrap();
    test.elsewhere = HashSet::from(["1".to_owned()]);
    test.made = Made::default();
    let first = std::mem::replace(&mut test.container, Net::new());
    test.set(&request).unwrap();
    assert!(test.container.run("ip addr").contains("10.0.0.2/24"));
    assert!(!first.run("ip addr").contains("eth0"));
}

#[test]
fn a_container_without_ipv6_gets_the_rest() {
    let mut test = Test::new();
    test.host_interface("eth0", "1");
    test.host.run(
        "ip link set eth0 up; ip addr add 10.0.0.2/24 dev eth0
        ip addr add 2001:db8::5/64 dev eth0 nodad; ip -6 route add default via 2001:db8::1",
    );
    test.container.inside(|| {
        std::fs::write("/proc/sys/net/ipv6/conf/all/disable_ipv6", "1").unwrap();
    });
    test.set(&test.host.dump(&[("eth0", "1")])).unwrap();
    let state = test.container.run("ip addr");
    assert!(
        state.contains("10.0.0.2/24") && !state.contains("inet6"),
        "{state}"
    );
    // Of one interface alone.
    let mut test = Test {
        container: Net::new(),
        made: Made::default(),
        elsewhere: HashSet::from(["1".to_owned()]),
        ..test
    };
    let path = "net/ipv6/conf/eth0/disable_ipv6".to_owned();
    test.sysctls.insert(path, "1".to_owned());
    test.set(&test.host.dump(&[("eth0", "1")])).unwrap();
    let state = test
        .container
        .run("ip addr show dev eth0; ip addr show dev lo");
    assert!(
        state.contains("10.0.0.2/24")
            && !state.contains("inet6 2001")
            && state.contains("inet6 ::1"),
        "{state}"
    );
}

#[test]
fn routes_of_the_kernel_may_be_left_to_it() {
    let mut test = Test::new();
    test.host_interface("eth0", "1");
    test.host.run(
        "ip link set eth0 up; ip addr add 10.0.0.2/24 dev eth0; ip route add default via 10.0.0.1",
    );
    let mut request = test.host.dump(&[("eth0", "1")]);
    request
        .routes
        .retain(|route| !super::items::is_kernel_route(route));
    test.set(&request).unwrap();
    let routes = test.container.run("ip route");
    assert!(
        routes.contains("10.0.0.0/24 dev eth0 proto kernel"),
        "{routes}"
    );
}
