//! Namespaces that a container has besides the usual ones, or shares with another of its pod.

use bulkhead_agent_api::messages::{CreateContainerRequest, JoinedNamespace};
use serde_json::{Value, json};
use ttrpc::Code;

use crate::host::{Host, spec, status};

/// The ids of a test's user namespace outside it.
const FIRST: u32 = 100_000;

fn add_namespace(spec: &mut Value, namespace: Value) {
    let namespaces = spec["linux"]["namespaces"].as_array_mut().unwrap();
    namespaces.retain(|other| other["type"] != namespace["type"]);
    namespaces.push(namespace);
}

/// A spec with a user namespace, as containerd makes one.
fn with_users(script: &str) -> Value {
    let mut spec = spec(script);
    add_namespace(&mut spec, json!({"type": "user"}));
    let ids = json!([{"containerID": 0, "hostID": FIRST, "size": 65536}]);
    spec["linux"]["uidMappings"] = ids.clone();
    spec["linux"]["gidMappings"] = ids;
    spec["process"]["user"]["additionalGids"] = json!([0, 10]);
    spec
}

/// As containerd does with the files of an image.
fn give_root(host: &Host) {
    fn give(path: &std::path::Path) {
        std::os::unix::fs::lchown(path, Some(FIRST), Some(FIRST)).unwrap();
        if path.is_dir() && !path.is_symlink() {
            for entry in std::fs::read_dir(path).unwrap() {
                give(&entry.unwrap().path());
            }
        }
    }
    give(&host.root(""));
    // Unlike the guest's directories, a test's own are closed to others.
    let open = std::os::unix::fs::PermissionsExt::from_mode(0o755);
    std::fs::set_permissions(host.dir.path(), open).unwrap();
}

#[tokio::test]
async fn a_user_namespace_has_its_own_root() {
    let host = Host::start().await;
    give_root(&host);
    let script = "
        id -u; id -G; cat /proc/self/uid_map; cat /proc/self/setgroups
        stat -c '%u %a %t,%T' /dev/null; echo x > /dev/null && echo null; ls /dev
        echo a > /proc/self/fd/1; touch /made; stat -c %u /made
        mount -t tmpfs none /tmp && echo mounted
        cat /proc/sys/net/ipv4/ip_unprivileged_port_start; hostname; ip -o link | grep -c UP
        ulimit -n
    ";
    let mut spec = with_users(script);
    spec["hostname"] = json!("boxed");
    spec["linux"]["sysctl"] = json!({"net.ipv4.ip_unprivileged_port_start": "7"});
    spec["process"]["rlimits"] = json!([{"type": "RLIMIT_NOFILE", "hard": 3000, "soft": 2000}]);
    let admin = json!(["CAP_SYS_ADMIN"]);
    spec["process"]["capabilities"] =
        json!({"bounding": admin, "effective": admin, "permitted": admin});
    let (code, out, err) = host.run("c1", &spec).await;
    assert_eq!((code, err.as_str()), (0, ""), "{out}");
    let fields: Vec<_> = out.split_whitespace().collect();
    let expected = "0 0 10 0 100000 65536 allow 0 666 1,3 null fd full mqueue null ptmx pts random \
        shm stderr stdin stdout tty urandom zero a 0 mounted 7 boxed 1 2000";
    assert_eq!(fields, expected.split_whitespace().collect::<Vec<_>>());
    let made = std::fs::metadata(host.root("made")).unwrap();
    assert_eq!(std::os::unix::fs::MetadataExt::uid(&made), FIRST);
}

