#![no_main]
//! The streams that a guest dials, against dialling at will: with tokens that are waited for, were, or
//! never were, with parts of them, and with none.

use std::{collections::HashSet, sync::Arc, time::Duration};

use arbitrary::Arbitrary;
use bulkhead_agent_api::TOKEN_LEN;
use bulkhead_shim::streams::{Expected, Streams};
use libfuzzer_sys::fuzz_target;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::UnixStream,
    runtime::Builder,
    task::yield_now,
    time::{advance, timeout},
};

/// Streams that are waited for at a time.
const MAX_EXPECTED: usize = 16;

/// Steps of one run.
const MAX_STEPS: usize = 256;

/// Connections that a guest leaves open: more than may be without their token.
const MAX_OPEN: usize = 100;

/// More than a connection may take to send its token.
const LONG: Duration = Duration::from_secs(61);

#[derive(Debug, Arbitrary)]
enum Step {
    /// Waits for one more stream.
    Expect,
    /// Does not wait for it any longer.
    Forget(u8),
    /// Dials, once or more often.
    Dial {
        token: Token,
        payload: Vec<u8>,
        hang_up: bool,
        more: u8,
    },
    /// Sends more on a connection that was dialled.
    Send { connection: u8, bytes: Vec<u8> },
    /// Takes the stream that is waited for, if it has come.
    Take(u8),
    /// Time passes.
    Wait,
}

#[derive(Debug, Arbitrary)]
enum Token {
    /// One of those that were made so far.
    Known(u8),
    /// The same, cut short.
    Part {
        known: u8,
        length: u8,
    },
    Any([u8; TOKEN_LEN]),
    None,
}

struct Run {
    streams: Arc<Streams>,
    expected: Vec<Expected>,
    /// All tokens so far.
    tokens: Vec<Vec<u8>>,
    /// The guest's ends, and all that was sent on each.
    dialled: Vec<(UnixStream, Vec<u8>)>,
    /// Everything that was sent by connections, to look up what has arrived.
    sent: HashSet<Vec<u8>>,
}

fuzz_target!(|steps: Vec<Step>| {
    let runtime = Builder::new_current_thread()
        .enable_all()
        .start_paused(true)
        .build()
        .expect("a runtime");
    runtime.block_on(async {
        let mut run = Run {
            streams: Streams::new(),
            expected: Vec::new(),
            tokens: Vec::new(),
            dialled: Vec::new(),
            sent: HashSet::new(),
        };
        for step in steps.into_iter().take(MAX_STEPS) {
            run.step(step).await;
        }
        run.serves_at_last().await;
    });
});

impl Run {
    async fn step(&mut self, step: Step) {
        match step {
            Step::Expect if self.expected.len() < MAX_EXPECTED => {
                let expected = self.streams.expect().expect("random bytes");
                assert!(!self.tokens.contains(&expected.token()));
                self.tokens.push(expected.token());
                self.expected.push(expected);
            }
            Step::Expect => {}
            Step::Forget(index) => {
                self.pick(index);
            }
            Step::Dial {
                token,
                payload,
                hang_up,
                more,
            } => {
                for _ in 0..=more {
                    if self.dialled.len() < MAX_OPEN {
                        self.dial(&token, &payload, hang_up).await;
                    }
                }
            }
            Step::Send { connection, bytes } => {
                let count = self.dialled.len().max(1);
                let dialled = self.dialled.get_mut(usize::from(connection) % count);
                if let Some((stream, sent)) = dialled
                    // It may have been closed.
                    && stream.write_all(&bytes).await.is_ok()
                {
                    sent.extend(bytes);
                }
            }
            Step::Take(index) => {
                if let Some(expected) = self.pick(index) {
                    self.take(expected).await;
                }
            }
            Step::Wait => {
                advance(LONG).await;
                settle().await;
            }
        }
    }

    fn pick(&mut self, index: u8) -> Option<Expected> {
        let count = self.expected.len();
        (count > 0).then(|| self.expected.swap_remove(usize::from(index) % count))
    }

    fn known(&self, index: u8) -> Vec<u8> {
        let count = self.tokens.len().max(1);
        let token = self.tokens.get(usize::from(index) % count);
        token.cloned().unwrap_or_default()
    }

    async fn dial(&mut self, token: &Token, payload: &[u8], hang_up: bool) {
        let mut bytes = match token {
            Token::Known(index) => self.known(*index),
            Token::Part { known, length } => {
                let mut token = self.known(*known);
                token.truncate(usize::from(*length) % TOKEN_LEN);
                token
            }
            Token::Any(token) => token.to_vec(),
            Token::None => Vec::new(),
        };
        bytes.extend(payload);
        let (ours, mut theirs) = UnixStream::pair().expect("a pair");
        theirs.write_all(&bytes).await.expect("room for it");
        self.streams.accept(ours);
        settle().await;
        if hang_up {
            self.sent.insert(bytes);
        } else {
            self.dialled.push((theirs, bytes));
        }
    }

    /// What arrives was sent after this token on one connection, without gaps.
    async fn take(&mut self, expected: Expected) {
        let token = expected.token();
        let Ok(arrived) = timeout(LONG, expected.arrived()).await else {
            return;
        };
        let mut stream = arrived.expect("whoever is waited for is not given up");
        for (_, sent) in self.dialled.drain(..) {
            self.sent.insert(sent);
        }
        let mut bytes = token;
        let read = stream.read_to_end(&mut bytes).await;
        // The guest may hang up before it has read something.
        if read.is_ok() {
            assert!(self.sent.contains(&bytes), "{bytes:?} was never sent");
        }
    }

    /// Whatever the guest has done, a stream that is waited for arrives, once time has passed.
    async fn serves_at_last(&mut self) {
        advance(LONG).await;
        settle().await;
        let expected = self.streams.expect().expect("random bytes");
        let (ours, mut theirs) = UnixStream::pair().expect("a pair");
        theirs
            .write_all(&expected.token())
            .await
            .expect("room for it");
        self.streams.accept(ours);
        let arrived = timeout(LONG, expected.arrived()).await;
        assert!(arrived.expect("it arrives").is_some());
    }
}

/// Lets the shim's tasks do what they can.
async fn settle() {
    for _ in 0..8 {
        yield_now().await;
    }
}
