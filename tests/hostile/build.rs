//! Builds the guest: the library of this crate once more, as a program that needs no operating
//! system, linked to where the VMM loads kernels.

use std::{env, path::Path, process::Command};

fn main() {
    println!("cargo::rerun-if-changed=src");
    println!("cargo::rerun-if-changed=guest.ld");
    println!("cargo::rustc-check-cfg=cfg(guest)");
    let variable = |name| env::var(name).expect("cargo sets it for build scripts");
    let script = Path::new(&variable("CARGO_MANIFEST_DIR")).join("guest.ld");
    let guest = Path::new(&variable("OUT_DIR")).join("guest");
    let status = Command::new(variable("RUSTC"))
        .args(["src/lib.rs", "--crate-name=guest", "--crate-type=bin"])
        .args([
            "--edition=2024",
            "--cfg=guest",
            "--check-cfg=cfg(guest,test)",
        ])
        // Not the target's, which may not be this compiler's own.
        .args(["--target", &variable("HOST")])
        // Static: nothing relocates it. Interrupts use the stack that they find. Nothing unwinds.
        .args(["-Crelocation-model=static", "-Cno-redzone=yes"])
        .args(["-Cpanic=abort", "-Copt-level=s", "-Coverflow-checks=yes"])
        // No vector instructions, like a kernel: KVM has to emulate them on some hosts, and cannot.
        // rustc warns because floating-point arguments could not be passed; there are none.
        .arg("-Ctarget-feature=-sse,-sse2")
        .args(["-Clink-arg=-nostdlib", "-Clink-arg=-static"])
        .arg(format!("-Clink-arg=-Wl,-T,{}", script.display()))
        .args([
            "-Clink-arg=-Wl,--build-id=none",
            "-Cstrip=symbols",
            "-Dwarnings",
        ])
        .arg("-o")
        .arg(&guest)
        .status()
        .expect("cannot run rustc");
    assert!(status.success(), "the guest does not compile");
}
