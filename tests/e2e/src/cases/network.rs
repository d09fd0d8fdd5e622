//! Networks that somebody else sets up, as CNI does: a container has in its VM what runc's would have.

use std::fs;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use serde_json::json;

use super::failures::Config;
use super::{Case, Setting, bulkhead, case};
use crate::command::Input;
use crate::ctr::{Foreground, PROBE, RUNC, Run, ctr};
use crate::host::{self, Pod};
use crate::network::{
    Attachment, Bridge, GATEWAY, GATEWAY6, Namespace, ask, ask_datagrams, echo, enter, ip,
};

/// Where containers answer.
pub const PORT: u16 = 7000;

/// Where the host answers.
const HOST_PORT: u16 = 7001;

/// Bytes of a transfer each way: more than all buffers between the two ends.
const BYTES: u64 = 16 << 20;

pub fn cases() -> Vec<Case> {
    vec![
        case(
            "a container has the interfaces, addresses and routes of its namespace",
            interfaces,
        ),
        case("interfaces of every kind of CNI work", kinds),
        case(
            "bytes and datagrams arrive whole between containers and the host",
            traffic,
        ),
        case("ctr run --cni connects a container", ctr_cni),
        case(
            "interfaces, addresses and routes come and go while a container runs",
            changes,
        ),
        case(
            "what dials the loopback interface of a container's namespace reaches it",
            loopback,
        ),
        bulkhead(
            "nothing of a network is left, whoever is killed",
            nothing_left,
        ),
        bulkhead("a container's interfaces keep to their rates", rate_limits),
        case(
            "an interface keeps to the bandwidth that CNI gives it",
            bandwidth,
        ),
        bulkhead("more interfaces than a VM can have are refused", too_many),
    ]
}

/// Everything about interfaces that does not say which machine it is: no indices, no queues; nor that
/// IPv6 addresses in the guest are not tried out, or that an address has no route of its own there
/// because on the host it has lost it.
const LOOK: &str = r#"
for dir in /sys/class/net/*; do
    name=${dir##*/}
    echo "link $name $(cat $dir/address) mtu $(cat $dir/mtu) $(cat $dir/operstate) $(cat $dir/flags)"
done
ip -o addr | sed 's/^[0-9]*: *//; s/@[^ ]*//; s/valid_lft.*//; s/\\//; s/ flags 02//; s/ noprefixroute//' | sort
for family in -4 -6; do
    ip $family route show table main | sed "s/^/$family main /" | sort
    ip $family route show table 100 | sed "s/^/$family 100 /" | sort
    ip $family rule | sed "s/^/$family rule /"
done
ip neigh show nud permanent | sort
"#;

fn interfaces(setting: &Setting) -> Result<()> {
    let bridge = Bridge::new();
    let namespace = Namespace::new()?;
    // An address is at once what it will be: no plug-in waits for those that the kernel makes itself.
    namespace.enter(|| {
        Ok(fs::write(
            "/proc/sys/net/ipv6/conf/default/accept_dad",
            "0",
        )?)
    })?;
    let first = Attachment::bridge(&namespace, "eth0", &bridge)?;
    let ptp = json!({ "type": "ptp", "mtu": 1400 });
    let second = Attachment::add(&namespace, "net1", vec![ptp], &["10.98.0.0/24"], &json!({}))?;
    for words in [
        format!("route add 203.0.113.0/24 via {GATEWAY} metric 7 mtu 1300"),
        format!("route add default via {GATEWAY} table 100"),
        "route add unreachable 198.51.100.0/24".to_owned(),
        format!("-6 route add 2001:db8::/32 via {GATEWAY6} dev eth0"),
        format!(
            "rule add from {} table 100 priority 500",
            second.address(false)?
        ),
        "neigh add 10.97.0.77 lladdr 02:00:00:00:00:77 dev eth0 nud permanent".to_owned(),
        "addr add 10.97.0.99/24 dev eth0 label eth0:x".to_owned(),
    ] {
        namespace.ip(&words)?;
    }
    let look = |runtime: &str| {
        Run::new(runtime)
            .flags(&["--with-ns", &namespace.flag()])
            .run(&["sh", "-c", LOOK])?
            .succeeds()
    };
    let expected = look(RUNC)?;
    for needed in [
        "203.0.113.0/24",
        "mtu 1400",
        "lookup 100",
        "2001:db8::/32",
        "fd97::",
    ] {
        ensure!(expected.contains(needed), "no {needed} in {expected}");
    }
    let found = look(&setting.runtime)?;
    same(&found, &expected).context("otherwise than under runc")?;
    // And it was left as it was.
    same(&look(RUNC)?, &expected).context("not left as it was")?;
    drop((first, second));
    Ok(())
}

