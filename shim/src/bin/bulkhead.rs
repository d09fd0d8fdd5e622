//! `bulkhead`: what an administrator runs by hand.

use std::process::ExitCode;

use clap::{Parser, Subcommand};

/// Bulkhead runs container pods in microVMs; containerd does the daily work, this looks after it.
#[derive(Debug, Parser)]
#[command(name = "bulkhead", version)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Tell whether Bulkhead works on this host, and which settings of the host weaken it.
    ///
    /// Exits with 0 when nothing failed; warnings are no failures.
    Check {
        /// Print the report as JSON.
        #[arg(long)]
        json: bool,
    },
}

fn main() -> ExitCode {
    match Cli::parse().command {
        Command::Check { json } => bulkhead_shim::check::run(json),
    }
}
