//! Running configurations under both runtimes and comparing them.

use std::path::Path;
use std::sync::{Mutex, PoisonError};
use std::thread;
use std::time::Instant;

use anyhow::{Context, Result, bail, ensure};

use super::disk::{Programs, Workspace};
use super::observe::{Runtime, Seen, Started, start, start_pod};
use super::{Configuration, Theme};
use crate::ctr::{Container, ctr};
use crate::differences::differences;

/// Configurations that run at a time: each is two clients that mostly wait for each other.
const WORKERS: usize = 2;

/// Runs these under runc and under `runtime`; fails with every difference of every one.
pub fn run(runtime: &str, mut configurations: Vec<Configuration>) -> Result<()> {
    // They are taken from the end.
    configurations.reverse();
    let directory = Workspace::new()?;
    let programs = Programs::prepare(directory.path())?;
    let idle = super::profiles::idle()?;
    let pod = start_pod(&idle, runtime, &programs, directory.path())?;
    let run = Run {
        runtime,
        directory: directory.path(),
        programs,
        pod: pod.id().to_owned(),
        waiting: Mutex::new(configurations),
        failures: Mutex::new(Vec::new()),
    };
    thread::scope(|scope| {
        for _ in 0..WORKERS {
            scope.spawn(|| run.work());
        }
    });
    let failures = run.failures.into_inner();
    let failures = failures.unwrap_or_else(PoisonError::into_inner);
    end(pod)?;
    directory.remove()?;
    ensure!(
        failures.is_empty(),
        "{} configuration(s) differ, as told above: {}",
        failures.len(),
        failures.join(", ")
    );
    Ok(())
}

fn end(pod: Container) -> Result<()> {
    pod.kill("KILL")?;
    let id = pod.id().to_owned();
    // The client waits for the end of the task.
    ctr(&["task", "delete", &id])?;
    drop(pod);
    Ok(())
}

struct Run<'a> {
    runtime: &'a str,
    directory: &'a Path,
    programs: Programs,
    pod: String,
    waiting: Mutex<Vec<Configuration>>,
    failures: Mutex<Vec<String>>,
}

impl Run<'_> {
    /// Runs one after the other until there are no more.
    fn work(&self) {
        loop {
            let next = lock(&self.waiting).pop();
            let Some(configuration) = next else { return };
            let started = Instant::now();
            let result = self.one(&configuration);
            let (name, seconds) = (&configuration.name, started.elapsed().as_secs_f32());
            eprintln!("    {name} {seconds:.1} s");
            if let Err(error) = result {
                // At once: the last configuration may be minutes away.
                eprintln!("{name}: {error:#}\n  to repeat: bulkhead-e2e configuration {name:?}");
                lock(&self.failures).push(name.clone());
            }
        }
    }

    fn one(&self, configuration: &Configuration) -> Result<()> {
        let start =
            |runtime: Runtime<'_>| start(configuration, &runtime, &self.programs, self.directory);
        let runc = match configuration.theme {
            // runc may do anything.
            Theme::Unsupported => None,
            _ => Some(start(Runtime::Runc)?),
        };
        let tested = start(Runtime::Containerd {
            runtime: self.runtime,
            pod: &self.pod,
        })?;
        let runc = runc
            .map(Started::finish)
            .transpose()
            .context("under runc")?;
        let tested = tested.finish().context("under the tested runtime")?;
        judge(configuration, runc.as_ref().unwrap_or(&tested), &tested)
    }
}

fn judge(configuration: &Configuration, runc: &Seen, tested: &Seen) -> Result<()> {
    match (runc, tested, &configuration.cause) {
        (Seen::Found(runc), Seen::Found(tested), None) => {
            let new = differences(&configuration.name, runc, tested)?;
            ensure!(
                new.is_empty(),
                "{} difference(s):\n  {}",
                new.len(),
                new.join("\n  ")
            );
            Ok(())
        }
        (Seen::Refused(runc), Seen::Refused(tested), Some(cause)) => {
            for (whose, error) in [("runc", runc), ("the tested runtime", tested)] {
                let error = error.to_lowercase();
                ensure!(
                    cause
                        .iter()
                        .any(|word| error.contains(&word.to_lowercase())),
                    "{whose} does not name the cause ({}): {error}",
                    cause.join(" or ")
                );
            }
            Ok(())
        }
        (Seen::Refused(runc), Seen::Refused(tested), None) => {
            bail!("refused by runc: {runc}\n  and by the tested runtime: {tested}")
        }
        (Seen::Refused(_), Seen::Found(_), None) if configuration.recent => Ok(()),
        (Seen::Refused(runc), Seen::Found(_), _) => {
            bail!("refused by runc, but not by the tested runtime: {runc}")
        }
        (Seen::Found(_), Seen::Refused(tested), _) => {
            bail!("refused by the tested runtime, but not by runc: {tested}")
        }
        (Seen::Found(_), Seen::Found(_), Some(_)) => bail!("refused by nobody"),
    }
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
