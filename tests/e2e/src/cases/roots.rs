//! Root file systems, mounted as the snapshotters of containerd ask for it.

use std::ffi::OsStr;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, ensure};
use containerd_shim_protos::api::Mount;
use serde_json::{Value, json};

use super::{Case, Setting, case};
use crate::command::{Input, Running};
use crate::ctr::{BUSYBOX, Container, RUNC, Run, ctr};
use crate::shim::Shim;

/// Layers that need more than the page that mount(2) takes for options.
const MANY: usize = 100;

pub fn cases() -> Vec<Case> {
    vec![case(
        "a root is mounted as each snapshotter asks for it",
        as_asked,
    )]
}

fn as_asked(setting: &Setting) -> Result<()> {
    let directory = tempfile::Builder::new()
        .prefix("roots-")
        .tempdir_in("/var/tmp")?;
    let image = Image::copy(&directory.path().join("image"))?;
    let roots = |name: &str, runtime: &str| -> Result<Vec<String>> {
        let directory = directory.path().join(name);
        fs::create_dir(&directory)?;
        found_in(&image, runtime, &directory)
    };
    let (runc, tested) = (roots("runc", RUNC)?, roots("tested", &setting.runtime)?);
    ensure!(runc == tested, "runc: {runc:#?}\ntested: {tested:#?}");
    let everything = runc.concat();
    for part in ["written", "Read-only file system", "a submount", "layer 99"] {
        ensure!(everything.contains(part), "no {part:?} in {runc:#?}");
    }
    Ok(())
}

/// What a container of this runtime finds in a root of each kind, and what it leaves there.
fn found_in(image: &Image, runtime: &str, directory: &Path) -> Result<Vec<String>> {
    let pod = Run::new(runtime).detach(&["sleep", "100000"])?;
    let shim = Shim::of(&pod)?;
    let mut found = Vec::new();
    for (name, root) in [
        ("bind", image.bind(directory, "rw")?),
        ("bind-ro", image.bind(directory, "ro")?),
        ("overlay", image.overlay(directory, "overlay", 1)?),
        ("overlay-long", image.overlay(directory, "long", MANY)?),
        ("view", image.view(directory)?),
        (
            "loop",
            image.file_system(directory, "loop", &["loop", "rw"])?,
        ),
        (
            "loop-ro",
            image.file_system(directory, "loop-ro", &["loop", "ro"])?,
        ),
        ("device", image.device(directory)?),
        ("submount", image.submount(directory)?),
    ] {
        let bundle = directory.join(format!("{name}-bundle"));
        fs::create_dir_all(bundle.join("rootfs"))?;
        let id = format!("{}-{name}", pod.id());
        let spec = spec_like(&pod, &id)?;
        fs::write(bundle.join("config.json"), spec.to_string())?;
        let mut process = shim
            .create(&bundle, &id, root.mounts.clone())
            .with_context(|| format!("{name} under {runtime}"))?;
        process.start()?;
        let ended = process.finish()?;
        let said = String::from_utf8_lossy(&ended.stdout).into_owned();
        let left = match &root.changes {
            Some(path) => fs::read_to_string(path.join("new"))?,
            None => String::new(),
        };
        found.push(format!("{name}: {} {said}left: {left}", ended.code));
        fs::remove_dir(bundle.join("rootfs")).context("the bundle's rootfs is in use")?;
    }
    Ok(found)
}

/// The specification of this container for another one, which looks at its root.
fn spec_like(pod: &Container, id: &str) -> Result<Value> {
    let bundles = "/run/containerd/io.containerd.runtime.v2.task/default";
    let path = format!("{bundles}/{}/config.json", pod.id());
    let mut spec: Value = serde_json::from_slice(&fs::read(&path)?)?;
    let script = "cat /marker /sub/marker; cat /layer; echo written > /new && cat /new; ls /";
    spec["process"]["args"] = json!(["sh", "-c", format!("exec 2>&1; {script}")]);
    spec["root"] = json!({ "path": "rootfs" });
    spec["linux"]["cgroupsPath"] = json!(format!("/default/{id}"));
    Ok(spec)
}

/// A root to be.
struct Root {
    mounts: Vec<Mount>,
    /// Where on the host the container's changes are, if that is known.
    changes: Option<PathBuf>,
    /// A block device that goes with this.
    device: Option<LoopDevice>,
}

impl Root {
    fn new(kind: &str, source: &Path, options: &[&str], changes: Option<PathBuf>) -> Self {
        let mount = Mount {
            type_: kind.to_owned(),
            source: source.to_string_lossy().into_owned(),
            options: options.iter().map(|&option| option.to_owned()).collect(),
            ..Mount::default()
        };
        Self {
            mounts: vec![mount],
            changes,
            device: None,
        }
    }
}

/// The files of the busybox image.
struct Image(PathBuf);

