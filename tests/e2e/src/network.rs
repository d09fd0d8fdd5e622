//! Networks as an orchestrator makes them: a namespace, and interfaces in it by plug-ins of CNI
//! (containernetworking/cni, SPEC.md).

use std::fs::{self, File};
use std::io::{Read, Write};
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result, anyhow, bail, ensure};
use nix::sched::{CloneFlags, setns};
use serde_json::{Value, json};

use crate::command::{DEADLINE, Finished, Input, Running};
use crate::pattern::Pattern;

/// Where Debian has the plug-ins.
const PLUGINS: &str = "/usr/lib/cni";

/// Runs `ip` with these words.
pub fn ip(words: &str) -> Result<String> {
    run("ip", words)?.succeeds()
}

fn run(program: &str, words: &str) -> Result<Finished> {
    let mut command = Command::new(program);
    command.args(words.split_whitespace());
    Running::spawn(command, Input::Null)?.finish()
}

/// A network namespace with a name, removed when dropped.
pub struct Namespace {
    name: String,
}

impl Namespace {
    /// A new one, with its loopback interface up.
    pub fn new() -> Result<Self> {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let number = COUNT.fetch_add(1, Ordering::Relaxed);
        let name = format!("e2e-{}-{number}", std::process::id());
        ip(&format!("netns add {name}"))?;
        let namespace = Self { name };
        namespace.ip("link set lo up")?;
        Ok(namespace)
    }

    /// Gives it an interface that is up, whose other end is on the host.
    pub fn add_interface(&self, number: u8) -> Result<()> {
        let (host, inside) = (format!("e2ev{number}"), format!("eth{number}"));
        let own = &self.name;
        ip(&format!(
            "link add {host} type veth peer name {inside} netns {own}"
        ))?;
        self.ip(&format!("link set {inside} up"))?;
        Ok(())
    }

    /// The interfaces in it, and what handles their packets.
    pub fn look(&self) -> Result<String> {
        Ok(self.ip("-br link")? + &self.tc("qdisc show")?)
    }

    /// Its name, for `ip`.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Its file.
    pub fn path(&self) -> PathBuf {
        Path::new("/run/netns").join(&self.name)
    }

    /// `ctr run` in it.
    pub fn flag(&self) -> String {
        format!("network:{}", self.path().display())
    }

    /// `ip` in it.
    pub fn ip(&self, words: &str) -> Result<String> {
        ip(&format!("-n {} {words}", self.name))
    }

    /// `tc` in it.
    pub fn tc(&self, words: &str) -> Result<String> {
        run("tc", &format!("-n {} {words}", self.name))?.succeeds()
    }

    /// Does something in it, on a thread of its own.
    pub fn enter<T: Send>(&self, work: impl FnOnce() -> Result<T> + Send) -> Result<T> {
        enter(&self.path(), work)
    }
}

impl Drop for Namespace {
    fn drop(&mut self) {
        // What stays behind is found by the comparison after every test.
        let _ = ip(&format!("netns delete {}", self.name));
    }
}

/// Does something in the network namespace of this file.
pub fn enter<T: Send>(path: &Path, work: impl FnOnce() -> Result<T> + Send) -> Result<T> {
    let namespace = File::open(path).with_context(|| format!("cannot open {}", path.display()))?;
    let inside = || {
        setns(&namespace, CloneFlags::CLONE_NEWNET).context("cannot enter the namespace")?;
        work()
    };
    let result = thread::scope(|scope| scope.spawn(inside).join());
    result.map_err(|_| anyhow!("the thread in the namespace panicked"))?
}

/// An interface that a chain of plug-ins has made; taken back when dropped.
pub struct Attachment<'n> {
    namespace: &'n Namespace,
    interface: &'static str,
    chain: Vec<Value>,
    /// What the last plug-in said.
    pub result: Value,
    /// Which addresses are taken, unless others know as well.
    _addresses: Option<tempfile::TempDir>,
}

impl<'n> Attachment<'n> {
    /// Adds `interface` by these plug-ins, each described by its part of a network's configuration.
    /// The first one's addresses are from `ranges`.
    pub fn add(
        namespace: &'n Namespace,
        interface: &'static str,
        chain: Vec<Value>,
        ranges: &[&str],
        runtime: &Value,
    ) -> Result<Self> {
        let addresses = tempfile::tempdir()?;
        let path = addresses.path();
        let mut attachment = Self::add_from(path, namespace, interface, chain, ranges, runtime)?;
        attachment._addresses = Some(addresses);
        Ok(attachment)
    }

