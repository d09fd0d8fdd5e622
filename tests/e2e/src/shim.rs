//! Driving a shim as containerd does, without containerd: nothing is lost from a specification on its
//! way, and no client has to start for each step.

use std::fs::{self, File, OpenOptions};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use containerd_shim_protos::Client;
use containerd_shim_protos::api::{
    CreateTaskRequest, DeleteRequest, ExecProcessRequest, KillRequest, Mount, PauseRequest,
    PidsRequest, ResumeRequest, StartRequest, StateRequest, StatsRequest, UpdateTaskRequest,
    WaitRequest, WaitResponse,
};
use containerd_shim_protos::protobuf::well_known_types::any::Any;
use containerd_shim_protos::protobuf::{Message, MessageField};
use containerd_shim_protos::ttrpc::{self, context};
use rustix::fs::{CWD, FileType, Mode, OFlags, fcntl_setfl, mknodat};
use serde::Deserialize;
use serde_json::Value;

use crate::command::{Capture, DEADLINE};
use crate::ctr::Container;
use crate::host;

/// How containerd names the type of a process that is executed in addition.
const PROCESS: &str = "types.containerd.io/opencontainers/runtime-spec/1/Process";

/// And of limits.
const RESOURCES: &str = "types.containerd.io/opencontainers/runtime-spec/1/LinuxResources";

/// For what a process has written to arrive once it is deleted.
const SETTLE: Duration = Duration::from_secs(60);

/// A connection to the shim of a pod.
pub struct Shim {
    client: Client,
    /// The name of the task service.
    service: String,
}

/// How a shim is reached, by containerd 2's file in the bundle.
#[derive(Deserialize)]
struct Bootstrap {
    /// Of the API.
    version: u32,
    address: String,
}

impl Shim {
    /// Of this container's pod.
    pub fn of(pod: &Container) -> Result<Self> {
        let state = "/run/containerd/io.containerd.runtime.v2.task/default";
        let bundle = Path::new(state).join(pod.id());
        let Bootstrap { version, address } = match fs::read(bundle.join("bootstrap.json")) {
            Ok(bootstrap) => serde_json::from_slice(&bootstrap)?,
            // Of containerd 1.7.
            Err(_) => Bootstrap {
                version: 2,
                address: host::read(&bundle.join("address"))?,
            },
        };
        let client = Client::connect(address.trim());
        Ok(Self {
            client: client.with_context(|| format!("connect to {address}"))?,
            service: format!("containerd.task.v{version}.Task"),
        })
    }

