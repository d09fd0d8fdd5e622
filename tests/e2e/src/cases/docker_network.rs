//! Docker's networks: its bridges, published ports, names and changes while containers run.

use std::net::{Ipv4Addr, SocketAddr};

use anyhow::{Context, Result, ensure};

use super::{Case, Setting, bulkhead, case};
use crate::command::Input;
use crate::ctr::RUNC;
use crate::docker::{BUSYBOX, Docker};
use crate::network::ask;

/// Where containers answer.
const PORT: &str = "7000";

/// Bytes of a transfer.
const BYTES: u64 = 4 << 20;

pub fn cases() -> Vec<Case> {
    vec![
        case(
            "docker's bridge and published ports reach a container",
            published,
        )
        .long(),
        case(
            "containers of two runtimes find each other by name in a docker network",
            names,
        )
        .long(),
        case(
            "docker connects and disconnects a running container",
            connect,
        )
        .long(),
        bulkhead(
            "docker networks that are another's namespace are refused",
            refused,
        ),
        case("docker compose brings two services up and down", compose).long(),
    ]
}

fn published(setting: &Setting) -> Result<()> {
    let docker = Docker::start_networked(&setting.runtime)?;
    let _server = docker.server(
        &setting.runtime,
        &["--name", "web", "-p", "8080:7000", "-p", "8080:7000/udp"],
    )?;
    let at = |host: Ipv4Addr, port| SocketAddr::new(host.into(), port);
    let own: Ipv4Addr = docker
        .inspect("web", "{{.NetworkSettings.IPAddress}}")?
        .parse()
        .context("its address")?;
    ask(at(own, 7000), BYTES)?;
    // By the rules of the host's packet filter, and by Docker's proxy.
    let gateway: Ipv4Addr = docker
        .inspect("web", "{{.NetworkSettings.Gateway}}")?
        .parse()
        .context("its gateway")?;
    ask(at(gateway, 8080), BYTES)?;
    ask(at(Ipv4Addr::LOCALHOST, 8080), BYTES)?;
    let script = "ip -o -4 addr show eth0 | grep -o 'inet [0-9.]*'; ip route | grep default";
    let seen = docker.exec("web", script)?;
    ensure!(
        seen.starts_with(&format!("inet {own}\n"))
            && seen.contains(&format!("default via {gateway} dev eth0")),
        "{seen}"
    );
    // Outwards, as far as there is anything: the host.
    let partner = format!("{gateway}:8080");
    let client = docker.with_probe(RUNC, &["--rm"], &["ask", &partner, "1000"]);
    docker.docker(&client)?.succeeds()?;
    docker.end()
}

fn names(setting: &Setting) -> Result<()> {
    let docker = Docker::start_networked(&setting.runtime)?;
    docker.docker(&["network", "create", "mesh"])?.succeeds()?;
    let of = |name| ["--network", "mesh", "--name", name];
    let _web = docker.server(&setting.runtime, &of("web"))?;
    let _db = docker.server(RUNC, &of("db"))?;
    for (client, partner) in [("web", "db:7000"), ("db", "web:7000"), ("web", "web:7000")] {
        let ask = ["exec", client, "/probe", "probe", "ask", partner, "1000000"];
        docker
            .docker(&ask)?
            .succeeds()
            .with_context(|| format!("{client} to {partner}"))?;
    }
    // Over UDP and TCP, and several at once.
    let script = "for i in 1 2 3 4 5 6 7 8; do nslookup db >/tmp/$i & done; wait; \
                  grep -l 'Name:.*db' /tmp/? | wc -l; nslookup nobody.invalid >/dev/null; echo $?";
    let said = docker.exec("web", script)?;
    ensure!(said == "8\n1\n", "{said}");
    // One that starts later is found, and one that is gone is not.
    let late = docker.server(RUNC, &of("late"))?;
    let lookup = "nslookup late 127.0.0.11 >/dev/null; echo $?";
    ensure!(docker.exec("web", lookup)? == "0\n");
    // With --rm its end removes it.
    docker
        .docker(&["stop", "--time", "0", "late"])?
        .succeeds()?;
    late.finish()?.exits_with(137)?;
    ensure!(docker.exec("web", lookup)? == "1\n");
    docker.end()
}

