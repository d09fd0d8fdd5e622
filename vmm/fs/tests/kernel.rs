//! The file server under a real kernel: the host's own FUSE client over `/dev/fuse`, compared with a
//! plain directory. Needs root, and does nothing where there is no `/dev/fuse`.
#![allow(missing_docs, reason = "the names of the tests say it")]

mod guest;

use std::{
    fs::{self, File},
    io::{ErrorKind, Read, Write},
    os::fd::AsRawFd,
    path::Path,
    process::Command,
};

use guest::{EXCLUSIVE, SHARED};
use nix::{
    mount::{MntFlags, MsFlags, mount, umount2},
    sched::{CloneFlags, unshare},
};
use vm_memory::VolatileSlice;

/// What a container does to its root file system. Prints everything that should be the same.
const SCRIPT: &str = r#"
set -eu
export LC_ALL=C
as() { setpriv --reuid "$1" --regid "$2" --clear-groups -- sh -c "$3"; }
umask 022
mkdir -m 1777 tmp; mkdir -m 2770 group; chgrp 3000 group; mkdir plain; chmod 777 plain
# Ownership, umask, group inheritance, sticky directories.
as 1000 1000 'umask 077; echo mine > tmp/mine; mkdir tmp/dir; ln -s /etc/passwd tmp/out; mkfifo tmp/pipe'
as 1001 1001 'rm -f tmp/mine 2>/dev/null && echo removed || echo sticky'
as 1001 1001 'cat tmp/mine 2>/dev/null && echo read || echo private'
as 1000 3000 'umask 002; echo x > group/file; mkdir group/sub'
as 1001 1001 'ls group >/dev/null 2>&1 && echo in || echo out'
# Set-user-ID goes with a write by somebody else, and with a new owner.
echo prog > suid; chmod 6777 suid; as 1000 1000 'echo more >> suid'; stat -c '%a' suid
chmod 6755 suid; echo root >> suid; stat -c '%a' suid; chown 5:6 suid; stat -c '%a %u %g' suid
chmod 6777 suid; as 1000 1000 ': > suid'; stat -c '%a %s' suid
# Links, renames, files removed while open.
echo one > one; ln one two; mv one three; cat two three; stat -c %h two
exec 3<>two; rm two three; echo more >&3; exec 3>&-
echo a > a; echo b > b; mv -f a b; cat b; mkdir x y; mv x y/; mv -T y z; ls -R z
python3 - <<'P'
import fcntl, mmap, os, struct, tempfile
with open('map', 'w+b') as f:
    f.truncate(10000)
    with mmap.mmap(f.fileno(), 10000) as m:
        m[5000:5005] = b'hello'
        m.flush()
    f.seek(5000); print(f.read(5))
# Pages of a map that go back through a handle that appends.
fd = os.open('log', os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
os.write(fd, b'first\n')
with mmap.mmap(fd, 5) as m:
    m[0:5] = b'FIRST'; m.flush()
os.write(fd, b'second\n'); os.close(fd)
print(open('log').read())
fd = os.open('.', os.O_TMPFILE | os.O_RDWR, 0o600)
os.write(fd, b'tmp'); os.link(f'/proc/self/fd/{fd}', 'linked', src_dir_fd=os.open('.', os.O_RDONLY), follow_symlinks=True); os.close(fd)
print(open('linked').read(), oct(os.stat('linked').st_mode))
with open('big', 'wb') as f:
    f.seek(5 << 30); f.write(b'end'); f.flush()
    print(os.lseek(f.fileno(), 0, os.SEEK_DATA) == 5 << 30, os.stat('big').st_blocks < 100)
    os.posix_fallocate(f.fileno(), 0, 65536); print(os.stat('big').st_blocks >= 128)
os.truncate('big', 100)
os.setxattr('big', 'user.a', b'1'); os.setxattr('big', 'trusted.b', b'2')
print(sorted(os.listxattr('big')), os.getxattr('big', 'trusted.b'))
os.mknod('null', 0o20666, os.makedev(1, 3)); open('null', 'w').write('x'); print(os.stat('null').st_rdev)
os.mknod('dev', 0o60600, os.makedev(259, 70000)); print(os.stat('dev').st_rdev == os.makedev(259, 70000))
f = open('lock', 'w'); fcntl.flock(f, fcntl.LOCK_EX); fcntl.lockf(f, fcntl.LOCK_EX); print('locked')
data = os.urandom(3 << 20); open('random', 'wb').write(data); print(open('random', 'rb').read() == data)
a = os.open('random', os.O_RDONLY); b = os.open('copy', os.O_RDWR | os.O_CREAT)
print(os.copy_file_range(a, b, 3 << 20) > 0)
d = os.open('direct', os.O_RDWR | os.O_CREAT | os.O_DIRECT)
m = mmap.mmap(-1, 8192); m[:] = b'd' * 8192; print(os.write(d, m)); os.lseek(d, 0, 0); print(os.readv(d, [m]))
os.utime('big', ns=(123456789, 987654321000000001)); print(os.stat('big').st_mtime_ns, os.stat('big').st_atime_ns)
os.symlink('nowhere', 'dangling'); os.chown('dangling', 7, 8, follow_symlinks=False)
s = os.lstat('dangling'); print(s.st_uid, s.st_gid, os.readlink('dangling'))
for name in ['big', 'suid']:
    print(sorted(os.listxattr(name)))
os.mkdir('many')
for i in range(500): open(f'many/{i}', 'w').write(str(i))
print(len(os.listdir('many')), sum(e.stat().st_size for e in os.scandir('many')))
P
# An executable that was just written; archives; removal of a tree.
cp /bin/true ./run; ./run && echo ran
tar -C many -cf many.tar . && mkdir again && tar -C again -xf many.tar && diff -r many again && echo same
rm -rf again many many.tar; test ! -e many
rm -f random copy
find . -printf '%P %y %m %U %G %s %n %l\n' | sed 's/^\(.* d [0-9]* [0-9]* [0-9]*\) [0-9]* /\1 /' | sort
"#;

fn run(directory: &Path) -> String {
    let output = Command::new("sh")
        .args(["-c", SCRIPT])
        .current_dir(directory)
        .output()
        .unwrap();
    format!(
        "{}{}{}",
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr),
        output.status
    )
}

