//! Steps at which a test holds the shim, so that something ends in the middle of a call.
//!
//! Only a build with the feature `steps` has this, and a release cannot be built with it. A step is a
//! request to the VMM or a call of the agent, before it is made and when it is answered. Where a test
//! listens on the step's socket, the shim connects and waits until the test hangs up.

use std::path::Path;

use tokio::{io::AsyncReadExt, net::UnixStream};

#[cfg(not(debug_assertions))]
compile_error!("the feature steps is for tests; no release may have it");

/// Where the sockets are.
const DIRECTORY: &str = "/run/bulkhead-test";

/// The request or call `name` is about to be made.
pub async fn before(name: &str) {
    hold(name).await;
}

/// It has been answered, or has failed.
pub async fn after(name: &str) {
    hold(&format!("{name}-answered")).await;
}

async fn hold(step: &str) {
    // Where nobody listens, nobody holds it.
    if let Ok(mut test) = UnixStream::connect(Path::new(DIRECTORY).join(step)).await {
        let _ = test.read_u8().await;
    }
}
