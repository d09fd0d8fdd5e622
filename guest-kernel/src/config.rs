//! Kernel configurations as text, and the check that nothing asked for was dropped.
//!
//! kconfig turns an option off without a word when one that it depends on is off, and a kernel
//! without it still boots: the container that needed it fails much later. So what was built is
//! compared with what was asked for.

use std::collections::BTreeMap;
use std::fmt;

/// An option whose built value is not the one that was asked for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Mismatch {
    /// The option's name, with `CONFIG_`.
    pub option: String,
    /// The value asked for; `n` for an option that is to be off.
    pub wanted: String,
    /// The value in the built configuration; `n` for an option that is off or unknown.
    pub built: String,
}

impl fmt::Display for Mismatch {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self {
            option,
            wanted,
            built,
        } = self;
        write!(formatter, "{option} is {built} instead of {wanted}")
    }
}

/// Every line of the configuration `fragment` that the configuration `built` does not fulfil, by
/// name. An option that `built` does not mention is off.
pub fn mismatches(fragment: &str, built: &str) -> Vec<Mismatch> {
    let built = parse(built);
    parse(fragment)
        .into_iter()
        .map(|(option, wanted)| (option, wanted, built.get(option).copied().unwrap_or("n")))
        .filter(|(_, wanted, built)| wanted != built)
        .map(|(option, wanted, built)| Mismatch {
            option: option.to_owned(),
            wanted: wanted.to_owned(),
            built: built.to_owned(),
        })
        .collect()
}

/// The options of a configuration in kconfig's format; of an option named twice, the last value.
fn parse(text: &str) -> BTreeMap<&str, &str> {
    text.lines()
        .filter_map(|line| {
            if let Some(comment) = line.strip_prefix("# CONFIG_") {
                let name = comment.strip_suffix(" is not set")?;
                Some((&line[2..2 + "CONFIG_".len() + name.len()], "n"))
            } else if line.starts_with("CONFIG_") {
                line.split_once('=')
            } else {
                None
            }
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names(fragment: &str, built: &str) -> Vec<String> {
        mismatches(fragment, built)
            .iter()
            .map(Mismatch::to_string)
            .collect()
    }

    const BUILT: &str = "\
#
# Automatically generated file; DO NOT EDIT.
#
CONFIG_NET=y
CONFIG_NR_CPUS=64
CONFIG_LSM=\"landlock,apparmor\"
# CONFIG_MODULES is not set
";

    #[test]
    fn a_fulfilled_fragment_has_no_mismatch() {
        let fragment = "\
# --- Base: comments are not options
CONFIG_NET=y
CONFIG_NR_CPUS=64
CONFIG_LSM=\"landlock,apparmor\"
# CONFIG_MODULES is not set
# CONFIG_NEVER_HEARD_OF is not set
";
        assert!(names(fragment, BUILT).is_empty());
    }

    #[test]
    fn a_dropped_option_is_named() {
        assert_eq!(
            names("CONFIG_EROFS_FS=y\nCONFIG_NET=y\n", BUILT),
            ["CONFIG_EROFS_FS is n instead of y"]
        );
        assert_eq!(
            names("CONFIG_MODULES=y\n", BUILT),
            ["CONFIG_MODULES is n instead of y"]
        );
    }

    #[test]
    fn another_value_is_named() {
        assert_eq!(
            names("CONFIG_NR_CPUS=2\nCONFIG_LSM=\"landlock\"\n", BUILT),
            [
                "CONFIG_LSM is \"landlock,apparmor\" instead of \"landlock\"",
                "CONFIG_NR_CPUS is 64 instead of 2"
            ]
        );
    }

    #[test]
    fn an_option_that_has_to_be_off_is_named_when_it_is_on() {
        assert_eq!(
            names("# CONFIG_NET is not set\n", BUILT),
            ["CONFIG_NET is y instead of n"]
        );
    }

    #[test]
    fn a_name_is_not_mistaken_for_a_longer_one() {
        assert_eq!(
            names("CONFIG_NE=y\n", BUILT),
            ["CONFIG_NE is n instead of y"]
        );
    }

    #[test]
    fn the_guests_fragment_names_no_option_twice() {
        let lines = crate::FRAGMENT
            .lines()
            .filter(|line| {
                line.starts_with("CONFIG_")
                    || (line.starts_with("# CONFIG_") && line.ends_with(" is not set"))
            })
            .count();
        assert_eq!(parse(crate::FRAGMENT).len(), lines);
    }
}
