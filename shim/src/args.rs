//! The command line that containerd writes: flags in the style of Go's `flag` package, then an
//! action.

use std::ffi::OsString;

use thiserror::Error;

/// What the executable is asked to do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Action {
    /// Start a shim, or find the one of the pod.
    Start,
    /// Clean up after a shim.
    Delete,
    /// Print the runtime's description as protobuf.
    Info,
    /// Print the version.
    Version,
}

/// A parsed command line.
#[derive(Debug, PartialEq, Eq)]
pub struct Arguments {
    /// What to do.
    pub action: Action,
    /// containerd's namespace.
    pub namespace: String,
    /// The container's id.
    pub id: String,
    /// containerd's gRPC address.
    pub address: String,
    /// The bundle directory; empty for the working directory.
    pub bundle: String,
    /// Log more.
    pub debug: bool,
}

/// A command line that cannot be understood.
#[derive(Debug, Error, PartialEq, Eq)]
pub enum ArgumentError {
    /// No such flag.
    #[error("Unknown flag -{0}")]
    UnknownFlag(String),
    /// A flag that needs a value came last.
    #[error("Flag -{0} needs a value")]
    MissingValue(String),
    /// A flag's value cannot be used.
    #[error("Value {value:?} of flag -{flag} is invalid")]
    InvalidValue {
        /// The flag's name.
        flag: String,
        /// What it was given.
        value: String,
    },
    /// An argument is not UTF-8.
    #[error("Argument {0:?} is not UTF-8")]
    NotUtf8(OsString),
    /// No such action.
    #[error("Unknown action {0:?}: use start or delete")]
    UnknownAction(String),
    /// Nothing to do.
    #[error("No action given: use start or delete")]
    NoAction,
    /// A flag that the action needs is missing.
    #[error("Flag -{0} is missing")]
    MissingFlag(&'static str),
}

impl Arguments {
    /// Parses the arguments after the program's name.
    pub fn parse(arguments: impl Iterator<Item = OsString>) -> Result<Self, ArgumentError> {
        let mut parsed = Self {
            action: Action::Start,
            namespace: String::new(),
            id: String::new(),
            address: String::new(),
            bundle: String::new(),
            debug: false,
        };
        let (mut version, mut info) = (false, false);
        let mut action = None;
        let mut arguments =
            arguments.map(|argument| argument.into_string().map_err(ArgumentError::NotUtf8));
        while let Some(argument) = arguments.next() {
            let argument = argument?;
            let Some(flag) = argument
                .strip_prefix("--")
                .or_else(|| argument.strip_prefix('-'))
            else {
                action = Some(argument);
                break;
            };
            let (name, inline) = match flag.split_once('=') {
                Some((name, value)) => (name, Some(value.to_owned())),
                None => (flag, None),
            };
            match name {
                "debug" => parsed.debug = boolean(name, inline)?,
                "v" | "version" => version = boolean(name, inline)?,
                "info" => info = boolean(name, inline)?,
                "namespace" | "id" | "address" | "bundle" | "publish-binary" | "socket" => {
                    let value = match inline {
                        Some(value) => value,
                        None => arguments
                            .next()
                            .ok_or_else(|| ArgumentError::MissingValue(name.to_owned()))??,
                    };
                    match name {
                        "namespace" => parsed.namespace = value,
                        "id" => parsed.id = value,
                        "address" => parsed.address = value,
                        "bundle" => parsed.bundle = value,
                        // containerd passes them to every shim; events go over TTRPC_ADDRESS and
                        // the socket is our own choice.
                        _ => {}
                    }
                }
                _ => return Err(ArgumentError::UnknownFlag(name.to_owned())),
            }
        }
        parsed.action = match (version, info, action.as_deref()) {
            (true, _, _) => Action::Version,
            (_, true, _) => Action::Info,
            (_, _, Some("start")) => Action::Start,
            (_, _, Some("delete")) => Action::Delete,
            (_, _, Some(other)) => return Err(ArgumentError::UnknownAction(other.to_owned())),
            (_, _, None) => return Err(ArgumentError::NoAction),
        };
        if matches!(parsed.action, Action::Start | Action::Delete) {
            for (flag, value) in [("namespace", &parsed.namespace), ("id", &parsed.id)] {
                if value.is_empty() {
                    return Err(ArgumentError::MissingFlag(flag));
                }
                // Both become names of directories.
                if value.contains('/') || value == "." || value == ".." {
                    return Err(ArgumentError::InvalidValue {
                        flag: flag.to_owned(),
                        value: value.clone(),
                    });
                }
            }
        }
        Ok(parsed)
    }
}

fn boolean(flag: &str, value: Option<String>) -> Result<bool, ArgumentError> {
    match value.as_deref() {
        None | Some("true" | "1" | "t" | "T" | "TRUE" | "True") => Ok(true),
        Some("false" | "0" | "f" | "F" | "FALSE" | "False") => Ok(false),
        Some(value) => Err(ArgumentError::InvalidValue {
            flag: flag.to_owned(),
            value: value.to_owned(),
        }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(line: &str) -> Result<Arguments, ArgumentError> {
        Arguments::parse(line.split_whitespace().map(OsString::from))
    }

    #[test]
    fn containerds_start_is_understood() {
        let parsed = parse(
            "-namespace default -address /run/containerd/containerd.sock \
             -publish-binary /usr/bin/containerd -id c1 -debug start",
        )
        .unwrap();
        assert_eq!(parsed.action, Action::Start);
        assert_eq!(parsed.namespace, "default");
        assert_eq!(parsed.id, "c1");
        assert_eq!(parsed.address, "/run/containerd/containerd.sock");
        assert!(parsed.debug);
    }

    #[test]
    fn both_dashes_and_inline_values_are_understood() {
        let parsed = parse("--namespace=k8s.io -id=x -debug=false -bundle /b delete").unwrap();
        assert_eq!(parsed.action, Action::Delete);
        assert_eq!(parsed.namespace, "k8s.io");
        assert_eq!(parsed.bundle, "/b");
        assert!(!parsed.debug);
    }

    #[test]
    fn version_and_info_need_no_namespace() {
        assert_eq!(parse("-v").unwrap().action, Action::Version);
        assert_eq!(parse("--version").unwrap().action, Action::Version);
        assert_eq!(parse("-info").unwrap().action, Action::Info);
    }

    #[test]
    fn what_cannot_be_understood_is_named() {
        assert_eq!(
            parse("-wrong start"),
            Err(ArgumentError::UnknownFlag("wrong".into()))
        );
        assert_eq!(parse("-id"), Err(ArgumentError::MissingValue("id".into())));
        assert_eq!(parse("start"), Err(ArgumentError::MissingFlag("namespace")));
        assert_eq!(
            parse("-namespace n -id ../x start"),
            Err(ArgumentError::InvalidValue {
                flag: "id".into(),
                value: "../x".into()
            })
        );
        assert_eq!(parse(""), Err(ArgumentError::NoAction));
    }
}
