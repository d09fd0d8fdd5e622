//! One configuration under one runtime, and what is seen of it.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicU32, Ordering};

use anyhow::{Context, Result};
use serde_json::{Value, json};

use super::disk::{self, Programs};
use super::{Configuration, patch};
use crate::command::{Finished, Input, Running};
use crate::ctr::Container;
use crate::probe::Report;

/// The annotation that puts containers into one VM.
const GROUP: &str = "io.containerd.runc.v2.group";

/// In a specification, this stands for a directory of the host to be mounted.
const VOLUME: &str = "@volume@";

/// Under which runtime, and where.
pub(super) enum Runtime<'a> {
    /// runc itself.
    Runc,
    /// A runtime of containerd, in the pod of this name.
    Containerd { runtime: &'a str, pod: &'a str },
}

/// What came of a configuration.
pub(super) enum Seen {
    /// The container was not made: what the client said.
    Refused(String),
    /// What its process found, and what was left on the disk.
    Found(Report),
}

/// A container that runs.
pub(super) struct Started {
    client: Running,
    id: String,
    bundle: PathBuf,
    process: Value,
    execs: Vec<Value>,
    /// Removed when dropped.
    container: Held,
}

/// What removes a container should its client not do it.
enum Held {
    Runc(PathBuf, String),
    Containerd(Container),
}

impl Drop for Held {
    fn drop(&mut self) {
        if let Self::Runc(bundle, id) = self {
            // Mostly it is gone already.
            let _ = finish(runc(bundle, &["delete", "--force", id]));
        }
    }
}

/// Starts a configuration in a new directory below `directory`.
pub(super) fn start(
    configuration: &Configuration,
    runtime: &Runtime<'_>,
    programs: &Programs,
    directory: &Path,
) -> Result<Started> {
    let id = new_id();
    let bundle = directory.join(&id);
    fs::create_dir(&bundle)?;
    programs.root(&bundle.join("root"), &bundle.join("volume"))?;
    let mut spec = complete(configuration, &id, &bundle)?;
    let process = spec["process"].clone();
    if !configuration.execs.is_empty() {
        let script = "/probe probe spec; exec sleep 1000";
        let changes = json!({ "process": { "args": ["/bin/sh", "-c", script] } });
        patch::apply(&mut spec, &changes);
    }
    let (command, container) = match runtime {
        Runtime::Runc => (
            run_by_runc(&bundle, &id),
            Held::Runc(bundle.clone(), id.clone()),
        ),
        Runtime::Containerd { runtime, pod } => {
            patch::apply(&mut spec, &json!({ "annotations": { GROUP: pod } }));
            let command = run_by_containerd(&bundle, runtime, &["--rm"], &id);
            let container = Container::existing(id.clone());
            (command, Held::Containerd(container))
        }
    };
    fs::write(bundle.join("config.json"), serde_json::to_vec(&spec)?)?;
    Ok(Started {
        client: Running::spawn(command, Input::Null)?,
        id,
        bundle,
        process,
        execs: configuration.execs.clone(),
        container,
    })
}

/// Starts an idle container, whose VM others share.
pub(super) fn start_pod(
    configuration: &Configuration,
    runtime: &str,
    programs: &Programs,
    directory: &Path,
) -> Result<Container> {
    let id = new_id();
    let bundle = directory.join(&id);
    fs::create_dir(&bundle)?;
    programs.root(&bundle.join("root"), &bundle.join("volume"))?;
    let mut spec = complete(configuration, &id, &bundle)?;
    let changes = json!({
        "process": { "args": ["/bin/sleep", "1000000"] },
        "annotations": { GROUP: id },
    });
    patch::apply(&mut spec, &changes);
    fs::write(bundle.join("config.json"), serde_json::to_vec(&spec)?)?;
    let container = Container::existing(id.clone());
    let command = run_by_containerd(&bundle, runtime, &["-d"], &id);
    Running::spawn(command, Input::Null)?.finish()?.succeeds()?;
    Ok(container)
}

fn new_id() -> String {
    static COUNT: AtomicU32 = AtomicU32::new(0);
    let number = COUNT.fetch_add(1, Ordering::Relaxed);
    format!("configured-{}-{number:04}", std::process::id())
}

/// Adds what differs from run to run.
fn complete(configuration: &Configuration, id: &str, bundle: &Path) -> Result<Value> {
    let volume = bundle.join("volume");
    let volume = volume.to_str().context("a path that is not UTF-8")?;
    let text = configuration.spec.to_string().replace(VOLUME, volume);
    let mut spec = serde_json::from_str(&text)?;
    patch::apply(
        &mut spec,
        &json!({
            "root": { "path": bundle.join("root") },
            "linux": { "cgroupsPath": format!("/{id}") },
        }),
    );
    Ok(spec)
}

