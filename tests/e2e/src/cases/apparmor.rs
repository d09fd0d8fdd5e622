//! AppArmor: a profile of the host confines a process in the guest as it would under runc.

use std::fs;
use std::process::Command;

use anyhow::{Result, ensure};

use super::failures::says;
use super::{Case, Setting, bulkhead, case};
use crate::command::{Input, Running};
use crate::ctr::{RUNC, Run};

pub fn cases() -> Vec<Case> {
    vec![
        case(
            "under containerd's AppArmor profile the same is denied as under runc",
            default_profile,
        ),
        case(
            "an AppArmor profile of the administrator's denies what it says",
            own_profile,
        ),
        case(
            "an exec'd process has the AppArmor profile of its container",
            exec,
        ),
        case(
            "an AppArmor profile that is not loaded fails the start",
            not_loaded,
        ),
        bulkhead(
            "in a pod an AppArmor profile stays what it was at first",
            replaced,
        ),
    ]
}

/// A profile in the host's kernel, taken out when dropped.
struct Profile(&'static str);

impl Profile {
    /// One that `ctr` loads.
    const DEFAULT: &str = "docker-default";

    /// Loads a profile, or another in its place.
    fn load(name: &'static str, rules: &str) -> Result<Self> {
        let text =
            format!("profile {name} flags=(attach_disconnected,mediate_deleted) {{{rules}}}");
        let mut parser = Command::new("apparmor_parser");
        parser.args(["--replace", "--skip-cache"]);
        let input = Input::From(Box::new(std::io::Cursor::new(text)));
        Running::spawn(parser, input)?.finish()?.succeeds()?;
        Ok(Self(name))
    }
}

impl Drop for Profile {
    fn drop(&mut self) {
        if let Err(error) = fs::write("/sys/kernel/security/apparmor/.remove", self.0) {
            eprintln!("AppArmor profile {} cannot be removed: {error}", self.0);
        }
    }
}

/// What a container with every capability tries, a line each. Files are opened for writing, and
/// nothing is written.
const ATTEMPTS: &str = "
    try() {
        what=$1; shift
        if said=$(\"$@\" 2>&1); then said=\"done $said\"; fi
        echo \"$what: $said\"
    }
    append() { (: >> \"$1\"); }
    try profile cat /proc/self/attr/current
    try mount mount -t tmpfs none /tmp
    try bind mount -o bind /proc /tmp
    try securityfs mount -t securityfs none /sys/kernel/security
    try policy ls -A /sys/kernel/security
    for file in /proc/sysrq-trigger /proc/sys/kernel/panic /proc/sys/kernel/shm_rmid_forced \\
        /proc/sys/vm/overcommit_memory /proc/sys/net/ipv4/ip_forward \\
        /sys/kernel/rcu_expedited /etc/passwd; do
        try \"write $file\" append $file
    done
    sleep 1000 & child=$!
    try trace readlink /proc/$child/exe
    try signal kill -KILL $child
";

/// The answers to [`ATTEMPTS`].
fn attempts(runtime: &str, flags: &[&str]) -> Result<String> {
    let run = Run::new(runtime).flags(&["--privileged"]).flags(flags);
    run.run(&["sh", "-c", ATTEMPTS])?.succeeds()
}

fn default_profile(setting: &Setting) -> Result<()> {
    let flags = ["--apparmor-default-profile", Profile::DEFAULT];
    let runc = attempts(RUNC, &flags)?;
    let _loaded = Profile(Profile::DEFAULT);
    let tested = attempts(&setting.runtime, &flags)?;
    ensure!(
        runc == tested,
        "under runc:\n{runc}under the runtime under test:\n{tested}"
    );
    let free = attempts(&setting.runtime, &[])?;
    let denied = |report: &str| report.matches("ermission denied").count();
    // The profile, and nothing else, is what denies.
    ensure!(denied(&free) == 0, "without a profile:\n{free}");
    for what in ["mount", "bind", "securityfs", "write /proc/sysrq-trigger"] {
        let line = |report: &str| {
            let found = report
                .lines()
                .find(|line| line.starts_with(&format!("{what}: ")));
            found.unwrap_or_default().to_owned()
        };
        ensure!(
            denied(&line(&tested)) == 1 && line(&free).ends_with(": done "),
            "{what}: with the profile:\n{tested}without:\n{free}"
        );
    }
    Ok(())
}

/// Everything that a shell does, apart from one file, and from other processes.
const RULES: &str = "
    file,
    capability,
    signal (receive) peer=unconfined,
    deny /etc/group r,
";

const OWN: &str = "bulkhead-e2e";

const LOOK: &str = "
    cat /proc/self/attr/current
    cat /etc/group && exit 1
    head -n 1 /etc/passwd
    sleep 1000 & readlink /proc/$!/exe && exit 2
    kill -KILL $! 2>/dev/null && exit 3
    mount -t tmpfs none /tmp 2>/dev/null && exit 4
    echo ready
";

const SEEN: &str = "bulkhead-e2e (enforce)\nroot:x:0:0:root:/root:/bin/sh\nready\n";

fn own_profile(setting: &Setting) -> Result<()> {
    let _profile = Profile::load(OWN, RULES)?;
    let container = || {
        let flags = ["--apparmor-profile", OWN, "--cap-add", "CAP_SYS_ADMIN"];
        setting.container().flags(&flags)
    };
    let seen = container().run(&["sh", "-c", LOOK])?.succeeds()?;
    ensure!(seen == SEEN, "{seen}");
    // The same with a user's rights alone, on which the profile does not depend.
    let user = ["--user", "33:33"];
    let seen = container().flags(&user).run(&["sh", "-c", LOOK])?;
    let seen = seen.succeeds()?;
    ensure!(seen == SEEN, "as a user: {seen}");
    // It is the profile's doing.
    let free = setting.container().run(&["cat", "/etc/group"])?;
    free.succeeds()?;
    Ok(())
}

fn exec(setting: &Setting) -> Result<()> {
    let _profile = Profile::load(OWN, RULES)?;
    let run = setting.container().flags(&["--apparmor-profile", OWN]);
    let container = run.detach(&["sleep", "100000"])?;
    let seen = container.exec(&[], &["sh", "-c", LOOK])?.succeeds()?;
    ensure!(seen == SEEN, "{seen}");
    // The profile lets processes without one signal it.
    let client = container.attach()?;
    container.kill("KILL")?;
    client.finish()?.exits_with(137)?;
    Ok(())
}

fn not_loaded(setting: &Setting) -> Result<()> {
    let flags = ["--apparmor-profile", "no-such-profile"];
    let done = setting.container().flags(&flags).run(&["echo", "hello"])?;
    says(&done, &["apparmor", "profile"])
}

fn replaced(setting: &Setting) -> Result<()> {
    let group = format!(
        "io.containerd.runc.v2.group=apparmor-{}",
        std::process::id()
    );
    let member = || {
        let flags = ["--annotation", &group, "--apparmor-profile", OWN];
        setting.container().flags(&flags)
    };
    let first_rules = Profile::load(OWN, RULES)?;
    let first = member().detach(&["sleep", "100000"])?;
    let second = member().run(&["sh", "-c", LOOK])?.succeeds()?;
    ensure!(second == SEEN, "in a second container: {second}");
    let _other_rules = Profile::load(OWN, "file, signal,")?;
    std::mem::forget(first_rules);
    let third = member().run(&["echo", "hello"])?;
    says(&third, &[OWN, "not replaced"])?;
    let exec = first.exec(&[], &["sh", "-c", LOOK])?.succeeds()?;
    ensure!(exec == SEEN, "in the first container: {exec}");
    // Another pod begins with the rules of now.
    let flags = ["--apparmor-profile", OWN];
    let other = setting.container().flags(&flags);
    other.run(&["cat", "/etc/group"])?.succeeds()?;
    Ok(())
}