    fn add_from(
        addresses: &Path,
        namespace: &'n Namespace,
        interface: &'static str,
        mut chain: Vec<Value>,
        ranges: &[&str],
        runtime: &Value,
    ) -> Result<Self> {
        let ranges: Vec<Value> = ranges
            .iter()
            .map(|net| json!([{ "subnet": net }]))
            .collect();
        chain[0]["ipam"] = json!({
            "type": "host-local", "dataDir": addresses, "ranges": ranges,
        });
        for plugin in &mut chain {
            plugin["cniVersion"] = "1.0.0".into();
            plugin["name"] = "e2e".into();
            plugin["runtimeConfig"] = runtime.clone();
        }
        let mut attachment = Self {
            namespace,
            interface,
            chain,
            result: Value::Null,
            _addresses: None,
        };
        for index in 0..attachment.chain.len() {
            let said = attachment.call("ADD", index)?;
            attachment.result = serde_json::from_slice(&said)?;
        }
        Ok(attachment)
    }

    /// The bridge plug-in, with addresses that nobody else on this bridge has.
    pub fn bridge(
        namespace: &'n Namespace,
        interface: &'static str,
        bridge: &Bridge,
    ) -> Result<Self> {
        Self::bridge_and(vec![], namespace, interface, bridge, &json!({}))
    }

    /// As [`Attachment::bridge`], with a port of all addresses of the host's that leads to one of the
    /// namespace's.
    pub fn published(
        namespace: &'n Namespace,
        interface: &'static str,
        bridge: &Bridge,
        host_port: u16,
        port: u16,
    ) -> Result<Self> {
        let portmap = json!({
            "type": "portmap", "capabilities": { "portMappings": true }, "snat": true,
        });
        let mapping = json!({ "hostPort": host_port, "containerPort": port, "protocol": "tcp" });
        let runtime = json!({ "portMappings": [mapping] });
        Self::bridge_and(vec![portmap], namespace, interface, bridge, &runtime)
    }

    /// As [`Attachment::bridge`], held to so many bits a second each way, after a burst of as many.
    pub fn limited(
        namespace: &'n Namespace,
        interface: &'static str,
        bridge: &Bridge,
        rate: u64,
    ) -> Result<Self> {
        let bandwidth = json!({ "type": "bandwidth", "capabilities": { "bandwidth": true } });
        let runtime = json!({ "bandwidth": {
            "ingressRate": rate, "ingressBurst": rate, "egressRate": rate, "egressBurst": rate,
        } });
        Self::bridge_and(vec![bandwidth], namespace, interface, bridge, &runtime)
    }

    fn bridge_and(
        others: Vec<Value>,
        namespace: &'n Namespace,
        interface: &'static str,
        bridge: &Bridge,
        runtime: &Value,
    ) -> Result<Self> {
        let plugin = json!({
            "type": "bridge", "bridge": bridge.name, "isDefaultGateway": true, "hairpinMode": true,
        });
        let chain = [vec![plugin], others].concat();
        let (addresses, ranges) = (&bridge.addresses, bridge.ranges);
        Self::add_from(addresses, namespace, interface, chain, ranges, runtime)
    }

    /// The address of this family, without its length.
    pub fn address(&self, v6: bool) -> Result<String> {
        let all = self.result["ips"].as_array().context("no addresses")?;
        let texts = all.iter().filter_map(|ip| ip["address"].as_str());
        let found = texts
            .filter_map(|text| text.split('/').next())
            .find(|text| text.contains(':') == v6);
        Ok(found.context("no such address")?.to_owned())
    }

    fn call(&self, command: &str, index: usize) -> Result<Vec<u8>> {
        let mut config = self.chain[index].clone();
        if !self.result.is_null() {
            config["prevResult"] = self.result.clone();
        }
        let kind = config["type"].as_str().context("a plug-in without type")?;
        let mut child = Command::new(Path::new(PLUGINS).join(kind))
            .env("CNI_COMMAND", command)
            .env("CNI_CONTAINERID", self.namespace.name())
            .env("CNI_NETNS", self.namespace.path())
            .env("CNI_IFNAME", self.interface)
            .env("CNI_PATH", PLUGINS)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .with_context(|| format!("cannot run the plug-in {kind}"))?;
        let mut input = child.stdin.take().context("no input")?;
        input.write_all(config.to_string().as_bytes())?;
        drop(input);
        let output = child.wait_with_output()?;
        let said = String::from_utf8_lossy(&output.stdout).into_owned();
        ensure!(output.status.success(), "{kind} {command}: {said}");
        Ok(output.stdout)
    }
}

impl Drop for Attachment<'_> {
    fn drop(&mut self) {
        for index in (0..self.chain.len()).rev() {
            if let Err(error) = self.call("DEL", index) {
                eprintln!("cannot take an interface back: {error:#}");
            }
        }
    }
}

