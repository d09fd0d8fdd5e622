//! Real programs from Debian: the same result as under runc.

use std::fs::File;
use std::io::{BufWriter, Write};
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use tar::{Builder, EntryType, Header};

use super::{Case, Setting, case};
use crate::command::Input;
use crate::ctr::{Container, DEBIAN, PROBE, RUNC, Run};
use crate::probe::tree;

pub fn cases() -> Vec<Case> {
    vec![
        case(
            "python3 computes the same with threads, files and a database",
            python,
        )
        .in_debian(),
        case(
            "dpkg installs and removes a package that dpkg-deb has built",
            dpkg,
        )
        .in_debian(),
        case("gcc compiles a program that runs", gcc).in_debian(),
        case(
            "tar unpacks 5,000 files with all their metadata",
            |setting| tar_tree(setting, 50),
        )
        .in_debian()
        .long(),
        case(
            "tar unpacks 20,000 files with all their metadata",
            |setting| tar_tree(setting, 200),
        )
        .in_debian()
        .soak(),
    ]
}

const PYTHON: &str = r#"
import concurrent.futures, hashlib, mmap, os, sqlite3, tempfile, threading

directory = tempfile.mkdtemp(dir="/var/lib")
os.chdir(directory)

def work(number):
    name = f"file-{number}"
    with open(name, "wb") as file:
        for block in range(50):
            file.write(hashlib.sha256(f"{number} {block}".encode()).digest() * 40)
    with open(name, "r+b") as file, mmap.mmap(file.fileno(), 0) as view:
        view[100:104] = b"edit"
    return hashlib.sha256(open(name, "rb").read()).hexdigest()

with concurrent.futures.ThreadPoolExecutor(8) as pool:
    for digest in pool.map(work, range(16)):
        print(digest)

database = sqlite3.connect("data.db")
database.execute("pragma journal_mode = wal")
database.execute("create table squares (number integer, square integer)")

def insert(start):
    own = sqlite3.connect("data.db", timeout=60)
    for number in range(start, start + 50):
        own.execute("insert into squares values (?, ?)", (number, number * number))
        own.commit()

threads = [threading.Thread(target=insert, args=(start,)) for start in (0, 50, 100, 150)]
for thread in threads: thread.start()
for thread in threads: thread.join()
print(database.execute("select count(*), sum(square) from squares").fetchone())
print(database.execute("pragma integrity_check").fetchone())
print(sorted(os.listdir(".")))
"#;

fn python(setting: &Setting) -> Result<()> {
    let output = same(setting, |run| run, &["python3", "-c", PYTHON])?;
    ensure!(
        output.contains("(200, 2646700)") && output.contains("('ok',)"),
        "{output}"
    );
    Ok(())
}

const DPKG: &str = r#"
set -e
mkdir -p /tmp/p/DEBIAN /tmp/p/usr/bin /tmp/p/usr/share/greeting /tmp/p/etc
cat > /tmp/p/DEBIAN/control <<END
Package: greeting
Version: 1.0
Architecture: all
Maintainer: Nobody <nobody@example.org>
Description: says hello
END
echo /etc/greeting.conf > /tmp/p/DEBIAN/conffiles
printf '#!/bin/sh\nset -e\nadduser_file=/usr/share/greeting/configured\ndate +%%Y > $adduser_file\n' > /tmp/p/DEBIAN/postinst
printf '#!/bin/sh\nrm -f /usr/share/greeting/configured\n' > /tmp/p/DEBIAN/prerm
chmod 755 /tmp/p/DEBIAN/postinst /tmp/p/DEBIAN/prerm
printf '#!/bin/sh\n. /etc/greeting.conf\necho $GREETING\n' > /tmp/p/usr/bin/greeting
chmod 4755 /tmp/p/usr/bin/greeting
echo GREETING=hello > /tmp/p/etc/greeting.conf
ln -s ../../bin/greeting /tmp/p/usr/share/greeting/link
dpkg-deb --root-owner-group --build /tmp/p /tmp/greeting.deb
dpkg -i /tmp/greeting.deb
greeting
test -s /usr/share/greeting/configured && echo configured
dpkg -s greeting
dpkg -L greeting
stat -c '%n %a %U %G' /usr/bin/greeting /etc/greeting.conf
dpkg --verify greeting && echo verified
dpkg -i /tmp/greeting.deb
dpkg --purge greeting
ls /usr/bin/greeting /etc/greeting.conf /usr/share/greeting 2>&1 || true
dpkg --audit
"#;

