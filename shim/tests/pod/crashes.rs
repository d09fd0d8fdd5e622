//! What happens when something dies.

use std::fs;

use containerd_shim_protos::api::{ConnectRequest, DeleteResponse};
use nix::{
    sys::signal::{Signal, kill as send_signal},
    unistd::Pid,
};
use protobuf::Message;

use crate::{
    containerd::{Containerd, deadline, delete, start, wait, wait_gone},
    lifecycle::{shut_down, try_shut_down},
    machine,
};

pub fn signal(pid: impl TryInto<i32>, signal: Signal) {
    let pid = pid.try_into().ok().unwrap();
    send_signal(Pid::from_raw(pid), signal).unwrap();
}

/// A running container: the client, the anchor's PID and the shim's.
async fn running(
    containerd: &Containerd,
) -> (containerd_shim_protos::shim_async::TaskClient, u32, i32) {
    containerd.add_bundle("c1", None, &["sleep"]);
    let (client, _) = containerd.start_shim("c1").await;
    client
        .create(deadline(), &containerd.create_request("c1"))
        .await
        .unwrap();
    let anchor = client
        .start(deadline(), &start("c1", ""))
        .await
        .unwrap()
        .pid;
    let shim = client
        .connect(deadline(), &ConnectRequest::default())
        .await
        .unwrap()
        .shim_pid;
    (client, anchor, shim.try_into().unwrap())
}

pub async fn vmm_killed() {
    let containerd = Containerd::new("normal").await;
    let (client, anchor, _) = running(&containerd).await;
    let waiting = wait("c1", "");
    let [vmm] = containerd.vmm_pids()[..] else {
        panic!("not one VMM");
    };
    let (first, second, ()) = tokio::join!(
        client.wait(deadline(), &waiting),
        client.wait(deadline(), &waiting),
        async { signal(vmm, Signal::SIGKILL) }
    );
    assert_eq!(first.unwrap().exit_status, 137);
    assert_eq!(second.unwrap().exit_status, 137);
    wait_gone(anchor.try_into().unwrap());
    let deleted = client.delete(deadline(), &delete("c1", "")).await.unwrap();
    assert_eq!(deleted.exit_status, 137);
    shut_down(&client).await;
    containerd.assert_nothing_left("c1");
    assert!(containerd.topics().contains(&"/tasks/exit c1 137".into()));
}

pub async fn anchor_killed() {
    let containerd = Containerd::new("normal").await;
    let (client, anchor, _) = running(&containerd).await;
    signal(anchor, Signal::SIGKILL);
    let exited = client.wait(deadline(), &wait("c1", "")).await.unwrap();
    assert_eq!(exited.exit_status, 137);
    client.delete(deadline(), &delete("c1", "")).await.unwrap();
    shut_down(&client).await;
    containerd.assert_nothing_left("c1");
}

pub async fn anchor_signalled() {
    let containerd = Containerd::new("normal").await;
    let (client, anchor, _) = running(&containerd).await;
    signal(anchor, Signal::SIGUSR1);
    let exited = client.wait(deadline(), &wait("c1", "")).await.unwrap();
    assert_eq!(exited.exit_status, 128 + Signal::SIGUSR1 as u32);
    client.delete(deadline(), &delete("c1", "")).await.unwrap();
    shut_down(&client).await;
    containerd.assert_nothing_left("c1");
}

pub async fn shim_killed() {
    let containerd = Containerd::new("normal").await;
    let (_client, anchor, shim) = running(&containerd).await;
    let vmms = containerd.vmm_pids();
    signal(shim, Signal::SIGKILL);
    for pid in vmms.into_iter().chain([anchor.try_into().unwrap(), shim]) {
        wait_gone(pid);
    }
    let output = containerd.run_shim("c1", "delete", || Ok(()));
    assert!(output.status.success(), "{output:?}");
    let answer = DeleteResponse::parse_from_bytes(&output.stdout).unwrap();
    assert_eq!(answer.exit_status, 137);
    containerd.assert_nothing_left("c1");
    assert!(containerd.directory.path().join("image/hello").exists());
}

pub async fn shim_terminated() {
    let containerd = Containerd::new("normal").await;
    let (_client, _, shim) = running(&containerd).await;
    signal(shim, Signal::SIGTERM);
    wait_gone(shim);
    containerd.assert_nothing_left("c1");
    assert!(containerd.topics().contains(&"/tasks/exit c1 137".into()));
}

/// containerd gives up on a slow creation: it asks for the deletion and the end, and not again.
pub async fn abandoned() {
    let containerd = Containerd::new("slow").await;
    let go = containerd.directory.path().join("go");
    nix::unistd::mkfifo(&go, nix::sys::stat::Mode::S_IRWXU).unwrap();
    containerd.add_bundle("c1", None, &["sleep"]);
    let (client, _) = containerd.start_shim_with("c1", || Ok(())).await;
    let connected = client.connect(deadline(), &ConnectRequest::default()).await;
    let shim = connected.unwrap().shim_pid.try_into().unwrap();
    let request = containerd.create_request("c1");
    let (created, ()) = tokio::join!(client.create(deadline(), &request), async {
        let deleted = client.delete(deadline(), &delete("c1", "")).await;
        assert!(deleted.is_err());
        try_shut_down(&client).await;
        tokio::task::spawn_blocking(move || fs::write(go, "").unwrap())
            .await
            .unwrap();
    });
    assert!(created.is_err());
    wait_gone(shim);
    containerd.assert_nothing_left("c1");
}

pub async fn boot_failures() {
    for (scenario, wanted) in [
        ("refuse", "Cannot allocate 512 MiB of guest memory"),
        ("die", "fake VMM: no luck today"),
        (
            "panic",
            "Kernel panic - not syncing: VFS: Unable to mount root fs",
        ),
        ("corrupt", "is corrupt"),
        ("missing", "vmlinux"),
        ("misconfigured", "line 6: unknown field `colour`"),
    ] {
        let containerd = Containerd::new(scenario).await;
        let guest = containerd.directory.path().join("guest");
        match scenario {
            "corrupt" => fs::write(guest.join("initramfs.cpio"), "initramf5").unwrap(),
            "missing" => fs::remove_file(guest.join("vmlinux")).unwrap(),
            "misconfigured" => {
                let path = containerd.directory.path().join("config.toml");
                let config = fs::read_to_string(&path).unwrap();
                fs::write(path, format!("{config}colour = 'red'\n")).unwrap();
            }
            _ => {}
        }
        fails_to_create(&containerd, || Ok(()), wanted).await;
    }
}

pub async fn no_kvm() {
    let containerd = Containerd::new("normal").await;
    fails_to_create(
        &containerd,
        machine::without_kvm,
        "Cannot open /dev/kvm: No such file or directory (os error 2); load the kernel module",
    )
    .await;
}

async fn fails_to_create(
    containerd: &Containerd,
    prepare: fn() -> std::io::Result<()>,
    wanted: &str,
) {
    containerd.add_bundle("c1", None, &["sleep"]);
    let (client, _) = containerd.start_shim_with("c1", prepare).await;
    let error = client
        .create(deadline(), &containerd.create_request("c1"))
        .await
        .unwrap_err();
    let ttrpc::Error::RpcStatus(status) = error else {
        panic!("{error}");
    };
    let message = status.message();
    assert!(message.contains(wanted), "{message}");
    assert!(!message.contains('\n'), "{message}");
    shut_down(&client).await;
    containerd.assert_nothing_left("c1");
}
