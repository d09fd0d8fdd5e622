//! The tests, by theme.

mod apps;
mod basic;
mod check;
mod crash;
mod failures;
mod io;
mod jail;
mod lifecycle;
mod parity;

use anyhow::Result;

use crate::ctr::Run;

/// One test.
pub struct Case {
    /// A sentence that says what is true when it passes.
    pub name: &'static str,
    /// It asks for something that only Bulkhead does.
    pub bulkhead_only: bool,
    /// Fails with everything that is needed to understand why.
    pub run: fn(&Setting) -> Result<()>,
}

/// What the tests run against.
pub struct Setting {
    /// The runtime under test, by containerd's name.
    pub runtime: String,
}

impl Setting {
    /// A busybox container to be, under the runtime under test.
    pub fn container(&self) -> Run {
        Run::new(&self.runtime)
    }
}

/// A test for every runtime.
const fn case(name: &'static str, run: fn(&Setting) -> Result<()>) -> Case {
    Case {
        name,
        bulkhead_only: false,
        run,
    }
}

/// A test of what only Bulkhead does.
const fn bulkhead(name: &'static str, run: fn(&Setting) -> Result<()>) -> Case {
    Case {
        name,
        bulkhead_only: true,
        run,
    }
}

/// Every test, in an order in which the simple comes first.
pub fn all() -> Vec<Case> {
    [
        basic::cases(),
        check::cases(),
        io::cases(),
        lifecycle::cases(),
        parity::cases(),
        jail::cases(),
        apps::cases(),
        failures::cases(),
        crash::cases(),
    ]
    .into_iter()
    .flatten()
    .collect()
}
