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
use crate::probe::Report;
use crate::shim::{Ended, Process, Refused, Shim};

/// In a specification, this stands for a directory of the host to be mounted.
const VOLUME: &str = "@volume@";

/// Under which runtime.
#[derive(Clone, Copy)]
pub(super) enum Runtime<'a> {
    /// runc itself.
    Runc,
    /// One of containerd's, in a pod that its shim has already.
    Shim(&'a Shim),
}

/// What came of a configuration.
pub(super) enum Seen {
    /// The container was not made: what the runtime said.
    Refused(String),
    /// What its process found, and what was left on the disk.
    Found(Report),
}

/// A container that runs.
pub(super) struct Started<'a> {
    id: String,
    bundle: PathBuf,
    process: Value,
    execs: Vec<Value>,
    container: Container<'a>,
}

/// What removes a container on every path.
enum Container<'a> {
    Runc(Runc),
    Shim(Process<'a>),
    /// There is none: what the shim said.
    Refused(String),
}

/// Starts a configuration in a new directory below `directory`.
pub(super) fn start<'a>(
    configuration: &Configuration,
    runtime: Runtime<'a>,
    programs: &Programs,
    directory: &Path,
) -> Result<Started<'a>> {
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
    fs::write(bundle.join("config.json"), serde_json::to_vec(&spec)?)?;
    let container = match runtime {
        Runtime::Runc => Container::Runc(Runc::run(&bundle, &id)?),
        Runtime::Shim(shim) => match run_by_shim(shim, &bundle, &id) {
            Ok(process) => Container::Shim(process),
            Err(error) => Container::Refused(error.downcast::<Refused>()?.message),
        },
    };
    Ok(Started {
        id,
        bundle,
        process,
        execs: configuration.execs.clone(),
        container,
    })
}

fn run_by_shim<'a>(shim: &'a Shim, bundle: &Path, id: &str) -> Result<Process<'a>> {
    let mut process = shim.create(bundle, id, Vec::new())?;
    process.start()?;
    Ok(process)
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

/// A container of `runc run` in the foreground.
struct Runc {
    bundle: PathBuf,
    id: String,
    /// None once it has ended.
    client: Option<Running>,
}

impl Runc {
    fn run(bundle: &Path, id: &str) -> Result<Self> {
        let mut container = Self {
            bundle: bundle.to_owned(),
            id: id.to_owned(),
            client: None,
        };
        let mut command = container.command(&["run", "--bundle"]);
        command.arg(bundle).arg(id);
        container.client = Some(Running::spawn(command, Input::Null)?);
        Ok(container)
    }

    /// runc, with its state in the bundle, so that nothing of it stays.
    fn command(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new("runc");
        command.arg("--root").arg(self.bundle.join("state"));
        command.args(arguments);
        command
    }

    fn expect(&self, text: &str) -> Result<()> {
        let client = self.client.as_ref().context("it has ended")?;
        client.expect(text)
    }

    fn exec(&self, exec_id: &str, process: &Value) -> Result<Finished> {
        let file = self.bundle.join(exec_id);
        fs::write(&file, serde_json::to_vec(process)?)?;
        let mut command = self.command(&["exec", "--process"]);
        command.arg(file).arg(&self.id);
        finish(command)
    }

    fn kill(&self) -> Result<()> {
        finish(self.command(&["kill", &self.id, "KILL"]))?.succeeds()?;
        Ok(())
    }

    fn finish(mut self) -> Result<Finished> {
        let client = self.client.take().context("it has ended")?;
        client.finish()
    }
}

impl Drop for Runc {
    fn drop(&mut self) {
        // `runc run` removes what it has made.
        if self.client.take().is_some() {
            let _ = finish(self.command(&["delete", "--force", &self.id]));
        }
    }
}

fn finish(command: Command) -> Result<Finished> {
    Running::spawn(command, Input::Null)?.finish()
}

impl Started<'_> {
    /// Waits for the end and looks at what is left.
    pub(super) fn finish(self) -> Result<Seen> {
        let mut report = Report::new();
        if !self.execs.is_empty() {
            self.expect("\n}\n")?;
            for (index, changes) in self.execs.iter().enumerate() {
                let mut process = self.process.clone();
                patch::apply(&mut process, changes);
                let ended = self.exec(&format!("exec-{index}"), &process)?;
                let prefix = format!("exec {index}: ");
                note(&self.id, &self.bundle, &prefix, &ended, &mut report);
            }
            self.kill()?;
        }
        let ended = match self.container {
            Container::Runc(container) => {
                let finished = container.finish()?;
                // It reports what it could not do by itself, the process does not.
                let error = finished.err();
                if finished.stdout.is_empty()
                    && finished.code() == 1
                    && error.contains("level=error")
                {
                    return Ok(Seen::Refused(error));
                }
                by_runc(finished)
            }
            Container::Shim(process) => process.finish()?,
            Container::Refused(error) => return Ok(Seen::Refused(error)),
        };
        note(&self.id, &self.bundle, "", &ended, &mut report);
        report.extend(disk::look(&self.bundle.join("root"))?);
        disk::remove(&self.bundle)?;
        Ok(Seen::Found(report))
    }

    fn expect(&self, text: &str) -> Result<()> {
        match &self.container {
            Container::Runc(container) => container.expect(text),
            Container::Shim(process) => process.expect(text),
            Container::Refused(_) => Ok(()),
        }
    }

    /// Another process in the container, to its end.
    fn exec(&self, exec_id: &str, process: &Value) -> Result<Ended> {
        match &self.container {
            Container::Runc(container) => Ok(by_runc(container.exec(exec_id, process)?)),
            Container::Shim(container) => container.exec(&self.bundle, exec_id, process)?.finish(),
            Container::Refused(error) => anyhow::bail!("there is no container: {error}"),
        }
    }

    fn kill(&self) -> Result<()> {
        match &self.container {
            Container::Runc(container) => container.kill(),
            Container::Shim(process) => process.kill(9),
            Container::Refused(_) => Ok(()),
        }
    }
}

fn by_runc(finished: Finished) -> Ended {
    Ended {
        code: finished.code().cast_unsigned(),
        stdout: finished.stdout,
    }
}

/// Adds to a report how a process ended and what it said: a report, or else anything.
fn note(id: &str, bundle: &Path, prefix: &str, ended: &Ended, report: &mut Report) {
    let text = String::from_utf8_lossy(&ended.stdout);
    let text = text
        .replace(&*bundle.to_string_lossy(), "BUNDLE")
        .replace(id, "ID");
    report.insert(format!("{prefix}exit code"), ended.code.to_string());
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
