#![no_main]
//! The questions that a guest has for the host's name server, as frames on a stream.

use bulkhead_agent_api::RESOLVER_HEADER;
use bulkhead_shim::network::resolver::{answer_frame, read_question};
use libfuzzer_sys::fuzz_target;
use tokio::runtime::Builder;

fuzz_target!(|bytes: &[u8]| {
    let runtime = Builder::new_current_thread().build().expect("a runtime");
    runtime.block_on(async {
        let mut rest = bytes;
        loop {
            let before = rest;
            let read = read_question(&mut rest).await.expect("bytes can be read");
            let Some(Ok(question)) = read else {
                return;
            };
            assert!(!question.message.is_empty());
            // Exactly one frame was taken, and it is the one that the same message would have.
            let taken = RESOLVER_HEADER + question.message.len();
            assert_eq!(before.len() - rest.len(), taken);
            let frame = answer_frame(&question, &question.message);
            assert_eq!(frame.expect("it fits"), &before[..taken]);
        }
    });
});
