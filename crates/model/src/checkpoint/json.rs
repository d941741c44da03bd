//! JSON files of a repository: what people's tools make of them, read or named.

use std::borrow::Cow;

use serde::de::DeserializeOwned;

/// The start of a Git LFS pointer, which lies where a file would be that was never fetched.
pub(super) const POINTER: &[u8] = b"version https://git-lfs.github.com/spec/";

/// What `bytes` say. A UTF-8 byte order mark is skipped; `NaN` and `Infinity`, which Python writes and JSON has
/// not, come as texts, so that whoever needs a number there refuses them.
///
/// # Errors
/// What is wrong, with line and column or what the file is instead of JSON.
pub fn parse<T: DeserializeOwned>(bytes: &[u8]) -> Result<T, String> {
    let bytes = bytes.strip_prefix(b"\xEF\xBB\xBF").unwrap_or(bytes);
    if let Some(instead) = instead(bytes) {
        return Err(instead.to_owned());
    }
    serde_json::from_slice(&quoted(bytes)).map_err(|error| format!("not valid JSON: {error}"))
}

/// What bytes are that are no text.
pub(super) fn instead(bytes: &[u8]) -> Option<&'static str> {
    if bytes.is_empty() {
        return Some("it is empty; was it fetched to its end?");
    }
    let starts: [(&[u8], &str); 4] = [
        (
            POINTER,
            "it is a Git LFS pointer, not the file itself; fetch that with `git lfs pull`",
        ),
        (b"\xFF\xFE", "it is UTF-16; save it as UTF-8"),
        (b"\xFE\xFF", "it is UTF-16; save it as UTF-8"),
        (b"\x1F\x8B", "it is compressed with gzip; unpack it"),
    ];
    let found = starts
        .into_iter()
        .find(|(start, _)| bytes.starts_with(start));
    found.map(|(_, text)| text)
}

/// The same with quotation marks about the words for numbers that are none. Lines stay as they are, and columns
/// up to the first such word of a line.
fn quoted(bytes: &[u8]) -> Cow<'_, [u8]> {
    const WORDS: [&[u8]; 3] = [b"NaN", b"Infinity", b"-Infinity"];
    let mut out: Vec<u8> = Vec::new();
    let (mut rest, mut kept, mut in_text) = (bytes, bytes, false);
    while let Some((&byte, after)) = rest.split_first() {
        let word = WORDS
            .into_iter()
            .find(|word| !in_text && rest.starts_with(word));
        rest = match (byte, word) {
            (b'"', _) => {
                in_text = !in_text;
                after
            }
            (b'\\', _) if in_text => after.get(1..).unwrap_or_default(),
            (_, Some(word)) => {
                out.extend(
                    kept.get(..kept.len().saturating_sub(rest.len()))
                        .unwrap_or_default(),
                );
                out.push(b'"');
                out.extend(word);
                out.push(b'"');
                kept = rest.get(word.len()..).unwrap_or_default();
                kept
            }
            _ => after,
        };
    }
    match out.is_empty() {
        true => Cow::Borrowed(bytes),
        false => {
            out.extend(kept);
            Cow::Owned(out)
        }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use serde_json::{Value, json};

    #[test]
    fn a_byte_order_mark_and_pythons_numbers_are_read() {
        let text = "\u{FEFF}{\"a\": NaN, \"b\": [-Infinity, Infinity], \"NaN\": \"x \\\" NaN \\\\\", \"c\": NaN}";
        let value: Value = parse(text.as_bytes()).unwrap();
        assert_eq!(
            value,
            json!({"a": "NaN", "b": ["-Infinity", "Infinity"], "NaN": "x \" NaN \\", "c": "NaN"})
        );
    }

    #[test]
    fn faults_have_a_place_or_a_name() {
        let fault = |bytes: &[u8]| parse::<Value>(bytes).unwrap_err();
        assert!(fault(b"{\n \"a\": 1,\n}").contains("line 3 column 1"));
        assert!(fault(b"{\"a\": NaN,\n \"b\" 1}").contains("line 2 column 6"));
        assert!(fault(b"").contains("empty"));
        assert!(fault(b"\xFF\xFE{\0}\0").contains("UTF-16"));
        assert!(fault(b"\x1F\x8B\x08").contains("gzip"));
        assert!(fault(b"version https://git-lfs.github.com/spec/v1\noid").contains("git lfs pull"));
        assert!(fault(b"{\"a\": NaNa}").contains("line 1"));
        assert!(fault(b"\"a\\").contains("line 1"));
    }
}
