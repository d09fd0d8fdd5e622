//! Driving Docker, as a user does: a daemon of the test's own, which ends with everything of it.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, ensure};
use rustix::mount::{UnmountFlags, unmount};
use rustix::process::{Signal, kill_process};

use crate::command::{DEADLINE, Finished, Input, Running};
use crate::ctr::{self, ctr};
use crate::host;
use crate::network;

/// The image in every daemon.
pub const BUSYBOX: &str = "busybox";

/// The parent of its containers' cgroups, which the daemon leaves.
const CGROUP: &str = "/sys/fs/cgroup/docker";

/// Where the daemon looks for plug-ins, whatever it was told; it makes the directory and leaves it.
const PLUGINS: &str = "/run/docker";

/// How long the path of the directory of layers is, so that the options of a container's overlay are
/// more than a page, and those of the overlay that the daemon tries at its start less: each names four
/// directories below it, and the container's have the longer names.
const DEEP: usize = 975;

/// What keeps a daemon from touching the host's network.
const NO_NETWORKS: [&str; 3] = ["--iptables=false", "--ip6tables=false", "--bridge=none"];

/// The bridge of a daemon with networks, which it leaves.
const BRIDGE: &str = "docker0";

/// Where [`Docker::server`] has this program, and the port at which it answers.
const SERVE: [&str; 4] = ["/probe", "probe", "serve", "7000"];

/// A daemon with the image of busybox alone. It ends with [`Docker::end`].
pub struct Docker {
    runtime: String,
    home: PathBuf,
    data: PathBuf,
    flags: Vec<&'static str>,
    /// This program as a volume.
    probe: String,
    daemon: Option<Running>,
    /// The directory for plug-ins was not there before.
    makes_plugins: bool,
}

