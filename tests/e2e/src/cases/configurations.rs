//! Many configurations under runc and under the runtime under test, by theme.

use anyhow::Result;

use super::{Case, Setting, bulkhead, case};
use crate::configurations::{self, Theme};

pub fn cases() -> Vec<Case> {
    vec![
        case("configured as by engines it is as under runc", |setting| {
            same(setting, Theme::Profiles)
        })
        .long(),
        case("a process is configured as under runc", |setting| {
            same(setting, Theme::Process)
        })
        .long(),
        case("mounts are configured as under runc", |setting| {
            same(setting, Theme::Mounts)
        })
        .long(),
        case("isolation is configured as under runc", |setting| {
            same(setting, Theme::Isolation)
        })
        .long(),
        case("resources are configured as under runc", |setting| {
            same(setting, Theme::Resources)
        })
        .long(),
        case("seccomp is configured as under runc", |setting| {
            same(setting, Theme::Seccomp)
        })
        .long(),
        case("configured by chance it is as under runc", |setting| {
            same(setting, Theme::Generated)
        })
        .long(),
        case("namespaces are configured as under runc", |setting| {
            same(setting, Theme::Namespaces)
        })
        .long(),
        case("what runc refuses is refused", |setting| {
            same(setting, Theme::Refused)
        })
        .long(),
        bulkhead("everything is configured as under runc", all).soak(),
        bulkhead("what a VM cannot do is refused by name", |setting| {
            same(setting, Theme::Unsupported)
        })
        .long(),
    ]
}

fn same(setting: &Setting, theme: Theme) -> Result<()> {
    configurations::run(&setting.runtime, configurations::sample(theme)?)
}

fn all(setting: &Setting) -> Result<()> {
    configurations::run(&setting.runtime, configurations::all()?)
}
