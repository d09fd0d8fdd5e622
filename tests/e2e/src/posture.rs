//! What each process of a pod is on the host: one table, which a test compares with the processes of
//! a running pod, and which docs/security.md shows.

use std::collections::BTreeSet;
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};

use crate::host::read;

/// One property of a process.
pub struct Row {
    /// What it is.
    what: &'static str,
    /// What it must be.
    expected: &'static str,
    /// Finds out what it is.
    look: fn(&Target) -> Result<String>,
}

/// One of a pod's processes.
pub struct Target {
    pid: i32,
}

const fn row(
    what: &'static str,
    expected: &'static str,
    look: fn(&Target) -> Result<String>,
) -> Row {
    Row {
        what,
        expected,
        look,
    }
}

const FILE_SERVER: &str = "chown dac_override fowner fsetid setgid setuid setfcap";
const NONE: &str = "none";

/// `bulkhead-vmm`
pub const VMM: &[Row] = &[
    row("user ids", "0 to 262143 are the pod's own", |t| {
        t.ids("uid_map")
    }),
    row("group ids", "0 to 262143 are the pod's own", |t| {
        t.ids("gid_map")
    }),
    row("user", "0 of the pod's own", |t| t.user("Uid")),
    row("group", "0 of the pod's own", |t| t.user("Gid")),
    row("other groups", NONE, |t| t.groups()),
    row("capabilities, effective", FILE_SERVER, |t| {
        t.capabilities("CapEff")
    }),
    row("capabilities, permitted", FILE_SERVER, |t| {
        t.capabilities("CapPrm")
    }),
    row("capabilities, bounding", FILE_SERVER, |t| {
        t.capabilities("CapBnd")
    }),
    row("capabilities, inheritable", NONE, |t| {
        t.capabilities("CapInh")
    }),
    row("capabilities, ambient", NONE, |t| t.capabilities("CapAmb")),
    row("no_new_privs", "1", |t| t.status("NoNewPrivs")),
    row("system call filters of each thread", "2", Target::filters),
    row("readable by its own user", "no", Target::readable),
    row(
        "namespaces of its own",
        "cgroup ipc mnt net pid time user uts",
        Target::namespaces,
    ),
    row("PID in its namespace", "1", Target::inner_pid),
    row("root directory", "empty, read-only", Target::root),
    row("mounts", "1", Target::mounts),
    row("environment", "empty", Target::environment),
    row(
        "descriptors",
        "/dev/null eventfd eventpoll kvm-vcpu kvm-vcpu-stats kvm-vm pipe shares socket",
        Target::descriptors,
    ),
    row("open files", "1048576", |t| t.limit("Max open files")),
    row("size of a file", "17592186044416", |t| {
        t.limit("Max file size")
    }),
    row("size of a core dump", "0", |t| {
        t.limit("Max core file size")
    }),
    row("locked memory", "0", |t| t.limit("Max locked memory")),
    row("cgroup", "vmm, in the container's", |t| t.cgroup()),
    row("memory", "1342177280", |t| t.cgroup_limit("memory.max")),
    row("processes and threads", "21", |t| {
        t.cgroup_limit("pids.max")
    }),
];

/// `bulkhead-anchor`
pub const ANCHOR: &[Row] = &[
    row("capabilities, effective", NONE, |t| {
        t.capabilities("CapEff")
    }),
    row("capabilities, permitted", NONE, |t| {
        t.capabilities("CapPrm")
    }),
    row("capabilities, bounding", NONE, |t| t.capabilities("CapBnd")),
    row("capabilities, inheritable", NONE, |t| {
        t.capabilities("CapInh")
    }),
    row("capabilities, ambient", NONE, |t| t.capabilities("CapAmb")),
    row("no_new_privs", "1", |t| t.status("NoNewPrivs")),
    row("namespaces of its own", "mnt net", Target::namespaces),
    row("root directory", "empty, read-only", Target::root),
    row("mounts", "1", Target::mounts),
    row("environment", "empty", Target::environment),
    row(
        "descriptors",
        "/dev/null signalfd socket",
        Target::descriptors,
    ),
    row("cgroup", "anchors, in the container's", |t| t.cgroup()),
];

