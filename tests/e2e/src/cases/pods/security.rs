//! Rights of pods: users, privileges, and namespaces of the host.

use std::collections::HashMap;
use std::fs;
use std::os::unix::fs::MetadataExt;

use anyhow::{Result, ensure};
use serde_json::json;

use super::{Case, Setting, bulkhead, case};
use crate::cri::{Cri, Refused, mount, refusal};

pub fn cases() -> Vec<Case> {
    vec![
        case(
            "a container of a pod has the user and rights that it is given",
            rights,
        ),
        case("a pod may have users of its own", users),
        case("a pod's sysctls hold in all of its containers", sysctls),
        bulkhead(
            "a privileged pod has all rights inside its VM alone",
            privileged,
        ),
        bulkhead("a pod cannot have the host's namespaces", of_host),
    ]
}

fn rights(setting: &Setting) -> Result<()> {
    let cri = Cri::new(&setting.runtime)?;
    let pod = cri.pod(&json!({}))?;
    let context = json!({
        "run_as_user": { "value": "1000" },
        "run_as_group": { "value": "2000" },
        "supplemental_groups": ["3000"],
        "readonly_rootfs": true,
        "no_new_privs": true,
        "capabilities": { "drop_capabilities": ["ALL"] },
        "seccomp": { "profile_type": "RuntimeDefault" },
        "masked_paths": ["/proc/kcore"],
        "readonly_paths": ["/proc/sys"],
    });
    let member = pod.start(
        "member",
        &json!({ "linux": { "security_context": context } }),
    )?;
    let said = member.says("id -u; id -g; id -G")?;
    ensure!(said == "1000\n2000\n2000 3000", "{said}");
    let status = member.says("grep -E '^(CapEff|NoNewPrivs|Seccomp):' /proc/self/status")?;
    ensure!(
        status == "CapEff:\t0000000000000000\nNoNewPrivs:\t1\nSeccomp:\t2",
        "{status}"
    );
    ensure!(
        member.exec("touch /file")?.code != 0,
        "the root is writable"
    );
    drop(member);
    drop(pod);
    cri.end()
}

pub fn users(setting: &Setting) -> Result<()> {
    let cri = Cri::new(&setting.runtime)?;
    let map = json!([{ "host_id": 131_072, "container_id": 0, "length": 65_536 }]);
    let options = json!({
        "namespace_options": { "userns_options": { "mode": "POD", "uids": map, "gids": map } },
    });
    let pod = cri.pod(&json!({ "linux": { "security_context": options } }))?;
    let first = pod.start("first", &json!({}))?;
    let second = pod.start("second", &json!({}))?;
    for member in [&first, &second] {
        let said = member.says("id -u; awk '{ print $1, $2, $3 }' /proc/self/uid_map")?;
        ensure!(said == "0\n0 131072 65536", "{said}");
        // Its own files are its own.
        ensure!(member.says("stat -c %u /etc/passwd")? == "0");
        member.says("touch /mine")?;
    }
    let users = "readlink /proc/self/ns/user";
    ensure!(
        first.says(users)? == second.says(users)?,
        "users are not shared"
    );
    let volume = pod.volume("volume")?;
    let mut mapped = mount(&volume, "/volume");
    (mapped["uidMappings"], mapped["gidMappings"]) = (map.clone(), map);
    match pod.start("third", &json!({ "mounts": [mapped] })) {
        Ok(third) => {
            third.says("touch /volume/file && [ $(stat -c %u /volume/file) = 0 ]")?;
            let owner = fs::metadata(volume.join("file"))?.uid();
            ensure!(owner == 0, "the file belongs to {owner}");
        }
        // containerd 1.7 has no volumes for such pods.
        Err(error) => {
            let refused = error.downcast::<Refused>()?;
            ensure!(
                refused.message.contains("idmap mounts not yet supported"),
                "{refused}"
            );
        }
    }
    drop((first, second));
    drop(pod);
    cri.end()
}

fn sysctls(setting: &Setting) -> Result<()> {
    let cri = Cri::new(&setting.runtime)?;
    let set = [
        ("kernel.shm_rmid_forced", "1"),
        ("net.core.somaxconn", "77"),
        ("net.ipv4.ip_local_port_range", "40000\t40100"),
        ("net.ipv4.ip_unprivileged_port_start", "80"),
        ("net.ipv4.tcp_syncookies", "0"),
    ];
    let values = HashMap::from(set);
    let pod = cri.pod(&json!({ "linux": { "sysctls": values } }))?;
    for name in ["first", "second"] {
        let member = pod.start(name, &json!({}))?;
        for (name, value) in set {
            let said = member.says(&format!("sysctl -n {name}"))?;
            ensure!(said == value, "{name} is {said}");
        }
    }
    drop(pod);
    cri.end()
}

fn privileged(setting: &Setting) -> Result<()> {
    let cri = Cri::new(&setting.runtime)?;
    let context = json!({ "security_context": { "privileged": true } });
    let pod = cri.pod(&json!({ "linux": context }))?;
    let member = pod.start("member", &json!({ "linux": context }))?;
    ensure!(
        member
            .says("grep CapEff /proc/self/status")?
            .ends_with("000001ffffffffff")
    );
    member.says("mkdir /mnt && mount -t tmpfs none /mnt && umount /mnt")?;
    let devices = member.says("ls /dev")?;
    ensure!(
        !devices.contains("kvm") && !devices.contains("vda"),
        "{devices}"
    );
    let ordinary = pod.start("ordinary", &json!({}))?;
    ensure!(
        !ordinary
            .says("grep CapEff /proc/self/status")?
            .ends_with("000001ffffffffff")
    );
    drop((member, ordinary));
    drop(pod);
    cri.end()
}

fn of_host(setting: &Setting) -> Result<()> {
    refused_of_host(setting, &["network", "pid", "ipc"])
}

/// No pod can have these namespaces of the host.
pub fn refused_of_host(setting: &Setting, kinds: &[&str]) -> Result<()> {
    let cri = Cri::new(&setting.runtime)?;
    for kind in kinds {
        let options = json!({ "namespace_options": { *kind: "NODE" } });
        let pod = cri.pod(&json!({ "linux": { "security_context": options } }));
        let refused = refusal(pod)?;
        ensure!(
            refused.message.contains(&format!("host {kind} namespace")),
            "{refused}"
        );
    }
    cri.end()
}
