#![no_main]
//! Paths of a spec in a root file system full of symbolic links: nothing is made outside it.

use std::{
    fs,
    os::unix::fs::symlink,
    path::{Path, PathBuf},
};

use arbitrary::Arbitrary;
use bulkhead_agent::stage::root::Root;
use libfuzzer_sys::fuzz_target;
use rustix::fs::{Mode, OFlags};

/// One step of a path; few names, so that links are met.
#[derive(Arbitrary, Debug, Clone, Copy)]
enum Step {
    Root,
    Up,
    Here,
    A,
    B,
    C,
}

#[derive(Arbitrary, Debug)]
enum Made {
    Link(Vec<Step>, Vec<Step>),
    Directory(Vec<Step>),
    File(Vec<Step>),
}

fn path(steps: &[Step]) -> PathBuf {
    let names = steps.iter().take(8).map(|step| match step {
        Step::Root => "/",
        Step::Up => "..",
        Step::Here => ".",
        Step::A => "a",
        Step::B => "b",
        Step::C => "c",
    });
    names.collect()
}

fuzz_target!(|all: Vec<Made>| {
    let outer = tempfile::tempdir().expect("a directory");
    let top = outer.path().join("one/two/root");
    fs::create_dir_all(&top).expect("a root");
    let flags = OFlags::PATH | OFlags::DIRECTORY;
    let root = Root::new(rustix::fs::open(&top, flags, Mode::empty()).expect("the root"));
    for made in all.iter().take(16) {
        match made {
            Made::Link(at, to) => {
                let names = path(at);
                let name = names.file_name().unwrap_or("a".as_ref());
                let _ = symlink(path(to), top.join(name));
            }
            Made::Directory(at) => {
                let _ = root.make_directory(&path(at));
            }
            Made::File(at) => {
                let _ = root.make_file(&path(at));
            }
        }
    }
    let only = |directory: &Path, name: &str| {
        let names: Vec<_> = fs::read_dir(directory)
            .expect("a directory")
            .map(|entry| entry.expect("an entry").file_name())
            .collect();
        assert_eq!(names, [name], "in {}", directory.display());
    };
    only(outer.path(), "one");
    only(&outer.path().join("one"), "two");
    only(&outer.path().join("one/two"), "root");
});