/// Fails with the lines that are not in both.
fn same(found: &str, expected: &str) -> Result<()> {
    let only = |of: &str, other: &str| {
        let other: Vec<&str> = other.lines().collect();
        let lines = of.lines().filter(|line| !other.contains(line));
        lines.map(|line| format!("\n{line}")).collect::<String>()
    };
    let (more, less) = (only(found, expected), only(expected, found));
    ensure!(found == expected, "only here:{more}\nonly there:{less}");
    Ok(())
}

/// An interface of each kind in turn: what is seen, and a partner that answers where there is one.
fn kinds(setting: &Setting) -> Result<()> {
    let parent = Parent::new()?;
    let on = |kind: &str, mode: &str| json!({ "type": kind, "master": parent.name, "mode": mode });
    for (what, plugin) in [
        ("macvlan", on("macvlan", "bridge")),
        ("ipvlan", on("ipvlan", "l2")),
    ] {
        let partner = Namespace::new()?;
        let own = Namespace::new()?;
        let attach = |namespace| {
            let chain = vec![plugin.clone()];
            Attachment::add(namespace, "eth0", chain, &["10.99.0.0/24"], &json!({}))
        };
        // Each has its own list of addresses, so they get the same one unless told.
        let _of_partner = attach(&partner)?;
        partner.ip("addr flush dev eth0")?;
        partner.ip("addr add 10.99.0.200/24 dev eth0")?;
        let attachment = attach(&own)?;
        let container = server(setting.container(), &own)?;
        let to = SocketAddr::new(attachment.address(false)?.parse()?, PORT);
        partner
            .enter(|| {
                ask(to, 1 << 20)?;
                ask_datagrams(to, &[1, 1400])
            })
            .with_context(|| {
                let found = partner
                    .ip("addr")
                    .and_then(|all| Ok(all + &partner.ip("route")?));
                format!("by {what}, with {found:?}")
            })?;
        stop(container)?;
    }
    Ok(())
}

/// An interface of the host without any others behind it.
struct Parent {
    name: &'static str,
}

impl Parent {
    fn new() -> Result<Self> {
        let name = "e2eparent";
        ip(&format!("link add {name} type dummy"))?;
        let parent = Self { name };
        ip(&format!("link set {name} up"))?;
        Ok(parent)
    }
}

impl Drop for Parent {
    fn drop(&mut self) {
        let _ = ip(&format!("link delete {}", self.name));
    }
}

/// A container in a namespace that answers at [`PORT`].
pub fn server(run: Run, namespace: &Namespace) -> Result<Foreground> {
    let container = run
        .with_probe()?
        .flags(&["--with-ns", &namespace.flag()])
        .input(Input::Open)
        .spawn(&[PROBE, "probe", "serve", &PORT.to_string()])?;
    container.client.expect("ready")?;
    Ok(container)
}

fn stop(mut container: Foreground) -> Result<()> {
    container.client.close_stdin();
    container.finish()?.succeeds()?;
    Ok(())
}

fn traffic(setting: &Setting) -> Result<()> {
    let bridge = Bridge::new();
    let (one, other) = (Namespace::new()?, Namespace::new()?);
    let eth = Attachment::bridge(&one, "eth0", &bridge)?;
    let _other_eth = Attachment::bridge(&other, "eth0", &bridge)?;
    let container = server(setting.container(), &one)?;
    let address = |v6: bool| -> Result<SocketAddr> {
        let ip: IpAddr = eth.address(v6)?.parse()?;
        Ok(SocketAddr::new(ip, PORT))
    };
    echo(HOST_PORT)?;
    for v6 in [false, true] {
        let to = address(v6)?;
        ask(to, BYTES).with_context(|| format!("from the host to {to}"))?;
        // More than a packet carries, and the most that UDP can.
        ask_datagrams(to, &[0, 1, 1400, 1500, 9000, 65_000])
            .with_context(|| format!("datagrams from the host to {to}"))?;
        let host: IpAddr = if v6 { GATEWAY6.into() } else { GATEWAY.into() };
        let partner = SocketAddr::new(host, HOST_PORT).to_string();
        let asked = [PROBE, "probe", "ask", &partner, &BYTES.to_string()];
        container.container.exec(&[], &asked)?.succeeds()?;
    }
    // From a container of another runtime, which is at least in another VM.
    for runtime in [RUNC, &setting.runtime] {
        let partner = address(runtime == RUNC)?.to_string();
        Run::new(runtime)
            .with_probe()?
            .flags(&["--with-ns", &other.flag()])
            .run(&[PROBE, "probe", "ask", &partner, &BYTES.to_string()])?
            .succeeds()
            .with_context(|| format!("from {runtime} to {partner}"))?;
    }
    let gateway = GATEWAY.to_string();
    let gateway6 = GATEWAY6.to_string();
    for (ping, host) in [("ping", &gateway), ("ping6", &gateway6)] {
        let words = [ping, "-c", "2", "-W", "10", host];
        container.container.exec(&[], &words)?.succeeds()?;
    }
    // Nobody listens: an answer at once, as ever.
    let closed = SocketAddr::new(eth.address(false)?.parse()?, PORT + 5);
    ensure!(ask(closed, 1).is_err(), "somebody answers at {closed}");
    stop(container)
}

