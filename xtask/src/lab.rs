//! `cargo xtask lab`: labs that stay up in the background.

use std::fs::{self, File};
use std::io::{Read, Write};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use bulkhead_lab::{Cache, Client, Input, Lab, LabOptions, LabState, Step, target_dir};
use clap::{Args, Subcommand, ValueEnum};

use crate::terminal::Terminal;

/// What the supervisor prints when the lab can be used.
const READY: &str = "ready\n";

#[derive(Subcommand)]
pub enum LabTask {
    /// Start a lab in the background and wait until it is ready.
    Up(Up),
    /// Run a command in the lab; its exit code is this command's.
    Exec {
        #[command(flatten)]
        name: Name,
        /// Run it on a terminal.
        #[arg(short)]
        tty: bool,
        /// Add a variable, NAME=VALUE, to its environment.
        #[arg(short, long)]
        env: Vec<String>,
        /// Its working directory.
        #[arg(short = 'w', long)]
        cwd: Option<PathBuf>,
        /// Kill it after this many seconds.
        #[arg(long, default_value_t = 600)]
        timeout: u64,
        /// The command and its arguments.
        #[arg(required = true, trailing_var_arg = true, allow_hyphen_values = true)]
        command: Vec<String>,
    },
    /// Copy a file, or a directory's content, to exactly this path in the lab.
    Push {
        #[command(flatten)]
        name: Name,
        from: PathBuf,
        to: String,
    },
    /// Copy a file, or a directory's content, from the lab to exactly this path.
    Pull {
        #[command(flatten)]
        name: Name,
        from: String,
        to: PathBuf,
    },
    /// Import one of the larger images, docker.io/library/IMAGE:latest, into the lab: debian-dev
    /// (python3, gcc), debian-services (nginx, postgres, redis) or debian-docker (dockerd).
    LoadImage {
        #[command(flatten)]
        name: Name,
        image: String,
    },
    /// Print the lab's serial console.
    Console(Name),
    /// End the lab; everything in it is lost.
    Down(Name),
    /// Supervise a lab; `up` starts this in the background.
    #[command(hide = true)]
    Serve(Up),
}

/// Which of several labs.
#[derive(Args)]
pub struct Name {
    /// The lab's name.
    #[arg(long, default_value = "default")]
    name: String,
}

/// A containerd of the lab's.
#[derive(Clone, Copy, Debug, Default, ValueEnum)]
pub enum Containerd {
    /// containerd 1.7 with runc 1.1.
    #[default]
    #[value(name = "1.7")]
    V1,
    /// containerd 2.1 with runc 1.3.
    #[value(name = "2.1")]
    V2,
    /// None.
    None,
}

impl Containerd {
    /// As the lab knows it.
    pub fn version(self) -> Option<bulkhead_lab::Containerd> {
        match self {
            Self::V1 => Some(bulkhead_lab::Containerd::V1),
            Self::V2 => Some(bulkhead_lab::Containerd::V2),
            Self::None => None,
        }
    }

    /// Whether its lab makes pods by the sandbox API.
    pub fn has_sandbox_api(self) -> bool {
        matches!(self, Self::V2)
    }

    fn name(self) -> &'static str {
        match self {
            Self::V1 => "1.7",
            Self::V2 => "2.1",
            Self::None => "none",
        }
    }
}

#[derive(Args)]
pub struct Up {
    #[command(flatten)]
    name: Name,
    /// Count instructions instead of time: slower, but the same on every machine.
    #[arg(long)]
    metered: bool,
    /// Which containerd to start.
    #[arg(long, value_enum, default_value_t)]
    containerd: Containerd,
    /// The lab's memory in MiB.
    #[arg(long, default_value_t = 6144)]
    memory: u32,
}

/// Runs the task; the result is the process's exit code.
pub fn run(task: LabTask) -> Result<i32> {
    match task {
        LabTask::Up(up) => up_in_background(&up)?,
        LabTask::Serve(up) => serve(&up.options())?,
        LabTask::Exec {
            name,
            tty,
            env,
            cwd,
            timeout,
            command,
        } => return exec(&name, tty, &env, cwd, timeout, command),
        LabTask::Push { name, from, to } => name.client()?.push(&from, &to)?,
        LabTask::Pull { name, from, to } => name.client()?.pull(&from, &to)?,
        LabTask::LoadImage { name, image } => load_image(&name.client()?, &image)?,
        LabTask::Console(name) => {
            let path = name.state()?.console();
            let mut console = File::open(&path).with_context(|| format!("{}", path.display()))?;
            std::io::copy(&mut console, &mut std::io::stdout())?;
        }
        LabTask::Down(name) => name.state()?.down()?,
    }
    Ok(0)
}

/// Supervises a lab; says when it is ready and nothing after, for nobody listens then.
fn serve(options: &LabOptions) -> Result<()> {
    let log = LabState::named(&options.name)?.supervisor_log();
    bulkhead_lab::serve(options, || {
        // The process that waits for this line may have been interrupted.
        let mut stdout = std::io::stdout();
        let _ = stdout
            .write_all(READY.as_bytes())
            .and_then(|()| stdout.flush());
        if let Ok(log) = File::create(log) {
            // Were this to fail, a later message would have no reader.
            let _ =
                rustix::stdio::dup2_stdout(&log).and_then(|()| rustix::stdio::dup2_stderr(&log));
        }
    })?;
    Ok(())
}

