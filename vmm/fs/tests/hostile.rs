//! A guest that says anything at all: the server answers or stays silent, and goes on. Needs root.
#![allow(missing_docs, reason = "the names of the tests say it")]

mod guest;

use guest::{EXCLUSIVE, Guest, ROOT, exchange, request, u32_at, u64_at};
use proptest::prelude::*;

/// Handles a request of any bytes, and checks what comes back.
fn check(guest: &Guest, bytes: &[u8], room: usize, piece: usize) -> Result<(), TestCaseError> {
    let mut bytes = bytes.to_vec();
    let mut reply = vec![0; room];
    let length = exchange(&guest.server, &mut bytes, &mut reply, piece);
    prop_assert!(length <= room);
    if length > 0 {
        prop_assert!(length >= 16);
        prop_assert_eq!(u32_at(&reply, 0) as usize, length);
        prop_assert_eq!(u64_at(&reply, 8), u64_at(&bytes, 8));
        let error = u32_at(&reply, 4).cast_signed();
        prop_assert!((-511..=0).contains(&error));
        prop_assert!(error == 0 || length == 16);
    }
    Ok(())
}

fn populated() -> Guest {
    let guest = Guest::new(EXCLUSIVE);
    let node = guest.file(guest.share, "file", b"content");
    guest.open(node, libc::O_RDWR).unwrap();
    guest.call(guest::OPENDIR, guest.share, &[0; 8]).unwrap();
    guest.symlink(guest.share, "link", "target").unwrap();
    guest
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 200, ..ProptestConfig::default() })]

    #[test]
    fn any_bytes_are_survived(
        requests in proptest::collection::vec(proptest::collection::vec(any::<u8>(), 0..300), 1..20),
        room in 0..300_usize,
        piece in 1..64_usize,
    ) {
        let guest = populated();
        for bytes in requests {
            check(&guest, &bytes, room, piece)?;
        }
    }

    #[test]
    fn any_body_of_a_known_operation_is_survived(
        requests in proptest::collection::vec(
            (0..54_u32, 0..6_u64, proptest::collection::vec(0..8_u8, 0..120), any::<u32>()),
            1..60,
        ),
        room in 0..5000_usize,
    ) {
        let guest = populated();
        for (opcode, node, body, id) in requests {
            let mut bytes = request(opcode, u64::from(id), node, id, id, &body);
            check(&guest, &bytes, room, 37)?;
            // A length that is not that of the request.
            bytes[0] ^= 0x41;
            check(&guest, &bytes, room, 4096)?;
        }
        guest.init(guest::OFFERED).unwrap();
        guest.getattr(ROOT).unwrap();
        guest.getattr(guest.share).unwrap();
    }
}

#[test]
fn a_reply_that_does_not_fit_is_an_error() {
    let guest = populated();
    let body = [0; 16];
    assert_eq!(
        guest.call_for(guest::GETATTR, guest.share, &body, 103),
        Err(libc::ERANGE)
    );
    guest
        .call_for(guest::GETATTR, guest.share, &body, 104)
        .unwrap();
    let mut bytes = request(guest::GETATTR, 9, guest.share, 0, 0, &body);
    for room in 0..16 {
        assert_eq!(
            exchange(&guest.server, &mut bytes, &mut vec![0; room], 5),
            0
        );
    }
}

#[test]
fn absurd_counts_end_at_the_end_of_the_request() {
    let guest = populated();
    let forget = record![u32::MAX, 0_u32, guest.share, 1_u64];
    guest.tell(guest::BATCH_FORGET, 0, &forget);
    let huge = record![u32::MAX, 0_u32, 0_u32, 0_u32, "user.x"];
    assert_eq!(
        guest.call(guest::SETXATTR, guest.share, &huge),
        Err(libc::E2BIG)
    );
    guest.getxattr(guest.share, "user.x", u32::MAX).unwrap_err();
    let all = record![2_u64, 0_u64, u32::MAX, 0_u32, 0_u64, 0_u32, 0_u32];
    guest.call_for(guest::READDIR, ROOT, &all, 100_000).unwrap();
    guest.call_for(guest::READ, 0, &all, 100_000).unwrap();
    let long = vec![b'x'; 200_000];
    assert_eq!(
        guest.call(guest::LOOKUP, guest.share, &long),
        Err(libc::EINVAL)
    );
}

#[test]
fn requests_of_several_threads_do_not_mix() {
    let guest = populated();
    std::thread::scope(|scope| {
        for thread in 0..4_u32 {
            let guest = &guest;
            scope.spawn(move || {
                for round in 0..200_u32 {
                    let name = format!("file-{thread}-{round}");
                    let flags = libc::O_RDWR.cast_unsigned();
                    let body = record![flags, 0o644_u32, 0_u32, 0_u32, name.as_str()];
                    let uid = 1000 + thread;
                    let mut bytes = request(guest::CREATE, 1, guest.share, uid, uid, &body);
                    let mut reply = vec![0; 200];
                    assert_eq!(
                        exchange(&guest.server, &mut bytes, &mut reply, 100),
                        16 + 144
                    );
                    assert_eq!(u32_at(&reply, 16 + 40 + 68), uid);
                    guest.release(u64_at(&reply, 16 + 128));
                }
            });
        }
    });
}
