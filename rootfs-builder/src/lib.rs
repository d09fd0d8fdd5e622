//! The guest's files on the host: how they are made and how they are checked.
//!
//! - [`initramfs`] packs the agent into a reproducible initramfs.
//! - [`manifest`] describes a guest directory (`vmlinux`, `initramfs.cpio`) with versions and
//!   hashes, written when it is installed.
//! - [`verify`] checks a guest directory against its manifest before every start and hands back
//!   the very files that were checked, open.

pub mod initramfs;
pub mod manifest;
pub mod verify;

pub use initramfs::{InitramfsError, build_initramfs};
pub use manifest::{INITRAMFS, MANIFEST, Manifest, ManifestError, VMLINUX, write_manifest};
pub use verify::{GuestFiles, VerifyError, verify};
