//! `cargo xtask fuzz`: every target for a while, and a table of what came of it.

use std::fs;
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail, ensure};
use bulkhead_lab::{target_dir, workspace};
use clap::Args;
use comfy_table::{Table, presets::ASCII_MARKDOWN};

const CARGO_FUZZ: &str = "cargo-fuzz";

#[derive(Args)]
pub struct FuzzOptions {
    /// Only these targets, of the files in `tests/fuzz/fuzz_targets`.
    targets: Vec<String>,
    /// How long each runs, in seconds.
    #[arg(long, default_value_t = 3600)]
    seconds: u32,
}

/// What libFuzzer says of one target.
#[derive(Default)]
struct Outcome {
    executions: String,
    coverage: String,
    crashed: bool,
}

pub fn run(options: &FuzzOptions) -> Result<i32> {
    let tool = cargo_fuzz()?;
    let all = targets()?;
    if let Some(unknown) = options.targets.iter().find(|name| !all.contains(name)) {
        bail!(
            "there is no fuzz target {unknown}; there are {}",
            all.join(", ")
        );
    }
    let chosen = if options.targets.is_empty() {
        &all
    } else {
        &options.targets
    };
    let mut table = Table::new();
    table.load_preset(ASCII_MARKDOWN);
    table.set_header(["target", "executions", "coverage", "result"]);
    let mut failed = 0;
    for target in chosen {
        let outcome = fuzz(&tool, target, options.seconds)?;
        failed += i32::from(outcome.crashed);
        table.add_row([
            target.as_str(),
            &outcome.executions,
            &outcome.coverage,
            if outcome.crashed {
                "CRASHED"
            } else {
                "no crash"
            },
        ]);
    }
    println!("{table}");
    Ok(failed.min(1))
}

fn directory() -> PathBuf {
    workspace().join("tests/fuzz")
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

/// Where cargo-fuzz is. It is installed for this project when it is missing.
fn cargo_fuzz() -> Result<PathBuf> {
    let installed = Command::new(CARGO_FUZZ)
        .arg("--version")
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .status();
    if installed.is_ok_and(|status| status.success()) {
        return Ok(CARGO_FUZZ.into());
    }
    let root = target_dir().join("tools");
    let tool = root.join("bin").join(CARGO_FUZZ);
    if !tool.exists() {
        eprintln!("==> Installing {CARGO_FUZZ}");
        let status = Command::new(env!("CARGO"))
            .args(["install", "--locked", "--quiet", CARGO_FUZZ, "--root"])
            .arg(&root)
            .status()
            .context("cannot run cargo")?;
        ensure!(status.success(), "cannot install {CARGO_FUZZ}: {status}");
    }
    Ok(tool)
}

/// Runs one target. Coverage needs no sanitizer, and so no nightly compiler.
fn fuzz(tool: &Path, target: &str, seconds: u32) -> Result<Outcome> {
    eprintln!("==> Fuzzing {target} for {seconds} s");
    let corpus = target_dir().join("fuzz-corpus").join(target);
    fs::create_dir_all(&corpus).with_context(|| format!("cannot create {}", corpus.display()))?;
    let mut child = Command::new(tool)
        .args(["run", "--sanitizer", "none", "--fuzz-dir"])
        .arg(directory())
        .arg("--target-dir")
        .arg(target_dir().join("fuzz"))
        .arg(target)
        .arg(&corpus)
        .args([
            "--",
            "-print_final_stats=1",
            "-timeout=20",
            "-rss_limit_mb=4096",
        ])
        .arg(format!("-max_total_time={seconds}"))
        .current_dir(workspace())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .with_context(|| format!("cannot run {}", tool.display()))?;
    let stderr = child.stderr.take().context("no standard error")?;
    let mut outcome = Outcome::default();
    for line in BufReader::new(stderr).lines() {
        let line = line.context("cannot read what the fuzzer says")?;
        if let Some(count) = line.strip_prefix("stat::number_of_executed_units:") {
            outcome.executions = count.trim().to_owned();
        } else if let Some(coverage) = after(&line, " cov: ") {
            outcome.coverage = coverage.to_owned();
            continue;
        }
        eprintln!("{line}");
    }
    let status = child.wait().context("cannot wait for the fuzzer")?;
    outcome.crashed = !status.success();
    Ok(outcome)
}

/// The word behind `label`.
fn after<'l>(line: &'l str, label: &str) -> Option<&'l str> {
    line.split_once(label)?.1.split_whitespace().next()
}
