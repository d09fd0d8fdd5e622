#![no_main]
//! The shim's calls to an agent that answers anything: frames, statuses and messages of its choice.

use std::{
    io,
    time::{Duration, SystemTime},
};

use arbitrary::Arbitrary;
use bulkhead_agent_api::messages::{
    CreateContainerRequest, ExecRequest, InfoResponse, IoEntry, StatsResponse, WaitResponse,
};
use bulkhead_shim::{
    agent_client::{AgentClient, AgentError, Exit},
    stats,
};
use libfuzzer_sys::fuzz_target;
use protobuf::{EnumOrUnknown, Message, MessageField};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::UnixStream,
    runtime::Builder,
    time::timeout,
};
use ttrpc::{Code, MessageHeader, Response, Status, proto::MESSAGE_TYPE_RESPONSE};

/// Bytes of a ttrpc frame before its payload.
const HEADER: usize = 10;

/// What the shim passes on of a message of the agent's, in bytes.
const MAX_MESSAGE: usize = 1024;

/// The most entries of one kind in statistics.
const MAX_STATS: usize = 1024;

#[derive(Debug, Arbitrary)]
enum Call {
    Info,
    Create,
    Start,
    Exec,
    Wait,
    Signal,
    Resize,
    Delete,
    Stats,
}

/// What the agent sends in answer to a call.
#[derive(Debug, Arbitrary)]
enum Answer {
    Info(Vec<String>),
    Wait {
        status: u32,
        at: Time,
    },
    Stats {
        values: [u64; 8],
        keys: u16,
        devices: u16,
    },
    Status {
        code: i32,
        message: String,
    },
    Message(Vec<u8>),
    Response(Vec<u8>),
    Frame {
        length: Option<u32>,
        stream: Option<u32>,
        kind: u8,
        flags: u8,
        payload: Vec<u8>,
    },
    Bytes(Vec<u8>),
}

#[derive(Debug, Arbitrary)]
enum Time {
    Ago { milliseconds: u32 },
    Ahead { milliseconds: u32 },
    Any(u64),
}

impl Time {
    fn nanoseconds(&self) -> u64 {
        let now = SystemTime::UNIX_EPOCH.elapsed().expect("a time after 1970");
        let from_now = |milliseconds: u32| Duration::from_millis(milliseconds.into());
        let time = match self {
            Self::Ago { milliseconds } => now.saturating_sub(from_now(*milliseconds)),
            Self::Ahead { milliseconds } => now + from_now(*milliseconds),
            Self::Any(nanoseconds) => Duration::from_nanos(*nanoseconds),
        };
        time.as_nanos() as u64
    }
}

#[derive(Debug, Arbitrary)]
struct Exchange {
    call: Call,
    answers: Vec<Answer>,
}

fuzz_target!(|exchanges: Vec<Exchange>| {
    // The clock goes on when there is nothing else to do, so a call without an answer takes no time.
    let runtime = Builder::new_current_thread()
        .enable_all()
        .start_paused(true)
        .build()
        .expect("a runtime");
    runtime.block_on(async {
        let (ours, theirs) = UnixStream::pair().expect("a pair");
        let client = AgentClient::new(ours);
        let (calls, answers): (Vec<_>, Vec<_>) = exchanges
            .into_iter()
            .map(|exchange| (exchange.call, exchange.answers))
            .unzip();
        tokio::spawn(async move {
            // The shim may hang up.
            let _ = answer(theirs, answers).await;
        });
        for call in calls {
            make(&client, &call).await;
        }
    });
});

/// Makes a call, and checks what is passed on of its answer.
async fn make(client: &AgentClient, call: &Call) {
    let result = match call {
        Call::Info => client.info().await.map(drop),
        Call::Create => {
            client
                .create(&CreateContainerRequest::default(), Duration::ZERO)
                .await
        }
        Call::Start => client.start("c", Duration::ZERO).await,
        Call::Exec => client.exec(&ExecRequest::default()).await,
        Call::Wait => match timeout(Duration::from_secs(3600), client.wait("c", "")).await {
            Ok(result) => result.map(|exit| check_exit(&exit)),
            // A process may run for ever.
            Err(_) => Ok(()),
        },
        Call::Signal => client.signal("c", "", 9, true).await,
        Call::Resize => client.resize("c", "", 80, 25).await,
        Call::Delete => client.delete("c", "").await,
        Call::Stats => client.stats("c").await.map(|stats| check_stats(&stats)),
    };
    if let Err(AgentError::Refused { code, message }) = result {
        assert_ne!(code, Code::OK);
        assert!(message.len() <= MAX_MESSAGE, "{} bytes", message.len());
        assert!(!message.contains(char::is_control), "{message:?}");
    }
}

