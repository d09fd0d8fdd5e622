//! Where a container's output goes: files, logging programs, nowhere, and readers that do not read.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;

use anyhow::{Context, Result, ensure};
use rustix::process::{Signal, kill_process};

use super::events::Listener;
use super::{Case, Setting, case};
use crate::ctr::{RUNC, Run, ctr};
use crate::host::{self, Pod};
use crate::pattern::compare;

/// More than everything on the way can hold.
const UNREAD: u64 = 8 << 20;

/// What of it the shim may hold, with all else that it has, in KiB.
const MOST_SHIM_KIB: u64 = 16 * 1024;

pub fn cases() -> Vec<Case> {
    vec![
        case(
            "output goes to a file, to a logging program or nowhere",
            places,
        ),
        case(
            "a container waits for a reader that does not read",
            slow_reader,
        ),
        case(
            "an exec ends with its command, whoever keeps its output",
            kept_output,
        ),
    ]
}

/// What a container of this runtime leaves at each place.
fn left_by(runtime: &str, directory: &Path) -> Result<Vec<String>> {
    let path = |name: &str| directory.join(name).to_string_lossy().into_owned();
    let script = "echo to stdout; echo to stderr >&2; exit 3";
    let log = format!("file://{}", path("new/directory/both"));
    let logger = format!("binary://{}?first=one&second=two", path("logger"));
    let program = format!(
        "#!/bin/sh\nexec 6>&5 5>&-\n(cat <&3 >{0}/out) 6>&- & (cat <&4 >{0}/err) 6>&- &\n\
         printf '%s %s\\n' \"$@\" | sort >{0}/arguments; echo $CONTAINER_NAMESPACE $CONTAINER_ID >{0}/names\n\
         echo >&6; exec 6>&-; wait; echo >{0}/done\n",
        directory.display()
    );
    fs::write(directory.join("logger"), program)?;
    fs::set_permissions(directory.join("logger"), fs::Permissions::from_mode(0o755))?;
    let mut found = Vec::new();
    for flags in [
        &["--log-uri", log.as_str()][..],
        &["--log-uri", logger.as_str()],
        &["--null-io"],
    ] {
        let events = Listener::start()?;
        let container = Run::new(runtime)
            .flags(flags)
            .detach(&["sh", "-c", script])?;
        let id = container.id();
        events.expect(&format!("/tasks/exit {{\"container_id\":\"{id}\""))?;
        // When it is deleted, all of its output has gone where it goes.
        let _ = ctr(&["task", "delete", id])?;
        let names = ["new/directory/both", "out", "err", "arguments", "names"];
        for name in names {
            let text = fs::read_to_string(directory.join(name)).unwrap_or_default();
            let text = text.replace(container.id(), "ID");
            // Two streams come to a file in any order.
            let mut lines: Vec<&str> = text.split_inclusive('\n').collect();
            lines.sort_unstable();
            found.push(format!("{name}: {}", lines.concat()));
            let _ = fs::remove_file(directory.join(name));
        }
    }
    Ok(found)
}

fn places(setting: &Setting) -> Result<()> {
    let directory = tempfile::tempdir()?;
    let left = |runtime: &str, name: &str| {
        let directory = directory.path().join(name);
        fs::create_dir(&directory)?;
        left_by(runtime, &directory)
    };
    let (runc, tested) = (left(RUNC, "a")?, left(&setting.runtime, "b")?);
    ensure!(runc == tested, "runc: {runc:#?}\ntested: {tested:#?}");
    let everything = runc.concat();
    // In any order, as Go's.
    for part in [
        "to stdout",
        "to stderr",
        "first one\nsecond two",
        "default ID",
    ] {
        ensure!(everything.contains(part), "no {part:?} in {runc:#?}");
    }
    Ok(())
}

fn slow_reader(setting: &Setting) -> Result<()> {
    let length = UNREAD.to_string();
    let started = setting.container().with_probe()?.spawn(&[
        crate::ctr::PROBE,
        "probe",
        "stream",
        &length,
    ])?;
    // Before it has read much, if anything.
    while started.container.task()?.is_none_or(|task| task.pid == 0) {}
    kill_process(started.client.pid(), Signal::STOP)?;
    let script = "written() { grep wchar /proc/1/io; }
        until [ \"$before\" = \"$(written)\" ]; do before=$(written); sleep 1; done; written";
    let written = started
        .container
        .exec(&[], &["sh", "-c", script])?
        .succeeds()?;
    let written = written.split_whitespace().nth(1);
    let written: u64 = written.context("nothing written")?.parse()?;
    ensure!(written < UNREAD, "{written} bytes went somewhere");
    let shim = Pod::of(started.container.id())?.shim.pid;
    let memory = host::pss_kib(shim)?;
    ensure!(memory < MOST_SHIM_KIB, "the shim has {memory} KiB");
    kill_process(started.client.pid(), Signal::CONT)?;
    let done = started.finish()?.exits_with(0)?;
    compare("stdout", &done.stdout, 1, UNREAD)?;
    compare("stderr", &done.stderr, 2, UNREAD)
}

fn kept_output(setting: &Setting) -> Result<()> {
    let container = setting.container().detach(&["sleep", "1000"])?;
    let script = "sleep 1000 & echo started; exit 4";
    let done = container.exec(&[], &["sh", "-c", script])?.exits_with(4)?;
    ensure!(done.out() == "started\n", "{done}");
    Ok(())
}
