//! Generates the messages and the async ttrpc client and server from the protocol file.

use std::{env, path::PathBuf};

use ttrpc_codegen::{Codegen, Customize, ProtobufCustomize};

fn main() -> Result<(), Box<dyn std::error::Error>> {
    println!("cargo::rerun-if-changed=proto/agent.proto");
    let out = PathBuf::from(env::var("OUT_DIR")?);
    Codegen::new()
        .out_dir(&out)
        .input("proto/agent.proto")
        .include("proto")
        .rust_protobuf()
        .customize(Customize {
            async_all: true,
            ..Default::default()
        })
        // The generated mod.rs has inner attributes, which `include!` refuses.
        .rust_protobuf_customize(ProtobufCustomize::default().gen_mod_rs(false))
        .run()?;
    // The same inner attributes head the generated files themselves.
    for file in ["agent.rs", "agent_ttrpc.rs"] {
        let path = out.join(file);
        let text = std::fs::read_to_string(&path)?;
        let outer: String = text
            .lines()
            .filter(|line| !line.starts_with("#![") && !line.starts_with("//!"))
            .flat_map(|line| [line, "\n"])
            .collect();
        std::fs::write(&path, outer)?;
    }
    Ok(())
}
