//! The socket of a pod's shim: its name, and who holds it.

use std::{
    fs::{self, DirBuilder},
    io::{self, ErrorKind, Read, Write},
    os::{
        fd::OwnedFd,
        unix::{
            fs::{DirBuilderExt, PermissionsExt},
            net::{UnixListener, UnixStream},
        },
    },
    path::{Path, PathBuf},
    time::Duration,
};

use protobuf::Message;
use rustix::{
    io::Errno,
    net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType, connect, socket_with},
};
use sha2::{Digest, Sha256};
use thiserror::Error;

/// Where containerd expects the sockets of shims.
const SOCKET_DIRECTORY: &str = "/run/containerd/s";

/// How long a shim may take to answer. containerd gives `delete` five seconds in all.
const ANSWER_DEADLINE: Duration = Duration::from_secs(1);

/// Name of the file in a bundle by which containerd 1.7 finds the shim again.
const ADDRESS_FILE: &str = "address";

/// The address of one pod's shim.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Address {
    path: PathBuf,
}

/// Who serves an address.
#[derive(Debug)]
pub enum Claim {
    /// A running shim.
    Taken,
    /// The caller, from now on.
    Ours(UnixListener),
}

/// Failures with a shim's socket.
#[derive(Debug, Error)]
pub enum AddressError {
    /// The directory of the sockets cannot be made.
    #[error("Cannot create {SOCKET_DIRECTORY}")]
    Directory(#[source] io::Error),
    /// The socket cannot be made.
    #[error("Cannot listen on {path}")]
    Listen {
        /// The socket's path.
        path: PathBuf,
        /// The system's error.
        #[source]
        source: io::Error,
    },
    /// A socket that nobody serves cannot be removed.
    #[error("Cannot remove the stale socket {path}")]
    Stale {
        /// The socket's path.
        path: PathBuf,
        /// The system's error.
        #[source]
        source: io::Error,
    },
    /// The address cannot be written into the bundle.
    #[error("Cannot write {path}")]
    Write {
        /// The file's path.
        path: PathBuf,
        /// The system's error.
        #[source]
        source: io::Error,
    },
}

impl Address {
    /// The address of `group` in `namespace` of the containerd at `containerd`.
    pub fn new(containerd: &str, namespace: &str, group: &str) -> Self {
        let name = Path::new(containerd).join(namespace).join(group);
        let digest = Sha256::digest(name.as_os_str().as_encoded_bytes());
        let hex: String = digest.iter().map(|byte| format!("{byte:02x}")).collect();
        Self {
            path: Path::new(SOCKET_DIRECTORY).join(hex),
        }
    }

    /// In the form that containerd dials.
    pub fn url(&self) -> String {
        format!("unix://{}", self.path.display())
    }

    /// Starts to listen, unless a running shim does already. A socket that nobody serves is
    /// replaced.
    pub fn claim(&self) -> Result<Claim, AddressError> {
        DirBuilder::new()
            .recursive(true)
            .mode(0o711)
            .create(SOCKET_DIRECTORY)
            .map_err(AddressError::Directory)?;
        match self.listen() {
            Ok(listener) => return Ok(Claim::Ours(listener)),
            Err(error) if error.kind() == ErrorKind::AddrInUse => {}
            Err(source) => {
                return Err(AddressError::Listen {
                    path: self.path.clone(),
                    source,
                });
            }
        }
        if self.is_served() {
            return Ok(Claim::Taken);
        }
        self.remove()?;
        match self.listen() {
            Ok(listener) => Ok(Claim::Ours(listener)),
            Err(source) => Err(AddressError::Listen {
                path: self.path.clone(),
                source,
            }),
        }
    }

    fn listen(&self) -> io::Result<UnixListener> {
        let listener = UnixListener::bind(&self.path)?;
        // Until here the directory's callers are root alone: connecting needs write permission,
        // which the usual umask takes from everybody else.
        fs::set_permissions(&self.path, fs::Permissions::from_mode(0o600))?;
        Ok(listener)
    }

    /// Whether a shim answers, or will: one that is stuck is not waited for, nor one with as many
    /// connections waiting for it as can. One that was killed is connected to as well while the kernel
    /// closes its other files, which may take long, and does not answer.
    pub fn is_served(&self) -> bool {
        match self.connect() {
            Ok(socket) => !is_closed(socket.into()),
            Err(errno) => errno == Errno::AGAIN,
        }
    }

