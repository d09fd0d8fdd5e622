//! `bulkhead-vmm`: one VM, on behalf of the shim at the other end of descriptor 3.

use std::{error::Error, process::ExitCode};

use bulkhead_vmm::{control, jail, seccomp::Filter};
use bulkhead_vmm_control::Channel;

fn main() -> ExitCode {
    match run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("bulkhead-vmm: {}", control::one_line(&*error));
            ExitCode::FAILURE
        }
    }
}

fn run() -> Result<(), Box<dyn Error>> {
    let inside = jail::enter()?;
    Filter::Setup.install()?;
    control::serve(
        Channel::from(inside.control),
        inside.proc_self_fd,
        inside.times,
    )?;
    Ok(())
}
