//! The network of a pod, which its containers share.

use std::net::{IpAddr, SocketAddr};

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};

use super::{Case, Setting, case};
use crate::cri::{Cri, Member};
use crate::ctr::{PROBE, RUNC};
use crate::network::ask;
use crate::pattern::Pattern;

/// Where a container of each pod answers.
const PORT: u16 = 7000;

pub fn cases() -> Vec<Case> {
    vec![
        case(
            "the containers of a pod have one network, which others reach",
            shared,
        ),
        case("a pod's ports are forwarded", forwarded),
    ]
}

/// A container that answers at [`PORT`].
fn server() -> Result<Value> {
    let own = std::env::current_exe()?;
    Ok(json!({
        "command": [PROBE, "probe", "serve", PORT.to_string()],
        "stdin": true,
        "mounts": [{ "container_path": PROBE, "host_path": own, "readonly": true }],
    }))
}

/// One that has the probe too.
fn client() -> Result<Value> {
    let mut config = server()?;
    config["command"] = json!(["sleep", "100000"]);
    Ok(config)
}

pub fn shared(setting: &Setting) -> Result<()> {
    let cri = Cri::new(&setting.runtime)?;
    let dns = json!({
        "dns_config": { "servers": ["10.0.0.53"], "searches": ["e2e.svc.cluster.local"] },
    });
    let pod = cri.pod(&dns)?;
    let server = pod.start("server", &server()?)?;
    server.logs("ready")?;
    let partner = pod.start("client", &client()?)?;
    let ask_from = |member: &Member<'_>, host: IpAddr| {
        let partner = SocketAddr::new(host, PORT);
        member
            .says(&format!("{PROBE} probe ask {partner} 1000000"))
            .with_context(|| format!("asking {partner}"))
    };
    let address = pod.address()?;
    for host in [IpAddr::from([127, 0, 0, 1]), address] {
        ask_from(&partner, host)?;
    }
    ask(SocketAddr::new(address, PORT), 4 << 20)?;
    let names = partner.says("cat /etc/resolv.conf")?;
    ensure!(
        names.contains("10.0.0.53") && names.contains("e2e.svc.cluster.local"),
        "{names}"
    );
    // From a pod of another runtime, and back.
    let others = Cri::new(RUNC)?;
    let other = others.pod(&json!({}))?;
    let other_server = other.start("server", &self::server()?)?;
    other_server.logs("ready")?;
    let other_client = other.start("client", &client()?)?;
    ask_from(&other_client, address)?;
    ask_from(&partner, other.address()?)?;
    drop((pod, other));
    cri.end()
}

pub fn forwarded(setting: &Setting) -> Result<()> {
    let cri = Cri::new(&setting.runtime)?;
    let pod = cri.pod(&json!({}))?;
    let server = pod.start("server", &server()?)?;
    server.logs("ready")?;
    let bytes = Pattern::new(5, 300_000).bytes()?;
    // Several connections at once.
    let mut first = pod.forward(PORT)?;
    let mut second = pod.forward(PORT)?;
    first.echo(&bytes)?;
    second.echo(&bytes[..1000])?;
    first.echo(b"again")?;
    let closed = pod.forward(PORT + 1)?.error();
    let said = closed.context("a closed port")?;
    ensure!(said.contains(&(PORT + 1).to_string()), "{said}");
    drop((first, second));
    drop(pod);
    cri.end()
}
