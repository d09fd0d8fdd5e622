//! The developer's commands: `cargo xtask --help`.

mod bench;
mod build;
mod demo;
mod e2e;
mod fuzz;
mod host;
mod install;
mod lab;
mod terminal;
mod test;

use std::path::PathBuf;

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
    /// Install what is missing, build everything, and run a container in its own microVM.
    Demo,
    /// Check format and lints, run the unit tests, and run the end-to-end tests in a lab.
    Test(e2e::Selection),
    /// Build all programs, the guest's kernel and its initramfs, as they are shipped.
    Build,
    /// Build, and lay the files out as they are on a user's machine.
    Install {
        /// Where the machine's file system is.
        #[arg(long, default_value = "/")]
        root: PathBuf,
    },
    /// Fuzz what a hostile guest, spec or image can bring.
    Fuzz(fuzz::FuzzOptions),
    /// Measure.
    #[command(subcommand)]
    Bench(bench::BenchTask),
    /// A KVM host in software: start one, run commands in it, copy files in and out.
    #[command(subcommand)]
    Lab(lab::LabTask),
}

fn main() {
    let result = match Cli::parse().command {
        Task::Demo => demo::run(),
        Task::Test(selection) => test::run(&selection),
        Task::Build => build::build().map(|_| 0),
        Task::Install { root } => install::run(&root),
        Task::Fuzz(options) => fuzz::run(&options),
        Task::Bench(task) => bench::run(task),
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
