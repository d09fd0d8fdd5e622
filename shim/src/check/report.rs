//! What was found, as data, as text for people and as JSON for programs.

use std::fmt;

use serde::Serialize;

use crate::text;

/// The longest detail or fix, in bytes. Some of them quote what a file or a guest says.
const MAX_TEXT: usize = 1200;

/// How an item is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Verdict {
    /// As it should be, or a fact that is neither good nor bad.
    Ok,
    /// Bulkhead works, but less well or less safely than it could, or nobody can tell.
    Warning,
    /// Bulkhead cannot work.
    Failed,
}

impl Verdict {
    fn word(self) -> &'static str {
        match self {
            Self::Ok => "ok",
            Self::Warning => "warning",
            Self::Failed => "FAILED",
        }
    }
}

/// The result of one check. Its texts are single lines.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Outcome {
    /// How it is.
    #[serde(rename = "result")]
    pub verdict: Verdict,
    /// What was seen.
    pub detail: String,
    /// What to do about it; there is one unless the verdict is [`Verdict::Ok`].
    #[serde(skip_serializing_if = "Option::is_none")]
    pub fix: Option<String>,
}

impl Outcome {
    /// Nothing to do.
    pub fn ok(detail: impl AsRef<str>) -> Self {
        Self {
            verdict: Verdict::Ok,
            detail: text::one_line(detail.as_ref(), MAX_TEXT),
            fix: None,
        }
    }

    /// Something that should be better.
    pub fn warning(detail: impl AsRef<str>, fix: impl AsRef<str>) -> Self {
        Self::wrong(Verdict::Warning, detail.as_ref(), fix.as_ref())
    }

    /// Something that must be better.
    pub fn failed(detail: impl AsRef<str>, fix: impl AsRef<str>) -> Self {
        Self::wrong(Verdict::Failed, detail.as_ref(), fix.as_ref())
    }

    fn wrong(verdict: Verdict, detail: &str, fix: &str) -> Self {
        Self {
            verdict,
            detail: text::one_line(detail, MAX_TEXT),
            fix: Some(text::one_line(fix, MAX_TEXT)),
        }
    }
}

/// One line of the report.
#[derive(Debug, Serialize)]
pub struct Item {
    /// Its name, as in docs/check.md.
    #[serde(rename = "item")]
    pub name: &'static str,
    /// What was found.
    #[serde(flatten)]
    pub outcome: Outcome,
}

/// Everything that was found. [`fmt::Display`] is the form for people.
#[derive(Debug, Default, Serialize)]
pub struct Report {
    items: Vec<Item>,
}

impl Report {
    /// Adds an item.
    pub fn add(&mut self, name: &'static str, outcome: Outcome) {
        self.items.push(Item { name, outcome });
    }

    /// How the item of this name is, if it was looked at.
    pub fn verdict(&self, name: &str) -> Option<Verdict> {
        self.items
            .iter()
            .find(|item| item.name == name)
            .map(|item| item.outcome.verdict)
    }

    /// How many items are like this.
    pub fn count(&self, verdict: Verdict) -> usize {
        self.items
            .iter()
            .filter(|item| item.outcome.verdict == verdict)
            .count()
    }

    /// The report as JSON: `{"items":[{"item":…,"result":…,"detail":…,"fix":…}]}`.
    pub fn to_json(&self) -> serde_json::Result<String> {
        serde_json::to_string_pretty(self)
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let width = self.items.iter().map(|item| item.name.len()).max();
        let width = width.unwrap_or(0);
        for Item { name, outcome } in &self.items {
            let word = outcome.verdict.word();
            writeln!(f, "{word:<7}  {name:<width$}  {}", outcome.detail)?;
            if let Some(fix) = &outcome.fix {
                writeln!(f, "{:<7}  fix: {fix}", "")?;
            }
        }
        let failed = self.count(Verdict::Failed);
        let warnings = match self.count(Verdict::Warning) {
            0 => String::new(),
            1 => ", 1 warning".to_owned(),
            count => format!(", {count} warnings"),
        };
        match failed {
            0 => writeln!(f, "Bulkhead works on this host{warnings}"),
            _ => writeln!(
                f,
                "Bulkhead does not work on this host: {failed} failed{warnings}"
            ),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn report() -> Report {
        let mut report = Report::default();
        report.add("root", Outcome::ok("yes"));
        report.add("a longer name", Outcome::warning("weak", "make it strong"));
        report
    }

    #[test]
    fn lines_are_aligned_and_fixes_indented() {
        let mut report = report();
        assert_eq!(
            report.to_string(),
            "ok       root           yes\n\
             warning  a longer name  weak\n\
             \x20        fix: make it strong\n\
             Bulkhead works on this host, 1 warning\n"
        );
        report.add("KVM", Outcome::failed("not\nthere \x1b[31m", "load it"));
        let text = report.to_string();
        assert!(
            text.contains(
                "\nFAILED   KVM            not there [31m\n         fix: load it\nBulkhead does not \
                 work on this host: 1 failed, 1 warning\n"
            ),
            "{text}"
        );
    }

    #[test]
    fn json_has_a_fix_only_where_something_is_to_do() {
        let json: serde_json::Value = serde_json::from_str(&report().to_json().unwrap()).unwrap();
        assert_eq!(
            json,
            serde_json::json!({"items": [
                {"item": "root", "result": "ok", "detail": "yes"},
                {
                    "item": "a longer name",
                    "result": "warning",
                    "detail": "weak",
                    "fix": "make it strong",
                },
            ]})
        );
    }
}
