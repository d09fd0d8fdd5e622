//! PID 1 of the lab, and the server that runs commands there for the build machine.
//!
//! The binary is the initramfs's `/init`: it mounts the root file system, sets the system up and
//! then only reaps processes. The server is a child process, so that it waits for its own children
//! alone.

mod boot;
mod containerd;
mod exec;
mod init;
mod server;
mod stream;

use std::process::ExitCode;

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().collect();
    let arguments: Vec<&str> = arguments.iter().skip(1).map(String::as_str).collect();
    let result = match arguments.as_slice() {
        _ if std::process::id() == 1 => init::run(),
        ["serve"] => server::run(),
        ["containerd", "start"] => containerd::start(),
        ["containerd", "stop"] => containerd::stop(),
        ["containerd", "restart"] => containerd::stop().and_then(|()| containerd::start()),
        _ => Err("usage: lab-agent serve | containerd start|stop|restart".into()),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("lab-agent: {error}");
            ExitCode::FAILURE
        }
    }
}

/// What is reported to a person at the console or through the build machine.
type Result<T> = std::result::Result<T, Box<dyn std::error::Error + Send + Sync>>;

/// Says what was tried when something fails.
trait Context<T> {
    fn context(self, doing: impl FnOnce() -> String) -> Result<T>;
}

impl<T, E: std::error::Error + Send + Sync + 'static> Context<T> for std::result::Result<T, E> {
    fn context(self, doing: impl FnOnce() -> String) -> Result<T> {
        self.map_err(|error| format!("{}: {error}", doing()).into())
    }
}
