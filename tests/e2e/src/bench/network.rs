//! A container's network: the host talks to it over a bridge and a veth, as CNI sets them up.

use std::io::{Read, Write};
use std::net::{Shutdown, SocketAddr, TcpStream};

use anyhow::{Context, Result, ensure};

use super::{Measure, compare, count, repeat, timed};
use crate::command::Input;
use crate::ctr::{PROBE, Run};
use crate::network::{Attachment, Bridge, Namespace};

/// Where the container answers.
const PORT: u16 = 7000;

/// Bytes of a stream.
const STREAM: u64 = 16 << 20;

/// Questions of one byte, each asked when the one before is answered.
const QUESTIONS: u32 = 200;

/// Connections, one after the other.
const CONNECTIONS: u32 = 50;

/// What is measured.
const MEASURES: [Measure; 4] = [
    ("stream to the container", megabytes),
    ("stream from the container", megabytes),
    ("question and answer", microseconds),
    ("connection, one byte each way", microseconds),
];

fn megabytes(value: f64) -> String {
    format!("{value:.0} MB/s")
}

fn microseconds(value: f64) -> String {
    format!("{value:.0} µs")
}

/// Measures `runs` times, prints a table, and as the last line everything as JSON.
pub fn run(runs: usize) -> Result<()> {
    compare("between the host and a container", MEASURES, |runtime| {
        under(runtime, runs)
    })
}

/// The measures of each run, in a container of this runtime.
fn under(runtime: &str, runs: usize) -> Result<Vec<[f64; 4]>> {
    let bridge = Bridge::new();
    let namespace = Namespace::new()?;
    let eth = Attachment::bridge(&namespace, "eth0", &bridge)?;
    let mut container = Run::new(runtime)
        .with_probe()?
        .flags(&["--with-ns", &namespace.flag()])
        .input(Input::Open)
        .spawn(&[PROBE, "probe", "measured", &PORT.to_string()])?;
    container.client.expect("ready")?;
    let to = SocketAddr::new(eth.address(false)?.parse()?, PORT);
    let measured = repeat(&format!("network under {runtime}"), runs, |_| measure(to))?;
    container.client.close_stdin();
    container.finish()?.succeeds()?;
    Ok(measured)
}

fn measure(to: SocketAddr) -> Result<[f64; 4]> {
    let megabytes = count(STREAM) / 1e6;
    Ok([
        megabytes / seconds(|| sink(to))?,
        megabytes / seconds(|| source(to))?,
        seconds(|| questions(to))? * 1e6 / f64::from(QUESTIONS),
        seconds(|| connections(to))? * 1e6 / f64::from(CONNECTIONS),
    ])
}

fn seconds(work: impl FnOnce() -> Result<()>) -> Result<f64> {
    Ok(timed(work)?.1)
}

/// The first byte says what a [`partner`] does.
const SINK: u8 = b'i';
const SOURCE: u8 = b'o';
const ECHO: u8 = b'e';

/// All of it is taken, and one byte says so.
fn sink(to: SocketAddr) -> Result<()> {
    let mut stream = connect(to, SINK)?;
    let block = vec![7; 1 << 17];
    let mut left = STREAM;
    while left > 0 {
        let part = block.len().min(usize::try_from(left)?);
        stream.write_all(&block[..part])?;
        left -= u64::try_from(part)?;
    }
    stream.shutdown(Shutdown::Write)?;
    stream.read_exact(&mut [0])?;
    Ok(())
}

fn source(to: SocketAddr) -> Result<()> {
    let mut stream = connect(to, SOURCE)?;
    let mut block = vec![0; 1 << 17];
    let mut all = 0;
    loop {
        match stream.read(&mut block)? {
            0 => break,
            length => all += u64::try_from(length)?,
        }
    }
    ensure!(all == STREAM, "{all} bytes came");
    Ok(())
}

fn questions(to: SocketAddr) -> Result<()> {
    let mut stream = connect(to, ECHO)?;
    for _ in 0..QUESTIONS {
        stream.write_all(&[1])?;
        stream.read_exact(&mut [0])?;
    }
    Ok(())
}

fn connections(to: SocketAddr) -> Result<()> {
    for _ in 0..CONNECTIONS {
        let mut stream = connect(to, ECHO)?;
        stream.write_all(&[1])?;
        stream.read_exact(&mut [0])?;
    }
    Ok(())
}

fn connect(to: SocketAddr, job: u8) -> Result<TcpStream> {
    let mut stream = TcpStream::connect(to).context("cannot connect")?;
    stream.set_nodelay(true)?;
    stream.write_all(&[job])?;
    Ok(stream)
}

/// The other end of a measurement.
pub fn partner(mut stream: TcpStream) -> std::io::Result<()> {
    stream.set_nodelay(true)?;
    let mut job = [0];
    stream.read_exact(&mut job)?;
    let mut block = vec![7; 1 << 17];
    match job[0] {
        SINK => {
            while stream.read(&mut block)? > 0 {}
            stream.write_all(&[1])
        }
        SOURCE => std::io::copy(&mut std::io::repeat(7).take(STREAM), &mut stream).map(drop),
        _ => loop {
            match stream.read(&mut block)? {
                0 => return Ok(()),
                length => stream.write_all(&block[..length])?,
            }
        },
    }
}
