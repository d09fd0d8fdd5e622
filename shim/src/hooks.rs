//! Programs that the specification has run at points of a container's life.
//! <https://github.com/opencontainers/runtime-spec/blob/v1.2.1/config.md#posix-platform-hooks>
//! Those in the container's namespaces are run by the agent, all others here, on the host.

use std::{
    collections::HashMap,
    io,
    os::unix::process::CommandExt,
    path::{Path, PathBuf},
    process::{Command, Stdio},
    time::Duration,
};

use bulkhead_agent_api::hook_time;
use serde::Serialize;
use thiserror::Error;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::unix::pipe,
    time::timeout,
};

use crate::{child::Reaper, privileges, spec::Hook, text};

/// The most of a hook's standard error that is told, in bytes.
const MAX_MESSAGE: u64 = 1024;

/// Failures of a hook.
#[derive(Debug, Error)]
pub enum HookError {
    /// It cannot be started.
    #[error("Cannot run the hook {path}")]
    Spawn {
        /// The executable.
        path: PathBuf,
        /// The system's error.
        #[source]
        source: io::Error,
    },
    /// It failed.
    #[error("The hook {path} exited with status {code}: {message}")]
    Failed {
        /// The executable.
        path: PathBuf,
        /// Its exit code.
        code: u8,
        /// The beginning of its standard error.
        message: String,
    },
    /// It took too long and was killed.
    #[error("The hook {path} did not end within {seconds} s")]
    Deadline {
        /// The executable.
        path: PathBuf,
        /// How long it had.
        seconds: u64,
    },
}

/// The container's state, as hooks get it on standard input.
/// <https://github.com/opencontainers/runtime-spec/blob/v1.2.1/runtime.md#state>
#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct State<'a> {
    /// Version of the specification.
    pub oci_version: &'a str,
    /// The container's id.
    pub id: &'a str,
    /// `creating`, `running` or `stopped`.
    pub status: &'static str,
    /// The anchor's process id; 0 when stopped.
    pub pid: u32,
    /// The bundle's directory.
    pub bundle: &'a Path,
    /// The specification's annotations.
    #[serde(skip_serializing_if = "HashMap::is_empty")]
    pub annotations: &'a HashMap<String, String>,
}

/// How long hooks may take, one after the other.
pub fn time(hooks: &[Hook]) -> Duration {
    hooks.iter().map(|hook| hook_time(hook.timeout)).sum()
}

/// Runs hooks one after the other; the first failure ends it.
pub async fn run(hooks: &[Hook], state: &State<'_>, reaper: &Reaper) -> Result<(), HookError> {
    for hook in hooks {
        let deadline = hook_time(hook.timeout);
        match timeout(deadline, run_one(hook, state, reaper)).await {
            Ok(result) => result?,
            // The child was dropped with the future, and with that killed.
            Err(_) => {
                return Err(HookError::Deadline {
                    path: hook.path.clone(),
                    seconds: deadline.as_secs(),
                });
            }
        }
    }
    Ok(())
}