fn connect(setting: &Setting) -> Result<()> {
    let docker = Docker::start_networked(&setting.runtime)?;
    docker.docker(&["network", "create", "one"])?.succeeds()?;
    docker.docker(&["network", "create", "two"])?.succeeds()?;
    let _box = docker.server(&setting.runtime, &["--name", "box", "--network", "one"])?;
    let _db = docker.server(RUNC, &["--name", "db", "--network", "two"])?;
    let reach = "/probe probe ask db:7000 1000 >/dev/null 2>&1";
    ensure!(docker.exec("box", &format!("{reach}; echo $?"))? != "0\n");
    docker
        .docker(&["network", "connect", "two", "box"])?
        .succeeds()?;
    let wait = |condition: &str| {
        let script = format!("timeout 60 sh -c 'until {condition}; do usleep 200000; done'");
        docker
            .exec("box", &script)
            .with_context(|| format!("it never came to {condition:?}"))
    };
    wait(reach)?;
    wait("test -e /sys/class/net/eth1")?;
    docker
        .docker(&["network", "disconnect", "two", "box"])?
        .succeeds()?;
    wait("! test -e /sys/class/net/eth1")?;
    docker
        .docker(&["network", "disconnect", "one", "box"])?
        .succeeds()?;
    wait("! test -e /sys/class/net/eth0")?;
    docker.end()
}

fn refused(setting: &Setting) -> Result<()> {
    let docker = Docker::start_networked(&setting.runtime)?;
    let _web = docker.server(RUNC, &["--name", "web"])?;
    for network in ["host", "container:web"] {
        let flags = [
            "run",
            "--rm",
            "--runtime",
            &setting.runtime,
            "--network",
            network,
        ];
        let done = docker.docker(&[&flags[..], &[BUSYBOX, "true"]].concat())?;
        ensure!(
            done.code() == 125 && done.err().contains("network"),
            "{network}: {done}"
        );
    }
    docker.end()
}

fn compose(setting: &Setting) -> Result<()> {
    let docker = Docker::start_networked(&setting.runtime)?;
    let own = std::env::current_exe()?;
    let service = |runtime: &str, port: &str| {
        format!(
            "image: {BUSYBOX}\n    pull_policy: never\n    runtime: {runtime}\n    \
             command: /probe probe serve {PORT}\n    stdin_open: true\n    \
             healthcheck: {{ test: /probe probe ask 127.0.0.1:{PORT} 1, interval: 2s }}\n    \
             volumes: ['{}:/probe:ro', 'data:/data']\n    ports: ['{port}:{PORT}']\n",
            own.display(),
        )
    };
    let file = docker.write(
        "compose.yaml",
        &format!(
            "services:\n  web:\n    depends_on: [db]\n    {}  db:\n    {}volumes:\n  data:\n",
            service(&setting.runtime, "8081"),
            service(&setting.runtime, "8082"),
        ),
    )?;
    let run = |words: &[&str]| {
        let mut command = std::process::Command::new("docker-compose");
        command
            .env("DOCKER_HOST", docker.host())
            .args(["--project-name", "e2e", "--file", &file])
            .args(words);
        crate::command::Running::spawn(command, Input::Null)?
            .finish()?
            .succeeds()
    };
    run(&["up", "--detach", "--wait"])?;
    for port in [8081, 8082] {
        ask((Ipv4Addr::LOCALHOST, port).into(), BYTES)
            .with_context(|| format!("at port {port}"))?;
    }
    run(&[
        "exec", "-T", "web", "/probe", "probe", "ask", "db:7000", "1000000",
    ])?;
    run(&["exec", "-T", "db", "sh", "-c", "echo kept > /data/file"])?;
    let seen = run(&["exec", "-T", "web", "cat", "/data/file"])?;
    ensure!(seen == "kept\n", "{seen}");
    run(&["down", "--volumes"])?;
    docker.end()
}
