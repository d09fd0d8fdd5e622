//! Real servers from Debian, reached over networks that plug-ins of CNI make.

use std::fmt::Write as _;
use std::io::{Read, Write as _};
use std::net::{Ipv4Addr, SocketAddr, TcpStream};
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, ensure};

use super::{Case, Setting, case};
use crate::command::{DEADLINE, Input};
use crate::ctr::{Foreground, Run, SERVICES};
use crate::network::{Attachment, Bridge, GATEWAY, Namespace};

/// The name of [`SERVICES`] in the lab.
const IMAGE: &str = "debian-services";

pub fn cases() -> Vec<Case> {
    let cases = [
        case(
            "nginx serves a load generator over a bridge and by a published port",
            nginx,
        ),
        case(
            "a postgres database outlives its container, stopped or killed",
            postgres,
        ),
        case("redis serves fifty clients at once", redis),
    ];
    let soak = |case: Case| case.with(IMAGE).soak();
    cases.into_iter().map(soak).collect()
}

/// A container to be in a namespace.
fn service(setting: &Setting, namespace: &Namespace) -> Run {
    setting
        .container()
        .image(SERVICES)
        .flags(&["--with-ns", &namespace.flag()])
}

/// What a client in a container of its own says.
fn client(setting: &Setting, namespace: &Namespace, script: &str) -> Result<String> {
    service(setting, namespace)
        .run(&["bash", "-ec", script])?
        .succeeds()
}

/// A script of a server whose last line waits for the end of its input.
fn serve(setting: &Setting, namespace: &Namespace, script: &str) -> Result<Foreground> {
    let server = service(setting, namespace).input(Input::Open);
    let server = server.spawn(&["bash", "-ec", script])?;
    server.client.expect("ready\n")?;
    Ok(server)
}

fn end(mut server: Foreground) -> Result<()> {
    server.client.close_stdin();
    server.finish()?.succeeds()?;
    Ok(())
}

/// Where the host publishes nginx.
const PUBLISHED: u16 = 8097;

/// How far [`NGINX`] counts, in more than a megabyte.
const NUMBERS: u32 = 200_000;

const NGINX: &str = r#"
seq 200000 > /var/www/html/numbers
echo small > /var/www/html/small
nginx
echo ready
cat
nginx -s quit
"#;

fn nginx(setting: &Setting) -> Result<()> {
    let bridge = Bridge::new();
    let (one, other) = (Namespace::new()?, Namespace::new()?);
    let eth = Attachment::published(&one, "eth0", &bridge, PUBLISHED, 80)?;
    let _other_eth = Attachment::bridge(&other, "eth0", &bridge)?;
    let server = serve(setting, &one, NGINX)?;
    let own = eth.address(false)?;
    let own6 = eth.address(true)?;
    let published = format!("{GATEWAY}:{PUBLISHED}");
    let mut script = String::new();
    for host in [&own, &format!("[{own6}]"), &published] {
        writeln!(script, "ab -q -n 300 -c 20 http://{host}/small")?;
        writeln!(script, "ab -q -n 100 -c 10 -k http://{host}/small")?;
        writeln!(script, "ab -q -n 20 -c 5 http://{host}/numbers")?;
    }
    let said = client(setting, &other, &script)?;
    let of = |label: &str| -> Vec<&str> {
        let lines = said.lines().filter_map(|line| line.strip_prefix(label));
        lines.map(str::trim).collect()
    };
    let complete = ["300", "100", "20"].repeat(3);
    ensure!(
        of("Complete requests:") == complete && of("Failed requests:") == ["0"; 9],
        "{said}"
    );
    println!("nginx: {}", of("Requests per second:").join(", "));
    // The host itself, by the rules of its packet filter.
    let numbers = get(GATEWAY, PUBLISHED, "/numbers")?;
    let expected: String = (1..=NUMBERS).map(|number| format!("{number}\n")).collect();
    ensure!(numbers == expected, "{} bytes", numbers.len());
    end(server)
}

/// The body of an answer to a request of HTTP 1.0.
pub fn get(host: Ipv4Addr, port: u16, path: &str) -> Result<String> {
    let to = SocketAddr::from((host, port));
    let mut stream =
        TcpStream::connect_timeout(&to, DEADLINE).with_context(|| format!("cannot reach {to}"))?;
    stream.set_read_timeout(Some(DEADLINE))?;
    write!(stream, "GET {path} HTTP/1.0\r\n\r\n")?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer)?;
    let parts = answer.split_once("\r\n\r\n");
    let (head, body) = parts.with_context(|| format!("no answer of HTTP: {answer}"))?;
    ensure!(head.contains(" 200 "), "{head}");
    Ok(body.to_owned())
}

