//! Comparing reports from two runtimes against the list of known differences.

use anyhow::{Context, Result, ensure};
use semver::{Version, VersionReq};
use serde::Deserialize;

use crate::host;
use crate::probe::Report;

/// The reviewed list.
const KNOWN: &str = include_str!("../differences.toml");

/// The question that is answered with names in an order.
const ORDER: &str = "mount order";

/// The differences that are meant to be, against the host's runc.
pub struct Known {
    differences: Vec<Difference>,
    runc: Version,
}

/// The list, as it is written.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Listed {
    difference: Vec<Difference>,
}

/// A difference that is meant to be.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Difference {
    /// Names of questions; `*` stands for anything.
    questions: Vec<String>,
    /// Under Bulkhead the answer is this; `*` stands for anything.
    #[serde(default = "anything")]
    answer: String,
    /// Under runc it is this; `*` stands for anything.
    #[serde(default = "anything")]
    runc: String,
    /// Only in comparisons of this name; `*` stands for anything.
    only: Option<String>,
    /// Not in comparisons of this name.
    except: Option<String>,
    /// Only against a runc of such a version, as `<1.2`.
    #[serde(default)]
    runc_version: VersionReq,
    /// Why.
    reason: String,
}

fn anything() -> String {
    "*".into()
}

impl Known {
    /// Reads the list, and which runc there is.
    pub fn read() -> Result<Self> {
        Self::against(host::runc_version()?)
    }

    fn against(runc: Version) -> Result<Self> {
        let mut differences = listed()?;
        differences.retain(|one| one.runc_version.matches(&runc));
        Ok(Self { differences, runc })
    }

    /// Whether the host's runc is of such a version.
    pub fn is_runc(&self, version: &VersionReq) -> bool {
        version.matches(&self.runc)
    }

    /// Fails with every difference between the two reports that is not in the list.
    pub fn compare(&self, what: &str, runc: &Report, tested: &Report) -> Result<()> {
        let new = self.differences(what, runc, tested);
        ensure!(
            new.is_empty(),
            "{what}: {} difference(s) from runc {} that tests/e2e/differences.toml does not list:\n  {}",
            new.len(),
            self.runc,
            new.join("\n  ")
        );
        Ok(())
    }

    /// Every difference between the two reports that is not in the list.
    pub fn differences(&self, what: &str, runc: &Report, tested: &Report) -> Vec<String> {
        let mut new = Vec::new();
        let mut questions: Vec<_> = runc.keys().chain(tested.keys()).collect();
        questions.sort();
        questions.dedup();
        for question in questions {
            let none = String::from("(nothing)");
            let (expected, found) = (
                runc.get(question).unwrap_or(&none),
                tested.get(question).unwrap_or(&none),
            );
            if expected != found
                && !(question.ends_with(ORDER) && same_order(expected, found))
                && !self
                    .differences
                    .iter()
                    .any(|one| one.covers(what, question, (expected, found)))
            {
                new.push(format!(
                    "{question}\n    runc:   {expected}\n    tested: {found}"
                ));
            }
        }
        new
    }
}

/// Whether those that are in both come in the same order. What is in one alone is another question's
/// difference.
fn same_order(one: &str, other: &str) -> bool {
    let words = |text: &str| -> Vec<String> { text.split(' ').map(str::to_owned).collect() };
    let (mut one, mut other) = (words(one), words(other));
    let all = one.clone();
    one.retain(|word| other.contains(word));
    other.retain(|word| all.contains(word));
    one == other
}

impl Difference {
    /// Whether these answers to the question, runc's and the other, are meant to be.
    fn covers(&self, what: &str, question: &str, (runc, answer): (&str, &str)) -> bool {
        // A process that is executed in addition is asked the same.
        let own = match question.split_once(": ") {
            Some((exec, own)) if exec.starts_with("exec ") => own,
            _ => question,
        };
        let fits = |pattern: &String| matches(pattern, own) || matches(pattern, question);
        let here = |only: &String| matches(only, what);
        matches(&self.answer, answer)
            && matches(&self.runc, runc)
            && self.only.as_ref().is_none_or(here)
            && !self.except.as_ref().is_some_and(here)
            && self.questions.iter().any(fits)
    }
}

fn listed() -> Result<Vec<Difference>> {
    let Listed { difference: listed } =
        toml::from_str(KNOWN).context("differences.toml is not valid")?;
    for difference in &listed {
        ensure!(
            !difference.reason.trim().is_empty(),
            "the difference in {:?} has no reason",
            difference.questions
        );
    }
    Ok(listed)
}

/// Whether `text` fits `pattern`, in which `*` stands for any characters.
pub fn matches(pattern: &str, text: &str) -> bool {
    let mut pieces = pattern.split('*');
    let Some(mut rest) = pieces.next().and_then(|first| text.strip_prefix(first)) else {
        return false;
    };
    let Some(last) = pieces.next_back() else {
        // Without a star, the whole must be the same.
        return rest.is_empty();
    };
    for piece in pieces {
        let Some((_, after)) = rest.split_once(piece) else {
            return false;
        };
        rest = after;
    }
    rest.ends_with(last)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Which runc before 1.2 does not set.
    const DOMAIN: &str = "setting./proc/sys/kernel/domainname";

    #[test]
    fn the_list_is_valid() {
        listed().unwrap();
    }

    #[test]
    fn a_star_stands_for_anything() {
        assert!(matches("a.b", "a.b"));
        assert!(!matches("a.b", "a.bc"));
        assert!(matches("a.*", "a."));
        assert!(matches("*", ""));
        assert!(matches("a*c*e", "abcde"));
        assert!(!matches("a*c*e", "abde"));
        assert!(!matches("ab*b", "ab"));
    }

    #[test]
    fn an_order_is_that_of_what_is_in_both() {
        assert!(same_order("/ /proc /sys", "/ /sys"));
        assert!(same_order("/ /sys", "/ /proc /sys /run"));
        assert!(!same_order("/ /proc /sys", "/ /sys /proc"));
        assert!(!same_order("/ /sys /sys", "/ /sys"));
    }

    #[test]
    fn a_difference_that_is_not_listed_is_found() {
        let known = Known::against(Version::new(1, 3, 0)).unwrap();
        let one = Report::from([("a question".into(), "yes".into())]);
        let other = Report::from([("a question".into(), "no".into())]);
        known.compare("x", &one, &one.clone()).unwrap();
        let error = known.compare("x", &one, &other).unwrap_err().to_string();
        assert!(error.contains("a question"), "{error}");
        assert!(known.compare("x", &one, &Report::new()).is_err());
    }
    #[test]
    fn a_difference_from_one_version_of_runc_is_none_from_another() {
        let domain = |name: &str| Report::from([(DOMAIN.into(), name.into())]);
        let (runc, tested) = (domain("(none)"), domain("domain-1"));
        let old = Known::against(Version::new(1, 1, 15)).unwrap();
        old.compare("x", &runc, &tested).unwrap();
        let new = Known::against(Version::new(1, 3, 6)).unwrap();
        let error = new.compare("x", &runc, &tested).unwrap_err().to_string();
        assert!(error.contains(DOMAIN), "{error}");
    }
}