fn check_exit(exit: &Exit) {
    let now = SystemTime::now();
    let age = now
        .duration_since(exit.at)
        .expect("no end is in the future");
    assert!(age <= Duration::from_secs(3700), "an end {age:?} ago");
}

fn check_stats(answer: &StatsResponse) {
    let memory = &answer.memory;
    for entries in [memory.stat.len(), memory.events.len(), answer.io.len()] {
        assert!(entries <= MAX_STATS, "{entries} entries");
    }
    stats::metrics(answer).write_to_bytes().expect("a message");
}

/// Answers call after call.
async fn answer(mut stream: UnixStream, answers: Vec<Vec<Answer>>) -> io::Result<()> {
    for answers in answers {
        let mut header = [0; HEADER];
        stream.read_exact(&mut header).await?;
        let header = MessageHeader::from(header);
        let mut request = vec![0; header.length as usize];
        stream.read_exact(&mut request).await?;
        for answer in answers {
            stream.write_all(&bytes(answer, header.stream_id)).await?;
        }
    }
    // What comes now is never answered.
    std::future::pending().await
}

/// What goes over the connection for an answer on this stream.
fn bytes(answer: Answer, stream: u32) -> Vec<u8> {
    let message = match answer {
        Answer::Bytes(bytes) => return bytes,
        Answer::Frame {
            length,
            stream: other,
            kind,
            flags,
            payload,
        } => {
            return frame(
                length.unwrap_or(payload.len() as u32),
                other.unwrap_or(stream),
                (kind, flags),
                &payload,
            );
        }
        Answer::Response(bytes) => {
            return frame(
                bytes.len() as u32,
                stream,
                (MESSAGE_TYPE_RESPONSE, 0),
                &bytes,
            );
        }
        Answer::Status { code, message } => {
            let status = Status {
                code: EnumOrUnknown::from_i32(code),
                message,
                ..Status::default()
            };
            let response = Response {
                status: MessageField::some(status),
                ..Response::default()
            };
            return response_frame(&response, stream);
        }
        Answer::Message(bytes) => bytes,
        Answer::Info(mut words) => encoded(&InfoResponse {
            version: words.pop().unwrap_or_default(),
            kernel_release: words.pop().unwrap_or_default(),
            ..InfoResponse::default()
        }),
        Answer::Wait { status, at } => encoded(&WaitResponse {
            status,
            exited_at_ns: at.nanoseconds(),
            ..WaitResponse::default()
        }),
        Answer::Stats {
            values,
            keys,
            devices,
        } => encoded(&statistics(values, keys, devices)),
    };
    let response = Response {
        payload: message,
        ..Response::default()
    };
    response_frame(&response, stream)
}

fn encoded(message: &impl Message) -> Vec<u8> {
    message.write_to_bytes().expect("a message")
}

fn response_frame(response: &Response, stream: u32) -> Vec<u8> {
    let payload = encoded(response);
    frame(
        payload.len() as u32,
        stream,
        (MESSAGE_TYPE_RESPONSE, 0),
        &payload,
    )
}

fn frame(length: u32, stream_id: u32, (type_, flags): (u8, u8), payload: &[u8]) -> Vec<u8> {
    let header = MessageHeader {
        length,
        stream_id,
        type_,
        flags,
    };
    let mut frame = Vec::<u8>::from(header);
    frame.extend(payload);
    frame
}

fn statistics(values: [u64; 8], keys: u16, devices: u16) -> StatsResponse {
    let [
        usage,
        limit,
        swap,
        refault,
        refault_too,
        pids,
        max_pids,
        bytes,
    ] = values;
    let mut stats = StatsResponse::default();
    let cpu = stats.cpu.mut_or_insert_default();
    (cpu.usage_usec, cpu.nr_periods) = (usage, limit);
    let memory = stats.memory.mut_or_insert_default();
    (memory.usage, memory.usage_limit, memory.swap_limit) = (usage, limit, swap);
    // Two that are added up.
    memory
        .stat
        .insert("workingset_refault_anon".into(), refault);
    memory
        .stat
        .insert("workingset_refault_file".into(), refault_too);
    let some = |key: u16| (key.to_string(), u64::from(key));
    memory.stat.extend((0..keys % 1100).map(some));
    memory.events.extend((0..keys / 60).map(some));
    let tasks = stats.pids.mut_or_insert_default();
    (tasks.current, tasks.limit) = (pids, max_pids);
    stats.io = (0..devices % 1100)
        .map(|device| IoEntry {
            major: device.into(),
            rbytes: bytes,
            ..IoEntry::default()
        })
        .collect();
    stats
}
