//! `cargo xtask fuzz`: every target for a while, and a table of what came of it.

use std::ffi::OsString;
use std::fs;
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail};
use bulkhead_lab::{
    BUILD_LIMIT, Step, cargo, install_host_packages, run_logged, run_shown, target_dir, workspace,
};
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

/// Where cargo-fuzz is. It is installed for this project when it is missing, with the compiler that
/// libFuzzer needs.
fn cargo_fuzz() -> Result<PathBuf> {
    install_host_packages(&["g++"])?;
    let tool = target_dir().join("tools/bin").join(CARGO_FUZZ);
    if !tool.exists() {
        let step = Step::start("Installing cargo-fuzz");
        let mut install = cargo();
        install
            .args(["install", "--locked", "--quiet", CARGO_FUZZ, "--root"])
            .arg(target_dir().join("tools"));
        run_logged(&mut install, BUILD_LIMIT)?;
        step.done();
    }
    Ok(tool)
}

/// Builds and runs one target. Coverage needs no sanitizer, and so no nightly compiler.
fn fuzz(tool: &Path, target: &str, seconds: u32) -> Result<Outcome> {
    let corpus = target_dir().join("fuzz-corpus").join(target);
    fs::create_dir_all(&corpus).with_context(|| format!("cannot create {}", corpus.display()))?;
    let arguments = |action: &'static str| {
        let mut arguments: Vec<OsString> = vec![action.into()];
        arguments.extend(["--sanitizer", "none", "--fuzz-dir"].map(OsString::from));
        arguments.extend([directory().into(), "--target-dir".into()]);
        arguments.extend([target_dir().join("fuzz").into(), target.into()]);
        arguments
    };
    let step = Step::announce(format!("Fuzzing {target} for {seconds} s"));
    let mut build = Command::new(tool);
    build.args(arguments("build")).current_dir(workspace());
    run_shown(&mut build, BUILD_LIMIT)?;

    // libFuzzer ends by itself; timeout(1) ends one that does not.
    let limit = u64::from(seconds) + BUILD_LIMIT.as_secs();
    let mut child = Command::new("timeout")
        .args(["--kill-after=10", &limit.to_string()])
        .arg(tool)
        .args(arguments("run"))
        .arg(&corpus)
        .args(["--", "-print_final_stats=1", "-timeout=20"])
        .args([
            "-rss_limit_mb=4096".to_owned(),
            format!("-max_total_time={seconds}"),
        ])
        .current_dir(workspace())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .context("cannot run timeout")?;
    let stderr = child.stderr.take().context("no standard error")?;
    let mut outcome = Outcome::default();
    for line in BufReader::new(stderr).split(b'\n').map_while(Result::ok) {
        let line = String::from_utf8_lossy(&line);
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
    step.done();
    Ok(outcome)
}

/// The word behind `label`.
fn after<'l>(line: &'l str, label: &str) -> Option<&'l str> {
    line.split_once(label)?.1.split_whitespace().next()
}