fn dpkg(setting: &Setting) -> Result<()> {
    let output = same(setting, |run| run, &["sh", "-c", DPKG])?;
    ensure!(
        output.contains("\nhello\nconfigured\n") && output.contains("\nverified\n"),
        "{output}"
    );
    Ok(())
}

const GCC: &str = r#"
set -e
cd /root
cat > primes.c <<END
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <math.h>
static int counts[4];
static void *count(void *part) {
    long p = (long)part;
    for (int n = 2 + p; n < 20000; n += 4) {
        int prime = 1;
        for (int d = 2; d <= (int)sqrt(n); d++) if (n % d == 0) { prime = 0; break; }
        counts[p] += prime;
    }
    return NULL;
}
int main(void) {
    pthread_t threads[4];
    for (long p = 0; p < 4; p++) if (pthread_create(&threads[p], NULL, count, (void *)p)) abort();
    int sum = 0;
    for (long p = 0; p < 4; p++) { pthread_join(threads[p], NULL); sum += counts[p]; }
    printf("%d primes\n", sum);
    return sum == 2262 ? 0 : 1;
}
END
gcc -O1 -Wall -o primes primes.c -lpthread -lm
./primes
gcc -O1 -c -o primes.o primes.c
sha256sum primes.o
"#;

fn gcc(setting: &Setting) -> Result<()> {
    let output = same(setting, |run| run, &["sh", "-c", GCC])?;
    ensure!(output.contains("2262 primes\n"), "{output}");
    Ok(())
}

/// Runs a command in the Debian image under both runtimes at once; the output must be the same.
fn same(setting: &Setting, options: impl Fn(Run) -> Run, command: &[&str]) -> Result<String> {
    let start = |runtime: &str| options(Run::new(runtime).debian()).spawn(command);
    let (runc, tested) = (start(RUNC)?, start(&setting.runtime)?);
    let runc = runc.finish()?.exits_with(0).context("under runc")?;
    let tested = tested.finish()?.exits_with(0)?;
    ensure!(
        runc.stdout == tested.stdout && runc.stderr == tested.stderr,
        "in {DEBIAN} under runc: {runc}\nunder the runtime under test: {tested}"
    );
    Ok(tested.out())
}

/// How long unpacking may take: each file is some six requests to the host's file server.
const UNPACKING: Duration = Duration::from_secs(30 * 60);

/// `directories` of about 100 files each.
fn tar_tree(setting: &Setting, directories: u64) -> Result<()> {
    let directory = tempfile::tempdir_in("/var/tmp")?;
    let archive = directory.path().join("tree.tar");
    let names = write_tree(&archive, directories)?;
    let source = archive
        .to_str()
        .context("the path of the archive is not UTF-8")?;
    let mount = format!("type=bind,src={source},dst=/tree.tar,options=bind:ro");
    let start = |runtime: &str| {
        Run::new(runtime)
            .probe()?
            .flags(&["--mount", &mount])
            .detach(&["sleep", "100000"])
    };
    let (runc, tested) = (start(RUNC)?, start(&setting.runtime)?);
    let unpack = |container: &Container| {
        let script = "mkdir /tree && \
                      exec tar --xattrs --xattrs-include='*' -xpf /tree.tar -C /tree";
        container.spawn_exec(&[], Input::Null, &["sh", "-c", script])
    };
    let (in_runc, in_tested) = (unpack(&runc)?, unpack(&tested)?);
    in_runc.finish_within(UNPACKING)?.succeeds()?;
    in_tested.finish_within(UNPACKING)?.succeeds()?;
    // Everything as it is on the host, which is quick to read, and a part as it is seen inside.
    let on_host = |container: &Container| tree::describe(&container.changes()?.join("tree"));
    same_lines(names, &on_host(&runc)?, &on_host(&tested)?)?;
    let inside = |container: &Container| {
        let probe = [PROBE, "probe", "tree", "/tree/d10"];
        container.exec(&[], &probe)?.succeeds()
    };
    same_lines(NAMES_OF_TENTH, &inside(&runc)?, &inside(&tested)?)
}

