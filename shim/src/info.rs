//! What the runtime is, for containerd 2 (`-info`) and people (`-v`).

use std::io::{self, Write};

use containerd_shim_protos::types::introspection::{RuntimeInfo, RuntimeVersion};
use protobuf::{Message, MessageField};
use thiserror::Error;

/// The runtime's name in containerd's configuration.
pub const RUNTIME_NAME: &str = "io.containerd.bulkhead.v2";

/// Why nothing could be told.
#[derive(Debug, Error)]
pub enum InfoError {
    /// The message cannot be encoded.
    #[error("Cannot encode the runtime's description")]
    Encode(#[source] protobuf::Error),
    /// Standard output is closed.
    #[error("Cannot write the runtime's description")]
    Write(#[source] io::Error),
}

/// Writes a bare `RuntimeInfo` to standard output.
pub fn run() -> Result<(), InfoError> {
    let info = RuntimeInfo {
        name: RUNTIME_NAME.to_owned(),
        version: MessageField::some(RuntimeVersion {
            version: env!("CARGO_PKG_VERSION").to_owned(),
            ..RuntimeVersion::default()
        }),
        ..RuntimeInfo::default()
    };
    let bytes = info.write_to_bytes().map_err(InfoError::Encode)?;
    io::stdout().write_all(&bytes).map_err(InfoError::Write)
}
