//! A FUSE file server that lives in the virtual machine monitor and serves a guest's virtio-fs.
//!
//! It serves only the directories and files it was handed as descriptors ("shares"): it never
//! looks up a path of the host. The guest's kernel is its one client and is hostile.

mod error;
mod server;
mod share;

pub use error::FsError;
pub use server::FileServer;
pub use share::ShareOptions;