/// runc, with its state in the bundle, so that nothing of it stays.
fn runc(bundle: &Path, arguments: &[&str]) -> Command {
    let mut command = Command::new("runc");
    command.arg("--root").arg(bundle.join("state"));
    command.args(arguments);
    command
}

fn run_by_runc(bundle: &Path, id: &str) -> Command {
    let mut command = runc(bundle, &["run", "--bundle"]);
    command.arg(bundle).arg(id);
    command
}

fn run_by_containerd(bundle: &Path, runtime: &str, mode: &[&str], id: &str) -> Command {
    let mut command = Command::new("ctr");
    command.args(["run", "--runtime", runtime]).args(mode);
    command.arg("--config").arg(bundle.join("config.json"));
    command.arg(id);
    command
}

fn finish(command: Command) -> Result<Finished> {
    Running::spawn(command, Input::Null)?.finish()
}

impl Started {
    /// Waits for the end and looks at what is left.
    pub(super) fn finish(self) -> Result<Seen> {
        let mut report = Report::new();
        if !self.execs.is_empty() {
            self.client.expect("\n}\n")?;
            for (index, changes) in self.execs.iter().enumerate() {
                let finished = finish(self.exec(index, changes)?)?;
                self.note(&format!("exec {index}: "), &finished, &mut report);
            }
            match &self.container {
                Held::Runc(bundle, id) => {
                    finish(runc(bundle, &["kill", id, "KILL"]))?.succeeds()?;
                }
                Held::Containerd(container) => container.kill("KILL")?,
            }
        }
        let Self {
            client,
            id,
            bundle,
            container,
            ..
        } = self;
        let finished = client.finish()?;
        let error = finished.err();
        // Both clients report what they could not do by themselves, the process does not.
        let refused = finished.stdout.is_empty()
            && finished.code() == 1
            && (error.contains("ctr: ") || error.contains("level=error"));
        if refused {
            return Ok(Seen::Refused(error));
        }
        note(&id, &bundle, "", &finished, &mut report);
        drop(container);
        report.extend(disk::look(&bundle.join("root"))?);
        disk::remove(&bundle)?;
        Ok(Seen::Found(report))
    }

    /// The command for another process in the container: the container's own with changes.
    fn exec(&self, index: usize, changes: &Value) -> Result<Command> {
        let mut process = self.process.clone();
        patch::apply(&mut process, changes);
        match &self.container {
            Held::Runc(bundle, id) => {
                let file = self.bundle.join(format!("process-{index}.json"));
                fs::write(&file, serde_json::to_vec(&process)?)?;
                let mut command = runc(bundle, &["exec", "--process"]);
                command.arg(file).arg(id);
                Ok(command)
            }
            Held::Containerd(container) => {
                // The client can say no more than this.
                let mut flags = Vec::new();
                let cwd = changes["cwd"].as_str();
                flags.extend(
                    cwd.iter()
                        .flat_map(|cwd| ["--cwd".to_owned(), (*cwd).into()]),
                );
                if let Some(uid) = changes["user"]["uid"].as_u64() {
                    let gid = changes["user"]["gid"].as_u64().unwrap_or(0);
                    flags.extend(["--user".to_owned(), format!("{uid}:{gid}")]);
                }
                let flags: Vec<_> = flags.iter().map(String::as_str).collect();
                let arguments = process["args"]
                    .as_array()
                    .context("a process without args")?;
                let arguments: Vec<_> = arguments.iter().filter_map(Value::as_str).collect();
                Ok(container.exec_command(&flags, &arguments))
            }
        }
    }

    fn note(&self, prefix: &str, finished: &Finished, report: &mut Report) {
        note(&self.id, &self.bundle, prefix, finished, report);
    }
}

/// Adds to a report how a process ended and what it said: a report, or else anything.
fn note(id: &str, bundle: &Path, prefix: &str, finished: &Finished, report: &mut Report) {
    let text = finished.out();
    let text = text
        .replace(&*bundle.to_string_lossy(), "BUNDLE")
        .replace(id, "ID");
    report.insert(format!("{prefix}exit code"), finished.code().to_string());
    match serde_json::from_str::<Report>(&text) {
        Ok(found) => {
            let found = found.into_iter();
            report.extend(found.map(|(question, answer)| (format!("{prefix}{question}"), answer)));
        }
        Err(_) => {
            report.insert(format!("{prefix}output"), text);
        }
    }
}
