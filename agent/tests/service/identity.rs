//! Who a container's process is, and how it is scheduled.

use bulkhead_agent_api::messages::CreateContainerRequest;
use serde_json::json;
use ttrpc::Code;

use crate::host::{Host, spec, status};

#[tokio::test]
async fn users_are_found_by_name() {
    let host = Host::start().await;
    let group = "root:x:0:\nwheel:x:10:root,user\nusers:x:100:user\n";
    std::fs::write(host.root("etc/group"), group).unwrap();
    let mut spec = spec("id -u; id -g; id -G; echo $HOME");
    spec["process"]["user"] = json!({"uid": 0, "gid": 0, "username": "user"});
    let (code, out, _) = host.run("c1", &spec).await;
    assert_eq!(
        (code, out.as_str()),
        (0, "1000\n1000\n1000 10 100\n/home/user\n")
    );
    spec["process"]["user"]["username"] = json!("nobody");
    let (code, text) = status(host.create("c1", &spec).await);
    assert_eq!(code, Code::INVALID_ARGUMENT);
    assert!(text.contains("unable to find user nobody"), "{text}");
}

#[tokio::test]
async fn scheduling_and_personality_are_applied() {
    let host = Host::start().await;
    let script = "
        cut -d' ' -f 19,40,41 /proc/self/stat; cat /proc/self/personality; uname -m
    ";
    let mut spec = spec(script);
    spec["process"]["scheduler"] = json!({"policy": "SCHED_BATCH", "nice": 5});
    spec["process"]["ioPriority"] = json!({"class": "IOPRIO_CLASS_IDLE", "priority": 0});
    spec["linux"]["personality"] = json!({"domain": "LINUX32"});
    let (code, out, err) = host.run("c1", &spec).await;
    assert_eq!((code, err.as_str()), (0, ""), "{out}");
    assert_eq!(out, "5 0 3\n00000008\ni686\n");

    let _ends = host
        .create_with("c2", &crate::spec("cat"), CreateContainerRequest::default())
        .await
        .unwrap();
    let mut process = crate::spec("grep Cpus_allowed_list /proc/self/status")["process"].clone();
    process["execCPUAffinity"] = json!({"initial": "0-1", "final": "1"});
    let exec = host.exec("c2", "e1", &process).await.unwrap();
    let (out, _) = exec.output().await;
    assert_eq!(out, "Cpus_allowed_list:\t1\n");
    host.end("c2").await;
}

#[tokio::test]
async fn a_tmpfs_may_begin_with_what_it_hides() {
    let host = Host::start().await;
    std::fs::create_dir_all(host.root("data/sub")).unwrap();
    std::fs::write(host.root("data/sub/file"), "content").unwrap();
    let mut spec = spec("cat /data/sub/file; echo new > /data/sub/file; cat /data/sub/file");
    spec["mounts"].as_array_mut().unwrap().push(json!({
        "destination": "/data", "type": "tmpfs", "source": "tmpfs",
        "options": ["tmpcopyup", "nosuid"],
    }));
    let (code, out, err) = host.run("c1", &spec).await;
    assert_eq!((code, out.as_str(), err.as_str()), (0, "contentnew\n", ""));
    let below = std::fs::read_to_string(host.root("data/sub/file")).unwrap();
    assert_eq!(below, "content");
}

#[tokio::test]
async fn nothing_is_mounted_inside_procfs() {
    let host = Host::start().await;
    for (target, refused) in [
        ("/proc/self/attr", true),
        ("/proc", true),
        ("/proc/uptime", false),
    ] {
        std::fs::create_dir_all(host.dir.path().join("shared/volume")).unwrap();
        std::fs::write(host.dir.path().join("shared/file"), "replaced").unwrap();
        let share = if refused { "volume" } else { "file" };
        let mut spec = spec("cat /proc/uptime");
        spec["mounts"].as_array_mut().unwrap().push(json!({
            "destination": target, "type": "bind", "source": "/host", "options": ["bind"],
        }));
        let request = CreateContainerRequest {
            shared_mounts: vec![bulkhead_agent_api::messages::SharedMount {
                index: 8,
                share: share.to_owned(),
                ..Default::default()
            }],
            ..CreateContainerRequest::default()
        };
        if refused {
            let (code, text) = status(host.create_with("c1", &spec, request).await);
            assert_eq!(code, Code::INVALID_ARGUMENT, "{text}");
            assert!(
                text.contains("/proc and is not") || text.contains("inside /proc"),
                "{text}"
            );
        } else {
            let (code, out, err) = host.run_with("c1", &spec, request).await;
            assert_eq!((code, out.as_str()), (0, "replaced"), "{err}");
        }
    }
}