/// `containerd-shim-bulkhead-v2`
pub const SHIM: &[Row] = &[
    row(
        "capabilities, effective",
        "chown dac_override dac_read_search fowner fsetid kill setgid setuid net_admin sys_admin sys_resource setfcap",
        |t| t.capabilities("CapEff"),
    ),
    row(
        "capabilities, permitted",
        "chown dac_override dac_read_search fowner fsetid kill setgid setuid net_admin sys_ptrace sys_admin sys_resource setfcap",
        |t| t.capabilities("CapPrm"),
    ),
    row("capabilities, inheritable", NONE, |t| {
        t.capabilities("CapInh")
    }),
    row("capabilities, ambient", NONE, |t| t.capabilities("CapAmb")),
];

/// The names of linux/capability.h, by number.
const CAPABILITIES: [&str; 41] = [
    "chown",
    "dac_override",
    "dac_read_search",
    "fowner",
    "fsetid",
    "kill",
    "setgid",
    "setuid",
    "setpcap",
    "linux_immutable",
    "net_bind_service",
    "net_broadcast",
    "net_admin",
    "net_raw",
    "ipc_lock",
    "ipc_owner",
    "sys_module",
    "sys_rawio",
    "sys_chroot",
    "sys_ptrace",
    "sys_pacct",
    "sys_admin",
    "sys_boot",
    "sys_nice",
    "sys_resource",
    "sys_time",
    "sys_tty_config",
    "mknod",
    "lease",
    "audit_write",
    "audit_control",
    "setfcap",
    "mac_override",
    "mac_admin",
    "syslog",
    "wake_alarm",
    "block_suspend",
    "audit_read",
    "perfmon",
    "bpf",
    "checkpoint_restore",
];

/// The ids that are set aside by default.
const FIRST_ID: u32 = 0x7000_0000;
const IDS_PER_POD: u32 = 0x4_0000;

/// Compares a process with its table; names every difference.
pub fn compare(who: &str, pid: i32, rows: &[Row]) -> Result<()> {
    let target = Target { pid };
    let mut differences = Vec::new();
    for row in rows {
        let found = (row.look)(&target).unwrap_or_else(|error| format!("{error:#}"));
        if found != row.expected {
            differences.push(format!(
                "{}: {found:?} instead of {:?}",
                row.what, row.expected
            ));
        }
    }
    ensure!(
        differences.is_empty(),
        "{who} is not as docs/security.md says:\n  {}",
        differences.join("\n  ")
    );
    Ok(())
}

/// The first of the host's ids that the process has for its own.
pub fn first_id(pid: i32) -> Result<u32> {
    Target { pid }.first_id("uid_map")
}

impl Target {
    fn path(&self, file: &str) -> PathBuf {
        format!("/proc/{}/{file}", self.pid).into()
    }

    fn status(&self, key: &str) -> Result<String> {
        let text = read(&self.path("status"))?;
        let value = text
            .lines()
            .find_map(|line| line.strip_prefix(key)?.strip_prefix(':'));
        Ok(value
            .with_context(|| format!("no {key}"))?
            .trim()
            .to_owned())
    }

    fn first_id(&self, map: &str) -> Result<u32> {
        let text = read(&self.path(map))?;
        let fields: Vec<u32> = text
            .split_whitespace()
            .map(str::parse)
            .collect::<Result<_, _>>()?;
        let [0, first, IDS_PER_POD] = fields[..] else {
            anyhow::bail!("{map} is {text:?}");
        };
        ensure!(
            first >= FIRST_ID && (first - FIRST_ID).is_multiple_of(IDS_PER_POD),
            "{map} begins at {first}"
        );
        Ok(first)
    }

    fn ids(&self, map: &str) -> Result<String> {
        self.first_id(map)?;
        Ok("0 to 262143 are the pod's own".to_owned())
    }

