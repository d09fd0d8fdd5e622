//! A running lab: starting it in this process or supervising it for others.

use std::fs::{self, File, OpenOptions};
use std::io::{Read, Write};
use std::ops::Deref;
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::mpsc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use rustix::fs::{FlockOperation, flock};
use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};
use tokio::sync::oneshot;

use crate::cache::{Cache, remove_tree};
use crate::client::Client;
use crate::command::{file_tail, poll_until};
use crate::error::{Context, Error};
use crate::machine::Machine;
use crate::protocol::Containerd;
use crate::{hub, image, tools};

/// How a lab is to be started.
#[derive(Debug, Clone)]
pub struct LabOptions {
    /// Tells labs that run at the same time apart.
    pub name: String,
    /// Count instructions instead of time: one CPU whose clock advances 1 ns each instruction.
    pub metered: bool,
    /// Start this containerd and import the images that are to be there.
    pub containerd: Option<Containerd>,
    /// The lab's memory in MiB.
    pub memory_mib: u32,
    /// CPUs that programs run on; a metered lab has one.
    pub cpus: u32,
}

impl Default for LabOptions {
    fn default() -> Self {
        LabOptions {
            name: "default".into(),
            metered: false,
            containerd: Some(Containerd::V1),
            memory_mib: 6144,
            cpus: 2,
        }
    }
}

/// Where a lab keeps its socket, console log and lock.
#[derive(Debug, Clone)]
pub struct LabState {
    name: String,
    directory: PathBuf,
}

impl LabState {
    /// The state of the lab named `name`, running or not.
    pub fn named(name: &str) -> Result<Self, Error> {
        let plain = |c: char| c.is_ascii_alphanumeric() || c == '-' || c == '_';
        if name.is_empty() || !name.chars().all(plain) {
            return Err(Error::Path {
                path: name.into(),
                reason: "a lab's name has letters, digits, - and _ only".into(),
            });
        }
        let directory = Cache::open()?.root().join("labs").join(name);
        // sockaddr_un holds 108 bytes with the final zero, see unix(7).
        if directory.join("socket").as_os_str().len() > 107 {
            return Err(Error::Path {
                path: directory,
                reason: "too long for a socket's address; set BULKHEAD_CACHE to a shorter one"
                    .into(),
            });
        }
        Ok(LabState {
            name: name.into(),
            directory,
        })
    }

    /// The lab's name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The log of the lab's serial console.
    pub fn console(&self) -> PathBuf {
        self.file("console.log")
    }

    /// The log of the process that supervises the lab in the background.
    pub fn supervisor_log(&self) -> PathBuf {
        self.file("supervisor.log")
    }

    /// Whether a lab of this name is running.
    pub fn is_up(&self) -> Result<bool, Error> {
        if !self.directory.exists() {
            return Ok(false);
        }
        let lock = self.append("lock")?;
        Ok(flock(lock.as_fd(), FlockOperation::NonBlockingLockExclusive).is_err())
    }

    /// Ends the lab of this name and waits until it is gone.
    pub fn down(&self) -> Result<(), Error> {
        let limit = Duration::from_secs(20);
        let gone = || Error::NotUp {
            name: self.name.clone(),
        };
        if !self.is_up()? {
            return Err(gone());
        }
        let mut pid = String::new();
        File::open(self.file("lock"))
            .and_then(|mut file| file.read_to_string(&mut pid))
            .context(|| format!("read {}", self.file("lock").display()))?;
        let pid = pid.trim().parse().ok().and_then(Pid::from_raw);
        let pid = pid.ok_or_else(gone)?;
        let pidfd =
            pidfd_open(pid, PidfdFlags::empty()).context(|| format!("watch process {pid:?}"))?;
        pidfd_send_signal(&pidfd, Signal::TERM).context(|| format!("signal process {pid:?}"))?;
        let ended = poll_until(&pidfd, Instant::now() + limit)
            .context(|| format!("wait for process {pid:?}"))?;
        if !ended {
            pidfd_send_signal(&pidfd, Signal::KILL).context(|| format!("kill process {pid:?}"))?;
            return Err(self.timed_out("ending the lab", limit));
        }
        Ok(())
    }

    pub(crate) fn directory(&self) -> &Path {
        &self.directory
    }

    pub(crate) fn file(&self, name: &str) -> PathBuf {
        self.directory.join(name)
    }

    pub(crate) fn socket(&self) -> PathBuf {
        self.file("socket")
    }

    pub(crate) fn append(&self, name: &str) -> Result<File, Error> {
        let path = self.file(name);
        OpenOptions::new()
            .append(true)
            .create(true)
            .open(&path)
            .context(|| format!("open {}", path.display()))
    }

    pub(crate) fn connect(&self) -> Result<UnixStream, Error> {
        UnixStream::connect(self.socket())
            .context(|| format!("connect to {}", self.socket().display()))
    }

    pub(crate) fn died(&self, doing: &str) -> Error {
        Error::Died {
            doing: doing.into(),
            console: self.last_words(),
        }
    }

    pub(crate) fn timed_out(&self, doing: &str, limit: Duration) -> Error {
        Error::Timeout {
            doing: doing.into(),
            limit,
            console: self.last_words(),
        }
    }

