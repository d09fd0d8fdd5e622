//! Programs that the specification has run in the container's namespaces on its way to its process.
//! <https://github.com/opencontainers/runtime-spec/blob/v1.2.1/config.md#posix-platform-hooks>
//!
//! Those of `createContainer` come from the host, whose files are not here. They run in a root of
//! their own with what they may look for at its path on the host: themselves, and the bundle with
//! the specification and the container's root.

use std::{
    collections::HashMap,
    ffi::{CStr, CString},
    fs::File,
    io::{self, Read, Seek, Write},
    os::{
        fd::{AsFd, AsRawFd, OwnedFd, RawFd},
        unix::ffi::OsStrExt,
    },
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use nix::{
    sys::{
        memfd::{MFdFlags, memfd_create},
        signal::{Signal, kill},
        wait::{WaitStatus, waitpid},
    },
    unistd::{ForkResult, Pid, execve, fork},
};
use oci_spec::runtime::{Hook, Hooks, Spec};
use rustix::{
    event::{PollFd, PollFlags, Timespec, poll},
    process::{PidfdFlags, pidfd_open},
};
use serde::Serialize;

use super::{
    StageError, mounts, open_guest,
    protocol::{CreateTask, hook_time},
    root::Root,
};

/// Where the root for `createContainer` is attached: what was there is not looked for any more.
const RUNTIME_ROOT: &str = "/tmp";

/// The most of a hook's standard error that is told, in bytes.
const MAX_MESSAGE: usize = 1024;

/// Exit status of a hook that could not be run.
const NOT_RUN: i32 = 127;

/// Runs `createContainer`, before the container's root is entered.
pub fn create_container(id: &str, create: &CreateTask, root: &Root) -> Result<(), StageError> {
    let hooks = of(&create.spec, Hooks::create_container);
    if hooks.is_empty() {
        return Ok(());
    }
    let rootfs = runtime_root(create, hooks, root).map_err(StageError::system(
        "make a root for createContainer's hooks",
    ))?;
    let state = state(id, "creating", create)?;
    let enter = || -> Result<(), StageError> {
        let failed = |what: &str| StageError::system::<rustix::io::Errno>(what.to_owned());
        rustix::process::chroot(RUNTIME_ROOT).map_err(failed("enter the hook's root"))?;
        rustix::process::chdir(&rootfs).map_err(failed("enter the container's root"))
    };
    run("createContainer", hooks, &state, enter)
}

/// Runs `startContainer`, as the container's process would run: `confine` takes the last privileges.
pub fn start_container(
    id: &str,
    create: &CreateTask,
    confine: impl Fn() -> Result<(), StageError>,
) -> Result<(), StageError> {
    let hooks = of(&create.spec, Hooks::start_container);
    if hooks.is_empty() {
        return Ok(());
    }
    let state = state(id, "created", create)?;
    run("startContainer", hooks, &state, confine)
}

fn of(spec: &Spec, kind: fn(&Hooks) -> &Option<Vec<Hook>>) -> &[Hook] {
    let hooks = spec.hooks().as_ref();
    let hooks = hooks.and_then(|hooks| kind(hooks).as_deref());
    hooks.unwrap_or_default()
}

/// <https://github.com/opencontainers/runtime-spec/blob/v1.2.1/runtime.md#state>, in runc's order.
#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct State<'a> {
    oci_version: &'a str,
    id: &'a str,
    status: &'a str,
    /// In the container's namespace, as from runc.
    pid: u32,
    bundle: &'a Path,
    #[serde(skip_serializing_if = "HashMap::is_empty")]
    annotations: &'a HashMap<String, String>,
}

fn state(id: &str, status: &str, create: &CreateTask) -> Result<Vec<u8>, StageError> {
    let none = HashMap::new();
    let state = State {
        oci_version: create.spec.version(),
        id,
        status,
        pid: std::process::id(),
        bundle: &create.bundle,
        annotations: create.spec.annotations().as_ref().unwrap_or(&none),
    };
    serde_json::to_vec(&state)
        .map_err(|error| StageError::system("write the container's state")(io::Error::from(error)))
}

/// Makes the root for hooks of the host, and returns where in it the container's root is.
fn runtime_root(create: &CreateTask, hooks: &[Hook], root: &Root) -> io::Result<PathBuf> {
    // Before anything here may hide them.
    let mut programs = Vec::new();
    for (index, hook) in hooks.iter().enumerate() {
        let shared = create.hook_programs.get(&index);
        let shared = shared.ok_or_else(|| io::Error::other("a hook's program is missing"))?;
        programs.push((hook.path(), mounts::clone_path(shared, false)?));
    }
    let files = mounts::scratch_directory()?;
    let place = open_guest_directory(RUNTIME_ROOT)?;
    mounts::attach(files.as_fd(), place.as_fd())?;
    let files = Root::new(files);
    files.make_directory(&create.bundle)?;
    let config = files.make_file(&create.bundle.join("config.json"))?;
    let spec = serde_json::to_vec(&create.spec).map_err(io::Error::from)?;
    File::options()
        .write(true)
        .open(format!("/proc/self/fd/{}", config.as_raw_fd()))?
        .write_all(&spec)?;
    for (path, program) in programs {
        mounts::attach(program.as_fd(), files.make_file(path)?.as_fd())?;
    }
    let path = create.spec.root().as_ref();
    let path = path.map_or(Path::new("rootfs"), |root| root.path());
    let path = create.bundle.join(path);
    let rootfs = files.make_directory(&path)?;
    let copy = mounts::clone_handle(root.as_fd(), true)?;
    mounts::attach(copy.as_fd(), rootfs.as_fd())?;
    Ok(path)
}

