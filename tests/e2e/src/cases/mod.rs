//! The tests, by theme.

mod adjust;
mod apparmor;
mod apps;
mod basic;
mod check;
mod clock;
mod configurations;
mod crash;
mod docker;
mod docker_inside;
mod docker_network;
mod escapes;
mod events;
mod failures;
mod faults;
mod io;
mod jail;
mod lifecycle;
mod namespaces;
mod neighbours;
mod network;
mod outputs;
mod parity;
mod pods;
mod roots;
mod services;
mod soak;

use anyhow::Result;

use crate::ctr::Run;

/// One test.
pub struct Case {
    /// A sentence that says what is true when it passes.
    pub name: &'static str,
    /// It asks for something that only Bulkhead does.
    pub bulkhead_only: bool,
    /// It needs this image beside busybox's: one of those of the lab that are built from Debian.
    pub image: Option<&'static str>,
    /// It takes minutes.
    pub long: bool,
    /// Pods are made by containerd's sandbox API.
    pub sandbox_api: bool,
    /// It takes long and asks for little that others do not: only run when asked for.
    pub soak: bool,
    /// Fails with everything that is needed to understand why.
    pub run: fn(&Setting) -> Result<()>,
}

impl Case {
    const fn in_debian(self) -> Self {
        self.with("debian-dev")
    }

    const fn with(self, image: &'static str) -> Self {
        Self {
            image: Some(image),
            ..self
        }
    }

    const fn long(self) -> Self {
        Self { long: true, ..self }
    }

    const fn by_sandbox_api(self) -> Self {
        Self {
            sandbox_api: true,
            bulkhead_only: true,
            ..self
        }
    }

    const fn soak(self) -> Self {
        Self { soak: true, ..self }
    }
}

/// What the tests run against.
pub struct Setting {
    /// The runtime under test, by containerd's name; where pods are made by the sandbox API,
    /// [`crate::ctr::SANDBOX`].
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
        image: None,
        long: false,
        sandbox_api: false,
        soak: false,
        run,
    }
}

/// A test of what only Bulkhead does.
const fn bulkhead(name: &'static str, run: fn(&Setting) -> Result<()>) -> Case {
    Case {
        name,
        bulkhead_only: true,
        image: None,
        long: false,
        sandbox_api: false,
        soak: false,
        run,
    }
}

/// Every test, in an order in which the simple comes first.
pub fn all() -> Vec<Case> {
    [
        basic::cases(),
        check::cases(),
        clock::cases(),
        io::cases(),
        outputs::cases(),
        lifecycle::cases(),
        events::cases(),
        adjust::cases(),
        parity::cases(),
        roots::cases(),
        namespaces::cases(),
        escapes::cases(),
        configurations::cases(),
        jail::cases(),
        apparmor::cases(),
        neighbours::cases(),
        network::cases(),
        apps::cases(),
        failures::cases(),
        crash::cases(),
        faults::cases(),
        soak::cases(),
        docker::cases(),
        docker_network::cases(),
        pods::cases(),
        docker_inside::cases(),
        services::cases(),
    ]
    .into_iter()
    .flatten()
    .collect()
}
