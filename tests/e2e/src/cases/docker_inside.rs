//! Docker in a container: it needs to be privileged, and in a VM of its own that is nothing on the host.

use std::fs;
use std::net::Ipv4Addr;
use std::path::Path;

use anyhow::{Context, Result, ensure};

use super::failures::Config;
use super::services::{get, mount};
use super::{Case, Setting, bulkhead};
use crate::command::DEADLINE;
use crate::ctr::{self, Container, Foreground, ctr};
use crate::host::{self, Pod};
use crate::network::{Attachment, Bridge, Namespace};

pub fn cases() -> Vec<Case> {
    vec![
        bulkhead(
            "docker builds and runs images in a privileged container",
            inside,
        )
        .with("debian-docker")
        .soak(),
    ]
}

/// The first of the host's ids that are set aside for pods, unless the configuration says otherwise.
const FIRST_ID: u32 = 1_879_048_192;

/// What docs/docker.md says, and what Docker would have done for the container: a cgroup namespace with
/// its cgroups in view. containerd is started first because dockerd gives it less time than the lab takes.
const DOCKERD: &str = r"
disk=/data/docker.ext4
[ -e $disk ] || { truncate -s 4G $disk && mkfs.ext4 -q $disk; }
[ -e /dev/loop-control ] || mknod /dev/loop-control c 10 237
[ -e /dev/loop0 ] || mknod /dev/loop0 b 7 0
mkdir -p /var/lib/docker
mount -o loop $disk /var/lib/docker
mount -t cgroup2 cgroup /sys/fs/cgroup
mkdir /sys/fs/cgroup/init
xargs -rn1 < /sys/fs/cgroup/cgroup.procs > /sys/fs/cgroup/init/cgroup.procs
sed 's/ / +/g; s/^/+/' /sys/fs/cgroup/cgroup.controllers > /sys/fs/cgroup/cgroup.subtree_control
containerd 2> /run/containerd.log &
until [ -S /run/containerd/containerd.sock ]; do sleep .2; done
exec dockerd --containerd=/run/containerd/containerd.sock
";

/// Files removed and directories replaced, which overlays keep as special files and attributes.
const DOCKERFILE: &str = r"
FROM busybox
RUN mkdir -p /www /old && echo built > /www/index.html && touch /old/file && chmod 4755 /bin/busybox
RUN rm -r /home /old && mkdir /old && echo new > /old/new
CMD httpd -f -p 80 -h /www
";

/// Waits until the container inside serves.
const LISTENS: &str = "docker exec web timeout 60 sh -c \
    'until wget -qO- http://127.0.0.1/index.html; do usleep 100000; done'";

fn inside(setting: &Setting) -> Result<()> {
    let _config = Config::replace("memory_mib = 1024\n")?;
    let data = tempfile::tempdir_in("/var/tmp")?;
    let path = data.path();
    fs::write(path.join("Dockerfile"), DOCKERFILE)?;
    let archive = path.join("busybox.tar").display().to_string();
    ctr(&["image", "export", &archive, ctr::BUSYBOX])?.succeeds()?;
    let bridge = Bridge::new();
    let namespace = Namespace::new()?;
    let eth = Attachment::bridge(&namespace, "eth0", &bridge)?;
    let own: Ipv4Addr = eth.address(false)?.parse()?;

    let daemon = start(setting, &namespace, path)?;
    unprivileged(&daemon.container)?;
    let docker = |daemon: &Foreground, script: &str| {
        let words = ["bash", "-ec", script];
        daemon.container.exec(&[], &words)?.succeeds()
    };
    let said = docker(
        &daemon,
        "docker info --format '{{.Driver}} {{.CgroupVersion}}'",
    )?;
    ensure!(said == "overlay2 2\n", "{said}");
    docker(&daemon, "docker load -i /data/busybox.tar")?;
    let build = "cd /data && tar -c Dockerfile | DOCKER_BUILDKIT=0 docker build -t web -";
    docker(&daemon, build)?;
    docker(
        &daemon,
        &format!("docker run -d --name web --memory 64m -p 8080:80 web; {LISTENS}"),
    )?;
    ensure!(get(own, 8080, "/index.html")? == "built\n");
    let look =
        "docker exec web sh -c 'ls -d /home || echo gone; ls /old; cat /sys/fs/cgroup/memory.max'
         docker run --rm web wget -qO- http://172.17.0.1:8080/index.html";
    let said = docker(&daemon, look)?;
    ensure!(said == "gone\nnew\n67108864\nbuilt\n", "{said}");
    stop(daemon)?;

    // What it has is in the volume.
    let daemon = start(setting, &namespace, path)?;
    docker(&daemon, &format!("docker start web; {LISTENS}"))?;
    ensure!(get(own, 8080, "/index.html")? == "built\n");
    stop(daemon)
}

fn start(setting: &Setting, namespace: &Namespace, data: &Path) -> Result<Foreground> {
    let daemon = setting
        .container()
        .image(ctr::DOCKER)
        .flags(&["--privileged", "--with-ns", &namespace.flag()])
        .flags(&["--mount", &mount(data, "/data")])
        .spawn(&["unshare", "--cgroup", "bash", "-ec", DOCKERD])?;
    daemon.client.stderr.expect("API listen on", DEADLINE)?;
    Ok(daemon)
}

/// Ends the daemon, which ends its containers.
fn stop(daemon: Foreground) -> Result<()> {
    daemon.container.kill("SIGTERM")?;
    daemon.finish()?.succeeds()?;
    Ok(())
}

/// On the host the container is a process in a user namespace of its own, under an id of nobody's.
fn unprivileged(container: &Container) -> Result<()> {
    let vmm = Pod::of(container.id())?.child("bulkhead-vmm")?.pid;
    let process = Path::new("/proc").join(vmm.to_string());
    let users = |process: &Path| fs::read_link(process.join("ns/user"));
    ensure!(
        users(&process)? != users(Path::new("/proc/self"))?,
        "it is in the host's user namespace"
    );
    let status = host::read(&process.join("status"))?;
    let ids = status.lines().find_map(|line| line.strip_prefix("Uid:"));
    for id in ids.context("no Uid")?.split_whitespace() {
        ensure!(id.parse::<u32>()? >= FIRST_ID, "it runs under {id}");
    }
    Ok(())
}
