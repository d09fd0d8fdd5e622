//! The last part of booting, at the build machine's request.

use std::fs;
use std::process::Command;

use crate::{Context, Result, containerd};

/// Image archives that every lab has in its containerd.
const IMAGES: &str = "/var/lib/bulkhead-images/boot";

/// Starts containerd and imports the images, if asked to.
pub fn run(with_containerd: bool) -> Result<()> {
    if !with_containerd {
        return Ok(());
    }
    containerd::start()?;
    for entry in fs::read_dir(IMAGES).context(|| format!("list {IMAGES}"))? {
        let archive = entry.context(|| format!("list {IMAGES}"))?.path();
        let output = Command::new("ctr")
            .args(["image", "import"])
            .arg(&archive)
            .output()
            .context(|| "run ctr".into())?;
        if !output.status.success() {
            let said = String::from_utf8_lossy(&output.stderr);
            return Err(format!("import {}: {said}", archive.display()).into());
        }
    }
    Ok(())
}
