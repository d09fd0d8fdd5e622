//! The stage: a freshly exec'd, single-threaded process that makes one process of a container.
//!
//! The stage itself only makes the process and reports its pid. Everything else happens in the
//! new process, which belongs to PID 1 (`CLONE_PARENT`) and ends in the container's execve.

pub mod affinity;
mod apparmor;
mod console;
mod copy_up;
mod credentials;
mod devices;
mod exec;
mod hooks;
mod mount_options;
pub mod mounts;
pub mod namespaces;
mod pause;
mod proc;
pub mod protocol;
pub mod root;
mod rootfs;
pub mod scheduling;
pub mod seccomp;
pub mod settings;
mod unknown_calls;
mod users;

use std::{
    io,
    os::fd::{AsFd, FromRawFd, OwnedFd},
    process::ExitCode,
};

use oci_spec::runtime::LinuxNamespaceType;
use rustix::{
    fs::{Mode, OFlags},
    process::DumpableBehavior,
};
use thiserror::Error;

use self::{
    exec::{ExecError, Program},
    namespaces::Cloned,
    protocol::{Channel, CreateTask, FailureKind, Reply, Request, Task},
    rootfs::Sources,
};
use crate::log;

/// Argument that makes this binary a stage.
pub const ARGUMENT: &str = "stage";

/// Lowest descriptor for the stage's own use, so that 0 to 2 stay for the process's streams.
const FIRST_OWN_FD: i32 = 3;

/// A step of the set-up that failed.
#[derive(Debug, Error)]
pub enum StageError {
    /// A system call.
    #[error("failed to {what}")]
    System {
        /// What was tried on what.
        what: String,
        /// The system's answer.
        #[source]
        source: io::Error,
    },
    /// The command cannot be run; worded as users and scripts know it.
    #[error(transparent)]
    Exec(#[from] ExecError),
    /// The spec asks for something that the kernel or the image cannot give.
    #[error("{0}")]
    Invalid(String),
    /// A hook failed.
    #[error("the hook {hook} {reason}")]
    Hook {
        /// Its kind and path.
        hook: String,
        /// How it ended, and what it said.
        reason: String,
    },
    /// The seccomp filter cannot be built.
    #[error("failed to build the seccomp filter: {what}")]
    Seccomp {
        /// Which part of it.
        what: String,
        /// libseccomp's answer.
        #[source]
        source: libseccomp::error::SeccompError,
    },
}

impl StageError {
    /// For `map_err`: a failed system call, and what was tried.
    fn system<E: Into<io::Error>>(what: impl Into<String>) -> impl FnOnce(E) -> Self {
        let what = what.into();
        move |source| Self::System {
            what,
            source: source.into(),
        }
    }

    fn kind(&self) -> FailureKind {
        match self {
            Self::System { .. } | Self::Hook { .. } => FailureKind::Internal,
            Self::Exec(_) | Self::Invalid(_) | Self::Seccomp { .. } => FailureKind::Invalid,
        }
    }
}

/// The whole life of a stage: serves the one request that waits on stdin.
pub fn main() -> ExitCode {
    // SAFETY: the agent starts a stage with the channel as descriptor 0, and nothing else in
    // this process owns that descriptor.
    let inherited = unsafe { OwnedFd::from_raw_fd(0) };
    // Processes of the container must neither trace this one nor open its files in /proc.
    let hidden = rustix::process::set_dumpable_behavior(DumpableBehavior::NotDumpable);
    // Keeps 0 occupied until the process's own stdin takes its place.
    let channel = rustix::io::fcntl_dupfd_cloexec(&inherited, FIRST_OWN_FD);
    std::mem::forget(inherited);
    let (Ok(channel), Ok(())) = (channel, hidden) else {
        return ExitCode::FAILURE;
    };
    let channel = Channel::new(channel);
    match serve(&channel) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            let _ = channel.fail(error.kind(), log::chain(&error));
            ExitCode::FAILURE
        }
    }
}

fn serve(channel: &Channel) -> Result<(), StageError> {
    let (request, fds) = channel
        .receive_request()
        .map_err(StageError::system("receive the request"))?;
    // Inherited by the new process. Here, because this /proc is the agent's; a container's may be
    // anything.
    settings::oom_score_adj(&request.process)?;
    // Neither can be had any more in a user namespace.
    settings::raise_hard_limits(&request.process)?;
    if let (Some(users), Some(streams)) = (&request.users, &fds.stdio) {
        settings::own_streams(streams, users)?;
    }
    let confinement = apparmor::Transition::of(&request.process)?;
    let (flags, place) = match (&request.task, &fds.init) {
        (Task::Create(create), _) => {
            let sources = Sources::open(create, request.users.as_ref())?;
            let mut joined = 0;
            for (namespace, flags) in fds.joined.iter().zip(&create.joined) {
                namespaces::enter(namespace.as_fd(), *flags)?;
                joined |= flags;
            }
            let flags = namespaces::to_create(&create.spec, joined);
            (flags, Place::New(sources))
        }
        (Task::Join, Some(init)) => {
            affinity::before_joining(&request.process)?;
            let cgroup = namespaces::join(init.as_fd(), request.users.is_some())?;
            (0, Place::Of(cgroup))
        }
        (Task::Join, None) => return Err(StageError::Invalid("no container to join".into())),
    };
    match namespaces::spawn(flags, fds.cgroup.as_fd(), request.users.as_ref())? {
        Cloned::Parent { pid, pidfd } => channel
            .reply(&Reply::Spawned { pid }, Some(pidfd.as_fd()))
            .map_err(StageError::system("report the new process")),
        Cloned::Child => {
            confinement.map_or(Ok(()), apparmor::Transition::at_execve)?;
            run(channel, request, fds.stdio, place)
        }
    }
}

