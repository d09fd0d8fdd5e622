//! `delete`: cleans up what a shim that crashed has left of a container.
//!
//! containerd also runs it after every ordinary deletion, while the shim may still serve other
//! containers of its pod: as long as the shim is there, everything is its own to clean up.

use std::{
    env, io,
    io::Write,
    path::{Path, PathBuf},
    time::{Duration, SystemTime},
};

use containerd_shim_protos::api::DeleteResponse;
use protobuf::{Message, MessageField};
use thiserror::Error;

use crate::{
    address::Address, args::Arguments, cgroup, child::KILLED, config::Config, errors::timestamp,
    mounts::unmount_all, network, options::Options, overlay::Overlay, rootfs, sandbox, spec::Spec,
    state, view,
};

/// How long killed processes may take to end. containerd gives the whole command five seconds.
const PROCESSES_DEADLINE: Duration = Duration::from_secs(3);

/// Why nothing could be answered.
#[derive(Debug, Error)]
pub enum DeleteError {
    /// The working directory is unknown.
    #[error("Cannot find the bundle's directory")]
    Bundle(#[source] io::Error),
    /// The answer cannot be encoded.
    #[error("Cannot encode the answer")]
    Encode(#[source] protobuf::Error),
    /// containerd does not listen.
    #[error("Cannot write the answer")]
    Write(#[source] io::Error),
}

/// Runs `delete` for the container's bundle. May be repeated.
pub fn run(arguments: &Arguments) -> Result<(), DeleteError> {
    let bundle = if arguments.bundle.is_empty() {
        env::current_dir().map_err(DeleteError::Bundle)?
    } else {
        PathBuf::from(&arguments.bundle)
    };
    clean(arguments, &bundle);
    let response = DeleteResponse {
        exit_status: KILLED.into(),
        exited_at: MessageField::some(timestamp(SystemTime::now())),
        ..DeleteResponse::default()
    };
    let bytes = response.write_to_bytes().map_err(DeleteError::Encode)?;
    io::stdout().write_all(&bytes).map_err(DeleteError::Write)
}

fn clean(arguments: &Arguments, bundle: &Path) {
    // Without a usable specification, the container was its own pod as far as can be known.
    let spec = Spec::read_if_there(bundle).ok().flatten();
    let spec = spec.unwrap_or_default();
    let group = spec
        .group(&arguments.id)
        .unwrap_or_else(|_| arguments.id.clone());
    let address = Address::new(&arguments.address, &arguments.namespace, &group);
    if address.is_served() {
        return;
    }
    // Of a sandbox's containers containerd leaves the rest to this.
    let mut cgroups = sandbox::left_cgroups(bundle);
    let own = cgroup::directory(spec.cgroups_path(), &arguments.namespace, &arguments.id);
    cgroups.extend(own.ok());
    // The VMM and the anchors have died with the shim; this waits for it.
    cgroup::destroy(&cgroups, PROCESSES_DEADLINE);
    if let Some(path) = spec.network_namespace()
        && !path.as_os_str().is_empty()
    {
        // The taps have gone with the VMM.
        network::clean_up(path);
    }
    unmount_all(&bundle.join(rootfs::DIRECTORY));
    if let Some(root) = &spec.root
        && root.path.is_absolute()
    {
        view::take_away(&root.path);
        if let Ok(Some(overlay)) = Overlay::at(&root.path) {
            overlay.clean_up();
        }
    }
    let config = Config::of_pod(&Options::kept(bundle)).unwrap_or_default();
    state::remove(&state::path(
        &config.state_dir,
        &arguments.namespace,
        &group,
    ));
    // A socket without a shim; a new one replaces it if it cannot be removed.
    let _ = address.remove();
}
