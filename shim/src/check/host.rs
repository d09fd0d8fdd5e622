//! What the host must have: its kernel's features, and containerd.

use std::{
    env,
    ffi::OsStr,
    fs::OpenOptions,
    io,
    process::{Command, Stdio},
    time::Duration,
};

use tokio::{io::AsyncReadExt, net::unix::pipe, time::timeout};

use super::{
    machine::{Machine, Unreadable, is_program, version},
    report::Outcome,
    with_runtime,
};
use crate::{child::Reaper, network::tap};

/// The first Linux with identity-mapped mounts of overlayfs layers.
const MIN_LINUX: (u32, u32) = (5, 19);

/// The first Linux with identity-mapped mounts of tmpfs.
const GOOD_LINUX: (u32, u32) = (6, 3);

/// The first containerd that understands what the shim answers to `start`.
const MIN_CONTAINERD: (u32, u32) = (1, 7);

/// Controllers by which pods are accounted for and limited.
const CONTROLLERS: [&str; 4] = ["cpu", "memory", "pids", "io"];

/// What the VMM's system call filter does with a call that it does not allow.
const SECCOMP_ACTIONS: [&str; 2] = ["kill_process", "trap"];

/// How long `containerd --version` may take.
const VERSION_DEADLINE: Duration = Duration::from_secs(10);

/// The most that is read of its answer, in bytes.
const MAX_ANSWER: u64 = 1024;

/// Root runs this.
pub fn root(_: &Machine) -> Result<Outcome, Unreadable> {
    Ok(match nix::unistd::geteuid().is_root() {
        true => Outcome::ok("yes"),
        false => Outcome::failed(
            "pods are started by root, so only root can try it",
            "sudo bulkhead check",
        ),
    })
}

/// The kernel is new enough.
pub fn linux(machine: &Machine) -> Result<Outcome, Unreadable> {
    let release = machine
        .read("/proc/sys/kernel/osrelease")?
        .unwrap_or_default();
    let fix = "install a kernel of 6.3 or later and reboot";
    Ok(match version(&release) {
        None => Outcome::warning(
            format!("{release:?} is no version"),
            "mount -t proc proc /proc",
        ),
        Some(found) if found < MIN_LINUX => Outcome::failed(
            format!("{release}: before 5.19 overlayfs has no identity-mapped layers"),
            fix,
        ),
        Some(found) if found < GOOD_LINUX => Outcome::warning(
            format!("{release}: before 6.3 volumes on tmpfs have no identity-mapped mounts"),
            fix,
        ),
        Some(_) => Outcome::ok(release),
    })
}

/// cgroup v2 is mounted, with the controllers that are used.
pub fn cgroup(machine: &Machine) -> Result<Outcome, Unreadable> {
    let Some(available) = machine.read("/sys/fs/cgroup/cgroup.controllers")? else {
        return Ok(Outcome::failed(
            "/sys/fs/cgroup is no cgroup v2 hierarchy",
            "boot with systemd.unified_cgroup_hierarchy=1 on the kernel's command line",
        ));
    };
    let missing = missing(&available, &CONTROLLERS);
    Ok(if missing.is_empty() {
        Outcome::ok(CONTROLLERS.join(", "))
    } else {
        Outcome::failed(
            format!("controllers are missing: {}", missing.join(", ")),
            "unmount every cgroup v1 hierarchy, remove cgroup_disable= from the kernel's command \
             line (some kernels need cgroup_enable=memory there), and reboot",
        )
    })
}