    /// The real, effective, saved and file system id.
    fn user(&self, key: &str) -> Result<String> {
        let first = self.first_id("uid_map")?.to_string();
        let ids = self.status(key)?;
        ensure!(ids.split_whitespace().all(|id| id == first), "{ids}");
        Ok("0 of the pod's own".to_owned())
    }

    fn groups(&self) -> Result<String> {
        Ok(or_none(self.status("Groups")?))
    }

    fn capabilities(&self, set: &str) -> Result<String> {
        let bits = u64::from_str_radix(&self.status(set)?, 16)?;
        let names: Vec<_> = (0..u64::BITS)
            .filter(|bit| bits & (1 << bit) != 0)
            .map(|bit| CAPABILITIES.get(bit as usize).copied().unwrap_or("unknown"))
            .collect();
        Ok(or_none(names.join(" ")))
    }

    /// What every thread has, but those that KVM adds, which never run a program.
    fn filters(&self) -> Result<String> {
        let mut counts = BTreeSet::new();
        for task in fs::read_dir(self.path("task"))? {
            let task = task?.path();
            if read(&task.join("comm"))?.starts_with("kvm-nx-lpage") {
                continue;
            }
            let status = read(&task.join("status"))?;
            let count = status
                .lines()
                .find_map(|line| line.strip_prefix("Seccomp_filters:"));
            counts.insert(count.context("no Seccomp_filters")?.trim().to_owned());
        }
        Ok(counts.into_iter().collect::<Vec<_>>().join(" "))
    }

    /// Whether a process of the same user could look into it: the files of one that is not dumpable
    /// are root's (proc_pid(5)).
    fn readable(&self) -> Result<String> {
        let owner = fs::metadata(self.path("maps"))?.uid();
        Ok(if owner == 0 { "no" } else { "yes" }.to_owned())
    }

    fn namespaces(&self) -> Result<String> {
        let mut own = BTreeSet::new();
        for entry in fs::read_dir("/proc/self/ns")? {
            let name = entry?.file_name();
            let file = format!("ns/{}", name.display());
            let hosts = fs::read_link(Path::new("/proc/self").join(&file))?;
            // Those for children are the same unless they are about to change.
            if fs::read_link(self.path(&file))? != hosts && !file.ends_with("_for_children") {
                own.insert(name.display().to_string());
            }
        }
        Ok(own.into_iter().collect::<Vec<_>>().join(" "))
    }

    fn inner_pid(&self) -> Result<String> {
        let pids = self.status("NSpid")?;
        Ok(pids
            .split_whitespace()
            .last()
            .unwrap_or_default()
            .to_owned())
    }

    fn root(&self) -> Result<String> {
        let entries = fs::read_dir(self.path("root"))?.count();
        ensure!(entries == 0, "{entries} entries");
        let mounts = read(&self.path("mountinfo"))?;
        let root = mounts.lines().last().unwrap_or_default();
        let options = root.split(' ').nth(5).unwrap_or_default();
        ensure!(options.split(',').any(|option| option == "ro"), "{root}");
        Ok("empty, read-only".to_owned())
    }

    fn mounts(&self) -> Result<String> {
        Ok(read(&self.path("mountinfo"))?.lines().count().to_string())
    }

    fn environment(&self) -> Result<String> {
        let environment = fs::read(self.path("environ"))?;
        ensure!(environment.is_empty(), "{} bytes", environment.len());
        Ok("empty".to_owned())
    }

