//! The agent's whole service, driven over Unix sockets without a VM. Needs root, cgroup v2 and a
//! static busybox.

mod hooks;
mod host;
mod identity;
mod limits;
mod namespaces;
mod network;

use bulkhead_agent_api::messages::{
    CreateContainerRequest, InfoRequest, SharedMount, SignalRequest,
};
use serde_json::json;
use ttrpc::Code;

use host::{Host, deadline, process, spec, status};

fn signal(id: &str, exec: &str, signal: i32, all: bool) -> SignalRequest {
    SignalRequest {
        container_id: id.to_owned(),
        exec_id: exec.to_owned(),
        signal: signal.unsigned_abs(),
        all,
        ..SignalRequest::default()
    }
}

#[tokio::test]
async fn a_container_runs_to_its_end() {
    let host = Host::start().await;
    let info = host
        .client
        .info(deadline(), &InfoRequest::default())
        .await
        .unwrap();
    assert!(info.ready_ns >= info.started_ns && !info.kernel_release.is_empty());
    let (code, out, err) = host
        .run("c1", &spec("echo out; echo err >&2; exit 42"))
        .await;
    assert_eq!((code, out.as_str(), err.as_str()), (42, "out\n", "err\n"));
    let (code, ..) = host.run("c1", &spec("kill -9 $$; exit 1")).await;
    assert_eq!(code, 1, "PID 1 of a namespace cannot kill itself");
    let (code, ..) = host.run("c1", &spec("sh -c 'kill -15 $$'; exit $?")).await;
    assert_eq!(code, 143);
}

#[tokio::test]
async fn a_container_sees_only_its_own() {
    let host = Host::start().await;
    let script = "
        echo pid $$; echo init $(readlink /proc/1/exe); hostname; ip -o link | wc -l
        id -u; id -G; env; pwd; umask; ls /proc/self/fd | wc -l; grep ^0: /proc/self/cgroup
        grep -E 'Cap(Eff|Bnd|Amb)|NoNewPrivs' /proc/self/status
        cat /proc/keys | wc -c; touch /proc/sys/x 2>/dev/null || echo proc-sys-ro
        ls /dev; readlink /dev/ptmx; echo x > /dev/null && echo null
        ls / | grep -c old; stat -c %a /tmp; cat /proc/self/oom_score_adj; cat /proc/sys/net/ipv4/ip_unprivileged_port_start
    ";
    let mut spec = spec(script);
    spec["hostname"] = json!("boxed");
    spec["process"]["cwd"] = json!("/made/by/agent");
    spec["process"]["oomScoreAdj"] = json!(321);
    spec["linux"]["sysctl"] = json!({"net.ipv4.ip_unprivileged_port_start": "0"});
    let (code, out, err) = host.run("c1", &spec).await;
    assert_eq!((code, err.as_str()), (0, ""), "{out}");
    let expected = [
        "pid 1\ninit /bin/busybox\nboxed\n1\n0\n0 10\n",
        "HOME=/root\n",
        "/made/by/agent\n0022\n4\n0::/\n",
        "CapEff:\t00000000a80425fb\nCapBnd:\t00000000a80425fb\nCapAmb:\t0000000000000000\nNoNewPrivs:\t1\n",
        "0\nproc-sys-ro\n",
        "fd\nfull\nmqueue\nnull\nptmx\npts\nrandom\nshm\nstderr\nstdin\nstdout\ntty\nurandom\nzero\n",
        "pts/ptmx\nnull\n",
        "321\n0\n",
    ];
    for part in expected {
        assert!(out.contains(part), "{part:?} is not in {out}");
    }
}