fn open_guest_directory(path: &str) -> io::Result<OwnedFd> {
    use rustix::fs::OFlags;
    open_guest(path, OFlags::PATH | OFlags::DIRECTORY)
        .map_err(|error| io::Error::other(crate::log::chain(&error)))
}

/// Runs hooks one after the other, each in a child that calls `enter` first. The first failure ends
/// it.
fn run(
    kind: &str,
    hooks: &[Hook],
    state: &[u8],
    enter: impl Fn() -> Result<(), StageError>,
) -> Result<(), StageError> {
    for hook in hooks {
        let path = hook.path().display();
        let failed = |reason: String| StageError::Hook {
            hook: format!("{kind} {path}"),
            reason,
        };
        let system = |error: io::Error| failed(error.to_string());
        let program = Program::new(hook).map_err(system)?;
        let mut input = memory("hook-state").map_err(system)?;
        input.write_all(state).map_err(system)?;
        input.rewind().map_err(system)?;
        // In memory that the container is charged for: nobody has to read while the hook runs.
        let mut output = memory("hook-output").map_err(system)?;
        // SAFETY: this process has one thread.
        let child = match unsafe { fork() }.map_err(io::Error::from).map_err(system)? {
            ForkResult::Child => become_hook(&program, &input, &output, &enter),
            ForkResult::Parent { child } => child,
        };
        let status = wait(child, hook_time(hook)).map_err(system)?;
        let reason = match status {
            Some(WaitStatus::Exited(_, 0)) => continue,
            Some(WaitStatus::Exited(_, code)) => format!("exited with status {code}"),
            Some(WaitStatus::Signaled(_, signal, _)) => format!("was ended by {signal}"),
            _ => format!("did not end within {} s", hook_time(hook).as_secs()),
        };
        let mut said = Vec::new();
        output.rewind().map_err(system)?;
        let limit = u64::try_from(MAX_MESSAGE).unwrap_or(u64::MAX);
        output.take(limit).read_to_end(&mut said).map_err(system)?;
        let said = String::from_utf8_lossy(&said);
        return Err(failed(format!("{reason}: {}", said.trim())));
    }
    Ok(())
}

/// What execve(2) takes.
struct Program {
    path: CString,
    arguments: Vec<CString>,
    environment: Vec<CString>,
}

impl Program {
    fn new(hook: &Hook) -> io::Result<Self> {
        let all = |strings: &Option<Vec<String>>| -> io::Result<Vec<CString>> {
            let strings = strings.iter().flatten();
            let strings = strings.map(|string| Ok(CString::new(string.as_str())?));
            strings.collect()
        };
        let path = CString::new(hook.path().as_os_str().as_bytes())?;
        let mut arguments = all(hook.args())?;
        if arguments.is_empty() {
            arguments.push(path.clone());
        }
        Ok(Self {
            path,
            arguments,
            environment: all(hook.env())?,
        })
    }
}

fn memory(name: &'static str) -> io::Result<File> {
    let name = CString::new(name)?;
    let name: &CStr = &name;
    Ok(File::from(memfd_create(name, MFdFlags::MFD_CLOEXEC)?))
}

/// The child: its streams, its place, its program.
fn become_hook(
    program: &Program,
    input: &File,
    output: &File,
    enter: &impl Fn() -> Result<(), StageError>,
) -> ! {
    let streams: [RawFd; 3] = [input.as_raw_fd(), output.as_raw_fd(), output.as_raw_fd()];
    for (number, stream) in (0..).zip(streams) {
        // SAFETY: open descriptors; those of the standard streams belong to nobody in this child.
        unsafe { libc::dup2(stream, number) };
    }
    let reason = match enter() {
        Ok(()) => match execve(&program.path, &program.arguments, &program.environment) {
            Err(errno) => errno.desc().to_owned(),
            Ok(never) => match never {},
        },
        Err(error) => crate::log::chain(&error),
    };
    let mut output = output;
    let _ = output.write_all(reason.as_bytes());
    // SAFETY: ends the child at once; what the parent has in this memory is the parent's to clean
    // up.
    unsafe { libc::_exit(NOT_RUN) }
}

/// Waits for a child's end; after `limit` it is killed, and there is no status.
fn wait(child: Pid, limit: Duration) -> io::Result<Option<WaitStatus>> {
    let deadline = Instant::now() + limit;
    let pid = rustix::process::Pid::from_raw(child.as_raw());
    let pid = pid.ok_or_else(|| io::Error::other("a child without a pid"))?;
    let pidfd = pidfd_open(pid, PidfdFlags::empty())?;
    let in_time = loop {
        let left = deadline.saturating_duration_since(Instant::now());
        let left = Timespec::try_from(left).map_err(io::Error::other)?;
        match poll(&mut [PollFd::new(&pidfd, PollFlags::IN)], Some(&left)) {
            Ok(count) => break count > 0,
            Err(rustix::io::Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
    };
    if !in_time {
        kill(child, Signal::SIGKILL)?;
    }
    let status = waitpid(child, None)?;
    Ok(in_time.then_some(status))
}
