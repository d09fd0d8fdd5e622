//! Configurations that are run as they are under runc and under Bulkhead: the same `config.json`,
//! the same root file system, and a probe that says what it finds.

mod base;
mod disk;
mod generated;
mod isolation;
mod mounts;
mod namespaces;
mod observe;
mod patch;
mod process;
mod profiles;
mod refused;
mod resources;
mod run;
mod seccomp;
mod unsupported;

use anyhow::{Result, ensure};
use semver::VersionReq;
use serde_json::{Value, json};

pub use self::run::run;
use crate::differences::matches;

/// The seed of the generated configurations that belong to the suite.
const SEED: u64 = 1;

/// From here on a theme has many.
const MANY: usize = 30;

/// What a configuration is about.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Theme {
    /// What engines and orchestrators set up by default.
    Profiles,
    /// The process itself.
    Process,
    /// The root and what is mounted in it.
    Mounts,
    /// Masked paths, devices, sysctls, names and namespaces.
    Isolation,
    /// The cgroup.
    Resources,
    /// Filters of system calls.
    Seccomp,
    /// A bit of everything, by chance.
    Generated,
    /// What cannot be run.
    Refused,
    /// User and time namespaces.
    Namespaces,
    /// What cannot be run in a VM.
    Unsupported,
}

/// A `config.json`, but for what differs from run to run: the root's path, the cgroup, the pod.
#[derive(Debug, Clone)]
pub struct Configuration {
    /// By which it is run alone and named in the list of differences.
    pub name: String,
    /// What it is about.
    pub theme: Theme,
    spec: Value,
    /// Changes to the container's process for each process that is executed in it in addition.
    execs: Vec<Value>,
    /// The container must not come to be, and both runtimes' errors must say one of these words.
    cause: Option<Vec<String>>,
    /// A runc of such a version may refuse it.
    refused_by: Option<VersionReq>,
}

impl Configuration {
    fn new(theme: Theme, name: &str, base: &Value, changes: &Value) -> Self {
        let mut spec = base.clone();
        patch::apply(&mut spec, changes);
        Self {
            name: name.to_owned(),
            theme,
            spec,
            execs: Vec::new(),
            cause: None,
            refused_by: None,
        }
    }

    /// May be refused by a runc of such a version, as `<1.2`.
    fn refused_by(mut self, version: &str) -> Result<Self> {
        self.refused_by = Some(version.parse()?);
        Ok(self)
    }

    /// Looks from another process in the container as well.
    fn exec(mut self, changes: &Value) -> Self {
        self.execs.push(changes.clone());
        self
    }

    /// Must be refused, with one of these words in the error.
    fn refused(mut self, cause: &[&str]) -> Self {
        self.cause = Some(cause.iter().map(|&word| word.to_owned()).collect());
        self
    }
}

/// Arguments of a shell that runs this script and fails as it fails.
fn script(text: &str) -> Value {
    json!({ "process": { "args": ["/bin/sh", "-c", text] } })
}

/// All that belong to the suite.
pub fn all() -> Result<Vec<Configuration>> {
    let mut all = Vec::new();
    all.extend(profiles::all()?);
    all.extend(process::all()?);
    all.extend(mounts::all()?);
    all.extend(isolation::all()?);
    all.extend(resources::all()?);
    all.extend(seccomp::all()?);
    all.extend(refused::all()?);
    all.extend(namespaces::all()?);
    all.extend(unsupported::all()?);
    all.extend(generated::all(SEED)?);
    Ok(all)
}

/// Those of a theme.
pub fn of(theme: Theme) -> Result<Vec<Configuration>> {
    let mut all = all()?;
    all.retain(|configuration| configuration.theme == theme);
    Ok(all)
}

/// Those of a theme that run each time: of one with many every second.
pub fn sample(theme: Theme) -> Result<Vec<Configuration>> {
    let all = of(theme)?;
    let step = if all.len() > MANY { 2 } else { 1 };
    Ok(all.into_iter().step_by(step).collect())
}

/// Those with names that fit, in which `*` stands for anything. A name that begins with
/// `generated-SEED-` is looked for among those of that seed.
pub fn named(patterns: &[String]) -> Result<Vec<Configuration>> {
    let mut named = Vec::new();
    for pattern in patterns {
        let seed = pattern
            .strip_prefix("generated-")
            .and_then(|rest| rest.split('-').next())
            .and_then(|seed| seed.parse().ok());
        let mut found = match seed {
            Some(seed) => generated::all(seed)?,
            None => all()?,
        };
        found.retain(|configuration| matches(pattern, &configuration.name));
        ensure!(!found.is_empty(), "no configuration is called {pattern:?}");
        named.extend(found);
    }
    Ok(named)
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    #[test]
    fn there_are_many_and_each_has_a_name_of_its_own() {
        let all = all().unwrap();
        let names: BTreeSet<_> = all.iter().map(|one| one.name.as_str()).collect();
        assert_eq!(names.len(), all.len());
        let themes = [
            Theme::Profiles,
            Theme::Process,
            Theme::Mounts,
            Theme::Isolation,
            Theme::Resources,
            Theme::Seccomp,
            Theme::Generated,
            Theme::Refused,
            Theme::Namespaces,
        ];
        let sampled: usize = themes
            .map(|theme| sample(theme).unwrap().len())
            .iter()
            .sum();
        assert!(sampled >= 150, "{sampled}");
    }

    #[test]
    fn a_seed_always_gives_the_same() {
        let specs = |seed| -> Vec<Value> {
            let all = generated::all(seed).unwrap();
            all.into_iter().map(|one| one.spec).collect()
        };
        assert_eq!(specs(7), specs(7));
        assert_ne!(specs(7), specs(8));
    }

    #[test]
    fn a_configuration_is_found_by_its_name() {
        let count = |name: &str| named(&[name.to_owned()]).map(|found| found.len());
        assert_eq!(count("containerd").unwrap(), 1);
        assert_eq!(count("generated-9-0").unwrap(), 1);
        assert!(count("generated-9-*").unwrap() >= 20);
        assert!(count("no such").is_err());
    }
}
