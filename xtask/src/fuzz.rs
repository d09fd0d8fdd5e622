//! `cargo xtask fuzz`: every target for a while, and a table of what came of it.

use std::collections::VecDeque;
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::{Mutex, PoisonError};
use std::thread;

use anyhow::{Context, Result, bail};
use bulkhead_lab::{
    BUILD_LIMIT, Step, cargo, install_host_packages, run_logged, run_shown, target_dir, workspace,
};
use clap::Args;
use comfy_table::{Table, presets::ASCII_MARKDOWN};

const CARGO_FUZZ: &str = "cargo-fuzz";

/// Where cargo-fuzz leaves the programs, which it always builds for a named target.
const PROGRAMS: &str = "x86_64-unknown-linux-gnu/release";

#[derive(Args)]
pub struct FuzzOptions {
    /// Only these targets, of the files in `tests/fuzz/fuzz_targets`.
    targets: Vec<String>,
    /// How long each runs, in seconds.
    #[arg(long, default_value_t = 3600)]
    seconds: u32,
    /// How many run at the same time; as many as there are CPUs unless told otherwise.
    #[arg(long)]
    jobs: Option<usize>,
}

/// What libFuzzer says of one target.
struct Outcome {
    target: String,
    executions: String,
    coverage: String,
    /// Its exit code; `None` when a signal has killed it.
    code: Option<i32>,
}

/// With which libFuzzer ends when it is interrupted (`-interrupted_exitcode`).
const INTERRUPTED: i32 = 72;

pub fn run(options: &FuzzOptions) -> Result<i32> {
    let all = targets()?;
    if let Some(unknown) = options.targets.iter().find(|name| !all.contains(name)) {
        bail!(
            "there is no fuzz target {unknown}; there are {}",
            all.join(", ")
        );
    }
    let chosen = if options.targets.is_empty() {
        all
    } else {
        options.targets.clone()
    };
    build()?;
    let jobs = match options.jobs {
        Some(jobs) => jobs.max(1),
        None => thread::available_parallelism().map_or(1, usize::from),
    };
    let mut outcomes = fuzz_all(chosen, options.seconds, jobs)?;
    outcomes.sort_by(|a, b| a.target.cmp(&b.target));

    let mut table = Table::new();
    table.load_preset(ASCII_MARKDOWN);
    table.set_header(["target", "executions", "coverage", "result"]);
    for outcome in &outcomes {
        let result = match outcome.code {
            Some(0) => "no crash",
            Some(INTERRUPTED) => "interrupted",
            _ => "CRASHED",
        };
        let Outcome {
            target,
            executions,
            coverage,
            ..
        } = outcome;
        table.add_row([target, executions, coverage, result]);
    }
    println!("{table}");
    Ok(i32::from(
        outcomes.iter().any(|outcome| outcome.code != Some(0)),
    ))
}

fn directory() -> PathBuf {
    workspace().join("tests/fuzz")
}

fn build_dir() -> PathBuf {
    target_dir().join("fuzz")
}

fn targets() -> Result<Vec<String>> {
    let path = directory().join("fuzz_targets");
    let mut names = Vec::new();
    for entry in fs::read_dir(&path).with_context(|| format!("cannot list {}", path.display()))? {
        let path = entry?.path();
        let name = path.file_stem().context("a target without a name")?;
        names.push(name.to_string_lossy().into_owned());
    }
    names.sort();
    Ok(names)
}

/// Builds all targets. Coverage needs no sanitizer, and so no nightly compiler.
fn build() -> Result<()> {
    let tool = cargo_fuzz()?;
    let step = Step::announce("Building the fuzz targets");
    let mut build = Command::new(tool);
    build
        .args(["build", "--sanitizer", "none", "--fuzz-dir"])
        .arg(directory())
        .arg("--target-dir")
        .arg(build_dir())
        .current_dir(workspace());
    run_shown(&mut build, BUILD_LIMIT)?;
    step.done();
    Ok(())
}

