//! `cargo xtask bench`: measurements in the metered lab, where time is a count of instructions.

use std::time::Duration;

use anyhow::Result;
use bulkhead_lab::{Lab, LabOptions, Step};
use clap::Subcommand;

use crate::lab::save_logs;
use crate::{build, install};

/// The tests' program in the lab, which has the measurements too.
const E2E: &str = "/usr/local/bin/bulkhead-e2e";

/// How long a measurement may take.
const LIMIT: Duration = Duration::from_secs(20 * 60);

#[derive(Subcommand)]
pub enum BenchTask {
    /// Starting and removing one container, under runc and under Bulkhead.
    Start,
    /// Creating and starting one more container in a pod that runs, under runc and under Bulkhead.
    Create,
    /// A container's connections with the host, under runc and under Bulkhead.
    Network,
    /// Starting and removing a pod of Kubernetes, under runc and under Bulkhead.
    Pod,
}

/// Runs a measurement; prints its table.
pub fn run(task: BenchTask) -> Result<i32> {
    let name = match task {
        BenchTask::Start => "start",
        BenchTask::Create => "create",
        BenchTask::Network => "network",
        BenchTask::Pod => "pod",
    };
    let built = build::build()?;
    let program = build::build_e2e()?;
    let lab = Lab::start(&LabOptions {
        name: format!("bench-{}", std::process::id()),
        metered: true,
        ..LabOptions::default()
    })?;
    let step = Step::start("Installing Bulkhead in the metered lab");
    install::install_in_lab(&built, &lab)?;
    lab.push(&program, E2E)?;
    step.done();
    let exec = lab.exec([E2E, "bench", name]).limit(LIMIT);
    let result = exec.stream(&mut std::io::stdout(), &mut std::io::stderr());
    if !matches!(result, Ok(0)) {
        save_logs(&lab, "bench");
    }
    Ok(result?)
}