/// How long it may take to make a database: a thousand files, each several requests to the host.
const INITDB_LIMIT: Duration = Duration::from_secs(15 * 60);

const INITDB: &str = r#"
chown postgres: /data
chmod 700 /data
as="setpriv --reuid postgres --regid postgres --init-groups"
$as /usr/lib/postgresql/17/bin/initdb --no-sync --auth=trust --pgdata=/data --locale=C
echo 'host all all 10.97.0.0/24 trust' >> /data/pg_hba.conf
echo made
"#;

const POSTGRES: &str = "exec setpriv --reuid postgres --regid postgres --init-groups \
    /usr/lib/postgresql/17/bin/postgres -D /data -c listen_addresses='*' \
    -c unix_socket_directories=/tmp";

/// The data are a directory of the host's, and the clients have a container of their own.
fn postgres(setting: &Setting) -> Result<()> {
    let directory = tempfile::tempdir_in("/var/tmp")?;
    let mount = mount(directory.path(), "/data");
    let bridge = Bridge::new();
    let (one, other) = (Namespace::new()?, Namespace::new()?);
    let eth = Attachment::bridge(&one, "eth0", &bridge)?;
    let _other_eth = Attachment::bridge(&other, "eth0", &bridge)?;
    let psql = format!("psql -h {} -U postgres -qAtc", eth.address(false)?);
    let with_data = |script: &str| {
        service(setting, &one)
            .flags(&["--mount", &mount])
            .spawn(&["bash", "-ec", script])
    };
    let making = with_data(INITDB)?;
    making.client.stdout.expect("made\n", INITDB_LIMIT)?;
    making.finish()?.succeeds()?;
    let mut expected = 0;
    for (round, (signal, code)) in [("SIGINT", 0), ("SIGKILL", 137), ("SIGINT", 0)]
        .into_iter()
        .enumerate()
    {
        let server = with_data(POSTGRES)?;
        let ready = "database system is ready to accept connections";
        server.client.stderr.expect(ready, DEADLINE)?;
        let recovered = "database system was not properly shut down";
        let log = server.client.stderr.text();
        ensure!(log.contains(recovered) == (round == 2), "{log}");
        let script = format!(
            "{psql} 'create table if not exists numbers (number int primary key, word text)'\n\
             for part in 0 1 2 3; do\n\
             {psql} \"insert into numbers select n, md5(n::text) from \
             generate_series({round} * 4000 + $part * 1000 + 1, \
             {round} * 4000 + $part * 1000 + 1000) n\" &\n\
             done; wait\n\
             {psql} 'select count(*), max(number) from numbers'\n\
             {psql} \"select count(*) from numbers where word <> md5(number::text)\""
        );
        let said = client(setting, &other, &script)?;
        expected += 4000;
        ensure!(said == format!("{expected}|{expected}\n0\n"), "{said}");
        server.container.kill(signal)?;
        let Foreground { client, container } = server;
        client.finish()?.exits_with(code)?;
        drop(container);
    }
    Ok(())
}

/// A bind mount, as `ctr run` takes it.
pub fn mount(source: &Path, target: &str) -> String {
    let source = source.display();
    format!("type=bind,src={source},dst={target},options=rbind:rw")
}

const REDIS: &str = r#"
cd /tmp
redis-server --bind 0.0.0.0 --protected-mode no --save '' --daemonize yes > log
until redis-cli ping | grep -q PONG; do :; done
echo ready
cat
redis-cli shutdown
"#;

fn redis(setting: &Setting) -> Result<()> {
    let bridge = Bridge::new();
    let (one, other) = (Namespace::new()?, Namespace::new()?);
    let eth = Attachment::bridge(&one, "eth0", &bridge)?;
    let _other_eth = Attachment::bridge(&other, "eth0", &bridge)?;
    let server = serve(setting, &one, REDIS)?;
    let own = eth.address(false)?;
    let script = format!(
        "for client in 1 2 3 4 5 6 7 8; do redis-cli -h {own} -r 100 incr counter >/dev/null & done\n\
         wait\n\
         redis-cli -h {own} get counter\n\
         redis-benchmark -h {own} -c 50 -n 2000 -t set,get,lpush,lrange_100 --csv\n\
         redis-cli -h {own} llen mylist\n"
    );
    let said = client(setting, &other, &script)?;
    let lines: Vec<&str> = said.lines().collect();
    ensure!(
        lines.first() == Some(&"800") && lines.last() == Some(&"4000"),
        "{said}"
    );
    println!("redis: {said}");
    end(server)
}
