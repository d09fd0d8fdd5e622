#![no_main]
//! The file server against requests of any kind, on a directory of its own.

use arbitrary::Arbitrary;
use bulkhead_fs::FileServer;
use bulkhead_fuzz::file_server;
use libfuzzer_sys::fuzz_target;
use vm_memory::VolatileSlice;

/// Of a request's header.
const HEADER: usize = 40;
const INIT: u32 = 26;

#[derive(Debug, Arbitrary)]
struct Request {
    opcode: u8,
    /// Mostly one of the first nodes.
    node: u8,
    wild_node: bool,
    user: u8,
    /// Numbers at the start of the body, as most requests have.
    numbers: Vec<u8>,
    name: Name,
    room: u16,
    cut: Option<u8>,
}

#[derive(Debug, Arbitrary)]
enum Name {
    None,
    Known(u8),
    Bytes(Vec<u8>),
}

const KNOWN: [&[u8]; 8] = [
    b"share\0",
    b"file\0",
    b"directory\0",
    b"link\0",
    b"..\0",
    b"new\0",
    b"file\0new\0",
    b"user.name\0value",
];

fuzz_target!(|requests: Vec<Request>| {
    let (server, _directory) = file_server();
    let mut init = vec![0; 64];
    init[..12].copy_from_slice(&[7, 0, 0, 0, 41, 0, 0, 0, 0, 0, 2, 0]);
    init[12..16].copy_from_slice(&u32::MAX.to_le_bytes());
    send(&server, INIT, 0, 0, &init, 4096, None);
    send(&server, 1, 1, 0, b"share\0", 4096, None);
    for request in &requests {
        let node = if request.wild_node {
            u64::from(request.node) << 40 | 1
        } else {
            u64::from(request.node % 8)
        };
        let mut body = request.numbers.clone();
        match &request.name {
            Name::None => {}
            Name::Known(index) => body.extend(KNOWN[usize::from(*index) % KNOWN.len()]),
            Name::Bytes(bytes) => body.extend(bytes),
        }
        let opcode = u32::from(request.opcode % 56);
        let room = request.room.into();
        send(
            &server,
            opcode,
            node,
            request.user.into(),
            &body,
            room,
            request.cut,
        );
    }
});

fn send(
    server: &FileServer,
    opcode: u32,
    node: u64,
    user: u32,
    body: &[u8],
    room: usize,
    cut: Option<u8>,
) {
    let length = u32::try_from(HEADER + body.len()).expect("a short request");
    let mut bytes = Vec::new();
    bytes.extend(length.to_le_bytes());
    bytes.extend(opcode.to_le_bytes());
    bytes.extend(7u64.to_le_bytes());
    bytes.extend(node.to_le_bytes());
    for number in [user, user, 1, 0] {
        bytes.extend(number.to_le_bytes());
    }
    bytes.extend(body);
    if let Some(cut) = cut {
        bytes.truncate(cut.into());
    }
    let mut reply = vec![0; room];
    // In two pieces, as a driver hands it over.
    let middle = bytes.len().min(HEADER);
    let (head, rest) = bytes.split_at_mut(middle);
    let request = [VolatileSlice::from(head), VolatileSlice::from(rest)];
    let written = server.handle(&request, &[VolatileSlice::from(reply.as_mut_slice())]);
    assert!(written <= room);
}
