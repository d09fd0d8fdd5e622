//! A partner for connections.

use std::io::{Read, Write};
use std::net::{SocketAddr, ToSocketAddrs};

use anyhow::{Context, Result};

use crate::network;

/// Answers at this port until standard input ends.
pub(super) fn serve(port: u16) -> Result<()> {
    network::echo(port)?;
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
