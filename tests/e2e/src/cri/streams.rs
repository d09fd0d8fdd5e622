//! Streams of a process, as `kubectl exec` and `kubectl attach` have them: one WebSocket, in which the
//! first byte of each message names its stream (k8s.io/apimachinery/pkg/util/httpstream/wsstream).

use std::net::TcpStream;

use anyhow::{Context, Result, bail, ensure};
use serde_json::{Value, json};
use tungstenite::client::IntoClientRequest;
use tungstenite::http::HeaderValue;
use tungstenite::{Message, WebSocket, client};

use crate::command::DEADLINE;

const PROTOCOL: &str = "v4.channel.k8s.io";

const INPUT: u8 = 0;
const OUTPUT: u8 = 1;
const ERROR_OUTPUT: u8 = 2;
/// How the process has ended.
const STATUS: u8 = 3;
/// Of the terminal.
const SIZE: u8 = 4;

fn connect(url: &str) -> Result<WebSocket<TcpStream>> {
    let address = url.strip_prefix("http://").context("no HTTP")?;
    let host = address.split('/').next().unwrap_or_default();
    let stream = TcpStream::connect(host).with_context(|| format!("connect to {host}"))?;
    stream.set_read_timeout(Some(DEADLINE))?;
    let mut request = format!("ws://{address}").into_client_request()?;
    let protocol = HeaderValue::from_static(PROTOCOL);
    request
        .headers_mut()
        .insert("sec-websocket-protocol", protocol);
    let connected = client(request, stream);
    let (socket, _) = connected.map_err(|error| anyhow::anyhow!("{url}: {error}"))?;
    Ok(socket)
}

/// A connection with a port of a pod, as `kubectl port-forward` has it: the first stream carries its
/// bytes and the second an error, and each begins with the port
/// (k8s.io/kubelet/pkg/cri/streaming/portforward).
pub struct Forwarded(WebSocket<TcpStream>);

impl Forwarded {
    /// By an address that containerd has given out.
    pub fn connect(url: &str, port: u16) -> Result<Self> {
        let mut socket = connect(&format!("{url}?port={port}"))?;
        for channel in [0, 1] {
            let first = socket.read()?.into_data();
            let expected = [&[channel], &port.to_le_bytes()[..]].concat();
            ensure!(first == expected, "{first:?} came first");
        }
        Ok(Self(socket))
    }

    /// Sends bytes and waits for the same to come back.
    pub fn echo(&mut self, bytes: &[u8]) -> Result<()> {
        for block in bytes.chunks(30_000) {
            let message = [&[0], block].concat();
            self.0.send(Message::binary(message))?;
        }
        let mut back = Vec::new();
        while back.len() < bytes.len() {
            let message = self.0.read()?.into_data();
            let (channel, rest) = message.split_first().context("an empty message")?;
            ensure!(*channel == 0, "{}", String::from_utf8_lossy(rest));
            back.extend_from_slice(rest);
        }
        ensure!(back == bytes, "other bytes came back");
        Ok(())
    }

    /// Waits for the error.
    pub fn error(&mut self) -> Result<String> {
        let message = self.0.read()?.into_data();
        let (channel, rest) = message.split_first().context("an empty message")?;
        ensure!(*channel == 1, "bytes came from a closed port");
        Ok(String::from_utf8_lossy(rest).into_owned())
    }
}

/// The streams of a process that runs.
pub struct Streams {
    socket: WebSocket<TcpStream>,
    /// What it has written so far.
    pub out: String,
    /// What it has written to its standard error so far.
    pub err: String,
    status: Option<Value>,
}

impl Streams {
    /// Connects to an address that containerd has given out.
    pub fn connect(url: &str) -> Result<Self> {
        Ok(Self {
            socket: connect(url)?,
            out: String::new(),
            err: String::new(),
            status: None,
        })
    }

    /// Writes to the process's standard input.
    pub fn write(&mut self, text: &str) -> Result<()> {
        self.send(INPUT, text)
    }

    /// Sets the size of its terminal.
    pub fn resize(&mut self, width: u16, height: u16) -> Result<()> {
        let size = json!({ "Width": width, "Height": height });
        self.send(SIZE, &size.to_string())
    }

    fn send(&mut self, channel: u8, text: &str) -> Result<()> {
        let message = [&[channel], text.as_bytes()].concat();
        Ok(self.socket.send(Message::binary(message))?)
    }

    /// Waits until it has written this text.
    pub fn expect(&mut self, text: &str) -> Result<()> {
        while !self.out.contains(text) {
            ensure!(self.receive()?, "no {text:?} in {:?}", self.out);
        }
        Ok(())
    }

    /// Waits for the end of all streams. Gives the exit code.
    pub fn finish(mut self) -> Result<(i32, String, String)> {
        while self.receive()? {}
        let status = self.status.context("nothing was said of its end")?;
        if status["status"] == "Success" {
            return Ok((0, self.out, self.err));
        }
        let cause = &status["details"]["causes"][0];
        ensure!(cause["reason"] == "ExitCode", "{status}");
        let code = cause["message"].as_str().context("no exit code")?.parse()?;
        Ok((code, self.out, self.err))
    }

    /// Takes one message; false at the end of all.
    fn receive(&mut self) -> Result<bool> {
        let bytes = match self.socket.read() {
            Ok(Message::Close(_)) | Err(tungstenite::Error::ConnectionClosed) => return Ok(false),
            Ok(message) => message.into_data(),
            Err(error) => return Err(error.into()),
        };
        let Some((channel, rest)) = bytes.split_first() else {
            return Ok(true);
        };
        let text = String::from_utf8_lossy(rest);
        match *channel {
            OUTPUT => self.out.push_str(&text),
            ERROR_OUTPUT => self.err.push_str(&text),
            STATUS if rest.is_empty() => {}
            STATUS => self.status = Some(serde_json::from_str(&text)?),
            other => bail!("stream {other} says {text:?}"),
        }
        Ok(true)
    }
}
