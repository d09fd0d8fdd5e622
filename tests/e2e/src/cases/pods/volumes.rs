//! Volumes, as the kubelet makes them.

use anyhow::{Context, Result, ensure};
use rustix::mount::{MountFlags, UnmountFlags, mount as mount_at, unmount};
use serde_json::{Value, json};
use std::fs::{self, File};
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use super::{Case, Setting, case};
use crate::cri::{Cri, mount, probe};

/// How soon a container sees what the kubelet has changed, though each look takes long here.
const SOON: Duration = Duration::from_secs(5);

pub fn cases() -> Vec<Case> {
    vec![
        case(
            "a pod's containers share volumes with each other and the host",
            shared,
        ),
        case(
            "a container sees a config map at once when it changes",
            config_map,
        ),
        case(
            "a container may have a part of a volume, and leave a message",
            parts,
        ),
    ]
}

/// A tmpfs, as of an `emptyDir` in memory. It is unmounted when dropped.
struct InMemory(PathBuf);

impl InMemory {
    fn at(path: PathBuf) -> Result<Self> {
        mount_at(
            "tmpfs",
            &path,
            "tmpfs",
            MountFlags::empty(),
            Some(c"size=16m"),
        )
        .with_context(|| format!("mount a tmpfs at {}", path.display()))?;
        Ok(Self(path))
    }
}

impl Drop for InMemory {
    fn drop(&mut self) {
        // The comparison after the test finds a mount that is left.
        let _ = unmount(&self.0, UnmountFlags::DETACH);
    }
}

fn with(mounts: &[Value]) -> Value {
    json!({ "mounts": mounts })
}

pub fn shared(setting: &Setting) -> Result<()> {
    let cri = Cri::new(&setting.runtime)?;
    let pod = cri.pod(&json!({}))?;
    let on_disk = pod.volume("disk")?;
    let in_memory = InMemory::at(pod.volume("memory")?)?;
    let host_path = pod.volume("host")?;
    fs::write(host_path.join("file"), "from the host\n")?;
    let mut read_only = mount(&host_path, "/host");
    read_only["readonly"] = json!(true);
    let mounts = [
        mount(&on_disk, "/disk"),
        mount(&in_memory.0, "/memory"),
        read_only,
        mount(&host_path.join("file"), "/etc/one-file"),
        probe()?,
    ];
    let first = pod.start("first", &with(&mounts))?;
    let second = pod.start("second", &with(&mounts))?;
    for volume in ["disk", "memory"] {
        first.says(&format!("echo one > /{volume}/a"))?;
        second.says(&format!("cat /{volume}/a && echo two >> /{volume}/a"))?;
        let said = first.says(&format!("cat /{volume}/a"))?;
        ensure!(said == "one\ntwo", "{volume}: {said:?}");
    }
    ensure!(fs::read_to_string(on_disk.join("a"))? == "one\ntwo\n");
    ensure!(fs::read_to_string(in_memory.0.join("a"))? == "one\ntwo\n");
    ensure!(first.says("cat /host/file /etc/one-file")? == "from the host\nfrom the host");
    ensure!(
        first.exec("echo x > /host/file")?.code != 0,
        "it is writable"
    );
    // They see each other's locks, mapped memory and events.
    let caller = pod.start(
        "caller",
        &json!({
            "command": ["/probe", "probe", "call", "/disk/called"],
            "mounts": mounts,
        }),
    )?;
    caller.logs("called")?;
    second.says("/probe probe answer /disk/called")?;
    ensure!(caller.ended()?["exit_code"] == 0);
    let watcher = pod.start(
        "watcher",
        &json!({ "command": ["/probe", "probe", "events", "/disk"], "mounts": mounts }),
    )?;
    watcher.logs("watching")?;
    second.says("mv /disk/a /disk/b")?;
    watcher.logs("IN_MOVED_TO) b")?;
    drop((caller, watcher));
    drop((first, second));
    pod.stop()?;
    drop(in_memory);
    drop(pod);
    cri.end()
}

/// A volume of the kubelet's: files are links into a directory that is replaced as a whole.
struct Atomic {
    path: PathBuf,
    version: u32,
}

impl Atomic {
    fn new(path: PathBuf) -> Result<Self> {
        let mut volume = Self { path, version: 0 };
        volume.write("0")?;
        symlink("..data/key", volume.path.join("key"))?;
        Ok(volume)
    }

    /// Replaces its content.
    fn write(&mut self, content: &str) -> Result<()> {
        let old = self.directory();
        self.version += 1;
        fs::create_dir(self.path.join(self.directory()))?;
        fs::write(self.path.join(self.directory()).join("key"), content)?;
        symlink(self.directory(), self.path.join("..data_tmp"))?;
        fs::rename(self.path.join("..data_tmp"), self.path.join("..data"))?;
        if self.version > 1 {
            fs::remove_dir_all(self.path.join(old))?;
        }
        Ok(())
    }

    fn directory(&self) -> String {
        format!("..2026_01_01_00_00_{:02}.1", self.version)
    }
}

fn config_map(setting: &Setting) -> Result<()> {
    let cri = Cri::new(&setting.runtime)?;
    let pod = cri.pod(&json!({}))?;
    let mut volume = Atomic::new(pod.volume("config")?)?;
    let mut read_only = mount(&volume.path, "/config");
    read_only["readonly"] = json!(true);
    let mounts = [read_only, probe()?];
    let member = pod.start("member", &with(&mounts))?;
    let watcher = pod.start(
        "watcher",
        &json!({ "command": ["/probe", "probe", "events", "/config"], "mounts": mounts }),
    )?;
    ensure!(member.says("cat /config/key")? == "0");
    watcher.logs("watching")?;
    for content in ["1", "22", "3"] {
        let written = Instant::now();
        volume.write(content)?;
        while member.says("cat /config/key")? != content {
            ensure!(written.elapsed() < SOON, "{content:?} is not seen");
        }
    }
    // Programs that watch their configuration wait for this.
    watcher.logs("IN_MOVED_TO) ..data\n")?;
    drop((member, watcher));
    drop(pod);
    cri.end()
}

fn parts(setting: &Setting) -> Result<()> {
    let cri = Cri::new(&setting.runtime)?;
    let pod = cri.pod(&json!({}))?;
    let volume = pod.volume("whole")?;
    fs::create_dir_all(volume.join("a/b"))?;
    fs::write(volume.join("a/b/file"), "part\n")?;
    let message = pod.directory.join("message");
    File::create(&message)?;
    let member = pod.start(
        "member",
        &json!({
            "command": ["sh", "-c", "cat /part/file > /dev/termination-log; exit 1"],
            "mounts": [
                mount(&volume.join("a/b"), "/part"),
                mount(&message, "/dev/termination-log"),
            ],
        }),
    )?;
    ensure!(member.ended()?["exit_code"] == 1);
    let said = read(&message)?;
    ensure!(said == "part\n", "{said:?}");
    drop(member);
    drop(pod);
    cri.end()
}

fn read(path: &Path) -> Result<String> {
    fs::read_to_string(path).with_context(|| path.display().to_string())
}
