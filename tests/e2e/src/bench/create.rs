//! One more container in a pod that runs: Create and Start, as containerd calls them.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use containerd_shim_protos::Client;
use containerd_shim_protos::api::{
    CreateTaskRequest, DeleteRequest, KillRequest, StartRequest, WaitRequest,
};
use containerd_shim_protos::protobuf::Message;
use containerd_shim_protos::ttrpc::{self, context};
use serde_json::{Value, json};

use super::{aligned, median, milliseconds, table};
use crate::command::{Input, Running};
use crate::ctr::{BULKHEAD, Container, RUNC, Run, ctr};

/// For one call of a shim.
const DEADLINE: Duration = Duration::from_secs(60);

/// Measures `runs` times, prints a table, and as the last line everything as JSON.
pub fn run(runs: usize) -> Result<()> {
    let directory = tempfile::tempdir()?;
    let bundle = make_bundle(directory.path())?;
    let runc = (0..=runs).map(|number| by_runc(&bundle, number));
    let runc: Vec<f64> = runc.collect::<Result<_>>()?;
    let runc_shim = in_pod(RUNC, &bundle, runs)?;
    let bulkhead = in_pod(BULKHEAD, &bundle, runs)?;
    let (runc, runc_shim, bulkhead) = (&runc[1..], &runc_shim[1..], &bulkhead[1..]);

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
    (0..=runs)
        .map(|number| shim.container(bundle, &format!("bench-{number}")))
        .collect()
}

/// A connection to the shim of a pod.
struct Shim(Client);

impl Shim {
    fn of(pod: &Container) -> Result<Self> {
        let state = "/run/containerd/io.containerd.runtime.v2.task/default";
        let address = format!("{state}/{}/address", pod.id());
        let address = fs::read_to_string(&address).with_context(|| format!("read {address}"))?;
        let client = Client::connect(address.trim());
        Ok(Self(
            client.with_context(|| format!("connect to {address}"))?,
        ))
    }

    fn container(&self, bundle: &Path, id: &str) -> Result<f64> {
        let id = id.to_owned();
        let bundle = bundle.to_str().context("a path that is not UTF-8")?;
        let begun = Instant::now();
        self.call(
            "Create",
            &CreateTaskRequest {
                id: id.clone(),
                bundle: bundle.to_owned(),
                ..CreateTaskRequest::default()
            },
        )?;
        self.call(
            "Start",
            &StartRequest {
                id: id.clone(),
                ..StartRequest::default()
            },
        )?;
        let took = begun.elapsed().as_secs_f64() * 1e3;
        // It may have ended by itself.
        let _ = self.call(
            "Kill",
            &KillRequest {
                id: id.clone(),
                signal: 9,
                ..KillRequest::default()
            },
        );
        self.call(
            "Wait",
            &WaitRequest {
                id: id.clone(),
                ..WaitRequest::default()
            },
        )?;
        self.call(
            "Delete",
            &DeleteRequest {
                id,
                ..DeleteRequest::default()
            },
        )?;
        Ok(took)
    }

    fn call(&self, method: &str, message: &impl Message) -> Result<()> {
        let deadline = i64::try_from(DEADLINE.as_nanos()).context("a long deadline")?;
        let request = ttrpc::Request {
            service: "containerd.task.v2.Task".into(),
            method: method.into(),
            timeout_nano: deadline,
            metadata: ttrpc::context::to_pb(context::with_duration(DEADLINE).metadata),
            payload: message.write_to_bytes()?,
            ..ttrpc::Request::default()
        };
        let called = self.0.request(request);
        called.map(drop).with_context(|| format!("{method} failed"))
    }
}
