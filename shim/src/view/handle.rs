//! The shim's side of a view.

use std::{
    ffi::OsStr,
    fs::{self, File},
    io,
    os::fd::{AsFd, AsRawFd, OwnedFd},
    path::{Path, PathBuf},
    sync::mpsc,
    thread,
    time::Duration,
};

use bulkhead_vmm_control::{Spawn, UserNamespace};
use nix::mount::{MsFlags, mount};
use rustix::{
    fs::{CWD, statfs},
    mount::{MoveMountFlags, UnmountFlags, move_mount, unmount},
};
use thiserror::Error;
use tokio::{
    sync::mpsc::{UnboundedSender, unbounded_channel},
    time::timeout,
};

use super::{ARGUMENT, SHARE};
use crate::{
    assembly,
    child::{Child, Reaper},
    tree::{self, TreeError},
};

/// The name by which the server is started.
const NAME: &str = "bulkhead-view";

/// Where the file system is mounted at first, in the scratch directory.
const PLACE: &str = "view";

/// How long the server may take to answer for the first time.
const DEADLINE: Duration = Duration::from_secs(20);

/// `FUSE_SUPER_MAGIC` (linux/magic.h)
const FUSE: i64 = 0x6573_5546;

/// Failures with a view.
#[derive(Debug, Error)]
pub enum ViewError {
    /// A step of its mount failed.
    #[error("Cannot {step}")]
    Step {
        /// The step.
        step: &'static str,
        /// The system's error.
        #[source]
        source: io::Error,
    },
    /// The server's files cannot be taken from it.
    #[error("Cannot show the host what the container sees")]
    Tree(#[from] TreeError),
    /// It cannot be put where it belongs.
    #[error("Cannot attach the host's view at {target}")]
    Attach {
        /// Where.
        target: PathBuf,
        /// The system's error.
        #[source]
        source: io::Error,
    },
    /// The server does not answer.
    #[error("The host's view was not ready within {} s", DEADLINE.as_secs())]
    Deadline,
}

/// What covers a mount of the host. When it is dropped, the host sees that mount again.
#[derive(Debug)]
pub struct View {
    target: PathBuf,
    _server: Child,
}

/// What the thread that mounts has to tell, in this order.
enum Made {
    /// The connection is ready for its server.
    Connection(File),
    /// What the server shows.
    Mount(OwnedFd),
}

impl View {
    /// Shows `tree`, which has the ids of the pod, at `target` under those on the disk. `scratch` is
    /// an existing directory.
    pub async fn show(
        tree: OwnedFd,
        namespace: &UserNamespace,
        reaper: &Reaper,
        scratch: &Path,
        target: &Path,
    ) -> Result<Self, ViewError> {
        let (sender, mut made) = unbounded_channel();
        let (served, is_served) = mpsc::channel();
        let scratch = scratch.to_owned();
        let work = move || {
            let result = mount_view(&scratch, &sender, &is_served);
            // The one who asked may have stopped waiting.
            let _ = sender.send(result.map(Made::Mount));
        };
        // A thread that ends: its mounts are nobody else's.
        thread::Builder::new()
            .name("view".to_owned())
            .spawn(work)
            .map_err(failed("run a thread to mount the host's view"))?;
        let mut server = None;
        let mount = loop {
            // If this is given up, the server goes, and the thread waits for nothing any more.
            match timeout(DEADLINE, made.recv()).await {
                Ok(Some(Ok(Made::Connection(device)))) => {
                    server = Some(serve(&device, &tree, namespace, reaper)?);
                    // The server alone has it from here on, and its end is the connection's.
                    drop(device);
                    // The thread tells itself why it cannot wait for this.
                    let _ = served.send(());
                }
                Ok(Some(Ok(Made::Mount(mount)))) => break mount,
                Ok(Some(Err(error))) => return Err(error),
                Ok(None) | Err(_) => return Err(ViewError::Deadline),
            }
        };
        let server = server.ok_or(ViewError::Deadline)?;
        let flags = MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH;
        move_mount(&mount, "", CWD, target, flags).map_err(|errno| ViewError::Attach {
            target: target.to_owned(),
            source: errno.into(),
        })?;
        Ok(Self {
            target: target.to_owned(),
            _server: server,
        })
    }
}

impl Drop for View {
    fn drop(&mut self) {
        take_away(&self.target);
    }
}

/// Takes a view off `target`, should one be there.
pub fn take_away(target: &Path) {
    match statfs(target) {
        Ok(about) if about.f_type == FUSE => {}
        // Its server is gone, or goes while it is asked.
        Err(rustix::io::Errno::NOTCONN | rustix::io::Errno::CONNABORTED) => {}
        _ => return,
    }
    let flags = UnmountFlags::DETACH | UnmountFlags::NOFOLLOW;
    if let Err(errno) = unmount(target, flags) {
        let target = target.display();
        tracing::warn!(%target, %errno, "Cannot take the host's view away");
    }
}

fn failed<E: Into<io::Error>>(step: &'static str) -> impl FnOnce(E) -> ViewError {
    move |error| ViewError::Step {
        step,
        source: error.into(),
    }
}

/// Mounts a view where only this thread sees it, and takes what is to be shown of it once it is
/// served.
fn mount_view(
    scratch: &Path,
    made: &UnboundedSender<Result<Made, ViewError>>,
    is_served: &mpsc::Receiver<()>,
) -> Result<OwnedFd, ViewError> {
    assembly::enter(scratch).map_err(failed("create a mount namespace for the host's view"))?;
    fs::create_dir(PLACE).map_err(failed("create a directory for the host's view"))?;
    let device = open("/dev/fuse").map_err(failed("open /dev/fuse"))?;
    // Who may do what is for the host's kernel to say, as with the mount that is covered.
    let options = format!(
        "fd={},rootmode=40000,user_id=0,group_id=0,default_permissions,allow_other",
        device.as_raw_fd()
    );
    let flags = MsFlags::MS_NOSUID | MsFlags::MS_NODEV;
    mount(
        Some("bulkhead"),
        PLACE,
        Some("fuse"),
        flags,
        Some(&*options),
    )
    .map_err(failed("mount the host's view"))?;
    // Either side's end is told by the other's channel.
    let _ = made.send(Ok(Made::Connection(device)));
    is_served.recv().map_err(|_| ViewError::Deadline)?;
    Ok(tree::clone(&Path::new(PLACE).join(SHARE), false)?)
}

/// Starts the server. Not from a thread that ends, since the server ends with it
/// (PR_SET_PDEATHSIG(2const)).
fn serve(
    device: &File,
    tree: &OwnedFd,
    namespace: &UserNamespace,
    reaper: &Reaper,
) -> Result<Child, ViewError> {
    let null = open("/dev/null").map_err(failed("open /dev/null"))?;
    let log = io::stderr();
    let spawn = Spawn {
        program: Path::new("/proc/self/exe"),
        arguments: &[NAME, ARGUMENT].map(OsStr::new),
        cgroup: None,
        namespaces: 0,
        // Those of its own follow in the order of their numbers.
        descriptors: &[
            null.as_fd(),
            null.as_fd(),
            log.as_fd(),
            device.as_fd(),
            tree.as_fd(),
            namespace.as_fd(),
        ],
    };
    // SAFETY: nothing is done in its process.
    let server = reaper.own(|| unsafe { spawn.start(|| Ok(())) });
    server.map_err(failed("start the server of the host's view"))
}

fn open(path: &str) -> io::Result<File> {
    File::options().read(true).write(true).open(path)
}