    /// Creates another container in the pod, from the bundle in this directory and what is to be mounted
    /// as its root, if it is not there. What its process writes is kept.
    ///
    /// # Errors
    ///
    /// [`Refused`] when the shim refuses it.
    pub fn create(&self, bundle: &Path, id: &str, rootfs: Vec<Mount>) -> Result<Process<'_>> {
        let streams = Streams::new(bundle, id)?;
        let request = CreateTaskRequest {
            id: id.to_owned(),
            bundle: text(bundle)?,
            rootfs,
            stdin: streams.name(0)?,
            stdout: streams.name(1)?,
            stderr: streams.name(2)?,
            ..CreateTaskRequest::default()
        };
        self.call("Create", &request)?;
        Ok(self.process(id, "", streams))
    }

    /// Starts another process in a container. `directory` is where its streams are to be.
    ///
    /// # Errors
    ///
    /// [`Refused`] when the shim refuses it.
    pub fn exec(
        &self,
        id: &str,
        directory: &Path,
        exec_id: &str,
        process: &Value,
    ) -> Result<Process<'_>> {
        let streams = Streams::new(directory, exec_id)?;
        let spec = Any {
            type_url: PROCESS.into(),
            value: serde_json::to_vec(process)?,
            ..Any::default()
        };
        let request = ExecProcessRequest {
            id: id.to_owned(),
            exec_id: exec_id.to_owned(),
            stdin: streams.name(0)?,
            stdout: streams.name(1)?,
            stderr: streams.name(2)?,
            spec: MessageField::some(spec),
            ..ExecProcessRequest::default()
        };
        self.call("Exec", &request)?;
        let mut process = self.process(id, exec_id, streams);
        process.start()?;
        Ok(process)
    }

    /// Changes limits of a container, by an OCI `linux.resources` object.
    pub fn update(&self, id: &str, resources: &Value) -> Result<()> {
        let request = UpdateTaskRequest {
            id: id.to_owned(),
            resources: MessageField::some(Any {
                type_url: RESOURCES.into(),
                value: serde_json::to_vec(resources)?,
                ..Any::default()
            }),
            ..UpdateTaskRequest::default()
        };
        self.call("Update", &request).map(drop)
    }

    /// Stops every process of a container.
    pub fn pause(&self, id: &str) -> Result<()> {
        let request = PauseRequest {
            id: id.to_owned(),
            ..PauseRequest::default()
        };
        self.call("Pause", &request).map(drop)
    }

    /// Lets them go on.
    pub fn resume(&self, id: &str) -> Result<()> {
        let request = ResumeRequest {
            id: id.to_owned(),
            ..ResumeRequest::default()
        };
        self.call("Resume", &request).map(drop)
    }

    /// Asks what a container uses, where it is in its life, and for its processes.
    pub fn look(&self, id: &str) -> Result<()> {
        let stats = StatsRequest {
            id: id.to_owned(),
            ..StatsRequest::default()
        };
        self.call("Stats", &stats)?;
        let state = StateRequest {
            id: id.to_owned(),
            ..StateRequest::default()
        };
        self.call("State", &state)?;
        let pids = PidsRequest {
            id: id.to_owned(),
            ..PidsRequest::default()
        };
        self.call("Pids", &pids).map(drop)
    }

    fn process(&self, id: &str, exec_id: &str, streams: Streams) -> Process<'_> {
        Process {
            shim: self,
            id: id.to_owned(),
            exec_id: exec_id.to_owned(),
            output: streams.readers.map(Capture::start),
            writers: Some(streams.writers),
            deleted: false,
        }
    }

    fn call(&self, method: &str, message: &impl Message) -> Result<Vec<u8>> {
        let deadline = i64::try_from(DEADLINE.as_nanos()).context("a long deadline")?;
        let request = ttrpc::Request {
            service: self.service.clone(),
            method: method.into(),
            timeout_nano: deadline,
            metadata: context::to_pb(context::with_duration(DEADLINE).metadata),
            payload: message.write_to_bytes()?,
            ..ttrpc::Request::default()
        };
        match self.client.request(request) {
            Ok(response) => Ok(response.payload),
            Err(ttrpc::Error::RpcStatus(status)) => bail!(Refused {
                code: status.code(),
                message: status.message,
            }),
            Err(error) => Err(error).with_context(|| format!("{method} failed")),
        }
    }
}

/// A shim's own word that it did not do what was asked.
#[derive(Debug)]
pub struct Refused {
    /// Its gRPC code.
    pub code: ttrpc::Code,
    /// Its reason.
    pub message: String,
}

impl std::fmt::Display for Refused {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.message)
    }
}

impl std::error::Error for Refused {}

/// A container's process, killed and deleted when dropped: its first one, with which the container
/// goes, or another.
pub struct Process<'a> {
    shim: &'a Shim,
    id: String,
    exec_id: String,
    output: [Capture; 2],
    /// Keep the readers from an end before the shim has opened the FIFOs.
    writers: Option<[File; 2]>,
    deleted: bool,
}

/// How a process ended, and what it wrote.
pub struct Ended {
    /// The exit status, as the shim has it.
    pub code: u32,
    /// All of its standard output.
    pub stdout: Vec<u8>,
}