/// Where the new process finds what is around it.
enum Place {
    /// In a new container, made from this.
    New(Sources),
    /// In a container with this cgroup namespace, if it is not the guest's.
    Of(Option<OwnedFd>),
}

/// The new process, up to its execve.
fn run(
    channel: &Channel,
    request: Request,
    stdio: Option<[OwnedFd; 3]>,
    place: Place,
) -> Result<(), StageError> {
    let process = &request.process;
    match (&request.task, place) {
        (Task::Create(create), Place::New(sources)) => {
            // While the agent's user still owns this process's files in /proc.
            if namespaces::has(&create.spec, LinuxNamespaceType::Time) {
                namespaces::unshare_time(&create.spec)?;
            }
            begin(&request)?;
            new_container(&request.container, create, sources)?;
        }
        (Task::Join, Place::Of(cgroup)) => {
            if let Some(cgroup) = cgroup {
                namespaces::join_cgroup(cgroup.as_fd())?;
            }
            begin(&request)?;
        }
        _ => return Err(StageError::Invalid("no place for the process".into())),
    }
    let user = credentials::User::of(process)?;
    match (request.terminal, stdio) {
        (Some(size), _) => {
            let bind_console = matches!(request.task, Task::Create(_));
            let master = console::open(size, bind_console, user.uid)?;
            channel
                .reply(&Reply::Terminal, Some(master.as_fd()))
                .map_err(StageError::system("hand over the terminal"))?;
        }
        (None, Some(stdio)) => settings::stdio(stdio, user.uid)?,
        (None, None) => return Err(StageError::Invalid("no streams".into())),
    }
    if let Task::Create(create) = &request.task {
        rootfs::finish(create)?;
    }
    become_process(channel, &request, &user)
}

/// What a process does before it looks at its container.
fn begin(request: &Request) -> Result<(), StageError> {
    if request.users.is_some() {
        namespaces::become_root()?;
    }
    rustix::process::setsid().map_err(StageError::system("start a session"))?;
    settings::join_session_keyring(&request.container, request.users.is_some())
}

/// Everything that a container has besides its process.
fn new_container(id: &str, create: &CreateTask, sources: Sources) -> Result<(), StageError> {
    let joined = create.joined.iter().fold(0, |all, flags| all | flags);
    namespaces::unshare(&create.spec, joined)?;
    if joined & namespaces::flag(LinuxNamespaceType::Network) == 0 {
        settings::loopback_up()?;
    }
    settings::names(&create.spec)?;
    settings::sysctls(&create.spec)?;
    rootfs::enter(id, create, sources)
}

/// Limits, identity, privileges, command: the last steps, in the order that each needs the
/// privileges which the next takes away.
fn become_process(
    channel: &Channel,
    request: &Request,
    user: &credentials::User,
) -> Result<(), StageError> {
    let process = &request.process;
    let filter = request.seccomp.as_ref();
    let filter = filter.map(seccomp::Filter::compile).transpose()?;
    scheduling::apply(process)?;
    if matches!(request.task, Task::Join) {
        affinity::after_joining(process)?;
    }
    if let Some(personality) = &request.personality {
        settings::personality(personality)?;
    }
    settings::rlimits(process)?;
    let entered = exec::change_directory(process);
    let capabilities = credentials::Capabilities::of(process)?;
    credentials::become_user(user, &capabilities)?;
    // A directory that only the user may enter, or only root.
    entered.or_else(|_| exec::change_directory(process))?;
    let create = match &request.task {
        Task::Create(create) => Some(create),
        Task::Join => None,
    };
    let program = match create {
        Some(create) if create.rootfs.is_none() => None,
        // As the user, who may see other files than root does.
        _ => Some(Program::find(process, user.uid)?),
    };
    credentials::Capabilities::raise_permitted()?;
    settings::no_new_privileges(process)?;
    settings::default_signals()?;
    if create.is_some() {
        channel
            .reply(&Reply::Ready, None)
            .map_err(StageError::system("report the container"))?;
        let started = channel.wait_for_start();
        if !started.map_err(StageError::system("wait for the start"))? {
            return Err(StageError::Invalid("the agent went away".into()));
        }
    }
    settings::close_on_exec()?;
    let confine = || {
        // From here on only system calls that the filter itself must allow for an execve.
        filter.as_ref().map_or(Ok(()), seccomp::Filter::install)?;
        capabilities.apply()
    };
    if let Some(create) = create {
        hooks::start_container(&request.container, create, confine)?;
    }
    confine()?;
    match program {
        Some(program) => Err(program.execute().into()),
        None => Err(pause::hold()),
    }
}

/// Opens something of the guest itself, before the container's root is entered.
fn open_guest(path: &str, flags: OFlags) -> Result<OwnedFd, StageError> {
    rustix::fs::open(path, flags | OFlags::CLOEXEC, Mode::empty())
        .map_err(StageError::system(format!("open {path}")))
}
