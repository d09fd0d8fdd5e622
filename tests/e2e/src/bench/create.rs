//! One more container in a pod that runs: Create and Start, as containerd calls them.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Instant;

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};

use super::{aligned, median, milliseconds, repeat, table};
use crate::command::{Input, Running};
use crate::ctr::{BULKHEAD, RUNC, Run, ctr};
use crate::shim::Shim;

/// Measures `runs` times, prints a table, and as the last line everything as JSON.
pub fn run(runs: usize) -> Result<()> {
    let directory = tempfile::tempdir()?;
    let bundle = make_bundle(directory.path())?;
    let runc = &repeat("runc alone", runs, |number| by_runc(&bundle, number))?;
    let runc_shim = &in_pod(RUNC, &bundle, runs)?;
    let bulkhead = &in_pod(BULKHEAD, &bundle, runs)?;

    let mut table = table(&["create and start in a running pod", "median"]);
    table.add_row([
        "`runc create` and `runc start`",
        &milliseconds(median(runc)),
    ]);
    table.add_row(["runc's shim", &milliseconds(median(runc_shim))]);
    table.add_row(["Bulkhead's shim", &milliseconds(median(bulkhead))]);
    let ratio = median(bulkhead) / median(runc);
    table.add_row(["Bulkhead's shim to runc alone", &format!("{ratio:.2}")]);
    println!("{}", aligned(table));
    println!(
        "{}",
        json!({"runc_ms": runc, "runc_shim_ms": runc_shim, "bulkhead_ms": bulkhead, "ratio": ratio})
    );
    Ok(())
}

/// A bundle with containerd's default spec and this program in its root file system.
fn make_bundle(directory: &Path) -> Result<PathBuf> {
    let rootfs = directory.join("rootfs");
    fs::create_dir(&rootfs)?;
    fs::copy(std::env::current_exe()?, rootfs.join("program"))?;
    let spec = ctr(&["oci", "spec"])?.succeeds()?;
    let mut spec: Value = serde_json::from_str(&spec).context("read the default spec")?;
    spec["root"]["path"] = json!("rootfs");
    spec["process"]["args"] = json!(["/program", "list"]);
    spec["process"]["terminal"] = json!(false);
    spec["linux"]["cgroupsPath"] = json!("/bench/container");
    fs::write(directory.join("config.json"), spec.to_string())?;
    Ok(directory.to_owned())
}

/// runc by itself, in milliseconds.
fn by_runc(bundle: &Path, number: usize) -> Result<f64> {
    let id = format!("bench-{number}");
    let runc = |arguments: &[&str]| -> Result<()> {
        let mut command = Command::new("runc");
        command.args(["--root", "state"]).args(arguments);
        command.current_dir(bundle);
        Running::spawn(command, Input::Null)?
            .finish()?
            .exits_with(0)?;
        Ok(())
    };
    let begun = Instant::now();
    // Its streams are those of the container, which are not to be waited for.
    let create = Command::new("sh")
        .args([
            "-c",
            &format!("runc --root state create {id} </dev/null >/dev/null 2>&1"),
        ])
        .current_dir(bundle)
        .status()?;
    ensure!(create.success(), "runc create: {create}");
    runc(&["start", &id])?;
    let took = begun.elapsed().as_secs_f64() * 1e3;
    runc(&["delete", "--force", &id])?;
    Ok(took)
}

/// Create and Start of a shim whose pod has a container already, in milliseconds.
fn in_pod(runtime: &str, bundle: &Path, runs: usize) -> Result<Vec<f64>> {
    let pod = Run::new(runtime).detach(&["sleep", "1000"])?;
    let shim = Shim::of(&pod)?;
    repeat(&format!("the shim of {runtime}"), runs, |number| {
        by_shim(&shim, bundle, &format!("bench-{runtime}-{number}"))
    })
}

fn by_shim(shim: &Shim, bundle: &Path, id: &str) -> Result<f64> {
    let begun = Instant::now();
    let mut process = shim.create(bundle, id, Vec::new())?;
    process.start()?;
    Ok(begun.elapsed().as_secs_f64() * 1e3)
}
