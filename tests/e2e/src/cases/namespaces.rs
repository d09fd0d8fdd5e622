//! Namespaces that containers share, user namespaces, and volumes with mapped ids.

use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt, chown};

use anyhow::{Result, ensure};

use super::{Case, Setting, bulkhead, case};

pub fn cases() -> Vec<Case> {
    vec![
        case("a container joins another one's namespaces", joined),
        case(
            "root of a user namespace is somebody else on the disk",
            remapped,
        ),
        // Debian 13's runc takes the option for the file system's and ignores it.
        bulkhead("a volume shows its files by a user namespace's ids", mapped),
    ]
}

fn joined(setting: &Setting) -> Result<()> {
    let first = setting
        .container()
        .flags(&["--hostname", "first"])
        .detach(&["sleep", "4711"])?;
    let group = format!("io.containerd.runc.v2.group={}", first.id());
    let pid = first.pid()?;
    let mut flags = vec!["--annotation".to_owned(), group];
    let kinds = [
        ("pid", "pid"),
        ("ipc", "ipc"),
        ("uts", "uts"),
        ("network", "net"),
    ];
    for (kind, file) in kinds {
        flags.extend([
            "--with-ns".to_owned(),
            format!("{kind}:/proc/{pid}/ns/{file}"),
        ]);
    }
    let flags: Vec<_> = flags.iter().map(String::as_str).collect();
    let links = "for kind in pid ipc uts net mnt; do readlink /proc/self/ns/$kind; done";
    let script = format!("hostname; tr '\\0' ' ' < /proc/1/cmdline; echo; {links}");
    let second = setting.container().flags(&flags);
    let found = second.run(&["sh", "-c", &script])?.succeeds()?;
    ensure!(found.starts_with("first\nsleep 4711 \n"), "{found}");
    let of_first = first.exec(&[], &["sh", "-c", links])?.succeeds()?;
    let own: Vec<_> = found.lines().skip(2).collect();
    let others: Vec<_> = of_first.lines().collect();
    ensure!(
        own.len() == 5 && own[..4] == others[..4],
        "{own:?} and {others:?}"
    );
    ensure!(own[4] != others[4], "the mount namespace is its own");
    first.kill("KILL")
}

const MAP: [&str; 4] = ["--uidmap", "0:100000:65536", "--gidmap", "0:100000:65536"];

/// Owner of a file on the host, and what a container prints of it.
fn volume_of(setting: &Setting, options: &str) -> Result<((u32, u32), String)> {
    let volume = tempfile::tempdir()?;
    let path = volume.path();
    fs::set_permissions(path, fs::Permissions::from_mode(0o777))?;
    fs::write(path.join("file"), "")?;
    chown(path.join("file"), Some(5), Some(6))?;
    let mount = format!("type=bind,src={},dst=/v,options={options}", path.display());
    let script = "id -u; stat -c '%u %g' /v/file; touch /v/made; stat -c '%u %g' /v/made";
    let run = setting.container().flags(&MAP).flags(&["--mount", &mount]);
    let found = run.run(&["sh", "-c", script])?.succeeds()?;
    let made = fs::metadata(path.join("made"))?;
    Ok(((made.uid(), made.gid()), found))
}

fn remapped(setting: &Setting) -> Result<()> {
    let (owner, found) = volume_of(setting, "rbind")?;
    ensure!(found == "0\n65534 65534\n0 0\n", "{found}");
    ensure!(owner == (100_000, 100_000), "{owner:?}");
    Ok(())
}

fn mapped(setting: &Setting) -> Result<()> {
    let (owner, found) = volume_of(setting, "rbind:idmap")?;
    ensure!(found == "0\n5 6\n0 0\n", "{found}");
    ensure!(owner == (0, 0), "{owner:?}");
    Ok(())
}
