//! The end-to-end tests, shared out among labs. Two labs of one CPU each get more done on two CPUs than
//! one lab of two, whose emulated CPUs wait for each other.

use std::collections::HashMap;
use std::fs;
use std::path::PathBuf;
use std::process::Command;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use bulkhead_lab::{Error, Lab, LabOptions, Step};
use serde::Deserialize;

use crate::build::Built;
use crate::install;
use crate::lab::{Containerd, load_image, save_logs};

/// Where the end-to-end tests' program is in the lab.
const E2E: &str = "/usr/local/bin/bulkhead-e2e";

/// Where they find a VMM with attacker code in it.
const OPEN_VMM: &str = "/usr/local/lib/bulkhead-test/bulkhead-vmm";

/// And a shim that they can hold at a step.
const HELD_SHIM: &str = "/usr/local/lib/bulkhead-test/containerd-shim-bulkhead-v2";

/// How long one test may take.
const TEST_LIMIT: Duration = Duration::from_secs(30 * 60);

/// What a lab takes of the machine's memory when all of its own is in use, in KiB.
const LAB_MEMORY: usize = 7 * 1024 * 1024;

/// More labs would find too few tests.
const MOST_LABS: usize = 4;

/// What goes into a lab.
pub struct Programs {
    /// Bulkhead as it is shipped.
    pub built: Built,
    /// The tests' program.
    pub tests: PathBuf,
    /// The VMM with attacker code in it.
    pub open_vmm: PathBuf,
    /// The shim that waits for the tests.
    pub held_shim: PathBuf,
}

/// A test, as the tests' program lists it.
#[derive(Deserialize)]
struct Test {
    name: String,
    /// It needs this image, which takes a minute to import.
    image: Option<String>,
    /// It takes minutes.
    long: bool,
    /// It takes long and asks for little that others do not.
    soak: bool,
    /// It needs pods by containerd's sandbox API.
    sandbox_api: bool,
}

/// Which tests to run.
#[derive(clap::Args)]
pub struct Selection {
    /// Only the end-to-end tests, and of these the ones that match.
    #[arg(long)]
    pub e2e: Option<String>,
    /// Also those that take long and ask for little that others do not.
    #[arg(long)]
    pub soak: bool,
    /// With this containerd.
    #[arg(long, value_enum, default_value_t)]
    pub containerd: Containerd,
}

impl Selection {
    fn has(&self, test: &Test) -> bool {
        let word = self.e2e.as_deref().unwrap_or_default();
        let meant = self.soak || !test.soak || test.name == word;
        let possible = !test.sandbox_api || self.containerd.has_sandbox_api();
        meant && possible && test.name.contains(word)
    }
}

/// What is still to be done and how the rest went.
struct Progress {
    waiting: Vec<Test>,
    /// Which lab has, or soon has, the images that tests need.
    images: HashMap<String, usize>,
    all: usize,
    ended: usize,
    failed: Vec<String>,
}

/// Runs the selected tests; the exit code is 0 when all were run and passed.
pub fn run(programs: &Programs, selection: &Selection) -> Result<i32> {
    let mut tests = list(programs)?;
    tests.retain(|test| selection.has(test));
    ensure!(!tests.is_empty(), "no end-to-end test has such a name");
    // What takes longest begins first, so that the labs end at about the same time.
    tests.sort_by_key(|test| !(test.long || test.soak));
    let all = tests.len();
    let (labs, cpus) = size_of_labs()?;
    let labs = labs.min(all);
    let started = Instant::now();
    let progress = Mutex::new(Progress {
        waiting: tests,
        images: HashMap::new(),
        all,
        ended: 0,
        failed: Vec::new(),
    });
    eprintln!("==> Running {all} end-to-end tests in {labs} labs");
    let broken: Vec<_> = thread::scope(|scope| {
        let progress = &progress;
        let workers: Vec<_> = (0..labs)
            .map(|number| scope.spawn(move || use_lab(programs, selection, number, cpus, progress)))
            .collect();
        let ends = workers.into_iter().map(|worker| match worker.join() {
            Ok(end) => end.err(),
            Err(panic) => std::panic::resume_unwind(panic),
        });
        ends.flatten().collect()
    });
    let progress = progress
        .into_inner()
        .unwrap_or_else(PoisonError::into_inner);
    let passed = progress.ended - progress.failed.len();
    eprintln!(
        "    {passed} of {all} end-to-end tests passed in {:.0} s",
        started.elapsed().as_secs_f32()
    );
    for name in &progress.failed {
        eprintln!("    FAILED: {name}");
    }
    for error in &broken {
        eprintln!("    A lab itself failed: {error:#}");
    }
    Ok(i32::from(passed < all || !broken.is_empty()))
}

/// Asks the tests' program, which is static and runs here too.
fn list(programs: &Programs) -> Result<Vec<Test>> {
    let output = Command::new(&programs.tests)
        .arg("list")
        .output()
        .with_context(|| format!("run {}", programs.tests.display()))?;
    ensure!(output.status.success(), "the tests cannot be listed");
    let lines = output.stdout.split(|byte| *byte == b'\n');
    lines
        .filter(|line| !line.is_empty())
        .map(|line| serde_json::from_slice(line).context("a test of an unknown form"))
        .collect()
}