#[tokio::test]
async fn an_exec_joins_the_user_namespace() {
    let host = Host::start().await;
    give_root(&host);
    let mut spec = with_users("cat");
    spec["process"]["terminal"] = json!(true);
    let _ends = host.create("c1", &spec).await.unwrap();
    // Also before the start.
    for (exec, uid) in [("e1", 0), ("e2", 1000)] {
        let mut process =
            with_users("id -u; cat /proc/self/uid_map /proc/self/cgroup; tty")["process"].clone();
        process["user"]["uid"] = json!(uid);
        let (out, err) = host
            .exec("c1", exec, &process)
            .await
            .unwrap()
            .output()
            .await;
        let expected = format!("{uid}\n         0     {FIRST}      65536\n");
        assert!(out.starts_with(&expected), "{out}{err}");
        assert!(out.contains("0::/\n"), "{out}");
    }
    host.start_container("c1").await.unwrap();
    let mut process = spec["process"].clone();
    process["args"] = json!(["/bin/sh", "-c", "tty; stat -c %u $(tty)"]);
    let mut ends = host.exec("c1", "e3", &process).await.unwrap();
    ends.expect("/dev/pts/").await;
    ends.expect("0\r\n").await;
    host.end("c1").await;
}

#[tokio::test]
async fn clocks_of_a_time_namespace_are_ahead() {
    let host = Host::start().await;
    let mut spec = spec("cat /proc/self/timens_offsets; head -c 20 /proc/uptime");
    add_namespace(&mut spec, json!({"type": "time"}));
    spec["linux"]["timeOffsets"] = json!({"boottime": {"secs": 1_000_000_000}});
    let (code, out, err) = host.run("c1", &spec).await;
    assert_eq!((code, err.as_str()), (0, ""), "{out}");
    let lines: Vec<_> = out.lines().collect();
    assert_eq!(
        lines[1].split_whitespace().collect::<Vec<_>>(),
        ["boottime", "1000000000", "0"]
    );
    assert!(lines[2].starts_with("10000"), "{out}");
}

#[tokio::test]
async fn namespaces_of_other_containers_are_joined() {
    let host = Host::start().await;
    let mut first = spec("hostname; exec sleep 1000");
    first["hostname"] = json!("first");
    add_namespace(
        &mut first,
        json!({"type": "network", "path": "/run/netns/pod"}),
    );
    let mut one = host.create("c1", &first).await.unwrap();
    host.start_container("c1").await.unwrap();
    one.expect("first").await;

    let script = "hostname; readlink /proc/1/exe; readlink /proc/self/ns/net; exec sleep 1000";
    let mut second = spec(script);
    for kind in ["uts", "ipc", "pid"] {
        let path = format!("/proc/77/ns/{kind}");
        add_namespace(&mut second, json!({"type": kind, "path": path}));
    }
    add_namespace(
        &mut second,
        json!({"type": "network", "path": "/run/netns/pod"}),
    );
    let joined = ["uts", "ipc", "pid"].map(|kind| JoinedNamespace {
        type_: kind.to_owned(),
        container_id: "c1".to_owned(),
        ..JoinedNamespace::default()
    });
    let request = CreateContainerRequest {
        joined_namespaces: joined.to_vec(),
        ..CreateContainerRequest::default()
    };
    let mut two = host.create_with("c2", &second, request).await.unwrap();
    host.start_container("c2").await.unwrap();
    let seen = two.expect("net:[").await;
    assert!(seen.starts_with("first\n/bin/busybox\n"), "{seen}");
    let network = two.expect("]").await;
    let process = spec("readlink /proc/self/ns/net; readlink /proc/self/ns/mnt")["process"].clone();
    let exec = host.exec("c1", "e1", &process).await.unwrap();
    let (out, _) = exec.output().await;
    assert!(out.contains(&network), "{network} is not in {out}");

    // What c2 leaves in a namespace of c1's ends with its own process.
    let process = spec("echo up; exec sleep 1000")["process"].clone();
    host.exec("c2", "left", &process)
        .await
        .unwrap()
        .expect("up")
        .await;
    host.client
        .signal(crate::deadline(), &crate::signal("c2", "", 9, false))
        .await
        .unwrap();
    assert_eq!(host.wait("c2", "").await, 137);
    assert_eq!(host.wait("c2", "left").await, 137);
    host.delete("c2").await;
    host.end("c1").await;
}

