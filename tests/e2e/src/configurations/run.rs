//! Running configurations under both runtimes and comparing them.

use std::path::Path;
use std::sync::{Mutex, PoisonError};
use std::thread;
use std::time::Instant;

use anyhow::{Context, Result, bail, ensure};

use super::disk::{Programs, Workspace};
use super::observe::{Runtime, Seen, Started, start};
use super::{Configuration, Theme};
use crate::ctr;
use crate::differences::Known;
use crate::shim::Shim;

/// Configurations that run at a time: each is two clients that mostly wait for each other.
const WORKERS: usize = 2;

/// So many differences of a configuration are told.
const SHOWN: usize = 20;

/// Runs these under runc and under `runtime`; fails with every difference of every one.
pub fn run(runtime: &str, mut configurations: Vec<Configuration>) -> Result<()> {
    // They are taken from the end.
    configurations.reverse();
    let directory = Workspace::new()?;
    let programs = Programs::prepare(directory.path())?;
    let pod = ctr::Run::new(runtime).detach(&["sleep", "1000000"])?;
    let run = Run {
        known: Known::read()?,
        shim: Shim::of(&pod)?,
        directory: directory.path(),
        programs,
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
    drop(pod);
    directory.remove()?;
    ensure!(
        failures.is_empty(),
        "{} configuration(s) differ, as told above: {}",
        failures.len(),
        failures.join(", ")
    );
    Ok(())
}

struct Run<'a> {
    known: Known,
    shim: Shim,
    directory: &'a Path,
    programs: Programs,
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
        let start = |runtime| start(configuration, runtime, &self.programs, self.directory);
        let runc = match configuration.theme {
            // runc may do anything.
            Theme::Unsupported => None,
            _ => Some(start(Runtime::Runc)?),
        };
        let tested = start(Runtime::Shim(&self.shim))?;
        let runc = runc
            .map(Started::finish)
            .transpose()
            .context("under runc")?;
        let tested = tested.finish().context("under the tested runtime")?;
        let runc = runc.as_ref().unwrap_or(&tested);
        judge(configuration, &self.known, runc, &tested)
    }
}

fn judge(configuration: &Configuration, known: &Known, runc: &Seen, tested: &Seen) -> Result<()> {
    match (runc, tested, &configuration.cause) {
        (Seen::Found(runc), Seen::Found(tested), None) => {
            let new = known.differences(&configuration.name, runc, tested);
            ensure!(
                new.is_empty(),
                "{} difference(s), the first:\n  {}",
                new.len(),
                new[..new.len().min(SHOWN)].join("\n  ")
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
        (Seen::Refused(_), Seen::Found(_), None)
            if configuration
                .refused_by
                .as_ref()
                .is_some_and(|version| known.is_runc(version)) =>
        {
            Ok(())
        }
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