fn ctr_cni(setting: &Setting) -> Result<()> {
    let bridge = Bridge::new();
    let directory = PathBuf::from("/etc/cni/net.d");
    let made = !directory.exists();
    fs::create_dir_all(&directory)?;
    // Before any other that is there.
    let file = directory.join("00-e2e.conflist");
    let addresses = tempfile::tempdir()?;
    let list = json!({
        "cniVersion": "1.0.0", "name": "e2e", "plugins": [
            { "type": "bridge", "bridge": bridge.name, "isDefaultGateway": true, "ipam": {
                "type": "host-local", "dataDir": addresses.path(),
                "ranges": [[{ "subnet": "10.97.0.0/24" }]] } },
            { "type": "portmap", "capabilities": { "portMappings": true } },
            { "type": "firewall" },
        ],
    });
    fs::write(&file, list.to_string())?;
    let done = setting.container().flags(&["--cni"]).run(&[
        "sh",
        "-c",
        "ip -o -4 addr show eth0; ping -c 1 -W 10 10.97.0.1",
    ]);
    fs::remove_file(&file)?;
    if made {
        fs::remove_dir(&directory)?;
    }
    let said = done?.succeeds()?;
    ensure!(
        said.contains("inet 10.97.0.2/24") && said.contains(" 0% packet loss"),
        "{said}"
    );
    Ok(())
}

/// Waits in a container until a command succeeds or, with `!` before it, fails.
fn until(container: &Foreground, condition: &str) -> Result<()> {
    let script = format!("until {condition}; do usleep 100000; done");
    let wait = container
        .container
        .exec(&[], &["timeout", "60", "sh", "-c", &script])?;
    wait.succeeds()
        .map(drop)
        .with_context(|| format!("it never came to {condition:?}"))
}

fn changes(setting: &Setting) -> Result<()> {
    let namespace = Namespace::new()?;
    let container = server(setting.container(), &namespace)?;
    let none = container
        .container
        .exec(&[], &["ls", "/sys/class/net"])?
        .succeeds()?;
    ensure!(none == "lo\n", "{none}");
    let own = namespace.name();
    ip(&format!(
        "link add e2eveth type veth peer name late0 netns {own}"
    ))?;
    ip("addr add 10.96.0.1/24 dev e2eveth")?;
    ip("link set e2eveth up")?;
    namespace.ip("addr add 10.96.0.2/24 dev late0")?;
    namespace.ip("link set late0 up")?;
    let to: SocketAddr = "10.96.0.2:7000".parse()?;
    until(&container, "ip addr show dev late0 | grep -q 10.96.0.2/24")?;
    ask(to, 1 << 20)?;

    namespace.ip("addr add 10.96.0.3/24 dev late0")?;
    namespace.ip("route add 192.0.2.0/24 via 10.96.0.1")?;
    until(
        &container,
        "ip route | grep -q '192.0.2.0/24 via 10.96.0.1'",
    )?;
    until(&container, "ip addr show dev late0 | grep -q 10.96.0.3/24")?;
    ask("10.96.0.3:7000".parse()?, 1 << 20)?;
    namespace.ip("route del 192.0.2.0/24")?;
    namespace.ip("addr del 10.96.0.3/24 dev late0")?;
    namespace.ip("link set late0 mtu 1280")?;
    until(&container, "! ip route | grep -q 192.0.2.0/24")?;
    until(
        &container,
        "! ip addr show dev late0 | grep -q 10.96.0.3/24",
    )?;
    until(&container, "test $(cat /sys/class/net/late0/mtu) = 1280")?;
    ask(to, 1 << 20)?;

    // Another one beside it, the first one away, and the same again.
    ip(&format!(
        "link add e2eveth2 type veth peer name late1 netns {own}"
    ))?;
    namespace.ip("link set late1 up")?;
    until(&container, "test -e /sys/class/net/late1")?;
    ip("link delete e2eveth")?;
    until(&container, "! test -e /sys/class/net/late0")?;
    ip("link delete e2eveth2")?;
    until(&container, "! test -e /sys/class/net/late1")?;
    ip(&format!(
        "link add e2eveth type veth peer name late0 netns {own}"
    ))?;
    ip("addr add 10.96.0.1/24 dev e2eveth")?;
    ip("link set e2eveth up")?;
    namespace.ip("addr add 10.96.0.2/24 dev late0")?;
    namespace.ip("link set late0 up")?;
    until(&container, "ip addr show dev late0 | grep -q 10.96.0.2/24")?;
    ask(to, 1 << 20)?;
    ip("link delete e2eveth")?;
    stop(container)
}