impl Image {
    fn copy(path: &Path) -> Result<Self> {
        let mounted = path.with_extension("mounted");
        fs::create_dir(&mounted)?;
        let mount = mounted.to_string_lossy();
        ctr(&["image", "mount", BUSYBOX, &mount])?.succeeds()?;
        let copied = copy(&mounted, path);
        ctr(&["image", "unmount", "--rm", &mount])?.succeeds()?;
        copied?;
        fs::write(path.join("marker"), "the image\n")?;
        // Where something is mounted must be there: some roots cannot be changed.
        for name in ["dev", "proc", "run", "sub", "sys"] {
            fs::create_dir_all(path.join(name))?;
        }
        Ok(Self(path.to_owned()))
    }

    /// As the native snapshotter does.
    fn bind(&self, directory: &Path, access: &str) -> Result<Root> {
        let root = directory.join(format!("bind-{access}"));
        copy(&self.0, &root)?;
        let changes = (access == "rw").then(|| root.clone());
        Ok(Root::new("bind", &root, &["rbind", access], changes))
    }

    /// As overlayfs does, with this many layers above the image.
    fn overlay(&self, directory: &Path, name: &str, layers: usize) -> Result<Root> {
        let [upper, work] = ["fs", "work"].map(|part| directory.join(name).join(part));
        let mut lower = Vec::new();
        for number in (0..layers).rev() {
            let name = format!("{name}-a-layer-with-a-long-name-{number}");
            let layer = directory.join(name);
            fs::create_dir(&layer)?;
            fs::write(layer.join("layer"), format!("layer {number}\n"))?;
            lower.push(layer.to_string_lossy().into_owned());
        }
        fs::create_dir_all(&upper)?;
        fs::create_dir_all(&work)?;
        lower.push(self.0.to_string_lossy().into_owned());
        let options = [
            "index=off".to_owned(),
            format!("workdir={}", work.display()),
            format!("upperdir={}", upper.display()),
            format!("lowerdir={}", lower.join(":")),
        ];
        let options = options.each_ref().map(String::as_str);
        Ok(Root::new(
            "overlay",
            Path::new("overlay"),
            &options,
            Some(upper),
        ))
    }

    /// As overlayfs shows what nobody may change.
    fn view(&self, directory: &Path) -> Result<Root> {
        let layer = directory.join("view-layer");
        fs::create_dir(&layer)?;
        fs::write(layer.join("layer"), "a layer\n")?;
        let lower = format!("lowerdir={}:{}", layer.display(), self.0.display());
        Ok(Root::new("overlay", Path::new("overlay"), &[&lower], None))
    }

    /// As the blockfile and erofs snapshotters do, but for the kind of file system.
    fn file_system(&self, directory: &Path, name: &str, options: &[&str]) -> Result<Root> {
        let file = self.ext4(directory, name)?;
        Ok(Root::new("ext4", &file, options, None))
    }

    /// As devmapper does.
    fn device(&self, directory: &Path) -> Result<Root> {
        let file = self.ext4(directory, "device")?;
        let device = LoopDevice::attach(&file)?;
        let mut root = Root::new("ext4", Path::new(&device.0), &[], None);
        root.device = Some(device);
        Ok(root)
    }

    /// A mount within another.
    fn submount(&self, directory: &Path) -> Result<Root> {
        let mut root = self.overlay(directory, "above", 1)?;
        let below = directory.join("below");
        fs::create_dir(&below)?;
        fs::write(below.join("marker"), "a submount\n")?;
        let bind = Root::new("bind", &below, &["rbind", "ro"], None);
        root.mounts
            .extend(bind.mounts.into_iter().map(|mount| Mount {
                target: "/sub".into(),
                ..mount
            }));
        Ok(root)
    }

    fn ext4(&self, directory: &Path, name: &str) -> Result<PathBuf> {
        let file = directory.join(format!("{name}.ext4"));
        let words = ["-q", "-t", "ext4", "-d"].map(OsStr::new);
        let files = [self.0.as_os_str(), file.as_os_str(), OsStr::new("16M")];
        run("mke2fs", &[&words[..], &files].concat())?;
        Ok(file)
    }
}

/// A file as a block device.
struct LoopDevice(String);

impl LoopDevice {
    fn attach(file: &Path) -> Result<Self> {
        let words = ["--find", "--show"].map(OsStr::new);
        let name = run("losetup", &[&words[..], &[file.as_os_str()]].concat())?;
        Ok(Self(name.trim().to_owned()))
    }
}

impl Drop for LoopDevice {
    fn drop(&mut self) {
        // A test that has failed is told of another failure.
        let _ = run("losetup", &["--detach", &self.0].map(OsStr::new));
    }
}

fn copy(from: &Path, to: &Path) -> Result<String> {
    run("cp", &["-a".as_ref(), from.as_os_str(), to.as_os_str()])
}

/// Runs a tool of the host's to its end; returns what it says.
fn run(program: &str, arguments: &[&OsStr]) -> Result<String> {
    let mut command = Command::new(program);
    command.args(arguments);
    Running::spawn(command, Input::Null)?.finish()?.succeeds()
}
