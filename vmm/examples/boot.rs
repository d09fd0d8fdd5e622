//! Boots a kernel and an initramfs under `bulkhead-vmm` as the shim does, for work on the VMM
//! without containerd:
//!
//! ```text
//! boot [--vmm FILE] [--vcpus N] [--memory MIB] [--args TEXT] [--console FILE]
//!      [--share NAME=PATH] [--nic TAP] [--seconds N] KERNEL INITRAMFS
//! ```
//!
//! `--nic` makes a tap of this name, as root, and attaches it to the first slot.
//!
//! It prints every event, with the counters at each connection, and sends back whatever the guest
//! writes to a connection. It ends when the VM does, or after `--seconds`.

use std::{
    error::Error,
    fs::File,
    io::{Read, Write},
    net::Shutdown,
    os::{
        fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd},
        unix::{fs::OpenOptionsExt, net::UnixStream},
    },
    path::PathBuf,
    thread,
    time::{Duration, Instant},
};

use bulkhead_vmm_control::{
    Channel, Event, FromVmm, Packet, Reply, Request, VmConfig, spawn_alone,
};

struct Options {
    vmm: PathBuf,
    config: VmConfig,
    console: Option<PathBuf>,
    share: Option<(String, PathBuf)>,
    nic: Option<String>,
    seconds: Option<u64>,
    files: Vec<PathBuf>,
}

fn main() -> Result<(), Box<dyn Error>> {
    let options = options()?;
    let [kernel, initramfs] = &options.files[..] else {
        return Err("needs a kernel and an initramfs".into());
    };
    let begin = Instant::now();
    let (ours, theirs) = Channel::pair()?;
    let vmm = spawn_alone(options.vmm.as_ref(), &theirs, std::io::stderr().as_fd())?;
    drop(theirs);
    let mut files = vec![
        File::options().read(true).write(true).open("/dev/kvm")?,
        File::open(kernel)?,
        File::open(initramfs)?,
    ];
    if let Some(path) = &options.console {
        files.push(File::options().append(true).create(true).open(path)?);
    }
    let fds: Vec<BorrowedFd<'_>> = files.iter().map(AsFd::as_fd).collect();
    ours.send(&Request::Boot(options.config.clone()), &fds)?;
    if let Some((name, path)) = &options.share {
        let root = File::options()
            .read(true)
            .custom_flags(libc::O_PATH)
            .open(path)?;
        let request = Request::Share {
            name: name.clone(),
            read_only: false,
            exclusive: true,
        };
        ours.send(&request, &[root.as_fd()])?;
    }
    if let Some(name) = &options.nic {
        let taps = (0..options.config.queue_pairs())
            .map(|_| tap(name))
            .collect::<Result<Vec<_>, _>>()?;
        let fds: Vec<BorrowedFd<'_>> = taps.iter().map(AsFd::as_fd).collect();
        let request = Request::AttachNic {
            slot: 0,
            mac: [2, 0, 0, 0, 0, 1],
            mtu: 1500,
        };
        ours.send(&request, &fds)?;
    }
    if let Some(seconds) = options.seconds {
        let pid = vmm.pid;
        thread::spawn(move || {
            thread::sleep(Duration::from_secs(seconds));
            rustix::process::kill_process(pid, rustix::process::Signal::KILL)
        });
    }
    while let Some(Packet { message, fds }) = ours.receive::<FromVmm>()? {
        let at = begin.elapsed();
        match message {
            FromVmm::Event(Event::Connection { port }) => {
                println!("{at:?} connection to port {port}");
                ours.send(&Request::Counters, &[])?;
                for fd in fds {
                    thread::spawn(|| echo(fd));
                }
            }
            FromVmm::Event(Event::Stopped { reason, console }) => {
                println!("{at:?} stopped: {reason:?}\n{console}");
            }
            FromVmm::Reply(Reply::Counters(counters)) => {
                let since = now_ns().saturating_sub(counters.entered_ns) / 1000;
                println!("{since} us after the kernel's entry: {counters:#?}");
            }
            FromVmm::Reply(Reply::Failed(line)) => return Err(line.into()),
            FromVmm::Reply(Reply::Done) => println!("{at:?} done"),
        }
    }
    println!("{:?} {}", begin.elapsed(), vmm.wait()?);
    Ok(())
}

