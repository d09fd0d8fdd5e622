//! What changes about a container while it runs. Limits need controllers that only the guest has for
//! certain; they are tried in a VM.

use bulkhead_agent_api::messages::{ContainerRequest, UpdateRequest};
use ttrpc::Code;

use crate::host::{Host, deadline, spec, status};

#[tokio::test]
async fn a_paused_container_stands_still_and_can_be_killed() {
    let host = Host::start().await;
    let request = ContainerRequest {
        container_id: "c1".into(),
        ..ContainerRequest::default()
    };
    let pause = async || host.client.pause(deadline(), &request).await;
    let (code, _) = status(pause().await);
    assert_eq!(code, Code::NOT_FOUND);
    let _ends = host.create("c1", &spec("sleep 1000")).await.unwrap();
    let (code, text) = status(pause().await);
    assert_eq!(code, Code::FAILED_PRECONDITION, "{text}");
    host.start_container("c1").await.unwrap();
    let frozen = || {
        let events = host.dir.path().join("cgroup/container-c1/cgroup.events");
        let events = std::fs::read_to_string(events).unwrap();
        events.lines().any(|line| line == "frozen 1")
    };
    pause().await.unwrap();
    assert!(frozen());
    host.client.resume(deadline(), &request).await.unwrap();
    assert!(!frozen());
    pause().await.unwrap();
    host.end("c1").await;
}

#[tokio::test]
async fn what_cannot_be_changed_is_refused() {
    let host = Host::start().await;
    let _ends = host.create("c1", &spec("sleep 1000")).await.unwrap();
    for (resources, field) in [
        ("{\"memory\": {\"kernel\": 5}}", "memory.kernel"),
        ("{\"hugePages\": 5}", "hugePages"),
        ("{", "resources"),
    ] {
        let request = UpdateRequest {
            container_id: "c1".into(),
            resources: resources.into(),
            ..UpdateRequest::default()
        };
        let (code, text) = status(host.client.update(deadline(), &request).await);
        assert_eq!(code, Code::INVALID_ARGUMENT, "{text}");
        assert!(text.contains(field), "{text}");
    }
    host.end("c1").await;
}
