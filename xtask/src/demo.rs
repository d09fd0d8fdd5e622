//! `cargo xtask demo`: a container in its own microVM, on this machine or in a lab.

use std::path::Path;
use std::process::Command;
use std::time::Duration;

use anyhow::Result;
use bulkhead_lab::{Cache, Lab, LabOptions, Step, busybox_archive, run_logged, run_shown};

use crate::build::{self, Built};
use crate::lab::save_logs;
use crate::{host, install};

/// The container that is shown.
const DEMO: [&str; 9] = [
    "ctr",
    "run",
    "--rm",
    "--runtime",
    "io.containerd.bulkhead.v2",
    "docker.io/library/busybox:latest",
    "demo",
    "uname",
    "-a",
];

/// How long the container may take.
const LIMIT: Duration = Duration::from_secs(120);

/// Builds everything and runs the container where it can run.
pub fn run() -> Result<i32> {
    let built = build::build()?;
    match host::check(&built) {
        Ok(()) => on_host(&built),
        Err(reason) => {
            eprintln!("This machine cannot run microVMs itself ({reason:#}): using a lab.");
            in_lab(&built)
        }
    }
}

fn on_host(built: &Built) -> Result<i32> {
    install::install(built, Path::new("/"))?;
    let archive = busybox_archive(&Cache::open()?)?;
    let mut import = Command::new("ctr");
    import.args(["image", "import"]).arg(archive);
    run_logged(&mut import, LIMIT)?;
    eprintln!("$ {}", DEMO.join(" "));
    let mut demo = Command::new(DEMO[0]);
    demo.args(&DEMO[1..]);
    run_shown(&mut demo, LIMIT)?;
    Ok(0)
}

fn in_lab(built: &Built) -> Result<i32> {
    let lab = Lab::start(&LabOptions {
        name: format!("demo-{}", std::process::id()),
        ..LabOptions::default()
    })?;
    let step = Step::start("Installing Bulkhead in the lab");
    install::install_in_lab(built, &lab)?;
    step.done();
    eprintln!("lab$ {}", DEMO.join(" "));
    let exec = lab.exec(DEMO).limit(LIMIT);
    let result = exec.stream(&mut std::io::stdout(), &mut std::io::stderr());
    if !matches!(result, Ok(0)) {
        save_logs(&lab, "demo");
    }
    Ok(result?)
}
