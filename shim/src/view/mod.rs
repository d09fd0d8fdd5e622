//! The host's view of a root that the host had mounted before the container.
//!
//! The VM's root is an overlay of its own, made of the same layers. Two overlays do not notice each
//! other's changes, so for as long as the container lasts a FUSE mount covers the host's: what is
//! done there happens in the VM's overlay, by the ids that are on the disk.
//!
//! A process serves it, in the user namespace of the pod as the VMM is. Nothing of the guest's reaches
//! it but the files.

mod handle;
pub mod process;

pub use handle::{View, ViewError, take_away};

/// First argument of the executable that makes it the server of a view.
pub const ARGUMENT: &str = "view";

/// Descriptor of the FUSE connection.
const DEVICE_FD: i32 = 3;

/// Descriptor of the mounts that are shown.
const TREE_FD: i32 = 4;

/// Descriptor of the pod's user namespace.
const NAMESPACE_FD: i32 = 5;

/// What the tree is called below the root of the FUSE file system.
const SHARE: &str = "root";