impl Process<'_> {
    /// Starts it.
    pub fn start(&mut self) -> Result<()> {
        let request = StartRequest {
            id: self.id.clone(),
            exec_id: self.exec_id.clone(),
            ..StartRequest::default()
        };
        self.shim.call("Start", &request)?;
        self.writers = None;
        Ok(())
    }

    /// Starts another process in its container. `directory` is where its streams are to be.
    pub fn exec(&self, directory: &Path, exec_id: &str, process: &Value) -> Result<Process<'_>> {
        self.shim.exec(&self.id, directory, exec_id, process)
    }

    /// Waits until it has written `text` to its standard output.
    pub fn expect(&self, text: &str) -> Result<()> {
        let [stdout, stderr] = &self.output;
        stdout
            .expect(text, DEADLINE)
            .with_context(|| format!("its error output: {}", stderr.text()))
    }

    /// Sends it a signal.
    pub fn kill(&self, signal: u32) -> Result<()> {
        let request = KillRequest {
            id: self.id.clone(),
            exec_id: self.exec_id.clone(),
            signal,
            ..KillRequest::default()
        };
        self.shim.call("Kill", &request).map(drop)
    }

    fn wait(&self) -> Result<u32> {
        let request = WaitRequest {
            id: self.id.clone(),
            exec_id: self.exec_id.clone(),
            ..WaitRequest::default()
        };
        let response = self.shim.call("Wait", &request)?;
        Ok(WaitResponse::parse_from_bytes(&response)?.exit_status)
    }

    fn delete(&mut self) -> Result<()> {
        self.deleted = true;
        self.writers = None;
        let request = DeleteRequest {
            id: self.id.clone(),
            exec_id: self.exec_id.clone(),
            ..DeleteRequest::default()
        };
        self.shim.call("Delete", &request).map(drop)
    }

    /// Waits for its end and deletes it.
    pub fn finish(mut self) -> Result<Ended> {
        let code = self.wait()?;
        self.delete()?;
        let [stdout, stderr] = &self.output;
        ensure!(
            stdout.ended(SETTLE) && stderr.ended(SETTLE),
            "something still holds the streams of {} {}",
            self.id,
            self.exec_id
        );
        Ok(Ended {
            code,
            stdout: stdout.bytes(),
        })
    }
}

impl Drop for Process<'_> {
    fn drop(&mut self) {
        if self.deleted {
            return;
        }
        // It may have ended by itself. An exec that was never started has nothing to end.
        let started = self.writers.is_none();
        if started || self.exec_id.is_empty() {
            let _ = self.kill(9);
            let _ = self.wait();
        }
        let _ = self.delete();
    }
}

/// The FIFOs of a process, which the shim has not opened yet.
struct Streams {
    /// Input, which never comes, output and error output.
    paths: [PathBuf; 3],
    readers: [File; 2],
    writers: [File; 2],
}

impl Streams {
    fn new(directory: &Path, name: &str) -> Result<Self> {
        let names = ["stdin", "stdout", "stderr"];
        let paths = names.map(|stream| directory.join(format!("{name}-{stream}")));
        for path in &paths {
            mknodat(CWD, path, FileType::Fifo, Mode::from_raw_mode(0o600), 0)?;
        }
        let [_, stdout, stderr] = &paths;
        let readers = [reader(stdout)?, reader(stderr)?];
        let writer = |path| OpenOptions::new().write(true).open(path);
        let writers = [writer(stdout)?, writer(stderr)?];
        Ok(Self {
            paths,
            readers,
            writers,
        })
    }

    fn name(&self, stream: usize) -> Result<String> {
        text(&self.paths[stream])
    }
}

/// Opens a FIFO that nobody writes to yet.
fn reader(path: &Path) -> Result<File> {
    let mut options = OpenOptions::new();
    options
        .read(true)
        .custom_flags(OFlags::NONBLOCK.bits().cast_signed());
    let file = options.open(path)?;
    // From here on reading waits.
    fcntl_setfl(&file, OFlags::empty())?;
    Ok(file)
}

fn text(path: &Path) -> Result<String> {
    let text = path.to_str().context("a path that is not UTF-8")?;
    Ok(text.to_owned())
}
