//! A FUSE file server that lives in the virtual machine monitor and serves a guest's virtio-fs.
//!
//! It serves only the directories and files it was handed as descriptors ("shares"): it never
//! looks up a path of the host. The guest's kernel is its one client and is hostile. It names files
//! by node id and single directory entries, and neither can lead out of a share:
//!
//! - a node is an `O_PATH` descriptor; a name is one component, looked up in its directory without
//!   following a symbolic link and without `..`;
//! - what is known by descriptor is opened again through its magic link in `/proc/self/fd`, which
//!   leads to that file whatever became of its names;
//! - only regular files and directories are ever opened: a device, a pipe or a socket belongs to
//!   the guest's kernel, and is a mere entry here.
//!
//! The guest's kernel checks permissions, since it alone knows its processes; a hostile one can
//! do to a share what root could, and no more than that.

mod abi;
mod chain;
mod descriptors;
mod error;
mod handles;
mod inodes;
mod ops;
mod reply;
mod request;
mod server;
mod share;
mod thread;

pub use error::FsError;
pub use server::FileServer;
pub use share::ShareOptions;
