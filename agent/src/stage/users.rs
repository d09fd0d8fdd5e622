//! Users and groups by the container's own `/etc/passwd` and `/etc/group`, passwd(5), group(5).

use std::{
    ffi::OsStr,
    fs::File,
    io::{self, Read},
    os::unix::ffi::OsStrExt,
    path::Path,
};

use rustix::fs::OFlags;

use super::root::Root;

/// How much of a file is looked through.
const FILE_MAX: u64 = 4 << 20;

/// A line of `/etc/passwd`.
#[derive(Debug, PartialEq, Eq)]
pub struct User {
    /// Number of the user.
    pub uid: u32,
    /// Number of its own group.
    pub gid: u32,
    /// Its home directory, if it has one.
    pub home: Option<String>,
}

/// Home directory of a user; `/` if nothing says otherwise.
pub fn home(uid: u32) -> String {
    let passwd = read("/etc/passwd").unwrap_or_default();
    let user = find_user(&passwd, |_, number| number == uid.to_string().as_bytes());
    user.and_then(|user| user.home)
        .unwrap_or_else(|| "/".to_owned())
}

/// The user of that name.
pub fn by_name(name: &str) -> io::Result<Option<User>> {
    let passwd = read("/etc/passwd")?;
    Ok(find_user(&passwd, |candidate, _| {
        candidate == name.as_bytes()
    }))
}

/// The groups that list a user among their members.
pub fn groups_of(name: &str) -> io::Result<Vec<u32>> {
    Ok(find_groups(&read("/etc/group")?, name))
}

/// A file of this process's root; empty if there is none.
fn read(path: &str) -> io::Result<Vec<u8>> {
    // Not blocking, as it might be a FIFO.
    let flags = OFlags::RDONLY | OFlags::NONBLOCK | OFlags::NOCTTY;
    let file = match Root::own()?.open(Path::new(path), flags) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        file => File::from(file?),
    };
    let mut text = Vec::new();
    if file.metadata()?.is_file() {
        file.take(FILE_MAX).read_to_end(&mut text)?;
    }
    Ok(text)
}

/// The first whole line whose name and number are wanted.
fn find_user(passwd: &[u8], wanted: impl Fn(&[u8], &[u8]) -> bool) -> Option<User> {
    lines(passwd).find_map(|fields| {
        let [name, _, uid, gid, _, home, ..] = fields.as_slice() else {
            return None;
        };
        if !wanted(name, uid) {
            return None;
        }
        let home = OsStr::from_bytes(home).to_str().filter(|it| !it.is_empty());
        Some(User {
            uid: number(uid)?,
            gid: number(gid)?,
            home: home.map(str::to_owned),
        })
    })
}

fn find_groups(group: &[u8], user: &str) -> Vec<u32> {
    let groups = lines(group).filter_map(|fields| {
        let [_, _, gid, members] = fields.as_slice() else {
            return None;
        };
        let mut members = members.split(|byte| *byte == b',');
        members.find(|member| *member == user.as_bytes())?;
        number(gid)
    });
    groups.collect()
}

fn lines(text: &[u8]) -> impl Iterator<Item = Vec<&[u8]>> {
    let lines = text.split(|byte| *byte == b'\n');
    lines.map(|line| line.split(|byte| *byte == b':').collect())
}

fn number(field: &[u8]) -> Option<u32> {
    std::str::from_utf8(field).ok()?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    const PASSWD: &[u8] =
        b"root:x:0:0:root:/root:/bin/sh\nbad line\nu:x:1000:100::/home/u:/bin/sh\ne:x:5:6:::\n";

    fn named(name: &str) -> Option<User> {
        find_user(PASSWD, |candidate, _| candidate == name.as_bytes())
    }

    #[test]
    fn users_are_found_by_name_and_number() {
        let user = User {
            uid: 1000,
            gid: 100,
            home: Some("/home/u".into()),
        };
        assert_eq!(named("u"), Some(user));
        assert_eq!(
            named("e").map(|user| (user.gid, user.home)),
            Some((6, None))
        );
        assert_eq!(named("bad line"), None);
        assert_eq!(named("nobody"), None);
        let root = find_user(PASSWD, |_, number| number == b"0");
        assert_eq!(root.and_then(|user| user.home).as_deref(), Some("/root"));
    }

    #[test]
    fn groups_are_those_with_the_user_in_them() {
        let group = b"root:x:0:\nwheel:x:10:a,u\nusers:x:100:uu,b\nlast:x:20:u\nbroken:x:u\n";
        assert_eq!(find_groups(group, "u"), [10, 20]);
        assert_eq!(find_groups(group, "c"), [0; 0]);
    }
}
