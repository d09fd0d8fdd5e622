//! A hostile process of a container: what it can do to processes that come into the container, and
//! to the directories that others mount onto.

use std::collections::BTreeSet;
use std::fs::{self, OpenOptions};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::{CWD, RenameFlags, renameat_with};

use super::{Report, outcome};

/// A file that the guest's own root has, and no container.
const GUEST_FILE: &str = "init";

/// Until standard input ends, tries everything on each process that runs no program of this
/// container: the agent's, on its way into it. Reports each attempt's outcomes.
pub(super) fn watch() -> Result<Report> {
    let own: BTreeSet<u64> = ["/", "/proc/self/exe"]
        .iter()
        .map(|path| Ok(fs::metadata(path)?.dev()))
        .collect::<Result<_>>()?;
    let mut seen = Seen::default();
    println!("watching");
    while !input_ended()? {
        for entry in fs::read_dir("/proc")?.flatten() {
            let name = entry.file_name();
            if name.to_string_lossy().parse::<u32>().is_ok() {
                seen.process(&entry.path(), &own);
            }
        }
    }
    let strangers = seen.strangers.len();
    let outcomes = seen.outcomes.into_iter();
    let mut report: Report = outcomes
        .map(|(attempt, outcomes)| {
            let all: Vec<_> = outcomes.into_iter().collect();
            (attempt, all.join(" "))
        })
        .collect();
    report.insert("strangers".into(), strangers.to_string());
    Ok(report)
}

/// Until standard input ends, swaps two names in the current directory.
pub(super) fn swap(one: &Path, other: &Path) -> Result<()> {
    println!("swapping");
    while !input_ended()? {
        renameat_with(CWD, one, CWD, other, RenameFlags::EXCHANGE).context("swap the names")?;
    }
    Ok(())
}

fn input_ended() -> Result<bool> {
    let stdin = rustix::stdio::stdin();
    let mut polled = [PollFd::new(&stdin, PollFlags::IN)];
    Ok(poll(&mut polled, Some(&Timespec::default()))? > 0)
}

#[derive(Default)]
struct Seen {
    strangers: BTreeSet<PathBuf>,
    outcomes: std::collections::BTreeMap<String, BTreeSet<String>>,
}

impl Seen {
    fn process(&mut self, process: &Path, own: &BTreeSet<u64>) {
        let exe = process.join("exe");
        // Whoever runs a file of this container is one of its own.
        if fs::metadata(&exe).is_ok_and(|exe| own.contains(&exe.dev())) {
            return;
        }
        let open = |path: PathBuf, write: bool| {
            let mut options = OpenOptions::new();
            options.read(true).write(write);
            outcome(options.custom_flags(libc::O_NONBLOCK).open(path))
        };
        self.note("write its program", open(exe.clone(), true));
        let is_hidden = || fs::read_link(&exe).is_err();
        if !is_hidden() {
            return;
        }
        let mut attempts = vec![("write its memory", open(process.join("mem"), true))];
        let mut try_guest = |attempt, directory: PathBuf| {
            attempts.push((attempt, open(directory.join(GUEST_FILE), false)));
        };
        try_guest("the guest by its root", process.join("root"));
        try_guest("the guest by its cwd", process.join("cwd"));
        for number in 0..16 {
            let fd = process.join("fd").join(number.to_string());
            try_guest("the guest above its descriptors", fd.join("../../../.."));
            try_guest("the guest by its descriptors", fd);
        }
        // It may have become one of the container's meanwhile, which is what it came for.
        if is_hidden() {
            self.strangers.insert(process.to_owned());
            for (attempt, outcome) in attempts {
                self.note(attempt, outcome);
            }
        }
    }

    fn note(&mut self, attempt: &str, outcome: String) {
        let outcomes = self.outcomes.entry(attempt.to_owned()).or_default();
        outcomes.insert(outcome);
    }
}