fn same_lines(count: usize, runc: &str, tested: &str) -> Result<()> {
    if let Some((expected, found)) = runc.lines().zip(tested.lines()).find(|(a, b)| a != b) {
        anyhow::bail!("the first difference\n  under runc: {expected}\n  tested: {found}");
    }
    for (runtime, lines) in [("runc", runc), ("the runtime under test", tested)] {
        ensure!(
            lines.lines().count() == count,
            "{} of {count} names under {runtime}",
            lines.lines().count()
        );
    }
    Ok(())
}

/// Files, links and a FIFO: what every tenth directory holds. (A device is refused by design; the
/// comparison of files asks for that.)
const NAMES_OF_TENTH: usize = 96 + 3 + 1;

/// Writes an archive with a bit of everything and returns how many names it holds.
fn write_tree(path: &Path, directories: u64) -> Result<usize> {
    let mut archive = Builder::new(BufWriter::new(File::create(path)?));
    let mut names = 0;
    let mut entry =
        |kind, name: &str, mode, number: u64, content: &[u8], target: &str| -> Result<()> {
            let mut header = Header::new_ustar();
            header.set_entry_type(kind);
            header.set_mode(mode);
            header.set_uid(number % 7 * 1000);
            header.set_gid(number % 5 * 1000);
            header.set_mtime(1_500_000_000 + number * 1000);
            header.set_size(u64::try_from(content.len())?);
            if number % 100 == 1 && kind == EntryType::Regular {
                let nanoseconds = format!("{}.123456789", 1_500_000_000 + number);
                let attributes = [
                    ("SCHILY.xattr.user.number", number.to_string().into_bytes()),
                    ("mtime", nanoseconds.into_bytes()),
                ];
                archive.append_pax_extensions(
                    attributes
                        .iter()
                        .map(|(key, value)| (*key, value.as_slice())),
                )?;
            }
            names += 1;
            if target.is_empty() {
                header.set_cksum();
                archive.append_data(&mut header, name, content)?;
            } else {
                archive.append_link(&mut header, name, target)?;
            }
            Ok(())
        };
    for directory in 0..directories {
        let top = format!("d{directory}");
        entry(EntryType::Directory, &top, 0o755, directory, &[], "")?;
        for number in 0..96 {
            let name = format!("{top}/file-{number}");
            let length = (directory * 31 + number * 17) % 700;
            let content = name
                .bytes()
                .cycle()
                .take(usize::try_from(length)?)
                .collect::<Vec<_>>();
            let mode = [0o644, 0o600, 0o755, 0o4755, 0o440][usize::try_from(number % 5)?];
            entry(EntryType::Regular, &name, mode, number, &content, "")?;
        }
        entry(
            EntryType::Symlink,
            &format!("{top}/link"),
            0o777,
            1,
            &[],
            "../d0/file-1",
        )?;
        entry(
            EntryType::Symlink,
            &format!("{top}/out"),
            0o777,
            2,
            &[],
            "/etc/hostname",
        )?;
        entry(
            EntryType::Link,
            &format!("{top}/hard"),
            0o644,
            3,
            &[],
            &format!("{top}/file-3"),
        )?;
        if directory % 10 == 0 {
            entry(EntryType::Fifo, &format!("{top}/pipe"), 0o640, 4, &[], "")?;
        }
    }
    archive.into_inner()?.flush()?;
    Ok(names)
}