    fn last_words(&self) -> String {
        let qemu = file_tail(&self.file("qemu.log"));
        // Harmless, and printed at every start: features of the CPU model that TCG lacks.
        let qemu = qemu
            .lines()
            .filter(|line| !line.contains("TCG doesn't support"));
        let qemu: Vec<&str> = qemu.collect();
        file_tail(&self.console()) + &qemu.join("\n")
    }

    /// Takes the lab's name: an empty directory and a lock that lives as long as this process.
    fn claim(&self) -> Result<File, Error> {
        fs::create_dir_all(&self.directory)
            .context(|| format!("create {}", self.directory.display()))?;
        let mut lock = self.append("lock")?;
        flock(lock.as_fd(), FlockOperation::NonBlockingLockExclusive).map_err(|_| {
            Error::AlreadyUp {
                name: self.name.clone(),
            }
        })?;
        for entry in ["socket", "console.log", "qemu.log", "initramfs.cpio"] {
            match fs::remove_file(self.file(entry)) {
                Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                    return Err(error).context(|| format!("remove {}", self.file(entry).display()));
                }
                _ => {}
            }
        }
        lock.set_len(0)
            .and_then(|()| writeln!(lock, "{}", std::process::id()))
            .context(|| format!("write {}", self.file("lock").display()))?;
        Ok(lock)
    }
}

/// A lab of this process. It ends when this is dropped, and with the process.
pub struct Lab {
    client: Client,
    state: LabState,
    stop: Option<oneshot::Sender<()>>,
    supervisor: Option<JoinHandle<()>>,
}

impl Lab {
    /// Builds what is missing, boots a lab and waits until it is ready.
    pub fn start(options: &LabOptions) -> Result<Self, Error> {
        let machine = machine()?;
        let state = LabState::named(&options.name)?;
        let lock = state.claim()?;
        let (stop, stopped) = oneshot::channel();
        let (report, started) = mpsc::channel();
        let supervisor = std::thread::spawn({
            let (state, options) = (state.clone(), options.clone());
            move || {
                let _lock = lock;
                let ready = report.clone();
                let stop = async { stopped.await.unwrap_or(()) };
                let on_ready = move || drop(ready.send(Ok(())));
                // After the lab was ready nobody listens: its users notice its death themselves.
                drop(report.send(run(&state, &options, &machine, on_ready, stop)));
            }
        });
        let mut lab = Lab {
            client: Client::of(state.clone()),
            state,
            stop: Some(stop),
            supervisor: Some(supervisor),
        };
        match started.recv() {
            Ok(Ok(())) => Ok(lab),
            Ok(Err(error)) => {
                lab.stop = None;
                Err(error)
            }
            Err(_) => Err(lab.state.died("it was starting")),
        }
    }

    /// Where its console log is, while it runs.
    pub fn state(&self) -> &LabState {
        &self.state
    }
}

impl Deref for Lab {
    type Target = Client;

    fn deref(&self) -> &Client {
        &self.client
    }
}

impl Drop for Lab {
    fn drop(&mut self) {
        if let Some(stop) = self.stop.take() {
            // Fails when the lab has died before.
            let _ = stop.send(());
        }
        if let Some(supervisor) = self.supervisor.take() {
            // A panic there was already printed.
            let _ = supervisor.join();
        }
        // What is left of its state takes no name and is overwritten by a namesake.
        let _ = remove_tree(self.state.directory());
    }
}

/// Supervises a lab for other processes until SIGTERM or SIGINT: builds, boots, calls `ready`.
pub fn serve(options: &LabOptions, ready: impl FnOnce()) -> Result<(), Error> {
    let machine = machine()?;
    let state = LabState::named(&options.name)?;
    let _lock = state.claim()?;
    let stop = async {
        use tokio::signal::unix::{SignalKind, signal};
        let wait = |kind| async move {
            match signal(kind) {
                Ok(mut signal) => drop(signal.recv().await),
                Err(_) => std::future::pending().await,
            }
        };
        tokio::select! {
            () = wait(SignalKind::terminate()) => {}
            () = wait(SignalKind::interrupt()) => {}
        }
    };
    run(&state, options, &machine, ready, stop)?;
    // Only after a failure is there something to look at.
    remove_tree(state.directory())
}

fn run(
    state: &LabState,
    options: &LabOptions,
    machine: &Machine,
    ready: impl FnOnce(),
    stop: impl Future<Output = ()>,
) -> Result<(), Error> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .context(|| "start an async runtime")?;
    runtime.block_on(hub::supervise(state, options, machine, ready, stop))
}

/// Builds the Debian systems that every lab and most tests take from the cache, unless they are there.
/// Mostly it waits for packages, so it goes well beside a build.
pub fn prepare_images() -> Result<(), Error> {
    let cache = Cache::open()?;
    tools::install_host_packages(tools::LAB_HOST_PACKAGES)?;
    tools::qemu(&cache)?;
    image::root_image(&cache)?;
    image::debian_archive(&cache, "debian-dev")?;
    Ok(())
}

/// Builds, or finds in the cache, everything a lab boots from.
fn machine() -> Result<Machine, Error> {
    let cache = Cache::open()?;
    tools::install_host_packages(tools::LAB_HOST_PACKAGES)?;
    Ok(Machine {
        qemu_root: tools::qemu(&cache)?,
        image: image::root_image(&cache)?,
        agent: tools::lab_agent()?,
    })
}