/// A queue of the tap `name` (Linux, Documentation/networking/tuntap.rst).
fn tap(name: &str) -> Result<File, Box<dyn Error>> {
    let tap = File::options()
        .read(true)
        .write(true)
        .custom_flags(libc::O_NONBLOCK)
        .open("/dev/net/tun")?;
    // SAFETY: the structure is plain numbers.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    for (to, from) in request.ifr_name.iter_mut().zip(name.bytes()).take(15) {
        *to = from.cast_signed();
    }
    let flags = libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR | libc::IFF_MULTI_QUEUE;
    request.ifr_ifru.ifru_flags = i16::try_from(flags)?;
    let header_len = 12;
    let offloads = libc::TUN_F_CSUM | libc::TUN_F_TSO4 | libc::TUN_F_TSO6;
    let fd = tap.as_raw_fd();
    // SAFETY: the pointers are to live values of the types that these requests take.
    let results = unsafe {
        [
            libc::ioctl(fd, libc::TUNSETIFF, &raw mut request),
            libc::ioctl(fd, libc::TUNSETVNETHDRSZ, &raw const header_len),
            libc::ioctl(fd, libc::TUNSETOFFLOAD, offloads),
        ]
    };
    if results.contains(&-1) {
        return Err(std::io::Error::last_os_error().into());
    }
    Ok(tap)
}

/// The clock of [`bulkhead_vmm_control::Counters::entered_ns`].
fn now_ns() -> u64 {
    let now = rustix::time::clock_gettime(rustix::time::ClockId::Monotonic);
    let seconds = u64::try_from(now.tv_sec).unwrap_or(0);
    seconds * 1_000_000_000 + u64::try_from(now.tv_nsec).unwrap_or(0)
}

fn echo(fd: OwnedFd) {
    let mut stream = UnixStream::from(fd);
    let mut buffer = vec![0; 64 * 1024];
    let (mut bytes, begin) = (0, Instant::now());
    while let Ok(count @ 1..) = stream.read(&mut buffer) {
        if stream.write_all(&buffer[..count]).is_err() {
            break;
        }
        bytes += count;
    }
    // The guest may be gone already.
    let _ = stream.shutdown(Shutdown::Write);
    println!("connection ended: {bytes} bytes in {:?}", begin.elapsed());
}

fn options() -> Result<Options, Box<dyn Error>> {
    let mut options = Options {
        vmm: std::env::current_exe()?.with_file_name("bulkhead-vmm"),
        config: VmConfig {
            vcpus: 1,
            memory_mib: 512,
            kernel_args: String::new(),
            fs_requests_per_second: 0,
            fs_bytes_per_second: 0,
            net_packets_per_second: 0,
            net_bytes_per_second: 0,
            console: false,
        },
        console: None,
        share: None,
        nic: None,
        seconds: None,
        files: Vec::new(),
    };
    let mut arguments = std::env::args().skip(1);
    while let Some(argument) = arguments.next() {
        if !argument.starts_with("--") {
            options.files.push(argument.into());
            continue;
        }
        let value = arguments.next().ok_or("an option without a value")?;
        match argument.as_str() {
            "--vmm" => options.vmm = value.into(),
            "--vcpus" => options.config.vcpus = value.parse()?,
            "--memory" => options.config.memory_mib = value.parse()?,
            "--args" => options.config.kernel_args = value,
            "--console" => {
                options.config.console = true;
                options.console = Some(value.into());
            }
            "--share" => {
                let (name, path) = value.split_once('=').ok_or("--share NAME=PATH")?;
                options.share = Some((name.to_owned(), path.into()));
            }
            "--nic" => options.nic = Some(value),
            "--seconds" => options.seconds = Some(value.parse()?),
            _ => return Err(format!("unknown option {argument}").into()),
        }
    }
    Ok(options)
}