#[tokio::test]
async fn missing_commands_fail_create_at_once() {
    let host = Host::start().await;
    let cases = [
        (
            "nosuch",
            "exec: \"nosuch\": executable file not found in $PATH",
        ),
        (
            "/no/such",
            "exec: \"/no/such\": stat /no/such: no such file or directory",
        ),
        ("/etc/passwd", "exec: \"/etc/passwd\": permission denied"),
        ("/etc", "exec: \"/etc\": is a directory"),
    ];
    for (command, message) in cases {
        let mut spec = spec("");
        spec["process"]["args"] = json!([command]);
        let (code, text) = status(host.create("c1", &spec).await);
        assert_eq!(code, Code::INVALID_ARGUMENT, "{text}");
        assert!(text.contains(message), "{text}");
    }
    std::fs::write(host.root("bin/bad"), "#!/no/interpreter\n").unwrap();
    std::process::Command::new("chmod")
        .arg("755")
        .arg(host.root("bin/bad"))
        .status()
        .unwrap();
    let mut spec = spec("");
    spec["process"]["args"] = json!(["bad"]);
    host.create("c1", &spec).await.unwrap();
    let (_, text) = status(host.start_container("c1").await);
    assert!(
        text.ends_with("exec /bin/bad: no such file or directory"),
        "{text}"
    );
    assert_eq!(host.wait("c1", "").await, 1);
    host.delete("c1").await;
}

#[tokio::test]
async fn what_cannot_be_applied_is_refused_by_name() {
    let host = Host::start().await;
    let refused = async |path: &str, value: serde_json::Value, expected: &str| {
        let mut spec = spec("true");
        *spec
            .pointer_mut(path.rsplit_once('/').unwrap().0)
            .unwrap()
            .as_object_mut()
            .unwrap()
            .entry(path.rsplit_once('/').unwrap().1)
            .or_insert(json!(null)) = value;
        let (code, text) = status(host.create("c1", &spec).await);
        assert_eq!(code, Code::INVALID_ARGUMENT, "{text}");
        assert!(text.contains(expected), "{expected:?} is not in {text:?}");
    };
    refused(
        "/process/apparmorProfile",
        json!("docker\ndefault"),
        "process.apparmorProfile",
    )
    .await;
    // The host hands over what it names.
    refused(
        "/process/apparmorProfile",
        json!("docker-default"),
        "its policy did not come along",
    )
    .await;
    refused(
        "/process/selinuxLabel",
        json!("system_u:system_r:container_t:s0"),
        "process.selinuxLabel",
    )
    .await;
    refused("/linux/newField", json!({"a": 1}), "linux.newField").await;
    refused("/linux/intelRdt", json!({"closID": "x"}), "linux.intelRdt").await;
    refused(
        "/linux/namespaces",
        json!([{"type": "pid"}, {"type": "mount"}, {"type": "ipc"}, {"type": "uts"}]),
        "host network namespace cannot be honoured in a microVM",
    )
    .await;
    refused(
        "/linux/uidMappings",
        json!([{"containerID": 0, "hostID": 5, "size": 1}]),
        "linux.uidMappings",
    )
    .await;
    refused(
        "/linux/sysctl",
        json!({"vm.overcommit_memory": "1"}),
        "vm.overcommit_memory",
    )
    .await;
    refused(
        "/mounts",
        json!([{"destination": "/x", "type": "bind", "source": "/host", "options": ["rbind"]}]),
        "mounts[0].source",
    )
    .await;
    refused(
        "/linux/seccomp",
        json!({"defaultAction": "SCMP_ACT_NOTIFY"}),
        "SCMP_ACT_NOTIFY",
    )
    .await;
}

#[tokio::test]
async fn bytes_pass_unchanged_and_streams_end() {
    let host = Host::start().await;
    let mut ends = host
        .create("c1", &spec("cat; echo done >&2"))
        .await
        .unwrap();
    host.start_container("c1").await.unwrap();
    let data: Vec<u8> = (0..3_000_000u32)
        .map(|i| b'a' + u8::try_from(i * 7 % 23).unwrap())
        .collect();
    let mut stdin = ends.stdin.take().unwrap();
    let sent = data.clone();
    let sender = tokio::spawn(async move {
        tokio::io::AsyncWriteExt::write_all(&mut stdin, &sent)
            .await
            .unwrap();
    });
    let (out, err) = ends.output().await;
    sender.await.unwrap();
    assert!(
        out.as_bytes() == data.as_slice(),
        "{} bytes of {}",
        out.len(),
        data.len()
    );
    assert_eq!(err, "done\n");
    assert_eq!(host.wait("c1", "").await, 0);
    host.delete("c1").await;
}

