#![no_main]
//! The agent's reading of a spec, and what it makes of one for the kernel.

use bulkhead_agent::{
    cgroup::{devices_bpf, limits},
    spec::{Supplied, read_process, read_spec},
    stage::{affinity, mounts, scheduling, seccomp::Filter},
};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| {
    let supplied = Supplied {
        shares: (0..64).collect(),
        ..Supplied::default()
    };
    if let Ok(process) = read_process(bytes) {
        scheduling::check(&process).expect("what was checked");
    }
    if let Ok(text) = std::str::from_utf8(bytes) {
        let _ = affinity::parse(text);
    }
    let Ok(spec) = read_spec(bytes, &supplied) else {
        return;
    };
    for mount in spec.mounts().iter().flatten() {
        mounts::options(mount);
    }
    let linux = spec.linux().as_ref().expect("what was checked");
    if let Some(resources) = linux.resources() {
        for (file, _) in limits::files(resources) {
            assert!(!file.contains('/'), "{file:?} is outside the cgroup");
        }
        devices_bpf::program(resources.devices().as_deref().unwrap_or_default());
    }
    if let Some(seccomp) = linux.seccomp() {
        let _ = Filter::compile(seccomp);
    }
});
