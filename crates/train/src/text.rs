//! Text for people: numbers, durations, and what others wrote made visible, so that a data file, a tensor's
//! name or a template cannot move a cursor, set a window's title, write to a clipboard or turn a line around.
use std::borrow::Cow;
use std::sync::Arc;

/// `text` with its control characters written as JSON writes them (`\u001b`), line breaks and tabs aside.
///
/// Control characters are Unicode's categories Cc (C0, DEL and C1) and, as they show a line in another order
/// than it is read (CVE-2021-42574), the marks that embed, override and isolate directions, and the two
/// separators that break a line in some programs.
pub fn shown(text: &str) -> Cow<'_, str> {
    if !text.contains(is_hidden) {
        return Cow::Borrowed(text);
    }
    let mut out = String::with_capacity(text.len() + 16);
    for c in text.chars() {
        if is_hidden(c) {
            // All of them are in the first plane.
            out.push_str(&format!("\\u{:04x}", u32::from(c)));
        } else {
            out.push(c);
        }
    }
    Cow::Owned(out)
}

fn is_hidden(c: char) -> bool {
    let direction = matches!(c, '\u{202a}'..='\u{202e}' | '\u{2066}'..='\u{2069}');
    let separator = matches!(c, '\u{2028}' | '\u{2029}');
    (c.is_control() && c != '\n' && c != '\t') || direction || separator
}

/// `text` as one word of a shell's command.
pub fn quoted(text: &str) -> String {
    let plain = |c: char| c.is_alphanumeric() || "/._-+:@%,=".contains(c);
    match !text.is_empty() && text.chars().all(plain) {
        true => text.to_owned(),
        false => format!("'{}'", text.replace('\'', "'\\''")),
    }
}

/// Bytes in binary units.
pub fn bytes_text(bytes: usize) -> String {
    const UNITS: [&str; 4] = ["KiB", "MiB", "GiB", "TiB"];
    let mut value = bytes as f64 / 1024.0;
    let mut unit = 0;
    while value >= 1024.0 && unit + 1 < UNITS.len() {
        value /= 1024.0;
        unit += 1;
    }
    format!("{value:.1} {}", UNITS[unit])
}

/// `1234567` as `1,234,567`.
pub fn thousands(n: u64) -> String {
    let digits = n.to_string();
    let mut out = String::new();
    for (i, d) in digits.chars().enumerate() {
        if i > 0 && (digits.len() - i).is_multiple_of(3) {
            out.push(',');
        }
        out.push(d);
    }
    out
}

/// `1h 02m`, `3m 20s` or `45s`.
pub fn duration_text(seconds: f64) -> String {
    let s = seconds.max(0.0).round() as u64;
    match (s / 3600, s / 60 % 60, s % 60) {
        (0, 0, s) => format!("{s}s"),
        (0, m, s) => format!("{m}m {s:02}s"),
        (h, m, _) => format!("{h}h {m:02}m"),
    }
}

/// Says one line to the person who waits.
pub type LogLine = Arc<dyn Fn(&str) + Send + Sync>;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_word_of_a_command_is_one_word() {
        for (text, expected) in [
            ("runs/a-1.b", "runs/a-1.b"),
            ("", "''"),
            ("my runs/a", "'my runs/a'"),
            ("it's $HOME", "'it'\\''s $HOME'"),
        ] {
            assert_eq!(quoted(text), expected);
        }
    }

    #[test]
    fn what_a_terminal_would_obey_is_shown() {
        for (text, expected) in [
            (
                "plain, with\ttabs\nand ümläuts 😀",
                "plain, with\ttabs\nand ümläuts 😀",
            ),
            ("\x1b]0;title\x07", "\\u001b]0;title\\u0007"),
            ("\x1b[2J", "\\u001b[2J"),
            ("over\rwritten", "over\\u000dwritten"),
            ("\u{9b}31m \u{7f}", "\\u009b31m \\u007f"),
            ("user\u{202e}nimda", "user\\u202enimda"),
            ("\u{2066}\u{2028}", "\\u2066\\u2028"),
        ] {
            assert_eq!(shown(text), expected);
        }
    }

    #[test]
    fn json_stays_json() {
        let json = "{\"a\": \"\u{85}\u{7f}\"}";
        let value = |text: &str| serde_json::from_str::<serde_json::Value>(text).ok();
        assert!(value(json).is_some());
        assert_eq!(value(&shown(json)), value(json));
    }

    #[test]
    fn thousands_are_grouped() {
        for (n, text) in [
            (0, "0"),
            (999, "999"),
            (1000, "1,000"),
            (4_884_480, "4,884,480"),
        ] {
            assert_eq!(thousands(n), text);
        }
    }

    #[test]
    fn durations_read_well() {
        assert_eq!(duration_text(44.6), "45s");
        assert_eq!(duration_text(200.0), "3m 20s");
        assert_eq!(duration_text(3720.0), "1h 02m");
    }

    #[test]
    fn numbers_read_well() {
        assert_eq!(bytes_text(19_537_920), "18.6 MiB");
    }
}