/// A bridge that plug-ins make and do not remove; removed when dropped.
pub struct Bridge {
    /// Its name.
    pub name: &'static str,
    ranges: &'static [&'static str],
    /// Which addresses are taken: a directory of the plug-in for addresses, which makes it.
    addresses: PathBuf,
}

impl Bridge {
    /// One with IPv4 and IPv6.
    pub fn new() -> Self {
        Self {
            name: "e2ebr0",
            ranges: &["10.97.0.0/24", "fd97::/64"],
            addresses: std::env::temp_dir().join(format!("e2e-addresses-{}", std::process::id())),
        }
    }
}

impl Drop for Bridge {
    fn drop(&mut self) {
        let _ = ip(&format!("link delete {}", self.name));
        let _ = fs::remove_dir_all(&self.addresses);
    }
}

/// The host's addresses in [`Bridge::new`].
pub const GATEWAY: Ipv4Addr = Ipv4Addr::new(10, 97, 0, 1);
/// Likewise.
pub const GATEWAY6: Ipv6Addr = Ipv6Addr::new(0xfd97, 0, 0, 0, 0, 0, 0, 1);

/// Answers everything with itself, over TCP and UDP, at one port of all addresses, until the process
/// ends.
pub fn echo(port: u16) -> Result<()> {
    let any = SocketAddr::from((Ipv6Addr::UNSPECIFIED, port));
    let listener = TcpListener::bind(any).context("cannot listen")?;
    let datagrams = UdpSocket::bind(any).context("cannot receive datagrams")?;
    thread::spawn(move || {
        for stream in listener.incoming().flatten() {
            thread::spawn(move || echo_stream(stream));
        }
    });
    thread::spawn(move || {
        let mut buffer = vec![0; 1 << 16];
        while let Ok((length, from)) = datagrams.recv_from(&mut buffer) {
            let _ = datagrams.send_to(&buffer[..length], from);
        }
    });
    Ok(())
}

fn echo_stream(mut stream: TcpStream) -> std::io::Result<()> {
    let mut copy = stream.try_clone()?;
    std::io::copy(&mut stream, &mut copy)?;
    copy.shutdown(std::net::Shutdown::Write)
}

/// Sends bytes to an [`echo`] and compares what comes back. Both directions are in use at once.
pub fn ask(to: SocketAddr, length: u64) -> Result<()> {
    let mut stream =
        TcpStream::connect_timeout(&to, DEADLINE).with_context(|| format!("cannot reach {to}"))?;
    stream.set_read_timeout(Some(DEADLINE))?;
    let mut sending = stream.try_clone()?;
    let sender = thread::spawn(move || -> std::io::Result<()> {
        std::io::copy(&mut Pattern::new(9, length), &mut sending)?;
        sending.shutdown(std::net::Shutdown::Write)
    });
    let mut expected = Pattern::new(9, length);
    let (mut got, mut wanted) = (vec![0; 1 << 16], vec![0; 1 << 16]);
    let mut all = 0;
    loop {
        let count = stream.read(&mut got)?;
        if count == 0 {
            break;
        }
        expected.read_exact(&mut wanted[..count])?;
        ensure!(got[..count] == wanted[..count], "other bytes after {all}");
        all += u64::try_from(count)?;
    }
    ensure!(all == length, "{all} bytes came back of {length}");
    sender
        .join()
        .map_err(|_| anyhow!("the sender panicked"))??;
    Ok(())
}

/// Sends datagrams of these lengths to an [`echo`] and compares what comes back. One that is lost is
/// sent again.
pub fn ask_datagrams(to: SocketAddr, lengths: &[usize]) -> Result<()> {
    const TRIES: usize = 5;
    let any: SocketAddr = match to {
        SocketAddr::V4(_) => (Ipv4Addr::UNSPECIFIED, 0).into(),
        SocketAddr::V6(_) => (Ipv6Addr::UNSPECIFIED, 0).into(),
    };
    let socket = UdpSocket::bind(any)?;
    socket.set_read_timeout(Some(Duration::from_secs(5)))?;
    socket.connect(to)?;
    for length in lengths {
        let sent = Pattern::new(3, u64::try_from(*length)?).bytes()?;
        let mut buffer = vec![0; 1 << 16];
        let mut answered = false;
        for _ in 0..TRIES {
            socket.send(&sent).context("cannot send a datagram")?;
            if let Ok(count) = socket.recv(&mut buffer) {
                ensure!(buffer[..count] == sent, "another datagram of {count} bytes");
                answered = true;
                break;
            }
        }
        if !answered {
            bail!("no answer to a datagram of {length} bytes");
        }
    }
    Ok(())
}
