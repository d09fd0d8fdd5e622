//! The developer's commands: `cargo xtask --help`.

mod lab;
mod terminal;

use clap::{Parser, Subcommand};

/// Build, try, test and measure Bulkhead.
#[derive(Parser)]
#[command(bin_name = "cargo xtask")]
struct Cli {
    #[command(subcommand)]
    command: Task,
}

#[derive(Subcommand)]
enum Task {
    /// A KVM host in software: start one, run commands in it, copy files in and out.
    #[command(subcommand)]
    Lab(lab::LabTask),
}

fn main() {
    let result = match Cli::parse().command {
        Task::Lab(task) => lab::run(task),
    };
    match result {
        // Not a return: a thread may still be blocked reading the terminal.
        Ok(status) => std::process::exit(status),
        Err(error) => {
            eprintln!("error: {error:#}");
            std::process::exit(125);
        }
    }
}
