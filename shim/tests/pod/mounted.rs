//! Roots that the host has mounted as an overlay before the container, as Docker does.

use std::{fs, os::unix::fs::MetadataExt, path::PathBuf};

use containerd_shim_protos::api::{ConnectRequest, CreateTaskRequest};
use nix::{
    mount::{MntFlags, MsFlags, mount, umount2},
    sys::statfs::{FUSE_SUPER_MAGIC, OVERLAYFS_SUPER_MAGIC, statfs},
};

use crate::{
    containerd::{Containerd, deadline, delete, wait_gone},
    lifecycle::shut_down,
};

/// An overlay of the image, as it is found at the root of a bundle.
struct Mounted {
    /// Elsewhere than what the container binds, which is mounted with all below it.
    _directory: tempfile::TempDir,
    image: PathBuf,
    upper: PathBuf,
    work: PathBuf,
    path: PathBuf,
}

impl Mounted {
    /// Mounts it and writes the bundle `c1` for it.
    fn new(containerd: &Containerd) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let home = directory.path().join("a, b:c");
        let [upper, work, path] = ["diff", "work", "merged"].map(|name| home.join(name));
        for directory in [&upper, &work, &path] {
            fs::create_dir_all(directory).unwrap();
        }
        let image = containerd.directory.path().join("image");
        let mounted = Self {
            _directory: directory,
            image,
            upper,
            work,
            path,
        };
        mounted.mount().unwrap();
        containerd.add_bundle("c1", None, &["sleep"]);
        let config = containerd.bundle("c1").join("config.json");
        let mut spec: serde_json::Value =
            serde_json::from_str(&fs::read_to_string(&config).unwrap()).unwrap();
        spec["root"]["path"] = mounted.path.to_str().unwrap().into();
        fs::write(&config, spec.to_string()).unwrap();
        mounted
    }

    /// Mounts the layers, once more if they are mounted already.
    fn mount(&self) -> nix::Result<()> {
        let escaped = |path: &PathBuf| path.to_str().unwrap().replace(',', "\\,");
        let options = format!(
            "lowerdir={},upperdir={},workdir={}",
            escaped(&self.image),
            escaped(&self.upper),
            escaped(&self.work),
        );
        let flags = MsFlags::empty();
        let kind = Some("overlay");
        mount(kind, &self.path, kind, flags, Some(&*options))
    }

    fn request(containerd: &Containerd) -> CreateTaskRequest {
        CreateTaskRequest {
            rootfs: Vec::new(),
            ..containerd.create_request("c1")
        }
    }

    /// Asserts that the host's own mount is what is seen, and that nothing is beside its layers.
    fn assert_as_before(&self) {
        let kind = statfs(&self.path).unwrap().filesystem_type();
        assert_eq!(kind, OVERLAYFS_SUPER_MAGIC);
        assert!(!self.upper.with_file_name("bulkhead-work").exists());
        let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap();
        assert!(!mounts.contains("work/work"), "{mounts}");
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        while umount2(&self.path, MntFlags::MNT_DETACH).is_ok() {}
    }
}

/// What the host does below the mount point happens in the container's root, by the ids of the disk.
pub async fn shown() {
    let containerd = Containerd::new("normal").await;
    let mounted = Mounted::new(&containerd);
    let (client, _) = containerd.start_shim("c1").await;
    client
        .create(deadline(), &Mounted::request(&containerd))
        .await
        .unwrap();
    let kind = statfs(&mounted.path).unwrap().filesystem_type();
    assert_eq!(kind, FUSE_SUPER_MAGIC);
    let seen = |name: &str| mounted.path.join(name);
    assert_eq!(fs::read_to_string(seen("hello")).unwrap(), "from the image");
    fs::write(seen("new"), "from the host").unwrap();
    std::os::unix::fs::chown(seen("new"), Some(12), Some(34)).unwrap();
    fs::remove_file(seen("hello")).unwrap();
    let on_disk = fs::metadata(mounted.upper.join("new")).unwrap();
    assert_eq!((on_disk.uid(), on_disk.gid()), (12, 34));
    // Changed without the view's doing, as the VMM does.
    fs::write(mounted.upper.join("new"), "changed").unwrap();
    assert_eq!(fs::read_to_string(seen("new")).unwrap(), "changed");

    // Whoever mounts the layers over again can only read.
    mounted.mount().unwrap();
    let error = fs::write(mounted.path.join("other"), "").unwrap_err();
    assert_eq!(error.kind(), std::io::ErrorKind::ReadOnlyFilesystem);
    assert_eq!(fs::read_to_string(seen("new")).unwrap(), "changed");
    umount2(&mounted.path, MntFlags::MNT_DETACH).unwrap();
    fs::write(mounted.path.join("other"), "").unwrap();

    client.delete(deadline(), &delete("c1", "")).await.unwrap();
    mounted.assert_as_before();
    shut_down(&client).await;
    containerd.assert_nothing_left("c1");
}

/// A view without a shim is taken away by containerd's clean-up.
pub async fn shim_killed() {
    let containerd = Containerd::new("normal").await;
    let mounted = Mounted::new(&containerd);
    let (client, _) = containerd.start_shim("c1").await;
    client
        .create(deadline(), &Mounted::request(&containerd))
        .await
        .unwrap();
    let shim = client
        .connect(deadline(), &ConnectRequest::default())
        .await
        .unwrap()
        .shim_pid;
    let shim = i32::try_from(shim).unwrap();
    nix::sys::signal::kill(nix::unistd::Pid::from_raw(shim), nix::sys::signal::SIGKILL).unwrap();
    wait_gone(shim);
    let output = containerd.run_shim("c1", "delete", || Ok(()));
    assert!(output.status.success(), "{output:?}");
    mounted.assert_as_before();
    containerd.assert_nothing_left("c1");
}
