//! Parses the interface of CRI, of which the tests make messages by name at run time.

use std::error::Error;
use std::path::PathBuf;
use std::{env, fs};

use protobuf::Message;

const INTERFACE: &str = "proto/cri.proto";

fn main() -> Result<(), Box<dyn Error>> {
    println!("cargo::rerun-if-changed={INTERFACE}");
    let descriptors = protobuf_parse::Parser::new()
        .pure()
        .include("proto")
        .input(INTERFACE)
        .file_descriptor_set()?;
    let out = PathBuf::from(env::var("OUT_DIR")?).join("cri.descriptors");
    Ok(fs::write(out, descriptors.write_to_bytes()?)?)
}