/// Puts an image of this name that is built from Debian packages into a lab's containerd.
pub fn load_image(lab: &Client, name: &str) -> Result<()> {
    let archive = bulkhead_lab::debian_archive(&Cache::open()?, name)?;
    let step = Step::start(format!("Importing the image {name} in the lab"));
    let file = File::open(&archive).with_context(|| format!("open {}", archive.display()))?;
    let import = lab
        .exec(["ctr", "image", "import", "-"])
        .stdin(Input::Reader(Box::new(file)))
        .run()?;
    if import.status != 0 {
        bail!(
            "ctr image import: {}",
            String::from_utf8_lossy(&import.stderr)
        );
    }
    step.done();
    Ok(())
}

/// Saves what explains a failure, after one: the lab's console, containerd's log, and the state of
/// pods with their guests' consoles. `what` it ran names the directory.
pub fn save_logs(lab: &Lab, what: &str) {
    let kept = target_dir().join("failed-labs").join(what);
    match save_logs_in(lab, &kept) {
        Ok(()) => eprintln!("The lab's logs are in {}", kept.display()),
        Err(error) => eprintln!("The lab's logs could not all be saved: {error:#}"),
    }
}

fn save_logs_in(lab: &Lab, to: &Path) -> Result<()> {
    if to.exists() {
        fs::remove_dir_all(to).with_context(|| format!("remove {}", to.display()))?;
    }
    fs::create_dir_all(to).with_context(|| format!("create {}", to.display()))?;
    let console = lab.state().console();
    fs::copy(&console, to.join("lab-console.log"))
        .with_context(|| format!("copy {}", console.display()))?;
    let client: &Client = lab;
    client.pull("/var/log/containerd.log", &to.join("containerd.log"))?;
    if client.exec(["test", "-d", "/run/bulkhead"]).run()?.status == 0 {
        client.pull("/run/bulkhead", &to.join("pods"))?;
    }
    Ok(())
}

fn exec(
    name: &Name,
    tty: bool,
    env: &[String],
    cwd: Option<PathBuf>,
    timeout: u64,
    command: Vec<String>,
) -> Result<i32> {
    let mut exec = name
        .client()?
        .exec(command)
        .limit(Duration::from_secs(timeout))
        .stdin(Input::Reader(Box::new(std::io::stdin())));
    for variable in env {
        let Some((name, value)) = variable.split_once('=') else {
            bail!("{variable:?} is not of the form NAME=VALUE");
        };
        exec = exec.env(name, value);
    }
    if let Some(dir) = cwd {
        exec = exec.cwd(dir);
    }
    let mut terminal = None;
    if tty {
        let (raw, size, resizes) = Terminal::raw()?;
        terminal = Some(raw);
        exec = exec.tty(size, resizes);
    }
    let status = exec.stream(&mut std::io::stdout(), &mut std::io::stderr());
    drop(terminal);
    Ok(status?)
}

/// Starts the supervisor in a session of its own and waits for its word.
fn up_in_background(up: &Up) -> Result<()> {
    let mut command = Command::new(std::env::current_exe().context("find this program")?);
    command
        .args(["lab", "serve", "--name", &up.name.name])
        .args(["--memory", &up.memory.to_string()])
        .args(up.metered.then_some("--metered"))
        .args(["--containerd", up.containerd.name()])
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .process_group(0);
    let mut supervisor = command.spawn().context("start the lab's supervisor")?;
    let (Some(mut stdout), Some(mut stderr)) = (supervisor.stdout.take(), supervisor.stderr.take())
    else {
        bail!("the lab's supervisor has no output");
    };
    // The supervisor's steps are shown as they happen; this thread ends with this process.
    let progress = std::thread::spawn(move || {
        let mut said = Vec::new();
        let mut buffer = [0; 4096];
        while let Ok(count @ 1..) = stderr.read(&mut buffer) {
            said.extend_from_slice(&buffer[..count]);
            if std::io::stderr().write_all(&buffer[..count]).is_err() {
                break;
            }
        }
    });
    // Every wait of the supervisor has a deadline, so this ends.
    let mut word = [0; READY.len()];
    if stdout.read_exact(&mut word).is_ok() && word == *READY.as_bytes() {
        println!("lab {:?} is ready", up.name.name);
        return Ok(());
    }
    // A panic there was already printed.
    let _ = progress.join();
    let status = supervisor.wait().context("wait for the lab's supervisor")?;
    bail!("the lab did not come up ({status})");
}

impl Name {
    fn state(&self) -> Result<LabState> {
        Ok(LabState::named(&self.name)?)
    }

    fn client(&self) -> Result<Client> {
        Ok(Client::connect(self.state()?)?)
    }
}

impl Up {
    fn options(&self) -> LabOptions {
        LabOptions {
            name: self.name.name.clone(),
            metered: self.metered,
            containerd: self.containerd.version(),
            memory_mib: self.memory,
            ..LabOptions::default()
        }
    }
}
