//! A partner for connections.

use std::io::{Read, Write};
use std::net::{Ipv4Addr, SocketAddr, TcpListener, ToSocketAddrs};
use std::thread;

use anyhow::{Context, Result};

use crate::bench::network::partner;
use crate::network;

/// Answers at this port until standard input ends.
pub(super) fn serve(port: u16) -> Result<()> {
    network::echo(port)?;
    until_input_ends()
}

/// Is measured at this port until standard input ends.
pub(super) fn measured(port: u16) -> Result<()> {
    let listener = TcpListener::bind((Ipv4Addr::UNSPECIFIED, port)).context("cannot listen")?;
    thread::spawn(move || {
        for stream in listener.incoming().flatten() {
            thread::spawn(move || partner(stream));
        }
    });
    until_input_ends()
}

fn until_input_ends() -> Result<()> {
    println!("ready");
    std::io::stdout().flush()?;
    std::io::stdin().read_to_end(&mut Vec::new())?;
    Ok(())
}

/// Asks a partner, by the address or name of its host.
pub(super) fn ask(partner: &str, length: u64) -> Result<()> {
    let address: SocketAddr = partner
        .to_socket_addrs()
        .with_context(|| format!("{partner} has no address"))?
        .next()
        .with_context(|| format!("{partner} has no address"))?;
    network::ask(address, length)?;
    network::ask_datagrams(address, &[1, 1400, 9000])?;
    println!("answered by {address}");
    Ok(())
}