async fn run_one(hook: &Hook, state: &State<'_>, reaper: &Reaper) -> Result<(), HookError> {
    let failed = |source| HookError::Spawn {
        path: hook.path.clone(),
        source,
    };
    let input = serde_json::to_vec(state).map_err(|error| failed(error.into()))?;
    let (their_input, our_input) = io::pipe().map_err(failed)?;
    let (our_errors, their_errors) = io::pipe().map_err(failed)?;
    let mut command = Command::new(&hook.path);
    if let Some((name, rest)) = hook.args.split_first() {
        command.arg0(name).args(rest);
    }
    command
        .env_clear()
        .envs(hook.env.iter().filter_map(|pair| pair.split_once('=')))
        .current_dir(state.bundle)
        .stdin(their_input)
        .stdout(Stdio::null())
        .stderr(their_errors);
    // SAFETY: it makes system calls only, and neither allocates nor takes a lock.
    unsafe { command.pre_exec(|| Ok(privileges::reach_processes()?)) };
    let child = reaper.spawn(&mut command).map_err(failed)?;
    drop(command);
    let mut our_input = pipe::Sender::from_owned_fd(our_input.into()).map_err(failed)?;
    let our_errors = pipe::Receiver::from_owned_fd(our_errors.into()).map_err(failed)?;
    let tell = async {
        // A hook may ignore the state.
        let _ = our_input.write_all(&input).await;
        drop(our_input);
    };
    let listen = async {
        let mut message = Vec::new();
        let mut errors = our_errors.take(MAX_MESSAGE);
        let _ = errors.read_to_end(&mut message).await;
        // Keep reading, so that a talkative hook does not fail.
        let _ = tokio::io::copy(&mut errors.into_inner(), &mut tokio::io::sink()).await;
        message
    };
    tokio::pin!(listen);
    let ((), code, message) = tokio::select! {
        (told, code) = async { tokio::join!(tell, child.exited()) } => {
            // What the hook left running may keep its standard error open.
            let grace = Duration::from_millis(100);
            (told, code, timeout(grace, &mut listen).await.unwrap_or_default())
        }
        message = &mut listen => ((), child.exited().await, message),
    };
    if code == 0 {
        return Ok(());
    }
    Err(HookError::Failed {
        path: hook.path.clone(),
        code,
        message: text::one_line(&String::from_utf8_lossy(&message), 1024),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shell(script: &str, timeout: Option<u64>) -> Hook {
        Hook {
            path: "/bin/sh".into(),
            args: vec!["sh".into(), "-c".into(), script.into()],
            env: vec!["PATH=/usr/bin:/bin".into()],
            timeout,
        }
    }

    async fn try_run(hook: Hook) -> Result<(), HookError> {
        let reaper = Reaper::start().unwrap();
        let annotations = HashMap::new();
        let state = State {
            oci_version: "1.1.0",
            id: "c1",
            status: "creating",
            pid: 7,
            bundle: Path::new("/"),
            annotations: &annotations,
        };
        run(&[hook], &state, &reaper).await
    }

    #[tokio::test]
    async fn a_hook_gets_the_state() {
        let directory = tempfile::tempdir().unwrap();
        let copy = directory.path().join("state");
        let script = format!("cat > {}", copy.display());
        try_run(shell(&script, None)).await.unwrap();
        let state: serde_json::Value =
            serde_json::from_slice(&std::fs::read(copy).unwrap()).unwrap();
        assert_eq!(state["id"], "c1");
        assert_eq!(state["pid"], 7);
        assert_eq!(state["status"], "creating");
    }

    #[tokio::test]
    async fn a_failing_hook_tells_why() {
        let error = try_run(shell("echo no way >&2; exit 3", None))
            .await
            .unwrap_err();
        let HookError::Failed { code, message, .. } = error else {
            panic!("{error}");
        };
        assert_eq!((code, message.as_str()), (3, "no way"));
    }

    #[tokio::test]
    async fn a_hook_may_be_the_executable_of_a_process_with_more_rights() {
        let mut process = Command::new("sleep").arg("1000").spawn().unwrap();
        let path = PathBuf::from(format!("/proc/{}/exe", process.id()));
        // Of this test's thread alone.
        privileges::restrict().unwrap();
        assert!(std::fs::read_link(&path).is_err());
        let ended = try_run(Hook {
            path,
            args: vec!["sleep".into(), "0".into()],
            env: Vec::new(),
            timeout: None,
        });
        let ended = ended.await;
        process.kill().unwrap();
        process.wait().ok();
        ended.unwrap();
    }

    #[tokio::test]
    async fn a_hanging_hook_is_ended() {
        let error = try_run(shell("sleep 1000", Some(0))).await.unwrap_err();
        assert!(matches!(error, HookError::Deadline { .. }));
    }
}