impl Docker {
    /// Starts a daemon whose containers have this runtime.
    pub fn start(runtime: &str, flags: &[&'static str]) -> Result<Self> {
        let flags = [&NO_NETWORKS, flags].concat();
        Self::start_in(runtime, &flags, |home| home.join("data"))
    }

    /// A daemon with networks.
    pub fn start_networked(runtime: &str) -> Result<Self> {
        Self::start_in(runtime, &[], |home| home.join("data"))
    }

    /// As [`Docker::start`], in a directory whose name is so long that the daemon names a container's
    /// layers relative to it, and not so long that it gives up overlays.
    pub fn start_deep(runtime: &str, flags: &[&'static str]) -> Result<Self> {
        let flags = [&NO_NETWORKS, flags].concat();
        Self::start_in(runtime, &flags, |home| {
            let home = home.display().to_string();
            let missing = DEEP - home.len() - "/overlay2".len();
            let names = (0..missing).map(|at| if at % 200 == 0 { '/' } else { 'd' });
            PathBuf::from(home + &names.collect::<String>())
        })
    }

    fn start_in(
        runtime: &str,
        flags: &[&'static str],
        data: impl FnOnce(&Path) -> PathBuf,
    ) -> Result<Self> {
        // Not in memory: Docker's layers need a disk below them.
        let home = PathBuf::from(format!("/var/tmp/e2e-docker-{}", std::process::id()));
        fs::create_dir(&home).with_context(|| format!("cannot create {}", home.display()))?;
        let mut docker = Self {
            runtime: runtime.to_owned(),
            data: data(&home),
            home,
            flags: flags.to_vec(),
            probe: format!("{}:{}:ro", std::env::current_exe()?.display(), SERVE[0]),
            daemon: None,
            makes_plugins: !Path::new(PLUGINS).exists(),
        };
        docker.resume()?;
        let archive = docker.file("busybox.tar");
        ctr(&["image", "export", &archive, ctr::BUSYBOX])?.succeeds()?;
        docker.docker(&["load", "-i", &archive])?.succeeds()?;
        Ok(docker)
    }

    /// Starts a daemon that was killed.
    pub fn resume(&mut self) -> Result<()> {
        let mut command = Command::new("dockerd");
        command
            .arg("--containerd=/run/containerd/containerd.sock")
            .arg(format!("--host={}", self.host()))
            .arg(format!("--data-root={}", self.data.display()))
            .arg(format!("--exec-root={}", self.file("exec")))
            .arg(format!("--pidfile={}", self.file("pid")))
            .args(&self.flags);
        let daemon = Running::spawn(command, Input::Null)?;
        daemon.stderr.expect("API listen on", DEADLINE)?;
        self.daemon = Some(daemon);
        Ok(())
    }

    /// Kills the daemon.
    pub fn kill(&mut self) -> Result<()> {
        let daemon = self.daemon.take().context("the daemon does not run")?;
        kill_process(daemon.pid(), Signal::KILL)?;
        daemon.finish()?.exits_with(137)?;
        Ok(())
    }

    /// Ends the daemon and its containers. What it kept is removed.
    pub fn end(mut self) -> Result<()> {
        let removed = self.remove_all();
        let ended = self.stop();
        removed?;
        ended?;
        let left = ctr(&["--namespace", "moby", "container", "ls", "-q"])?.succeeds()?;
        ensure!(left.is_empty(), "containerd has containers left: {left}");
        Ok(())
    }

    fn remove_all(&self) -> Result<()> {
        let ids = self.docker(&["ps", "-aq"])?.succeeds()?;
        let ids: Vec<&str> = ids.split_whitespace().collect();
        if !ids.is_empty() {
            self.docker(&[&["rm", "-f"], &*ids].concat())?.succeeds()?;
        }
        self.docker(&["network", "prune", "-f"])?.succeeds()?;
        Ok(())
    }

    fn stop(&mut self) -> Result<()> {
        if let Some(daemon) = self.daemon.take() {
            kill_process(daemon.pid(), Signal::TERM)?;
            daemon.finish()?.exits_with(0)?;
        }
        if !self.flags.contains(&"--bridge=none") {
            network::ip(&format!("link delete {BRIDGE}"))?;
        }
        if Path::new(CGROUP).exists() {
            fs::remove_dir(CGROUP).with_context(|| format!("cannot remove {CGROUP}"))?;
        }
        if self.makes_plugins && Path::new(PLUGINS).exists() {
            fs::remove_dir_all(PLUGINS).with_context(|| format!("cannot remove {PLUGINS}"))?;
        }
        // The namespace of containers in the host's network is kept by its name.
        let host_network = self.home.join("exec/netns/default");
        if self.mounted_at(&host_network)? {
            unmount(&host_network, UnmountFlags::NOFOLLOW).context("cannot unmount a namespace")?;
        }
        // A killed daemon's mount of its directory on itself stays, and the next one's is not made.
        if self.mounted_at(&self.data)? {
            unmount(&self.data, UnmountFlags::NOFOLLOW).context("cannot unmount the data")?;
        }
        fs::remove_dir_all(&self.home)
            .with_context(|| format!("cannot remove {}", self.home.display()))
    }

    /// Where the daemon listens, as `DOCKER_HOST` says it.
    pub fn host(&self) -> String {
        format!("unix://{}", self.file("socket"))
    }

    /// A file in the daemon's directory.
    pub fn file(&self, name: &str) -> String {
        self.home.join(name).display().to_string()
    }

    /// A file in the daemon's directory with this content.
    pub fn write(&self, name: &str, content: &str) -> Result<String> {
        let path = self.file(name);
        fs::write(&path, content).with_context(|| format!("cannot write {path}"))?;
        Ok(path)
    }

    /// The `docker` command with these arguments.
    pub fn command(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new("docker");
        command.args(["--host", &self.host()]).args(arguments);
        command
    }

    /// Starts `docker` with these arguments.
    pub fn spawn(&self, arguments: &[&str], input: Input) -> Result<Running> {
        Running::spawn(self.command(arguments), input)
    }

    /// Runs `docker` with these arguments to its end, whatever its exit code.
    pub fn docker(&self, arguments: &[&str]) -> Result<Finished> {
        self.spawn(arguments, Input::Null)?.finish()
    }

    /// The arguments of `docker run` for this command in busybox.
    pub fn run<'a>(&'a self, flags: &[&'a str], command: &[&'a str]) -> Vec<&'a str> {
        let first = ["run", "--runtime", &self.runtime, "--network", "none"];
        [&first[..], flags, &[BUSYBOX], command].concat()
    }

    /// The arguments of `docker run` for this program's probe in busybox.
    pub fn with_probe<'a>(
        &'a self,
        runtime: &'a str,
        flags: &[&'a str],
        words: &[&'a str],
    ) -> Vec<&'a str> {
        let first = ["run", "--runtime", runtime, "--volume", &self.probe];
        [&first[..], flags, &[BUSYBOX, SERVE[0], SERVE[1]], words].concat()
    }

    /// Starts a container that answers at a port, and waits until it does.
    pub fn server(&self, runtime: &str, flags: &[&str]) -> Result<Running> {
        let flags = [&["--rm", "-i"], flags].concat();
        let client = self.spawn(&self.with_probe(runtime, &flags, &SERVE[2..]), Input::Open)?;
        client.expect("ready")?;
        Ok(client)
    }

    /// What a script says in a container.
    pub fn exec(&self, name: &str, script: &str) -> Result<String> {
        self.docker(&["exec", name, "sh", "-c", script])?.succeeds()
    }

    /// `docker inspect` of one thing.
    pub fn inspect(&self, name: &str, format: &str) -> Result<String> {
        let said = self
            .docker(&["inspect", "--format", format, name])?
            .succeeds()?;
        Ok(said.trim_end().to_owned())
    }

    /// Whether something is mounted right there.
    fn mounted_at(&self, path: &Path) -> Result<bool> {
        let mounts = self.mounts()?;
        let path = path.display().to_string();
        Ok(mounts
            .iter()
            .any(|mount| mount.split(' ').nth(4) == Some(&path)))
    }

    /// What is mounted below the daemon's directory, as lines of mountinfo.
    fn mounts(&self) -> Result<Vec<String>> {
        let table = host::read(Path::new("/proc/self/mountinfo"))?;
        let home = self.home.display().to_string();
        let lines = table.lines().filter(|line| line.contains(&home));
        Ok(lines.map(str::to_owned).collect())
    }

    /// What is mounted as a container's root, as lines of mountinfo.
    pub fn roots(&self) -> Result<Vec<String>> {
        let mut mounts = self.mounts()?;
        mounts.retain(|mount| mount.contains("/merged "));
        Ok(mounts)
    }
}

impl Drop for Docker {
    fn drop(&mut self) {
        if self.daemon.is_some() {
            // After a failure, which says more than another one here.
            let _ = self.remove_all();
            let _ = self.stop();
        }
    }
}