fn loopback(setting: &Setting) -> Result<()> {
    let bridge = Bridge::new();
    let namespace = Namespace::new()?;
    let _eth = Attachment::bridge(&namespace, "eth0", &bridge)?;
    let container = server(setting.container(), &namespace)?;
    for host in [
        IpAddr::from(Ipv4Addr::LOCALHOST),
        IpAddr::from(Ipv6Addr::LOCALHOST),
    ] {
        namespace.enter(|| ask(SocketAddr::new(host, PORT), 1 << 20))?;
        let refused = namespace.enter(|| {
            let begun = Instant::now();
            let closed = ask(SocketAddr::new(host, PORT + 1), 1);
            Ok((closed.is_err(), begun.elapsed()))
        })?;
        ensure!(
            refused.0 && refused.1 < Duration::from_secs(30),
            "{refused:?}"
        );
    }
    // The process by which the host's tools know the container is in the namespace.
    let pid = container.container.pid()?;
    enter(&PathBuf::from(format!("/proc/{pid}/ns/net")), || {
        ask((Ipv4Addr::LOCALHOST, PORT).into(), 1 << 10)
    })?;
    stop(container)
}

fn nothing_left(setting: &Setting) -> Result<()> {
    let bridge = Bridge::new();
    let namespace = Namespace::new()?;
    let eth = Attachment::bridge(&namespace, "eth0", &bridge)?;
    let before = namespace.look()?;
    let clean =
        |who: &str| same(&namespace.look()?, &before).with_context(|| format!("after {who}"));
    for victim in ["nobody", "bulkhead-vmm", "bulkhead-anchor", "shim"] {
        let container = server(setting.container(), &namespace)?;
        ask(SocketAddr::new(eth.address(false)?.parse()?, PORT), 1 << 16)?;
        if victim == "nobody" {
            stop(container)?;
        } else {
            let pod = Pod::of(container.container.id())?;
            let pid = match victim {
                "shim" => pod.shim.pid,
                child => pod.child(child)?.pid,
            };
            host::kill(pid)?;
            let ended = container.client.finish()?;
            ensure!(ended.code() != 0, "{ended}");
            let id = container.container.id().to_owned();
            drop(container.container);
            let left = ctr(&["container", "ls", "-q"])?.succeeds()?;
            ensure!(!left.contains(&id), "{left}");
        }
        clean(victim)?;
        // And it works again.
    }
    let container = server(setting.container(), &namespace)?;
    ask(SocketAddr::new(eth.address(false)?.parse()?, PORT), 1 << 16)?;
    stop(container)
}

/// A second's worth of bytes passes at once, and the rest at its rate: this much takes two seconds at
/// least, each way.
const RATE: u64 = 200_000;

fn rate_limits(setting: &Setting) -> Result<()> {
    let _config = Config::replace("allowed_annotations = [\"net_bytes_per_second\"]\n")?;
    let bridge = Bridge::new();
    let namespace = Namespace::new()?;
    let eth = Attachment::bridge(&namespace, "eth0", &bridge)?;
    let annotation = format!("io.bulkhead.net_bytes_per_second={RATE}");
    let container = server(
        setting.container().flags(&["--annotation", &annotation]),
        &namespace,
    )?;
    takes_two_seconds(&eth)?;
    stop(container)
}

/// As the kubelet has it from the annotations `kubernetes.io/ingress-bandwidth` and `egress-bandwidth`.
fn bandwidth(setting: &Setting) -> Result<()> {
    let bridge = Bridge::new();
    let namespace = Namespace::new()?;
    let eth = Attachment::limited(&namespace, "eth0", &bridge, 8 * RATE)?;
    let container = server(setting.container(), &namespace)?;
    takes_two_seconds(&eth)?;
    stop(container)
}

fn takes_two_seconds(eth: &Attachment<'_>) -> Result<()> {
    let begun = Instant::now();
    ask(
        SocketAddr::new(eth.address(false)?.parse()?, PORT),
        3 * RATE,
    )?;
    let took = begun.elapsed();
    ensure!(took >= Duration::from_secs(2), "it took {took:?}");
    Ok(())
}

fn too_many(setting: &Setting) -> Result<()> {
    let namespace = Namespace::new()?;
    for number in 0..9 {
        namespace.add_interface(number)?;
    }
    let refused = setting
        .container()
        .flags(&["--with-ns", &namespace.flag()])
        .run(&["true"])?;
    ensure!(
        refused.code() == 1 && refused.err().contains("8 "),
        "{refused}"
    );
    let left = namespace.tc("qdisc show")?;
    ensure!(
        !left.contains("ingress") && !left.contains("clsact"),
        "{left}"
    );
    Ok(())
}
