//! Generates the messages by which a sandbox is described.

use std::{env, path::PathBuf};

use ttrpc_codegen::{Codegen, ProtobufCustomize};

fn main() -> Result<(), Box<dyn std::error::Error>> {
    println!("cargo::rerun-if-changed=proto/cri.proto");
    let out = PathBuf::from(env::var("OUT_DIR")?);
    // The generated mod.rs declares the modules, as the files have inner attributes.
    let out = out.join("cri");
    std::fs::create_dir_all(&out)?;
    Codegen::new()
        .out_dir(&out)
        .input("proto/cri.proto")
        .include("proto")
        .rust_protobuf()
        .rust_protobuf_customize(ProtobufCustomize::default().gen_mod_rs(true))
        .run()?;
    Ok(())
}
