//! Hooks in the container's namespaces.

use bulkhead_agent_api::messages::{CreateContainerRequest, SharedMount};
use serde_json::{Value, json};
use ttrpc::Code;

use crate::host::{Host, spec, status};

/// A request with busybox as the program of `count` hooks of `createContainer`.
fn request(count: u32) -> CreateContainerRequest {
    let hooks = (0..count).map(|index| SharedMount {
        index,
        share: "busybox".into(),
        ..SharedMount::default()
    });
    CreateContainerRequest {
        bundle: "/run/some/bundle".into(),
        create_container_hooks: hooks.collect(),
        ..CreateContainerRequest::default()
    }
}

async fn host() -> Host {
    let host = Host::start().await;
    let program = host.dir.path().join("shared/busybox");
    std::fs::copy(host.root("bin/busybox"), program).unwrap();
    host
}

fn shell(script: &str) -> Value {
    json!({ "path": "/opt/hooks/sh", "args": ["sh", "-c", script], "env": ["A=b"] })
}

#[tokio::test]
async fn those_of_the_host_find_bundle_and_root() {
    let host = host().await;
    let mut spec = spec("cat /state /config /env /where; ls /; hostname");
    spec["hostname"] = json!("boxed");
    spec["annotations"] = json!({"x": "y"});
    spec["hooks"] = json!({ "createContainer": [
        shell("read -r state; echo \"$state\" > state; echo \"A is $A\" > env; pwd > where"),
        shell("read -r spec < /run/some/bundle/config.json; echo \"${spec%%:*}\" > config"),
    ] });
    let (code, out, err) = host.run_with("c1", &spec, request(2)).await;
    assert_eq!((code, err.as_str()), (0, ""), "{out}");
    let mut lines = out.lines();
    let state: Value = serde_json::from_str(lines.next().unwrap()).unwrap();
    assert_eq!(state["status"], "creating");
    assert_eq!(state["id"], "c1");
    assert_eq!(state["pid"], 1);
    assert_eq!(state["bundle"], "/run/some/bundle");
    assert_eq!(state["annotations"]["x"], "y");
    assert_eq!(lines.next(), Some("{\"ociVersion\""));
    assert_eq!(lines.next(), Some("A is b"));
    assert_eq!(lines.next(), Some("/run/some/bundle/rootfs"));
    assert!(out.ends_with("boxed\n") && !out.contains("opt"), "{out}");
}

#[tokio::test]
async fn those_of_the_container_run_as_it_does() {
    let host = host().await;
    let everybody = std::os::unix::fs::PermissionsExt::from_mode(0o1777);
    std::fs::set_permissions(host.root("tmp"), everybody).unwrap();
    let mut spec = spec("cat /tmp/who /tmp/state");
    spec["process"]["user"] = json!({"uid": 1000, "gid": 1000});
    let script = "id -u > /tmp/who; grep -E 'CapEff|Seccomp:' /proc/self/status >> /tmp/who;
        read -r state; echo \"$state\" > /tmp/state";
    let hook = json!({ "path": "/bin/sh", "args": ["sh", "-c", script] });
    spec["hooks"] = json!({ "startContainer": [hook] });
    spec["linux"]["seccomp"] = json!({"defaultAction": "SCMP_ACT_ALLOW", "syscalls": [
        {"names": ["mount"], "action": "SCMP_ACT_ERRNO"}]});
    let (code, out, err) = host.run("c1", &spec).await;
    assert_eq!((code, err.as_str()), (0, ""), "{out}");
    let lines: Vec<_> = out.lines().collect();
    assert_eq!(
        lines[..3],
        ["1000", "CapEff:\t0000000000000000", "Seccomp:\t2"]
    );
    let state: Value = serde_json::from_str(lines[3]).unwrap();
    assert_eq!(
        (&state["status"], &state["pid"]),
        (&json!("created"), &json!(1))
    );
}

#[tokio::test]
async fn a_failing_hook_fails_the_create_or_the_start() {
    let host = host().await;
    let mut failing = shell("echo no luck >&2; exit 3");
    for (hook, expected) in [
        (
            failing.clone(),
            "the hook createContainer /opt/hooks/sh exited with status 3: no luck",
        ),
        (
            json!({"path": "/opt/hooks/sh", "args": ["sh", "-c", "while :; do :; done"], "timeout": 1}),
            "did not end within 1 s",
        ),
        (shell("kill -9 $$"), "was ended by SIGKILL"),
    ] {
        let mut spec = spec("true");
        spec["hooks"] = json!({ "createContainer": [hook] });
        let (_, text) = status(host.create_with("c1", &spec, request(1)).await);
        assert!(text.contains(expected), "{text}");
    }
    failing["path"] = json!("/bin/sh");
    let mut spec = spec("true");
    spec["hooks"] = json!({ "startContainer": [failing] });
    host.create("c1", &spec).await.unwrap();
    let (_, text) = status(host.start_container("c1").await);
    assert!(
        text.contains("startContainer /bin/sh exited with status 3: no luck"),
        "{text}"
    );
    assert_eq!(host.wait("c1", "").await, 1);
    host.delete("c1").await;
    spec["hooks"]["startContainer"][0]["path"] = json!("/no/such");
    host.create("c1", &spec).await.unwrap();
    let (_, text) = status(host.start_container("c1").await);
    assert!(text.contains("status 127: No such file"), "{text}");
    host.wait("c1", "").await;
    host.delete("c1").await;
}

#[tokio::test]
async fn hooks_without_a_path_are_refused() {
    let host = host().await;
    for hook in [
        json!({"path": "sh"}),
        json!({"path": "/a/../b"}),
        json!({"path": "/bin/sh", "timeout": 0}),
    ] {
        let mut spec = spec("true");
        spec["hooks"] = json!({ "startContainer": [hook] });
        let (code, text) = status(host.create("c1", &spec).await);
        assert_eq!(code, Code::INVALID_ARGUMENT, "{text}");
        assert!(text.contains("hooks.startContainer"), "{text}");
    }
}