/// Where cargo-fuzz is. It is installed for this project when it is missing, with the compiler that
/// libFuzzer needs.
fn cargo_fuzz() -> Result<PathBuf> {
    install_host_packages(&["g++"])?;
    let tool = target_dir().join("tools/bin").join(CARGO_FUZZ);
    if !tool.exists() {
        let step = Step::start("Installing cargo-fuzz");
        let mut install = cargo();
        install
            .args([
                "install", "--debug", "--locked", "--quiet", CARGO_FUZZ, "--root",
            ])
            .arg(target_dir().join("tools"));
        run_logged(&mut install, BUILD_LIMIT)?;
        step.done();
    }
    Ok(tool)
}

/// Runs the targets, `jobs` at a time.
fn fuzz_all(targets: Vec<String>, seconds: u32, jobs: usize) -> Result<Vec<Outcome>> {
    let waiting = Mutex::new(VecDeque::from(targets));
    let next = || {
        let mut waiting = waiting.lock().unwrap_or_else(PoisonError::into_inner);
        waiting.pop_front()
    };
    let worker = || -> Result<Vec<Outcome>> {
        std::iter::from_fn(next)
            .map(|target| fuzz(target, seconds))
            .collect()
    };
    thread::scope(|scope| {
        let workers: Vec<_> = (0..jobs).map(|_| scope.spawn(worker)).collect();
        let mut outcomes = Vec::new();
        for worker in workers {
            match worker.join() {
                Ok(done) => outcomes.extend(done?),
                Err(panic) => std::panic::resume_unwind(panic),
            }
        }
        Ok(outcomes)
    })
}

/// Runs one target, whose output goes to a log.
fn fuzz(target: String, seconds: u32) -> Result<Outcome> {
    let made = |path: PathBuf| match fs::create_dir_all(&path) {
        Ok(()) => Ok(path),
        Err(error) => Err(error).with_context(|| format!("cannot create {}", path.display())),
    };
    let corpus = made(target_dir().join("fuzz-corpus").join(&target))?;
    let artifacts = made(directory().join("artifacts").join(&target))?;
    let log_path = made(target_dir().join("fuzz-logs"))?.join(format!("{target}.log"));
    let opened = File::create(&log_path).and_then(|log| Ok((log.try_clone()?, log)));
    let (stdout, stderr) =
        opened.with_context(|| format!("cannot write {}", log_path.display()))?;
    let step = Step::announce(format!("Fuzzing {target} for {seconds} s"));
    // libFuzzer ends by itself; timeout(1) ends one that does not.
    let limit = u64::from(seconds) + BUILD_LIMIT.as_secs();
    let status = Command::new("timeout")
        .args(["--kill-after=10", &limit.to_string()])
        .arg(build_dir().join(PROGRAMS).join(&target))
        .arg(format!("-artifact_prefix={}/", artifacts.display()))
        .arg(format!("-max_total_time={seconds}"))
        .args(["-print_final_stats=1", "-timeout=20", "-rss_limit_mb=4096"])
        .arg(&corpus)
        .stdin(Stdio::null())
        .stdout(stdout)
        .stderr(stderr)
        .status()
        .context("cannot run timeout")?;
    step.done();
    if !status.success() {
        eprintln!("{target} ended early: see {}", log_path.display());
    }
    let (executions, coverage) = summary(&log_path)?;
    Ok(Outcome {
        target,
        executions,
        coverage,
        code: status.code(),
    })
}

/// How many inputs were run, and how much of the code they reached, by libFuzzer's own log.
fn summary(log: &Path) -> Result<(String, String)> {
    let text = fs::read(log).with_context(|| format!("cannot read {}", log.display()))?;
    let text = String::from_utf8_lossy(&text);
    let last = |label: &str| {
        let found = text.lines().rev().find_map(|line| line.split_once(label));
        let word = found.and_then(|(_, after)| after.split_whitespace().next());
        word.unwrap_or_default().to_owned()
    };
    Ok((last("stat::number_of_executed_units:"), last(" cov: ")))
}