#[tokio::test]
async fn a_process_that_reads_no_stdin_does_not_matter() {
    let host = Host::start().await;
    let mut ends = host
        .create("c1", &spec("exec <&-; echo closed; sleep 1000"))
        .await
        .unwrap();
    host.start_container("c1").await.unwrap();
    ends.expect("closed\n").await;
    let mut stdin = ends.stdin.take().unwrap();
    let read = tokio::io::AsyncReadExt::read_u8(&mut stdin).await;
    assert!(read.is_err(), "the agent closes a stream that nobody reads");
    host.end("c1").await;
}

#[tokio::test]
async fn a_terminal_works() {
    let host = Host::start().await;
    let mut spec =
        spec("tty; stty size; trap 'echo caught' INT; echo ready; while true; do sleep 0.1; done");
    spec["process"]["terminal"] = json!(true);
    spec["process"]["user"]["uid"] = json!(1000);
    let mut ends = host.create("c1", &spec).await.unwrap();
    host.start_container("c1").await.unwrap();
    let seen = ends.expect("ready\r\n").await;
    assert!(seen.contains("/dev/pts/0\r\n33 91\r\n"), "{seen}");
    ends.send(b"\x03").await;
    ends.expect("caught").await;
    host.client
        .signal(deadline(), &signal("c1", "", libc::SIGKILL, false))
        .await
        .unwrap();
    assert_eq!(host.wait("c1", "").await, 137);
    ends.output().await;
    host.delete("c1").await;
}

#[tokio::test]
async fn other_processes_join_a_container() {
    let host = Host::start().await;
    let mut ends = host
        .create("c1", &spec("echo > /marker; echo ready; sleep 1000"))
        .await
        .unwrap();
    host.start_container("c1").await.unwrap();
    ends.expect("ready\n").await;
    let mut exec = spec("ls /marker; id -u; grep ^0: /proc/self/cgroup; exit 7")["process"].clone();
    exec["user"] = json!({"uid": 1000, "gid": 1000});
    let joined = host.exec("c1", "e1", &exec).await.unwrap();
    assert_eq!(host.wait("c1", "e1").await, 7);
    let (out, err) = joined.output().await;
    assert_eq!((out.as_str(), err.as_str()), ("/marker\n1000\n0::/\n", ""));
    let (code, _) = status(host.exec("c1", "e1", &exec).await);
    assert_eq!(code, Code::ALREADY_EXISTS);
    host.client
        .delete(deadline(), &process("c1", "e1"))
        .await
        .unwrap();
    exec["args"] = json!(["nosuch"]);
    let (_, text) = status(host.exec("c1", "e2", &exec).await);
    assert!(
        text.contains("executable file not found in $PATH"),
        "{text}"
    );
    // The end of the container is the end of all its processes, and each has its status.
    exec["args"] = json!(["sleep", "1000"]);
    let _running = host.exec("c1", "e3", &exec).await.unwrap();
    host.client
        .signal(deadline(), &signal("c1", "", libc::SIGKILL, true))
        .await
        .unwrap();
    assert_eq!(host.wait("c1", "e3").await, 137);
    assert_eq!(host.wait("c1", "").await, 137);
    drop(ends);
    let (code, _) = status(host.exec("c1", "e4", &exec).await);
    assert_eq!(code, Code::FAILED_PRECONDITION);
    host.delete("c1").await;
    let (code, _) = status(host.client.delete(deadline(), &process("c1", "")).await);
    assert_eq!(code, Code::NOT_FOUND);
}

