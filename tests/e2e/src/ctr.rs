//! Driving containerd with `ctr`, as a user does.

use std::path::PathBuf;
use std::process::Command;
use std::sync::atomic::{AtomicU32, Ordering};

use anyhow::{Context, Result};

use crate::command::{Finished, Input, Running};

/// The runtime under test, unless another is named.
pub const BULKHEAD: &str = "io.containerd.bulkhead.v2";
/// Bulkhead where containerd makes pods by its sandbox API: a handler of CRI, not a name of the runtime.
pub const SANDBOX: &str = "bulkhead-sandbox";
/// The runtime that it is compared with.
pub const RUNC: &str = "io.containerd.runc.v2";

/// An image of busybox alone.
pub const BUSYBOX: &str = "docker.io/library/busybox:latest";
/// An image of Debian with python3, gcc and dpkg.
pub const DEBIAN: &str = "docker.io/library/debian-dev:latest";
/// An image of Debian with nginx, PostgreSQL, Redis and clients of theirs.
pub const SERVICES: &str = "docker.io/library/debian-services:latest";
/// An image of Debian with Docker.
pub const DOCKER: &str = "docker.io/library/debian-docker:latest";

/// Where the probe (see [`crate::probe`]) is found in a container started with [`Run::probe`].
pub const PROBE: &str = "/probe";

/// Starts `ctr` with these arguments.
pub fn spawn(arguments: &[&str]) -> Result<Running> {
    let mut command = Command::new("ctr");
    command.args(arguments);
    Running::spawn(command, Input::Null)
}

/// Runs `ctr` with these arguments to its end, whatever its exit code.
pub fn ctr(arguments: &[&str]) -> Result<Finished> {
    spawn(arguments)?.finish()
}

/// A container to be: `ctr run` with its options.
pub struct Run {
    id: String,
    runtime: String,
    image: &'static str,
    flags: Vec<String>,
    input: Input,
}

impl Run {
    /// A busybox container under this runtime, with an id of its own.
    pub fn new(runtime: &str) -> Self {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let number = COUNT.fetch_add(1, Ordering::Relaxed);
        Self {
            id: format!("e2e-{}-{number}", std::process::id()),
            runtime: runtime.to_owned(),
            image: BUSYBOX,
            flags: Vec::new(),
            input: Input::Null,
        }
    }

    /// Uses the Debian image.
    pub fn debian(self) -> Self {
        self.image(DEBIAN)
    }

    /// Uses this image.
    pub fn image(mut self, image: &'static str) -> Self {
        self.image = image;
        self
    }

    /// Uses the Debian image with this program at [`PROBE`].
    pub fn probe(self) -> Result<Self> {
        self.debian().with_probe()
    }

    /// Shows this program at [`PROBE`].
    pub fn with_probe(self) -> Result<Self> {
        let own = std::env::current_exe()?;
        let source = own
            .to_str()
            .context("the path of this program is not UTF-8")?;
        let mount = format!("type=bind,src={source},dst={PROBE},options=bind:ro");
        Ok(self.flags(&["--mount", &mount]))
    }

    /// Adds options of `ctr run`.
    pub fn flags(mut self, flags: &[&str]) -> Self {
        self.flags.extend(flags.iter().map(|&flag| flag.to_owned()));
        self
    }

    /// What `ctr run` reads; by default nothing.
    pub fn input(mut self, input: Input) -> Self {
        self.input = input;
        self
    }

    /// The `ctr run` command in the foreground, for those that start it themselves, and what
    /// removes the container should `ctr` not do it.
    pub fn into_command(self, arguments: &[&str]) -> (Command, Container) {
        (
            self.command(&["--rm"], arguments),
            Container { id: self.id },
        )
    }

    fn command(&self, mode: &[&str], arguments: &[&str]) -> Command {
        let mut command = Command::new("ctr");
        command
            .args(["run", "--runtime", &self.runtime])
            .args(mode)
            .args(&self.flags)
            .args([self.image, &self.id])
            .args(arguments);
        command
    }

    /// Starts the container in the foreground; `ctr` removes it at its end.
    pub fn spawn(self, arguments: &[&str]) -> Result<Foreground> {
        let command = self.command(&["--rm"], arguments);
        let container = Container { id: self.id };
        let client = Running::spawn(command, self.input)?;
        Ok(Foreground { client, container })
    }

    /// Runs the container in the foreground to its end, whatever its exit code.
    pub fn run(self, arguments: &[&str]) -> Result<Finished> {
        self.spawn(arguments)?.finish()
    }

