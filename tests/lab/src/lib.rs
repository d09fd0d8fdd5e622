//! The lab: a KVM host in software, for tests that need root, containerd and KVM on any machine.
//!
//! A [`Lab`] is a Debian system under QEMU's software emulation of an AMD processor with SVM, so
//! that nested KVM inside it is real whatever the build machine offers. Its root file system is
//! built once from Debian packages and cached; each run writes to a throw-away overlay. Commands
//! run in it through an agent on a virtio-serial port, so the lab's network stays untouched.
//!
//! ```no_run
//! use bulkhead_lab::{Lab, LabOptions};
//!
//! let lab = Lab::start(&LabOptions::default())?;
//! let output = lab.exec(["uname", "-r"]).run()?;
//! assert_eq!(output.status, 0);
//! # Ok::<(), bulkhead_lab::Error>(())
//! ```

mod cache;
mod client;
mod command;
mod emulator;
mod error;
mod hub;
mod image;
mod lab;
mod machine;
pub mod mux;
mod oci;
pub mod protocol;
mod step;
mod tools;

pub use cache::Cache;
pub use client::{Client, Exec, ExecOutput, Input};
pub use command::{run_logged, run_shown};
pub use error::Error;
pub use image::{busybox_archive, debian_archive};
pub use lab::{Lab, LabOptions, LabState, prepare_images, serve};
pub use protocol::Containerd;
pub use step::Step;
pub use tools::{
    BUILD_LIMIT, cargo, install_host_packages, static_build, static_dir, target_dir, workspace,
};