#[tokio::test]
async fn an_exec_has_a_terminal_of_the_container() {
    let host = Host::start().await;
    let _ends = host.create("c1", &spec("sleep 1000")).await.unwrap();
    host.start_container("c1").await.unwrap();
    let mut exec = spec("tty; stty size; exit 3")["process"].clone();
    exec["terminal"] = json!(true);
    let ends = host.exec("c1", "e1", &exec).await.unwrap();
    let (out, _) = ends.output().await;
    assert_eq!(out, "/dev/pts/0\r\n33 91\r\n");
    assert_eq!(host.wait("c1", "e1").await, 3);
    host.end("c1").await;
}

#[tokio::test]
async fn a_created_container_ends_by_a_signal() {
    let host = Host::start().await;
    let _ends = host.create("c1", &spec("true")).await.unwrap();
    let (code, _) = status(host.client.delete(deadline(), &process("c1", "")).await);
    assert_eq!(code, Code::FAILED_PRECONDITION);
    let (code, _) = status(host.create("c1", &spec("true")).await);
    assert_eq!(code, Code::ALREADY_EXISTS);
    host.client
        .signal(deadline(), &signal("c1", "", libc::SIGTERM, false))
        .await
        .unwrap();
    assert_eq!(host.wait("c1", "").await, 143);
    let (code, _) = status(host.start_container("c1").await);
    assert_eq!(code, Code::FAILED_PRECONDITION);
    let (code, _) = status(
        host.client
            .signal(deadline(), &signal("c1", "", libc::SIGTERM, false))
            .await,
    );
    assert_eq!(code, Code::NOT_FOUND);
    host.delete("c1").await;
}

#[tokio::test]
async fn mounts_are_as_the_spec_says() {
    let host = Host::start().await;
    std::fs::create_dir(host.dir.path().join("shared/volume")).unwrap();
    std::fs::write(host.dir.path().join("shared/volume/file"), "content").unwrap();
    std::fs::write(host.dir.path().join("shared/hosts"), "names").unwrap();
    // A link of the image that would lead out of the root if it were followed on the host.
    std::os::unix::fs::symlink("/../../outside", host.root("volumes")).unwrap();
    let mut spec = spec(
        "cat /volumes/v/file /etc/hosts; touch /volumes/v/x || echo ro; touch /etc/hosts && echo rw; \
         touch /y || echo root-ro; grep ' /volumes/v \\| /outside/v ' /proc/self/mountinfo | wc -l",
    );
    let mounts = spec["mounts"].as_array_mut().unwrap();
    mounts.push(
        json!({"destination": "/volumes/v", "type": "bind", "source": "/host/volume",
        "options": ["rbind", "ro", "rprivate", "nosuid"]}),
    );
    mounts.push(
        json!({"destination": "/etc/hosts", "type": "bind", "source": "/host/hosts",
        "options": ["bind", "rw"]}),
    );
    spec["root"]["readonly"] = json!(true);
    let share = |index, share: &str| SharedMount {
        index,
        share: share.to_owned(),
        ..SharedMount::default()
    };
    let shares = vec![share(8, "volume"), share(9, "hosts")];
    let request = CreateContainerRequest {
        shared_mounts: shares,
        ..CreateContainerRequest::default()
    };
    let ends = host.create_with("c1", &spec, request).await.unwrap();
    host.start_container("c1").await.unwrap();
    let (out, _) = ends.output().await;
    assert_eq!(out, "contentnamesro\nrw\nroot-ro\n1\n");
    assert!(host.root("outside/v").is_dir(), "made inside the root");
    host.wait("c1", "").await;
    host.delete("c1").await;
}

