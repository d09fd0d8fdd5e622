//! Calls of the Container Runtime Interface: gRPC on containerd's socket, with messages as JSON.
//!
//! gRPC's form: <https://github.com/grpc/grpc/blob/master/doc/PROTOCOL-HTTP2.md>

use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use bytes::Bytes;
use containerd_shim_protos::protobuf::descriptor::FileDescriptorSet;
use containerd_shim_protos::protobuf::reflect::{FileDescriptor, MessageDescriptor};
use containerd_shim_protos::protobuf::{Message, MessageDyn};
use h2::client;
use http::{HeaderMap, Request};
use protobuf_json_mapping::{PrintOptions, parse_dyn_from_str, print_to_string_with_options};
use serde_json::Value;
use tokio::net::UnixStream;
use tokio::time::timeout;

/// What `proto/cri.proto` says.
const DESCRIPTORS: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/cri.descriptors"));

const SERVICE: &str = "runtime.v1.RuntimeService";

/// Where containerd serves it.
const SOCKET: &str = "/run/containerd/containerd.sock";

/// How long a call may take.
const DEADLINE: Duration = Duration::from_secs(300);

/// Before each message: whether it is compressed, and its length.
const PREFIX: usize = 5;

/// A call that was answered with an error.
#[derive(Debug, thiserror::Error)]
#[error("{method} failed with code {code}: {message}")]
pub struct Refused {
    method: String,
    /// gRPC's code.
    pub code: i32,
    /// What went wrong.
    pub message: String,
}

/// The interface.
pub struct Client {
    file: FileDescriptor,
    runtime: tokio::runtime::Runtime,
}

impl Client {
    /// A client; each call makes a connection of its own.
    pub fn new() -> Result<Self> {
        let mut set = FileDescriptorSet::parse_from_bytes(DESCRIPTORS)?;
        let file = set.file.pop().context("the interface is empty")?;
        Ok(Self {
            file: FileDescriptor::new_dynamic(file, &[])?,
            runtime: tokio::runtime::Builder::new_current_thread()
                .enable_all()
                .build()?,
        })
    }

    /// Calls a method.
    ///
    /// # Errors
    ///
    /// [`Refused`] when the answer is an error.
    pub fn call(&self, method: &str, request: &Value) -> Result<Value> {
        let (input, output) = self.types(method)?;
        let request = parse_dyn_from_str(&input, &request.to_string())
            .with_context(|| format!("no request of {method}: {request}"))?;
        let answered = async {
            let answer = exchange(method, &*request);
            timeout(DEADLINE, answer).await.unwrap_or_else(|_| {
                bail!("{method} is not answered within {DEADLINE:?}");
            })
        };
        let bytes = self.runtime.block_on(answered)?;
        let mut answer = output.new_instance();
        answer
            .merge_from_bytes_dyn(&bytes)
            .with_context(|| format!("no answer of {method}"))?;
        let options = PrintOptions {
            proto_field_name: true,
            always_output_default_values: true,
            ..PrintOptions::default()
        };
        let text = print_to_string_with_options(&*answer, &options)?;
        Ok(serde_json::from_str(&text)?)
    }

    fn types(&self, method: &str) -> Result<(MessageDescriptor, MessageDescriptor)> {
        let service = self.file.services().next().context("no service")?;
        let mut methods = service.methods();
        let found = methods.find(|found| found.proto().name() == method);
        let found = found.with_context(|| format!("no method {method}"))?;
        Ok((found.input_type(), found.output_type()))
    }
}

/// One call on a connection of its own; the answer's bytes.
async fn exchange(method: &str, request: &dyn MessageDyn) -> Result<Bytes> {
    let socket = UnixStream::connect(SOCKET)
        .await
        .with_context(|| format!("cannot connect to {SOCKET}"))?;
    let (client, connection) = client::handshake(socket).await?;
    // It ends with the client, or with an error that the client gets too.
    tokio::spawn(connection);
    let head = Request::post(format!("http://localhost/{SERVICE}/{method}"))
        .header("content-type", "application/grpc")
        .header("te", "trailers")
        .body(())?;
    let (answer, mut sender) = client.ready().await?.send_request(head, false)?;
    sender.send_data(framed(request)?, true)?;

    let answer = answer.await?;
    ensure!(
        answer.status().is_success(),
        "{method}: {}",
        answer.status()
    );
    // An error may come without a message, in the only headers that there are.
    let headers = answer.headers().clone();
    let mut body = answer.into_body();
    let mut bytes = Vec::new();
    while let Some(data) = body.data().await {
        let data = data?;
        bytes.extend_from_slice(&data);
        body.flow_control().release_capacity(data.len())?;
    }
    let trailers = body.trailers().await?.unwrap_or(headers);
    check(method, &trailers)?;
    ensure!(
        bytes.len() >= PREFIX && bytes[0] == 0,
        "{method} was answered in an unknown form"
    );
    Ok(Bytes::from(bytes).slice(PREFIX..))
}

fn framed(message: &dyn MessageDyn) -> Result<Bytes> {
    let bytes = message.write_to_bytes_dyn()?;
    let mut framed = vec![0];
    framed.extend(u32::try_from(bytes.len())?.to_be_bytes());
    framed.extend(bytes);
    Ok(framed.into())
}

fn check(method: &str, trailers: &HeaderMap) -> Result<()> {
    let text = |name| {
        let value = trailers.get(name)?;
        Some(String::from_utf8_lossy(value.as_bytes()).into_owned())
    };
    let code = text("grpc-status").context("no grpc-status")?.parse()?;
    if code == 0 {
        return Ok(());
    }
    Err(Refused {
        method: method.to_owned(),
        code,
        message: text("grpc-message").unwrap_or_default(),
    }
    .into())
}
