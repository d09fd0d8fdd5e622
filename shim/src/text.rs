//! Text for people: error chains in one line, and text of unknown origin made harmless.

use std::error::Error;

/// An error and its causes in one line.
pub fn chain(error: &dyn Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        text.push_str(": ");
        text.push_str(&cause.to_string());
        source = cause.source();
    }
    text
}

/// `text` as one line of at most `limit` bytes without control characters, for text that the
/// guest may have chosen.
pub fn one_line(text: &str, limit: usize) -> String {
    const CUT: char = '…';
    let mut line = String::new();
    for word in text.split(|c: char| c.is_whitespace() || c.is_control()) {
        if line.len() > limit {
            break;
        }
        if !word.is_empty() {
            if !line.is_empty() {
                line.push(' ');
            }
            line.push_str(word);
        }
    }
    if line.len() > limit {
        line.truncate(line.floor_char_boundary(limit.saturating_sub(CUT.len_utf8())));
        line.push(CUT);
    }
    line
}

/// The lines of a guest's console that tell why it ended, as one line; empty when there are none.
pub fn last_words(console: &str) -> String {
    const LINES: usize = 4;
    const LIMIT: usize = 600;
    let lines: Vec<&str> = console
        .lines()
        .map(without_timestamp)
        .filter(|line| !line.is_empty())
        .collect();
    let end = match lines
        .iter()
        .position(|line| line.starts_with("Kernel panic"))
    {
        // What follows a panic's first line is its register dump.
        Some(panic) => panic + 1,
        None => lines.len(),
    };
    let start = end.saturating_sub(LINES);
    one_line(&lines[start..end].join(" | "), LIMIT)
}

fn without_timestamp(line: &str) -> &str {
    let line = line.trim();
    match line.strip_prefix('[').and_then(|rest| rest.split_once(']')) {
        Some((time, rest)) if time.trim().bytes().all(|b| b.is_ascii_digit() || b == b'.') => {
            rest.trim()
        }
        _ => line,
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn a_panic_is_told_with_what_came_before() {
        let console = "[    0.1] one\n[    0.2] bulkhead-agent: cannot mount /proc: EPERM\n\
                       [    0.3] Kernel panic - not syncing: Attempted to kill init!\n\
                       [    0.4] CPU: 0 PID: 1\n";
        assert_eq!(
            last_words(console),
            "one | bulkhead-agent: cannot mount /proc: EPERM | \
             Kernel panic - not syncing: Attempted to kill init!"
        );
    }

    #[test]
    fn without_a_panic_the_last_lines_are_told() {
        assert_eq!(last_words("a\n\nb\nc\nd\ne\n"), "b | c | d | e");
        assert_eq!(last_words(""), "");
    }

    proptest! {
        #[test]
        fn a_line_is_bounded_and_harmless(text in "\\PC*|[\\x00-\\x7f]*", limit in 16usize..200) {
            let line = one_line(&text, limit);
            prop_assert!(line.len() <= limit);
            prop_assert!(!line.chars().any(char::is_control));
        }
    }
}