    fn connect(&self) -> rustix::io::Result<OwnedFd> {
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        let socket = socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)?;
        connect(&socket, &SocketAddrUnix::new(&self.path)?)?;
        Ok(socket)
    }

    /// Removes the socket, if it is there.
    pub fn remove(&self) -> Result<(), AddressError> {
        match fs::remove_file(&self.path) {
            Err(source) if source.kind() != ErrorKind::NotFound => Err(AddressError::Stale {
                path: self.path.clone(),
                source,
            }),
            _ => Ok(()),
        }
    }

    /// Notes the address in a bundle. The file is replaced as a whole.
    pub fn write(&self, bundle: &Path) -> Result<(), AddressError> {
        let path = bundle.join(ADDRESS_FILE);
        let draft = bundle.join(".address");
        fs::write(&draft, self.url())
            .and_then(|()| fs::rename(&draft, &path))
            .map_err(|source| AddressError::Write { path, source })
    }
}

/// Asks something that every shim answers at once; whether the other end was closed instead.
fn is_closed(mut shim: UnixStream) -> bool {
    let mut ask = || -> io::Result<usize> {
        shim.set_nonblocking(false)?;
        shim.set_read_timeout(Some(ANSWER_DEADLINE))?;
        shim.set_write_timeout(Some(ANSWER_DEADLINE))?;
        shim.write_all(&question()?)?;
        shim.read(&mut [0])
    };
    match ask() {
        Ok(read) => read == 0,
        Err(error) => !matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut),
    }
}

/// `Connect`, as ttrpc has it on its first stream.
fn question() -> io::Result<Vec<u8>> {
    const STREAM: u32 = 1;
    const REQUEST: u8 = 1;
    const NO_FLAGS: u8 = 0;
    let request = ttrpc::Request {
        service: "containerd.task.v2.Task".into(),
        method: "Connect".into(),
        ..ttrpc::Request::default()
    };
    let body = request.write_to_bytes().map_err(io::Error::other)?;
    let length = u32::try_from(body.len()).map_err(io::Error::other)?;
    let stream = STREAM.to_be_bytes();
    Ok([
        &length.to_be_bytes()[..],
        &stream,
        &[REQUEST, NO_FLAGS],
        &body,
    ]
    .concat())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_name_is_containerds() {
        // sha256 of "/run/containerd/containerd.sock/default/c1", as sha256sum(1) has it.
        let address = Address::new("/run/containerd/containerd.sock", "default", "c1");
        assert!(address.url().starts_with("unix:///run/containerd/s/"));
        assert!(address.path.as_os_str().len() <= 106);
        assert_ne!(
            address,
            Address::new("/run/containerd/containerd.sock", "default", "c2")
        );
    }

    #[test]
    fn a_served_socket_is_taken_and_a_stale_one_replaced() {
        let directory = tempfile::tempdir().unwrap();
        let address = Address {
            path: directory.path().join("s"),
        };
        let first = address.listen().unwrap();
        assert_eq!(
            fs::metadata(&address.path).unwrap().permissions().mode() & 0o777,
            0o600
        );
        // It has not answered yet.
        assert!(address.is_served());
        // Nor does a shim that accepts nothing make anybody wait.
        rustix::net::listen(&first, 0).unwrap();
        let full: Vec<_> = (0..)
            .map(|_| address.connect())
            .take_while(Result::is_ok)
            .collect();
        assert!(address.is_served());
        drop((first, full));
        assert!(!address.is_served());
        address.remove().unwrap();
        address.remove().unwrap();
        assert!(address.listen().is_ok());
    }

    #[test]
    fn a_shim_that_is_ending_serves_nobody() {
        let directory = tempfile::tempdir().unwrap();
        let address = Address {
            path: directory.path().join("s"),
        };
        let listener = address.listen().unwrap();
        let ending = std::thread::spawn(move || drop(listener.accept().unwrap()));
        assert!(!address.is_served());
        ending.join().unwrap();
    }

    #[test]
    fn the_bundle_gets_the_address() {
        let bundle = tempfile::tempdir().unwrap();
        let address = Address::new("a", "b", "c");
        address.write(bundle.path()).unwrap();
        assert_eq!(
            fs::read_to_string(bundle.path().join("address")).unwrap(),
            address.url()
        );
    }
}