#[tokio::test]
async fn devices_are_kept_away() {
    let host = Host::start().await;
    let script = "mknod /tmp/zero c 1 5 2>&1; head -c 3 /dev/zero | wc -c; \
                  busybox mknod /dev/mem c 1 1 && { head -c 1 /dev/mem || echo denied; }";
    let (_, out, err) = host.run("c1", &spec(script)).await;
    assert!(
        out.contains("3\n") && out.ends_with("denied\n"),
        "{out} {err}"
    );
    assert!(err.contains("Operation not permitted"), "{err}");
}

#[tokio::test]
async fn limits_are_set_or_missed_by_name() {
    let host = Host::start().await;
    let controllers = std::fs::read_to_string(host.dir.path().join("cgroup/cgroup.controllers"));
    let controllers = controllers.unwrap();
    let limits = [
        (
            "memory",
            json!({"memory": {"limit": 67_108_864}}),
            "memory.max",
            "67108864",
        ),
        (
            "cpu",
            json!({"cpu": {"quota": 50_000, "period": 100_000}}),
            "cpu.max",
            "50000 100000",
        ),
        ("pids", json!({"pids": {"limit": 77}}), "pids.max", "77"),
    ];
    for (controller, resources, file, value) in limits {
        let mut spec = spec(&format!("cat /sys/fs/cgroup/{file}"));
        spec["linux"]["resources"] = resources;
        if controllers
            .split_whitespace()
            .any(|name| name == controller)
        {
            let (_, out, err) = host.run("c1", &spec).await;
            assert_eq!(out.trim(), value, "{err}");
        } else {
            let (code, text) = status(host.create("c1", &spec).await);
            assert_eq!(code, Code::INTERNAL);
            assert!(
                text.starts_with(&format!("failed to set {file} to {value:?}")),
                "{text}"
            );
        }
    }
}

#[tokio::test]
async fn numbers_of_a_container_are_told() {
    let host = Host::start().await;
    let mut ends = host
        .create("c1", &spec("echo up; sleep 1000"))
        .await
        .unwrap();
    host.start_container("c1").await.unwrap();
    ends.expect("up\n").await;
    let request = bulkhead_agent_api::messages::ContainerRequest {
        container_id: "c1".to_owned(),
        ..Default::default()
    };
    let stats = host.client.stats(deadline(), &request).await.unwrap();
    assert!(stats.cpu.usage_usec > 0, "{stats}");
    host.client
        .signal(deadline(), &signal("c1", "", libc::SIGKILL, true))
        .await
        .unwrap();
    host.wait("c1", "").await;
    let again = host
        .client
        .signal(deadline(), &signal("c1", "", libc::SIGKILL, true))
        .await;
    assert_eq!(
        status(again).0,
        Code::NOT_FOUND,
        "nothing is left to signal"
    );
    host.delete("c1").await;
}

#[tokio::test]
async fn seccomp_filters_system_calls() {
    let host = Host::start().await;
    for no_new_privileges in [true, false] {
        let mut spec = spec("grep Seccomp: /proc/self/status; mkdir /tmp/dir; id -u");
        spec["process"]["noNewPrivileges"] = json!(no_new_privileges);
        spec["process"]["user"] = json!({"uid": 1000, "gid": 1000});
        spec["linux"]["seccomp"] = json!({
            "defaultAction": "SCMP_ACT_ALLOW",
            "architectures": ["SCMP_ARCH_X86_64", "SCMP_ARCH_X86", "SCMP_ARCH_X32"],
            "syscalls": [
                {"names": ["mkdir", "mkdirat", "not_a_call"], "action": "SCMP_ACT_ERRNO", "errnoRet": 95},
                {"names": ["personality"], "action": "SCMP_ACT_ERRNO",
                 "args": [{"index": 0, "value": 4_294_967_295u64, "valueTwo": 1, "op": "SCMP_CMP_MASKED_EQ"}]}
            ]
        });
        let (_, out, err) = host.run("c1", &spec).await;
        assert_eq!(out, "Seccomp:\t2\n1000\n");
        assert!(err.contains("Operation not supported"), "{err}");
    }
}