/// A sandbox as the shim describes it; then the same with users of its own.
#[tokio::test]
async fn a_sandbox_holds_its_namespaces_without_files() {
    for with_users_of_its_own in [false, true] {
        let host = Host::start().await;
        give_root(&host);
        let mut sandbox = if with_users_of_its_own {
            with_users("")
        } else {
            spec("")
        };
        sandbox["hostname"] = json!("held");
        sandbox["mounts"] = json!([]);
        sandbox["root"] = json!({"path": "rootfs", "readonly": true});
        sandbox["process"] = json!({
            "user": {"uid": 65_535, "gid": 65_535}, "args": ["pause"], "cwd": "/",
            "noNewPrivileges": true, "capabilities": {},
        });
        let request = CreateContainerRequest {
            container_id: "s1".to_owned(),
            spec: sandbox.to_string().into_bytes(),
            ..CreateContainerRequest::default()
        };
        let created = host.client.create_container(crate::deadline(), &request);
        created.await.unwrap();
        host.start_container("s1").await.unwrap();

        // It is PID 1 of those that join it, and all that they can see of it.
        let script = "
            hostname; cat /proc/1/comm; grep -E '^(Uid|CapEff|NoNewPrivs)' /proc/1/status
            ls -A /proc/1/root 2>/dev/null | wc -l
            ls /proc/1/fd | wc -l
            sh -c 'sleep 0.1 & echo $!' > /tmp/orphan; orphan=$(cat /tmp/orphan)
            while [ -e /proc/$orphan ]; do sleep 0.1; done; echo reaped
        ";
        let mut member = spec(script);
        let mut kinds = vec!["uts", "ipc", "pid", "network"];
        if with_users_of_its_own {
            kinds.push("user");
        }
        for kind in &kinds {
            let path = format!("/proc/77/ns/{kind}");
            add_namespace(&mut member, json!({"type": kind, "path": path}));
        }
        let joined = kinds.iter().map(|kind| JoinedNamespace {
            type_: (*kind).to_owned(),
            container_id: "s1".to_owned(),
            ..JoinedNamespace::default()
        });
        let request = CreateContainerRequest {
            joined_namespaces: joined.collect(),
            ..CreateContainerRequest::default()
        };
        let (code, out, err) = host.run_with("c1", &member, request).await;
        assert_eq!((code, err.as_str()), (0, ""), "{out}");
        let expected = "held pause Uid: 65535 65535 65535 65535 CapEff: 0000000000000000 \
            NoNewPrivs: 1 0 3 reaped";
        let seen: Vec<_> = out.split_whitespace().collect();
        assert_eq!(seen, expected.split_whitespace().collect::<Vec<_>>());

        // As a pause container ends.
        let term = crate::signal("s1", "", libc::SIGTERM, false);
        host.client.signal(crate::deadline(), &term).await.unwrap();
        assert_eq!(host.wait("s1", "").await, 0);
        host.delete("s1").await;
    }
}

#[tokio::test]
async fn what_no_container_of_the_pod_has_is_refused() {
    let host = Host::start().await;
    let refused = async |change: &dyn Fn(&mut Value), expected: &str| {
        let mut spec = spec("true");
        change(&mut spec);
        let (code, text) = status(host.create("c1", &spec).await);
        assert_eq!(code, Code::INVALID_ARGUMENT, "{text}");
        assert!(text.contains(expected), "{expected:?} is not in {text:?}");
    };
    for kind in ["pid", "ipc", "uts", "user", "time"] {
        let path = format!("/proc/1/ns/{kind}");
        let join = |spec: &mut Value| {
            add_namespace(spec, json!({"type": kind, "path": path}));
        };
        refused(&join, "it is no namespace of another container in the pod").await;
    }
    refused(
        &|spec| add_namespace(spec, json!({"type": "mount", "path": "/proc/1/ns/mnt"})),
        "containers of a pod cannot share it",
    )
    .await;
    refused(
        &|spec| add_namespace(spec, json!({"type": "user"})),
        "linux.uidMappings",
    )
    .await;
    refused(
        &|spec| spec["linux"]["timeOffsets"] = json!({"boottime": {"secs": 1}}),
        "linux.timeOffsets",
    )
    .await;
    refused(
        &|spec| {
            add_namespace(spec, json!({"type": "time"}));
            spec["linux"]["timeOffsets"] = json!({"realtime": {"secs": 1}});
        },
        "\"realtime\" has no offset",
    )
    .await;
}