/// As many as the machine has CPUs and memory for, and how many CPUs each has.
fn size_of_labs() -> Result<(usize, u32)> {
    let meminfo = fs::read_to_string("/proc/meminfo").context("read /proc/meminfo")?;
    let available = meminfo
        .lines()
        .find_map(|line| line.strip_prefix("MemAvailable:"))
        .and_then(|rest| rest.split_whitespace().next()?.parse::<usize>().ok())
        .context("no MemAvailable in /proc/meminfo")?;
    let cpus = thread::available_parallelism().map_or(1, usize::from);
    let labs = cpus.min(available / LAB_MEMORY).clamp(1, MOST_LABS);
    Ok((labs, if cpus / labs > 1 { 2 } else { 1 }))
}

/// Starts a lab and runs tests in it until none is left. An image is imported in one lab, which runs the
/// tests that need it before all others.
fn use_lab(
    programs: &Programs,
    selection: &Selection,
    number: usize,
    cpus: u32,
    progress: &Mutex<Progress>,
) -> Result<()> {
    let name = format!("test-{}-{number}", std::process::id());
    let lab = Lab::start(&LabOptions {
        name,
        cpus,
        containerd: selection.containerd.version(),
        ..LabOptions::default()
    })?;
    let step = Step::announce("Installing Bulkhead and its tests in the lab");
    install::install_in_lab(&programs.built, &lab)?;
    lab.push(&programs.tests, E2E)?;
    lab.push(&programs.open_vmm, OPEN_VMM)?;
    lab.push(&programs.held_shim, HELD_SHIM)?;
    step.done();
    let mut all_passed = true;
    let result = loop {
        let Some((test, missing)) = lock(progress).next(number) else {
            break Ok(());
        };
        if let Some(image) = missing
            && let Err(error) = load_image(&lab, &image)
        {
            break Err(error);
        }
        match run_test(&lab, &test, progress) {
            Ok(passed) => all_passed &= passed,
            Err(error) => break Err(error),
        }
    };
    if !all_passed || result.is_err() {
        save_logs(&lab, &format!("test-{number}"));
    }
    result
}

impl Progress {
    /// Takes the next test for this lab, and the image that it must be given before.
    fn next(&mut self, lab: usize) -> Option<(Test, Option<String>)> {
        let owner = |test: &Test| Some(self.images.get(test.image.as_ref()?).copied());
        let position = |wanted| self.waiting.iter().position(|test| owner(test) == wanted);
        let own = position(Some(Some(lab)));
        let index = own
            .or_else(|| position(Some(None)))
            .or_else(|| position(None))?;
        let test = self.waiting.remove(index);
        let missing = if own.is_none() {
            test.image.clone()
        } else {
            None
        };
        if let Some(image) = &missing {
            self.images.insert(image.clone(), lab);
        }
        Some((test, missing))
    }
}

/// Runs one test; whether it passed. An error is the lab's.
fn run_test(lab: &Lab, test: &Test, progress: &Mutex<Progress>) -> Result<bool> {
    let started = Instant::now();
    let arguments = [E2E, "--include-ignored", "--exact", &test.name];
    let result = lab.exec(arguments).limit(TEST_LIMIT).run();
    let seconds = started.elapsed().as_secs_f32();
    let mut progress = lock(progress);
    progress.ended += 1;
    let (ended, all) = (progress.ended, progress.all);
    let passed = matches!(&result, Ok(output) if output.status == 0);
    let word = if passed { "PASS" } else { "FAIL" };
    println!("{word} {seconds:6.1} s ({ended:2}/{all}) {}", test.name);
    if passed {
        return Ok(true);
    }
    progress.failed.push(test.name.clone());
    // With the lock held, so that nobody's lines come between.
    match result {
        Ok(output) => {
            println!("{}", String::from_utf8_lossy(&output.stderr));
            println!("{}", String::from_utf8_lossy(&output.stdout));
            Ok(false)
        }
        // The next test finds out whether the lab is in order.
        Err(error @ Error::Timeout { .. }) => {
            println!("{error}");
            Ok(false)
        }
        Err(error) => {
            let name = &test.name;
            bail!(anyhow::Error::from(error).context(format!("it ended during the test {name:?}")))
        }
    }
}

fn lock(progress: &Mutex<Progress>) -> MutexGuard<'_, Progress> {
    progress.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_image_is_given_to_one_lab_which_runs_the_tests_that_need_it() {
        let test = |name: &str, image: Option<&str>| Test {
            name: name.to_owned(),
            image: image.map(str::to_owned),
            long: false,
            soak: false,
            sandbox_api: false,
        };
        let mut progress = Progress {
            waiting: vec![
                test("plain", None),
                test("first", Some("a")),
                test("second", Some("a")),
                test("other", Some("b")),
            ],
            images: HashMap::new(),
            all: 4,
            ended: 0,
            failed: Vec::new(),
        };
        let mut next = |lab| {
            let (test, missing) = progress.next(lab)?;
            Some((test.name, missing))
        };
        let given =
            |name: &str, image: Option<&str>| Some((name.to_owned(), image.map(str::to_owned)));
        assert_eq!(next(0), given("first", Some("a")));
        assert_eq!(next(1), given("other", Some("b")));
        assert_eq!(next(1), given("plain", None));
        assert_eq!(next(1), None);
        assert_eq!(next(0), given("second", None));
        assert_eq!(next(0), None);
    }
}
