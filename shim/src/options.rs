//! What containerd passes on to the runtime from its own configuration or its client: the standard
//! input of `start`.

use std::{
    fs,
    io::{self, IsTerminal, Read},
    path::{Path, PathBuf},
};

use protobuf::{CodedInputStream, Message, well_known_types::any::Any};
use thiserror::Error;

/// The message that any runtime understands, without the prefix of its type URL
/// (containerd's `api/types/runtimeoptions/v1/api.proto`).
const GENERIC: &str = "runtimeoptions.v1.Options";

/// Where a bundle keeps them, for a `delete` without the shim.
const FILE: &str = "bulkhead-options";

/// The longest that are taken, in bytes.
const MAX_LENGTH: u64 = 1 << 20;

/// Options that cannot be used.
#[derive(Debug, Error)]
pub enum OptionsError {
    /// They cannot be read.
    #[error("Cannot read the runtime's options")]
    Read(#[source] io::Error),
    /// They are too long.
    #[error("The runtime's options have more than {MAX_LENGTH} bytes")]
    TooLong,
    /// They are no protobuf message of their type.
    #[error("Cannot decode the runtime's options")]
    Decode(#[source] protobuf::Error),
    /// They cannot be kept.
    #[error("Cannot write {path}")]
    Keep {
        /// The file.
        path: PathBuf,
        /// The system's error.
        #[source]
        source: io::Error,
    },
}

/// Where a pod's configuration is, when it is not the machine's.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub enum Options {
    /// Nothing was said.
    #[default]
    None,
    /// In this file (`ConfigPath`).
    Path(PathBuf),
    /// In this text (`ConfigBody`).
    Text(String),
}

impl Options {
    /// Reads them as containerd gives them, and keeps them in the bundle.
    pub fn receive(bundle: &Path) -> Result<Self, OptionsError> {
        let stdin = io::stdin();
        // A person tries the program.
        if stdin.is_terminal() {
            return Ok(Self::None);
        }
        let mut bytes = Vec::new();
        let mut limited = stdin.lock().take(MAX_LENGTH + 1);
        limited
            .read_to_end(&mut bytes)
            .map_err(OptionsError::Read)?;
        if bytes.len() as u64 > MAX_LENGTH {
            return Err(OptionsError::TooLong);
        }
        let options = Self::decode(&bytes)?;
        if options != Self::None {
            let path = bundle.join(FILE);
            fs::write(&path, bytes).map_err(|source| OptionsError::Keep { path, source })?;
        }
        Ok(options)
    }

    /// Those of a bundle; what cannot be read counts as nothing.
    pub fn kept(bundle: &Path) -> Self {
        let bytes = fs::read(bundle.join(FILE)).unwrap_or_default();
        Self::decode(&bytes).unwrap_or_default()
    }

    /// Takes an `Any`. Options of other runtimes say nothing to this one.
    fn decode(bytes: &[u8]) -> Result<Self, OptionsError> {
        let any = Any::parse_from_bytes(bytes).map_err(OptionsError::Decode)?;
        if any.type_url.rsplit('/').next() != Some(GENERIC) {
            return Ok(Self::None);
        }
        Self::decode_generic(&any.value).map_err(OptionsError::Decode)
    }

    fn decode_generic(bytes: &[u8]) -> protobuf::Result<Self> {
        const PATH: u32 = 2 << 3 | 2;
        const BODY: u32 = 3 << 3 | 2;
        let mut input = CodedInputStream::from_bytes(bytes);
        let (mut path, mut body) = (String::new(), Vec::new());
        while let Some(tag) = input.read_raw_tag_or_eof()? {
            match tag {
                PATH => path = input.read_string()?,
                BODY => body = input.read_bytes()?,
                tag => protobuf::rt::skip_field_for_tag(tag, &mut input)?,
            }
        }
        Ok(if !path.is_empty() {
            Self::Path(path.into())
        } else if !body.is_empty() {
            Self::Text(String::from_utf8_lossy(&body).into_owned())
        } else {
            Self::None
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn any(type_url: &str, value: &[u8]) -> Vec<u8> {
        let any = Any {
            type_url: type_url.into(),
            value: value.into(),
            ..Any::default()
        };
        any.write_to_bytes().unwrap()
    }

    #[test]
    fn a_path_or_a_text_is_found() {
        let decode = |value: &[u8]| Options::decode(&any(GENERIC, value)).unwrap();
        assert_eq!(
            decode(b"\x0a\x01t\x12\x04/a/b"),
            Options::Path("/a/b".into())
        );
        assert_eq!(
            decode(b"\x1a\x09vcpus = 2"),
            Options::Text("vcpus = 2".into())
        );
        assert_eq!(decode(b""), Options::None);
        let prefixed = any(
            "types.containerd.io/runtimeoptions.v1.Options",
            b"\x12\x01x",
        );
        assert_eq!(
            Options::decode(&prefixed).unwrap(),
            Options::Path("x".into())
        );
    }

    #[test]
    fn options_of_others_say_nothing() {
        assert_eq!(Options::decode(b"").unwrap(), Options::None);
        let runc = any("containerd.runc.v1.Options", b"\x12\x04/a/b");
        assert_eq!(Options::decode(&runc).unwrap(), Options::None);
        assert!(Options::decode(b"\xff").is_err());
        assert!(Options::decode(&any(GENERIC, b"\x12\x7f/")).is_err());
    }
}
