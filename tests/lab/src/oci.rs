//! OCI image archives from a directory, for machines that reach no registry.

use std::fs::{self, File};
use std::io::Read;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use serde_json::{Value, json};
use sha2::{Digest, Sha256};

use crate::command::run_logged;
use crate::error::{Context, Error};

/// How long packing one image may take.
const TAR_LIMIT: Duration = Duration::from_secs(10 * 60);

/// What an image is called and runs.
pub(crate) struct ImageConfig<'a> {
    /// Its full name, with registry and tag.
    pub reference: &'a str,
    /// What a container of it runs unless told otherwise.
    pub command: &'a [&'a str],
}

/// Packs the tree `root` as the only layer of an image into an OCI layout archive
/// (image-spec, image-layout.md) that `ctr image import` takes.
pub(crate) fn write_archive(root: &Path, config: &ImageConfig, to: &Path) -> Result<(), Error> {
    let layout = tempfile::Builder::new()
        .prefix("oci-")
        .tempdir_in(root.parent().unwrap_or(root))
        .context(|| "create a temporary directory")?;
    let blobs = layout.path().join("blobs/sha256");
    fs::create_dir_all(&blobs).context(|| format!("create {}", blobs.display()))?;

    let unnamed = layout.path().join("layer");
    tar(root, &unnamed)?;
    let layer = digest(&unnamed)?;
    fs::rename(&unnamed, blobs.join(&layer)).context(|| "name a layer")?;
    let layer_size = fs::metadata(blobs.join(&layer))
        .context(|| "read a layer's size")?
        .len();

    let image = json!({
        "architecture": "amd64",
        "os": "linux",
        "config": {
            "Env": ["PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"],
            "Cmd": config.command,
        },
        "rootfs": { "type": "layers", "diff_ids": [format!("sha256:{layer}")] },
    });
    let manifest = json!({
        "schemaVersion": 2,
        "mediaType": "application/vnd.oci.image.manifest.v1+json",
        "config": blob(&blobs, "application/vnd.oci.image.config.v1+json", &image)?,
        "layers": [{
            "mediaType": "application/vnd.oci.image.layer.v1.tar",
            "digest": format!("sha256:{layer}"),
            "size": layer_size,
        }],
    });
    let mut descriptor = blob(
        &blobs,
        "application/vnd.oci.image.manifest.v1+json",
        &manifest,
    )?;
    descriptor["annotations"] = json!({ "io.containerd.image.name": config.reference });
    let index = json!({ "schemaVersion": 2, "manifests": [descriptor] });
    write(&layout.path().join("index.json"), &index)?;
    write(
        &layout.path().join("oci-layout"),
        &json!({ "imageLayoutVersion": "1.0.0" }),
    )?;
    tar(layout.path(), to)
}

/// Writes a JSON blob under its digest; returns its descriptor.
fn blob(blobs: &Path, media_type: &str, value: &Value) -> Result<Value, Error> {
    let unnamed = blobs.join("unnamed");
    write(&unnamed, value)?;
    let digest = digest(&unnamed)?;
    fs::rename(&unnamed, blobs.join(&digest)).context(|| "name a blob")?;
    Ok(json!({
        "mediaType": media_type,
        "digest": format!("sha256:{digest}"),
        "size": value.to_string().len(),
    }))
}

fn write(path: &Path, value: &Value) -> Result<(), Error> {
    fs::write(path, value.to_string()).context(|| format!("write {}", path.display()))
}

/// Archives a tree so that the same tree gives the same bytes.
fn tar(root: &Path, to: &Path) -> Result<(), Error> {
    let mut command = Command::new("tar");
    command
        .args(["--create", "--numeric-owner", "--sort=name", "--mtime=@0"])
        .args(["--format=posix", "--pax-option=delete=atime,delete=ctime"])
        .arg("--file")
        .arg(to)
        .arg("--directory")
        .arg(root)
        .arg(".");
    run_logged(&mut command, TAR_LIMIT)
}

fn digest(path: &Path) -> Result<String, Error> {
    let reading = || format!("read {}", path.display());
    let mut file = File::open(path).context(reading)?;
    let mut hasher = Sha256::new();
    let mut buffer = vec![0; 1 << 20];
    loop {
        match file.read(&mut buffer).context(reading)? {
            0 => break,
            count => hasher.update(&buffer[..count]),
        }
    }
    let digest = hasher.finalize();
    Ok(digest.iter().map(|byte| format!("{byte:02x}")).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_same_tree_gives_the_same_archive() {
        let dir = tempfile::tempdir().unwrap();
        let root = dir.path().join("root");
        fs::create_dir(&root).unwrap();
        fs::write(root.join("file"), "content").unwrap();
        let config = ImageConfig {
            reference: "docker.io/library/x:latest",
            command: &["sh"],
        };
        let [first, second] = ["a.tar", "b.tar"].map(|name| {
            let archive = dir.path().join(name);
            write_archive(&root, &config, &archive).unwrap();
            fs::read(archive).unwrap()
        });
        assert!(first == second);
    }
}
