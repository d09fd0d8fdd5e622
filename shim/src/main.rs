//! `containerd-shim-bulkhead-v2`: what containerd starts for each pod.

use std::process::ExitCode;

fn main() -> ExitCode {
    bulkhead_shim::main()
}