/// Passes requests from `/dev/fuse` to the server until the file system is unmounted.
fn serve(server: &bulkhead_fs::FileServer, mut device: &File) {
    let mut request = vec![0; (1 << 20) + 8192];
    let mut reply = request.clone();
    loop {
        let length = match device.read(&mut request) {
            Ok(length) => length,
            Err(error) if error.raw_os_error() == Some(libc::ENODEV) => return,
            Err(error) if matches!(error.kind(), ErrorKind::Interrupted | ErrorKind::NotFound) => {
                continue;
            }
            Err(error) => panic!("{error}"),
        };
        let length = server.handle(
            &[VolatileSlice::from(&mut request[..length])],
            &[VolatileSlice::from(&mut reply[..])],
        );
        if length > 0 {
            // The kernel refuses the reply to a request that was interrupted.
            let _ = device.write(&reply[..length]);
        }
    }
}

#[test]
fn a_container_sees_no_difference() {
    let Ok(device) = File::options().read(true).write(true).open("/dev/fuse") else {
        return;
    };
    unshare(CloneFlags::CLONE_NEWNS).unwrap();
    let private = MsFlags::MS_PRIVATE | MsFlags::MS_REC;
    mount(None::<&str>, "/", None::<&str>, private, None::<&str>).unwrap();
    let directory = tempfile::tempdir().unwrap();
    let inside = |name: &str| {
        let path = directory.path().join(name);
        fs::create_dir(&path).unwrap();
        path
    };
    let (plain, mounted) = (inside("plain"), inside("mounted"));
    let server = guest::server();
    for (name, options) in [("exclusive", EXCLUSIVE), ("shared", SHARED)] {
        let share = guest::path_fd(&inside(name));
        server.share(name, share, options).unwrap();
    }
    let options = format!(
        "fd={},rootmode=40000,user_id=0,group_id=0,default_permissions,allow_other",
        device.as_raw_fd()
    );
    let flags = MsFlags::empty();
    mount(Some("test"), &mounted, Some("fuse"), flags, Some(&*options)).unwrap();
    let expected = run(&plain);
    let (exclusive, shared) = std::thread::scope(|scope| {
        for _ in 0..2 {
            scope.spawn(|| serve(&server, &device));
        }
        let seen = (
            run(&mounted.join("exclusive")),
            run(&mounted.join("shared")),
        );
        umount2(&mounted, MntFlags::MNT_DETACH).unwrap();
        seen
    });
    assert!(expected.ends_with("exit status: 0"), "{expected}");
    similar(&expected, &exclusive);
    similar(&expected, &shared);
}

/// Compares line by line, to say where they part.
fn similar(expected: &str, seen: &str) {
    for (expected, seen) in expected.lines().zip(seen.lines()) {
        assert_eq!(expected, seen);
    }
    assert_eq!(expected, seen);
}