    /// Starts the container in the background.
    pub fn detach(self, arguments: &[&str]) -> Result<Container> {
        let command = self.command(&["-d"], arguments);
        // Made first: a failed start, too, must leave nothing behind.
        let container = Container { id: self.id };
        Running::spawn(command, self.input)?
            .finish()?
            .exits_with(0)?;
        Ok(container)
    }
}

/// A `ctr run` in the foreground.
pub struct Foreground {
    /// The `ctr` process.
    pub client: Running,
    /// What it runs.
    pub container: Container,
}

impl Foreground {
    /// Waits for the end of `ctr`.
    pub fn finish(self) -> Result<Finished> {
        let finished = self.client.finish()?;
        if finished.code() == 0 {
            // `ctr run --rm` has removed it.
            self.container.forget();
        }
        Ok(finished)
    }
}

/// A container, removed when dropped.
pub struct Container {
    id: String,
}

impl Container {
    /// A container that exists already.
    pub fn existing(id: String) -> Self {
        Self { id }
    }

    /// Its id.
    pub fn id(&self) -> &str {
        &self.id
    }

    /// The directory on the host that its root file system's changes go to.
    pub fn changes(&self) -> Result<PathBuf> {
        let command = ctr(&["snapshot", "mounts", "/mnt", &self.id])?.succeeds()?;
        command
            .split([',', ' '])
            .find_map(|option| option.strip_prefix("upperdir="))
            .map(|path| path.trim_end().into())
            .with_context(|| format!("no upper directory in {command}"))
    }

    /// Leaves the container to somebody else.
    fn forget(mut self) {
        self.id.clear();
    }

    /// `ctr task exec` of this command.
    pub fn exec(&self, flags: &[&str], arguments: &[&str]) -> Result<Finished> {
        self.spawn_exec(flags, Input::Null, arguments)?.finish()
    }

    /// Starts `ctr task exec` of this command.
    pub fn spawn_exec(&self, flags: &[&str], input: Input, arguments: &[&str]) -> Result<Running> {
        Running::spawn(self.exec_command(flags, arguments), input)
    }

    /// The `ctr task exec` command.
    pub fn exec_command(&self, flags: &[&str], arguments: &[&str]) -> Command {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let exec_id = format!("exec-{}", COUNT.fetch_add(1, Ordering::Relaxed));
        let mut command = Command::new("ctr");
        command
            .args(["task", "exec", "--exec-id", &exec_id])
            .args(flags)
            .arg(&self.id)
            .args(arguments);
        command
    }

    /// `ctr task kill -s SIGNAL`.
    pub fn kill(&self, signal: &str) -> Result<()> {
        ctr(&["task", "kill", "-s", signal, &self.id])?.succeeds()?;
        Ok(())
    }

    /// `ctr task attach`: a client that waits for the container's end.
    pub fn attach(&self) -> Result<Running> {
        spawn(&["task", "attach", &self.id])
    }

    /// The line of `ctr task ls` for this container.
    pub fn task(&self) -> Result<Option<Task>> {
        Ok(tasks()?.into_iter().find(|task| task.id == self.id))
    }

    /// The host process that containerd takes for the container's init.
    pub fn pid(&self) -> Result<i32> {
        let task = self.task()?;
        Ok(task
            .with_context(|| format!("{} has no task", self.id))?
            .pid)
    }
}

impl Drop for Container {
    fn drop(&mut self) {
        if self.id.is_empty() {
            return;
        }
        // Each may find that its work is done already. What really stays behind is found by the
        // comparison after every test.
        let _ = ctr(&["task", "delete", "--force", &self.id]);
        let _ = ctr(&["container", "delete", &self.id]);
        let _ = ctr(&["snapshot", "rm", &self.id]);
    }
}

/// A line of `ctr task ls`.
#[derive(Debug, PartialEq, Eq)]
pub struct Task {
    /// The container's id.
    pub id: String,
    /// The host process.
    pub pid: i32,
    /// As containerd spells it, for example `RUNNING`.
    pub status: String,
}

/// All tasks.
pub fn tasks() -> Result<Vec<Task>> {
    let listing = ctr(&["task", "ls"])?.succeeds()?;
    listing.lines().skip(1).map(parse_task).collect()
}

fn parse_task(line: &str) -> Result<Task> {
    let mut words = line.split_whitespace();
    let mut word = || {
        words
            .next()
            .with_context(|| format!("a task is missing from {line:?}"))
    };
    Ok(Task {
        id: word()?.to_owned(),
        pid: word()?.parse()?,
        status: word()?.to_owned(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_of_the_task_list_is_read() {
        let task = parse_task("c1    4711    RUNNING").unwrap();
        assert_eq!(
            (task.id.as_str(), task.pid, task.status.as_str()),
            ("c1", 4711, "RUNNING")
        );
        assert!(parse_task("c1").is_err());
    }
}
