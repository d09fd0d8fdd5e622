//! `bulkhead-agent`, the guest's `/init`.

fn main() -> std::process::ExitCode {
    bulkhead_agent::main()
}
