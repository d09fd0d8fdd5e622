//! Pods that containerd makes by its sandbox API, without a pause container. Most is asked of them
//! that is asked of others.

use std::fs;
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use serde_json::json;

use super::{Case, Setting, case, life, limits, network, security, volumes};
use crate::command::DEADLINE;
use crate::cri::{Cri, NAMESPACE};
use crate::ctr::ctr;
use crate::host;

pub fn cases() -> Vec<Case> {
    [
        case(
            "a pod by the sandbox API runs two containers",
            life::two_containers,
        ),
        case("a pod by the sandbox API has no pause container", no_pause),
        case(
            "containers of a pod by the sandbox API come and go while others run",
            life::come_and_go,
        ),
        case(
            "containers of a pod by the sandbox API may share pids",
            life::shared_pids,
        ),
        case(
            "containers of a pod by the sandbox API outlive the process that stands for it",
            life::first_process,
        ),
        case(
            "kubectl exec and attach talk to a container of a pod by the sandbox API",
            life::streams,
        ),
        case(
            "containerd finds its pods by the sandbox API again after a restart",
            life::restart,
        ),
        case("a pod by the sandbox API ends with its VM", life::vm_ends),
        case("a pod by the sandbox API ends with its shim", shim_ends),
        case(
            "a container of a pod by the sandbox API that runs out of memory says so",
            limits::out_of_memory,
        ),
        case(
            "statistics of a pod by the sandbox API tell what its containers use",
            limits::statistics,
        ),
        case(
            "the VM of a pod by the sandbox API is as large as what its sandbox says",
            limits::size,
        ),
        case(
            "the containers of a pod by the sandbox API have one network, which others reach",
            network::shared,
        ),
        case(
            "the ports of a pod by the sandbox API are forwarded",
            network::forwarded,
        ),
        case(
            "a pod by the sandbox API may have users of its own",
            security::users,
        ),
        case(
            "a pod by the sandbox API cannot have the host's namespaces",
            // Asked for a pod in the host's network, containerd 2.1 ends in a panic of its own.
            |setting| security::refused_of_host(setting, &["pid", "ipc"]),
        ),
        case(
            "containers of a pod by the sandbox API share volumes with each other and the host",
            volumes::shared,
        ),
    ]
    .map(Case::by_sandbox_api)
    .into()
}

fn no_pause(setting: &Setting) -> Result<()> {
    let cri = Cri::new(&setting.runtime)?;
    let sysctls = json!({ "sysctls": { "kernel.shm_rmid_forced": "1" } });
    let pod = cri.pod(&json!({ "linux": sysctls }))?;
    let listed = ctr(&["--namespace", NAMESPACE, "container", "ls", "-q"])?.succeeds()?;
    ensure!(listed.is_empty(), "a container is there: {listed}");
    // What stands for the pod is in its network namespace, and is the only one that was started.
    let info = pod.info()?;
    let namespaces = info["runtimeSpec"]["linux"]["namespaces"].as_array();
    let namespaces = namespaces.into_iter().flatten();
    let network = namespaces.filter(|one| one["type"] == "network");
    let path: Vec<_> = network.filter_map(|one| one["path"].as_str()).collect();
    ensure!(path.len() == 1, "{info}");
    let inode = |path: &str| -> Result<u64> {
        Ok(std::os::unix::fs::MetadataExt::ino(&fs::metadata(path)?))
    };
    let pid = pod.pid()?;
    ensure!(inode(path[0])? == inode(&format!("/proc/{pid}/ns/net"))?);
    let anchor = host::Pod::of(&pod.id)?.child("bulkhead-anchor")?.pid;
    ensure!(anchor == pid, "the pod's process is {pid}, not {anchor}");

    let member = pod.start("member", &json!({}))?;
    for (script, expected) in [
        ("cat /etc/hostname", "in-pod"),
        ("cat /proc/sys/kernel/shm_rmid_forced", "1"),
        ("cat /proc/sys/net/ipv4/ip_unprivileged_port_start", "0"),
        ("stat -c '%U %a' /etc/hosts", "root 644"),
    ] {
        let said = member.says(script)?;
        ensure!(said == expected, "{script}: {said}");
    }
    // What one container makes of the files, the others see.
    member.says("echo 10.1.2.3 partner >> /etc/hosts")?;
    let other = pod.start("other", &json!({}))?;
    other.says("grep -q partner /etc/hosts")?;
    drop((member, other));
    drop(pod);
    cri.end()
}

fn shim_ends(setting: &Setting) -> Result<()> {
    let cri = Cri::new(&setting.runtime)?;
    let pod = cri.pod(&json!({}))?;
    let member = pod.start("member", &json!({}))?;
    host::kill(host::Pod::of(&pod.id)?.shim.pid)?;
    let status = member.ended()?;
    ensure!(status["exit_code"] != 0, "{status}");
    // Until it has cleaned up, containerd asks the shim that is gone.
    let begun = Instant::now();
    while !pod
        .status()
        .is_ok_and(|status| status["state"] == "SANDBOX_NOTREADY")
    {
        ensure!(begun.elapsed() < DEADLINE, "the pod stays ready");
        std::thread::sleep(Duration::from_millis(200));
    }
    drop(member);
    drop(pod);
    cri.end()
}
