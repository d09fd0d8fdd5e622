//! The end-to-end tests: real containers, started by the real `ctr` through the real containerd.
//!
//! They run as root on a host that has them all, such as the lab (`cargo xtask test` does that).
//! `--runtime io.containerd.runc.v2` runs the same tests against runc, which shows whether a test
//! asks for the right thing.

mod bench;
mod cases;
mod command;
mod configurations;
mod cri;
mod ctr;
mod differences;
mod docker;
mod harness;
mod host;
mod network;
mod pattern;
mod posture;
mod probe;
mod residue;
mod shim;
mod steps;
mod terminal;

use std::process::ExitCode;

use clap::{Parser, Subcommand};

#[derive(Parser)]
#[command(args_conflicts_with_subcommands = true)]
struct Cli {
    #[command(subcommand)]
    job: Option<Job>,
    /// The runtime under test.
    #[arg(long, default_value = ctr::BULKHEAD)]
    runtime: String,
    #[command(flatten)]
    harness: libtest_mimic::Arguments,
}

#[derive(Subcommand)]
enum Job {
    /// Measure.
    #[command(subcommand)]
    Bench(bench::Bench),
    /// Run the configurations of these names under runc and under the runtime under test, and compare.
    Configuration {
        /// `*` stands for anything; `generated-SEED-*` are those of another seed.
        #[arg(required = true)]
        names: Vec<String>,
        /// The runtime under test.
        #[arg(long, default_value = ctr::BULKHEAD)]
        runtime: String,
    },
    /// Print the tests with what each needs, one JSON object a line.
    List,
    /// Report what is found inside a container.
    #[command(subcommand, hide = true)]
    Probe(probe::Probe),
}

fn main() -> ExitCode {
    let cli = Cli::parse();
    let result = match &cli.job {
        Some(Job::Bench(bench)) => bench::run(bench),
        Some(Job::Probe(probe)) => probe::run(probe),
        Some(Job::Configuration { names, runtime }) => {
            configurations::named(names).and_then(|found| configurations::run(runtime, found))
        }
        Some(Job::List) => {
            harness::list(&cli.runtime);
            Ok(())
        }
        None => return harness::run(&cli.runtime, cli.harness),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}
