//! The hostile guest: a kernel of its own that does to every device of the VMM what no driver would,
//! for a number of rounds and from a seed.
//!
//! The source is compiled twice. As a library it is checked like all other code, and offers the
//! finished program as [`GUEST`]; `build.rs` makes that program of it, with `cfg(guest)`. The test
//! that runs it is `vmm/tests/hostile.rs`.
//!
//! | module | what it does to the VMM |
//! |---|---|
//! | [`attack`] | virtio devices: registers, states, rings, descriptors, requests |
//! | [`race`] | changes memory and registers under a device that works, from a second processor |
//! | [`platform`] | I/O APIC, ports, addresses between devices |
//! | [`calm`] | nothing: the neighbour that must not notice |
//!
//! When all is done the guest says so on its serial console and resets the VM. Anything else, such as
//! an exception of its own, ends without that line.

#![cfg_attr(not(test), no_std)]
#![cfg_attr(guest, no_main)]

pub mod attack;
pub mod calm;
pub mod driver;
#[cfg(guest)]
mod entry;
pub mod fs;
pub mod machine;
pub mod net;
pub mod options;
pub mod platform;
pub mod race;
pub mod random;
pub mod requests;
pub mod vsock;

use crate::{
    attack::Rig,
    fs::Fs,
    machine::{
        Word::{Number, Text},
        say,
    },
    net::Net,
    options::{Options, Role},
    race::Second,
    random::Random,
    requests::{Console, Requests, Rng},
    vsock::Vsock,
};

/// The memory that the guest needs, in MiB.
pub const MEMORY_MIB: u32 = 64;

/// The program: an ELF file for [`MEMORY_MIB`] of memory, a console, and two vCPUs if it is to use
/// them.
#[cfg(not(guest))]
pub static GUEST: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/guest"));

/// Does what the command line says. `trampoline` are the second processor's first instructions.
pub fn run(command_line: &[u8], trampoline: &'static [u8]) {
    let Some(options) = Options::parse(command_line) else {
        say(&[Text(
            "hostile guest: the command line does not say what to do",
        )]);
        return;
    };
    machine::enable_local_apic();
    match options.role {
        Role::Calm => calm::run(),
        Role::Platform => {
            let mut random = Random::new(options.seed);
            (0..options.rounds).for_each(|_| platform::round(&mut random));
            report(&options, options.rounds, 1);
        }
        Role::Vsock => attack(Vsock, &options, trampoline),
        Role::Fs => attack(Fs::new(), &options, trampoline),
        Role::Rng => attack(Rng, &options, trampoline),
        Role::Console => attack(Console, &options, trampoline),
        Role::Net => attack(Net, &options, trampoline),
    }
}

fn attack(requests: impl Requests, options: &Options, trampoline: &'static [u8]) {
    let second = Second::find(trampoline);
    let mut rig = Rig::new(requests, options.seed, second);
    (0..options.rounds).for_each(|_| rig.round());
    let (answers, second) = rig.finish();
    report(options, answers, second.processors());
    // Both at once.
    second.reset();
}

fn report(options: &Options, answers: u64, processors: u32) {
    say(&[
        Text("hostile guest: role="),
        Text(options.role.name()),
        Text(" seed="),
        Number(options.seed),
        Text(" rounds="),
        Number(options.rounds),
        Text(" answers="),
        Number(answers),
        Text(" processors="),
        Number(processors.into()),
    ]);
}