    /// The kinds of its descriptors. What has a path must be in a mount that is attached nowhere.
    fn descriptors(&self) -> Result<String> {
        let hosts: BTreeSet<String> = read(Path::new("/proc/self/mountinfo"))?
            .lines()
            .filter_map(|line| Some(line.split_once(' ')?.0.to_owned()))
            .collect();
        let mut kinds = BTreeSet::new();
        for entry in fs::read_dir(self.path("fd"))? {
            let number = entry?.file_name();
            let number = number.to_string_lossy();
            // It may have been closed meanwhile.
            let Ok(link) = fs::read_link(self.path(&format!("fd/{number}"))) else {
                continue;
            };
            let link = link.to_string_lossy().into_owned();
            let kind = if let Some(inode) = link.strip_prefix("anon_inode:") {
                inode
                    .split(':')
                    .next()
                    .unwrap_or_default()
                    .trim_matches(['[', ']'])
            } else if ["/dev/null", "/dev/net/tun"].contains(&link.as_str()) {
                link.as_str()
            } else if link.starts_with('/') {
                let mount = self.mount_of(&number)?;
                ensure!(!hosts.contains(&mount), "{link} is a file of the host");
                "shares"
            } else {
                link.split(':').next().unwrap_or_default()
            };
            kinds.insert(kind.to_owned());
        }
        Ok(kinds.into_iter().collect::<Vec<_>>().join(" "))
    }

    fn mount_of(&self, descriptor: &str) -> Result<String> {
        let text = read(&self.path(&format!("fdinfo/{descriptor}")))?;
        let id = text.lines().find_map(|line| line.strip_prefix("mnt_id:"));
        Ok(id.context("no mnt_id")?.trim().to_owned())
    }

    /// A resource limit, which is both soft and hard.
    fn limit(&self, name: &str) -> Result<String> {
        let text = read(&self.path("limits"))?;
        let line = text.lines().find_map(|line| line.strip_prefix(name));
        let mut values = line.context("no such limit")?.split_whitespace();
        let (soft, hard) = (values.next(), values.next());
        ensure!(soft == hard, "{soft:?} is not {hard:?}");
        Ok(soft.unwrap_or_default().to_owned())
    }

    fn cgroup_path(&self) -> Result<PathBuf> {
        let text = read(&self.path("cgroup"))?;
        let path = text.trim_end().strip_prefix("0::/");
        Ok(Path::new("/sys/fs/cgroup").join(path.context("not in a v2 hierarchy")?))
    }

    fn cgroup(&self) -> Result<String> {
        let path = self.cgroup_path()?;
        let name = path.file_name().context("in the root")?;
        Ok(format!("{}, in the container's", name.display()))
    }

    fn cgroup_limit(&self, file: &str) -> Result<String> {
        Ok(read(&self.cgroup_path()?.join(file))?.trim_end().to_owned())
    }
}

fn or_none(text: String) -> String {
    if text.is_empty() {
        NONE.to_owned()
    } else {
        text
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The tables as docs/security.md shows them.
    fn markdown() -> String {
        let mut text = String::new();
        for (process, rows) in [
            ("`bulkhead-vmm`", VMM),
            ("`bulkhead-anchor`", ANCHOR),
            ("`containerd-shim-bulkhead-v2`", SHIM),
        ] {
            text.push_str(&format!("| {process} | |\n|---|---|\n"));
            for row in rows {
                text.push_str(&format!("| {} | {} |\n", row.what, row.expected));
            }
            text.push('\n');
        }
        text
    }

    #[test]
    fn the_documentation_shows_these_tables() {
        let document = include_str!("../../../docs/security.md");
        let tables = markdown();
        assert!(
            document.contains(tables.trim_end()),
            "docs/security.md should contain:\n{tables}"
        );
    }

    /// What follows an opening bracket at the beginning of an entry.
    fn attempts(source: &str) -> Vec<&str> {
        let list = source.split("pub const ATTEMPTS").nth(1).unwrap();
        list.split('(')
            .filter_map(|entry| entry.trim_start().strip_prefix('"')?.split_once("\","))
            .filter(|(_, rest)| rest.trim_start().starts_with("||"))
            .map(|(name, _)| name)
            .collect()
    }

    #[test]
    fn the_documentation_lists_every_attempt_to_break_out() {
        let attempts = attempts(include_str!("../../../vmm/src/back_door.rs"));
        assert!(attempts.len() > 50, "{attempts:?}");
        let document = include_str!("../../../docs/security.md");
        for attempt in attempts {
            assert!(document.contains(&format!("\n- {attempt}\n")), "{attempt}");
        }
    }
}
