//! What the other process does.

use std::{hint::black_box, process, ptr};

use bulkhead_vmm::{seccomp::Filter, thread};

use crate::{calls, files};

/// The first argument of a child.
pub const MARK: &str = "--as-child";

/// Seconds after which a child that hangs is killed.
const DEADLINE: u32 = 60;

pub fn run(words: &[String]) -> ! {
    // SAFETY: the signal ends the process.
    unsafe { libc::alarm(DEADLINE) };
    let words: Vec<&str> = words.iter().map(String::as_str).collect();
    match words[..] {
        ["allowed", filter] => {
            let calls = calls::of(filter);
            install(filter);
            for call in calls {
                make(call.number().into(), &call.arguments);
            }
        }
        ["call" | "number", filter, number, ref arguments @ ..] => {
            let arguments: Vec<i64> = arguments.iter().map(|word| word.parse().unwrap()).collect();
            install(filter);
            make(number.parse().unwrap(), &arguments);
        }
        ["gate", filter] => {
            install(filter);
            get_pid_by_the_old_gate();
        }
        ["files", directory] => files::serve(directory),
        ["threads"] => allocate_in_threads(),
        [how @ ("blocked" | "ignored" | "default")] => {
            install("setup");
            meddle(how);
            make(libc::SYS_fork, &[]);
        }
        [how, filter] => {
            install(filter);
            fail(how);
        }
        _ => panic!("{words:?}"),
    }
    process::exit(0)
}

/// The filter of the set-up and, unless it is that one, the thread's.
fn install(name: &str) {
    Filter::Setup.install().unwrap();
    let filter = match name {
        "setup" => return,
        "vcpu" => Filter::Vcpu,
        "devices" => Filter::Devices,
        "main" => Filter::Main,
        "fs" => Filter::Fs,
        "net" => Filter::Net,
        _ => panic!("{name}"),
    };
    filter.install().unwrap();
}

fn make(number: i64, arguments: &[i64]) {
    let mut all = [0; 6];
    all[..arguments.len()].copy_from_slice(arguments);
    let [a, b, c, d, e, f] = all;
    // SAFETY: pointers among the arguments are null, descriptors and processes do not exist, and
    // lengths are 0.
    unsafe { libc::syscall(number, a, b, c, d, e, f) };
}

/// System call 20 of a 32-bit program.
fn get_pid_by_the_old_gate() {
    // SAFETY: the call has no arguments and changes nothing but its result.
    unsafe { std::arch::asm!("int 0x80", inlateout("eax") 20 => _) };
}

/// Does to SIGSYS what an attacker might.
fn meddle(how: &str) {
    let action = |handler| {
        // SAFETY: an action without flags or mask; the handler is a valid one.
        unsafe { libc::signal(libc::SIGSYS, handler) };
    };
    match how {
        "blocked" => {
            // SAFETY: the set is made before it is used.
            unsafe {
                let mut set = std::mem::zeroed();
                libc::sigemptyset(&raw mut set);
                libc::sigaddset(&raw mut set, libc::SIGSYS);
                libc::sigprocmask(libc::SIG_BLOCK, &raw const set, ptr::null_mut());
            }
        }
        "ignored" => action(libc::SIG_IGN),
        _ => action(libc::SIG_DFL),
    }
}

/// Comes to an end that is no violation.
fn fail(how: &str) {
    #[allow(unconditional_recursion, reason = "that is the point")]
    fn overflow(bytes: [u8; 4096]) -> u8 {
        black_box(overflow(black_box(bytes))) + bytes[0]
    }
    match how {
        "abort" => process::abort(),
        "panic" => {
            // As in release builds, where a panic ends the process.
            let hook = std::panic::take_hook();
            std::panic::set_hook(Box::new(move |info| {
                hook(info);
                process::abort();
            }));
            panic!("the reason");
        }
        // SAFETY: none; it must fault.
        "fault" => unsafe { black_box(ptr::dangling_mut::<u8>()).write_volatile(1) },
        "overflow" => {
            overflow([1; 4096]);
        }
        "free" => {
            // SAFETY: none; the allocator must notice.
            unsafe {
                let memory = black_box(libc::malloc(100));
                libc::free(memory);
                libc::free(memory);
            }
        }
        _ => panic!("{how}"),
    }
}

/// More threads than glibc likes to make heaps for, each growing and shrinking its heap.
fn allocate_in_threads() {
    Filter::Setup.install().unwrap();
    let work = || {
        for _ in 0..10 {
            let blocks: Vec<Vec<u8>> = (0..200).map(|_| vec![1; 60_000]).collect();
            drop(black_box(blocks));
        }
        // What the standard library asks the kernel or glibc for by itself.
        let keys = std::collections::HashMap::<u8, u8>::new();
        let error = std::io::Error::from_raw_os_error(libc::ENOENT).to_string();
        eprintln!("{error} {keys:?}");
    };
    let threads: Vec<_> = (0..20)
        .map(|index| thread::start(format!("{index}"), Filter::Vcpu, || Ok(()), work).unwrap())
        .collect();
    for thread in threads {
        thread.join().unwrap();
    }
}
