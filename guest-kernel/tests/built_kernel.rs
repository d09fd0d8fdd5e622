//! The kernel that is really built has what `guest.config` asks for. The build enforces it too;
//! this test reads what lies in the cache, building it first when it is not there.

use std::fs;

use bulkhead_guest_kernel::config::mismatches;
use bulkhead_guest_kernel::{FRAGMENT, build, cache_dir};

#[test]
fn built_kernel_has_every_option_that_was_asked_for() {
    let cache = cache_dir().expect("HOME, XDG_CACHE_HOME or BULKHEAD_CACHE is set");
    let kernel = build(&cache, &mut |line| eprintln!("{line}")).unwrap();
    assert!(kernel.release.ends_with("-bulkhead"), "{}", kernel.release);

    let config = kernel
        .config
        .expect("BULKHEAD_VMLINUX is not set: only a kernel built here has a configuration");
    let built = fs::read_to_string(config).unwrap();
    assert_eq!(mismatches(FRAGMENT, &built), []);
}