fn missing(words: &str, needed: &[&'static str]) -> Vec<&'static str> {
    needed
        .iter()
        .filter(|needed| !words.split_whitespace().any(|word| word == **needed))
        .copied()
        .collect()
}

/// Root may make user namespaces.
pub fn user_namespaces(machine: &Machine) -> Result<Outcome, Unreadable> {
    let most = machine.read("/proc/sys/user/max_user_namespaces")?;
    Ok(match most.as_deref() {
        None => Outcome::failed(
            "the kernel has none",
            "use a kernel with CONFIG_USER_NS=y, as distributions' are",
        ),
        Some("0") => Outcome::failed(
            "user.max_user_namespaces is 0",
            "sysctl -w user.max_user_namespaces=10000, and the same in a file of /etc/sysctl.d",
        ),
        Some(most) => Outcome::ok(format!("up to {most}")),
    })
}

/// The kernel filters system calls in the way that the VMM needs.
pub fn seccomp(machine: &Machine) -> Result<Outcome, Unreadable> {
    let available = machine.read("/proc/sys/kernel/seccomp/actions_avail")?;
    let missing = missing(&available.unwrap_or_default(), &SECCOMP_ACTIONS);
    Ok(if missing.is_empty() {
        Outcome::ok(SECCOMP_ACTIONS.join(", "))
    } else {
        Outcome::failed(
            format!("filters cannot {}", missing.join(", ")),
            "use a kernel with CONFIG_SECCOMP_FILTER=y, as distributions' are",
        )
    })
}

/// The kernel has Landlock, the second lock on the VMM's file accesses.
pub fn landlock(machine: &Machine) -> Result<Outcome, Unreadable> {
    let modules = machine.read("/sys/kernel/security/lsm")?;
    Ok(match modules {
        None => Outcome::warning(
            "nobody can tell: /sys/kernel/security is not mounted",
            "mount -t securityfs securityfs /sys/kernel/security",
        ),
        Some(modules) if modules.split(',').any(|name| name == "landlock") => {
            Outcome::ok("enabled")
        }
        Some(modules) => Outcome::warning(
            format!("not among the security modules: {modules}"),
            format!("boot with lsm=landlock,{modules} on the kernel's command line"),
        ),
    })
}

/// Pods can have network interfaces.
pub fn tun(machine: &Machine) -> Result<Outcome, Unreadable> {
    let opened = OpenOptions::new()
        .read(true)
        .write(true)
        .open(machine.path(tap::DEVICE));
    Ok(match opened {
        Ok(_) => Outcome::ok("it opens"),
        Err(error) => {
            let detail = format!("Cannot open {}: {error}", tap::DEVICE);
            let fix = match error.kind() {
                io::ErrorKind::PermissionDenied => "sudo bulkhead check",
                _ => "modprobe tun, and the line tun in a file of /etc/modules-load.d",
            };
            Outcome::failed(detail, fix)
        }
    })
}

/// There is a containerd that knows how to use the shim.
pub fn containerd(_: &Machine) -> Result<Outcome, Unreadable> {
    let path = env::var_os("PATH").unwrap_or_default();
    let Some(program) = on_path(&path, "containerd") else {
        return Ok(Outcome::warning(
            "not on the PATH: nothing is there to start pods",
            "install containerd 1.7 or later (Debian: apt install containerd)",
        ));
    };
    let mut command = Command::new(&program);
    command.arg("--version");
    let answer = with_runtime(async |reaper| output(command, &reaper, VERSION_DEADLINE).await);
    Ok(match answer.and_then(|answer| answer) {
        Ok(answer) => judge_containerd(&answer),
        Err(error) => Outcome::warning(
            format!("{} --version does not answer: {error}", program.display()),
            "see that containerd starts: systemctl status containerd",
        ),
    })
}

fn on_path(path: &OsStr, name: &str) -> Option<std::path::PathBuf> {
    env::split_paths(path)
        .map(|directory| directory.join(name))
        .find(|path| is_program(path))
}

/// `answer` is "containerd", where it was built from, version and commit.
fn judge_containerd(answer: &str) -> Outcome {
    let word = answer
        .split_whitespace()
        .find(|word| version(word.trim_start_matches('v')).is_some());
    let fix = "install containerd 1.7 or later";
    match word.and_then(|word| Some((word, version(word.trim_start_matches('v'))?))) {
        None => Outcome::warning(format!("it tells no version: {answer}"), fix),
        Some((word, found)) if found < MIN_CONTAINERD => {
            Outcome::failed(format!("{word} is too old"), fix)
        }
        Some((word, _)) => Outcome::ok(word),
    }
}

/// The beginning of what a command prints. It is killed when that takes too long.
async fn output(mut command: Command, reaper: &Reaper, deadline: Duration) -> io::Result<String> {
    let (ours, theirs) = io::pipe()?;
    command
        .stdin(Stdio::null())
        .stdout(theirs)
        .stderr(Stdio::null());
    let child = reaper.spawn(&mut command)?;
    // It holds the other end of the pipe.
    drop(command);
    let ours = pipe::Receiver::from_owned_fd(ours.into())?;
    let mut bytes = Vec::new();
    let listen = async {
        ours.take(MAX_ANSWER).read_to_end(&mut bytes).await?;
        Ok(child.exited().await)
    };
    match timeout(deadline, listen).await {
        Ok(Ok(0)) => Ok(String::from_utf8_lossy(&bytes).into_owned()),
        Ok(Ok(code)) => Err(io::Error::other(format!("exit status {code}"))),
        Ok(Err(error)) => Err(error),
        Err(_) => Err(io::ErrorKind::TimedOut.into()),
    }
}

/// Whether the host is a virtual machine itself.
pub fn hardware(machine: &Machine) -> Result<Outcome, Unreadable> {
    Ok(Outcome::ok(match machine.has_cpu_flag("hypervisor")? {
        true => "a virtual machine: pods are nested, which makes every exit of a guest slower",
        false => "hardware",
    }))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::check::report::Verdict;

    /// What `check` says of a machine where this file has these contents.
    fn verdict(
        check: fn(&Machine) -> Result<Outcome, Unreadable>,
        path: &str,
        text: &str,
    ) -> Verdict {
        let (_directory, machine) = Machine::of(&[(path, text)]);
        let outcome = check(&machine).unwrap();
        assert_eq!(outcome.fix.is_none(), outcome.verdict == Verdict::Ok);
        outcome.verdict
    }

    #[test]
    fn kernels_are_judged_by_their_version() {
        for (release, expected) in [
            ("6.12.43+deb13-cloud-amd64\n", Verdict::Ok),
            ("6.3.0\n", Verdict::Ok),
            ("6.2.16-20-pve\n", Verdict::Warning),
            ("5.19.0-50-generic\n", Verdict::Warning),
            ("5.15.0-112-generic\n", Verdict::Failed),
            ("4.18.0-553.el8\n", Verdict::Failed),
        ] {
            let found = verdict(linux, "/proc/sys/kernel/osrelease", release);
            assert_eq!(found, expected, "{release}");
        }
    }

    #[test]
    fn missing_controllers_are_named() {
        let path = "/sys/fs/cgroup/cgroup.controllers";
        let all = "cpuset cpu io memory hugetlb pids rdma misc\n";
        assert_eq!(verdict(cgroup, path, all), Verdict::Ok);
        // Hybrid: some controllers are in v1.
        let (_directory, machine) = Machine::of(&[(path, "cpuset hugetlb memory pids\n")]);
        let outcome = cgroup(&machine).unwrap();
        assert_eq!(outcome.verdict, Verdict::Failed);
        assert!(outcome.detail.ends_with(": cpu, io"), "{outcome:?}");
        // v1 only.
        let elsewhere = "/sys/fs/cgroup/memory/tasks";
        assert_eq!(verdict(cgroup, elsewhere, ""), Verdict::Failed);
    }

    #[test]
    fn features_of_the_kernel_are_recognized() {
        let path = "/proc/sys/user/max_user_namespaces";
        assert_eq!(verdict(user_namespaces, path, "63432\n"), Verdict::Ok);
        assert_eq!(verdict(user_namespaces, path, "0\n"), Verdict::Failed);
        assert_eq!(verdict(user_namespaces, "/proc/x", ""), Verdict::Failed);

        let path = "/proc/sys/kernel/seccomp/actions_avail";
        let all = "kill_process kill_thread trap errno user_notif trace log allow\n";
        assert_eq!(verdict(seccomp, path, all), Verdict::Ok);
        let old = "kill_thread trap errno trace log allow\n";
        assert_eq!(verdict(seccomp, path, old), Verdict::Failed);
        assert_eq!(verdict(seccomp, "/proc/x", ""), Verdict::Failed);

        let path = "/sys/kernel/security/lsm";
        let with = "lockdown,capability,landlock,yama,apparmor";
        assert_eq!(verdict(landlock, path, with), Verdict::Ok);
        assert_eq!(verdict(landlock, path, "capability,yama"), Verdict::Warning);
        assert_eq!(verdict(landlock, "/sys/x", ""), Verdict::Warning);
    }

    #[test]
    fn a_missing_tun_is_told() {
        assert_eq!(verdict(tun, tap::DEVICE, ""), Verdict::Ok);
        let (_directory, machine) = Machine::of(&[("/dev/null", "")]);
        let outcome = tun(&machine).unwrap();
        assert_eq!(outcome.verdict, Verdict::Failed);
        assert!(outcome.fix.unwrap().starts_with("modprobe tun"));
    }

    #[test]
    fn containerds_answer_is_understood() {
        for (answer, expected) in [
            (
                "containerd containerd.io 1.7.24 88bf19b2105c8b17560993bee28a01ddc2f97182\n",
                "1.7.24",
            ),
            (
                "containerd github.com/containerd/containerd v1.7.12 71909c1814c5\n",
                "v1.7.12",
            ),
            (
                "containerd github.com/containerd/containerd/v2 2.1.3 ~ds1\n",
                "2.1.3",
            ),
        ] {
            assert_eq!(judge_containerd(answer), Outcome::ok(expected));
        }
        let old = judge_containerd("containerd github.com/containerd/containerd 1.6.20~ds1 1.6\n");
        assert_eq!(old.verdict, Verdict::Failed);
        assert_eq!(judge_containerd("").verdict, Verdict::Warning);
    }

    #[test]
    fn a_program_is_found_on_the_path() {
        let (_directory, machine) = Machine::of(&[("/a/tool", ""), ("/b/tool", "")]);
        let path = env::join_paths([machine.path("/a"), machine.path("/b")]).unwrap();
        assert_eq!(on_path(&path, "tool"), None);
        let tool = machine.path("/b/tool");
        let mode = std::os::unix::fs::PermissionsExt::from_mode(0o755);
        std::fs::set_permissions(&tool, mode).unwrap();
        assert_eq!(on_path(&path, "tool"), Some(tool));
    }

    #[tokio::test]
    async fn output_is_waited_for_under_a_deadline() {
        let reaper = Reaper::start().unwrap();
        let shell = |script| {
            let mut command = Command::new("sh");
            command.args(["-c", script]);
            command
        };
        let long = Duration::from_secs(60);
        let said = output(shell("echo 1.7"), &reaper, long).await.unwrap();
        assert_eq!(said, "1.7\n");
        let error = output(shell("exit 3"), &reaper, long).await.unwrap_err();
        assert!(error.to_string().contains("status 3"), "{error}");
        let short = Duration::from_millis(50);
        let error = output(shell("exec sleep 1000"), &reaper, short)
            .await
            .unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::TimedOut);
    }
}
