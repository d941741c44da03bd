//! Data files: which ones a path names, their rows with line numbers, and their hashes.

pub(crate) mod json;
mod kind;

use std::ops::Range;
use std::path::{Path, PathBuf};

use sha2::{Digest, Sha256};

use self::kind::looks_like_data;
use crate::error::{BadReason, DataError, shown};

pub(crate) use self::kind::foreign_kind;

/// Extensions taken from a directory.
const EXTENSIONS: [&str; 3] = ["jsonl", "ndjson", "json"];

/// One row's bytes in its file, or why it has none.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct RawRow {
    /// The line it starts on, from 1.
    pub(crate) line: usize,
    pub(crate) bytes: Range<usize>,
}

/// The data files that paths name.
#[derive(Debug, Default)]
pub(crate) struct Files {
    pub(crate) files: Vec<PathBuf>,
    /// Files of given directories that look like data and are not read.
    pub(crate) left_out: Vec<PathBuf>,
}

/// The data files that `paths` name: files as they are, directories as their `.jsonl`, `.ndjson` and
/// `.json` files by name, hidden ones left out.
pub(crate) fn expand_paths(paths: &[PathBuf]) -> Result<Files, DataError> {
    if paths.is_empty() {
        return Err(DataError::NoPaths);
    }
    let mut all = Files::default();
    for path in paths {
        let read_error = |source| DataError::Read {
            path: path.clone(),
            source,
        };
        if !std::fs::metadata(path).map_err(read_error)?.is_dir() {
            all.files.push(path.clone());
            continue;
        }
        let mut found = Vec::new();
        let mut others = Vec::new();
        for entry in std::fs::read_dir(path).map_err(read_error)? {
            let file = entry.map_err(read_error)?.path();
            let name = file.file_name().unwrap_or_default().to_string_lossy();
            // `._rows.jsonl` is what macOS leaves beside a file, `.ipynb_checkpoints` an editor.
            if name.starts_with('.') {
                continue;
            }
            let extension = file
                .extension()
                .and_then(|e| e.to_str())
                .unwrap_or_default();
            if EXTENSIONS.contains(&extension.to_ascii_lowercase().as_str()) && file.is_file() {
                found.push(file);
            } else if file.is_dir() || looks_like_data(&name) {
                others.push(file);
            }
        }
        others.sort();
        if found.is_empty() {
            return Err(DataError::NoFiles {
                path: path.clone(),
                others: others.iter().map(|other| shown_name(other)).collect(),
            });
        }
        found.sort();
        all.files.append(&mut found);
        others.retain(|other| !other.is_dir());
        all.left_out.append(&mut others);
    }
    Ok(all)
}

/// A file's name for a message, a directory's with a slash.
fn shown_name(path: &Path) -> String {
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    match path.is_dir() {
        true => format!("{}/", shown(&name)),
        false => shown(&name),
    }
}

/// The rows of a file: the lines of JSONL, or the elements of one JSON array. Blank lines and a
/// byte-order mark are skipped.
pub(crate) fn split_rows_of(path: &Path, bytes: &[u8]) -> Vec<RawRow> {
    let start = if bytes.starts_with(b"\xEF\xBB\xBF") {
        3
    } else {
        0
    };
    let lines_only = path
        .extension()
        .is_some_and(|e| e.eq_ignore_ascii_case("jsonl") || e.eq_ignore_ascii_case("ndjson"));
    let mut content = bytes.iter().skip(start);
    let first = content.find(|b| !b.is_ascii_whitespace());
    if first == Some(&b'[') && !lines_only {
        array_elements(bytes, start)
    } else {
        spread_objects(bytes, start).unwrap_or_else(|| lines(bytes, start))
    }
}

/// The rows of a file that has each of its objects over several lines, as pretty-printers write them; `None` for any
/// other file, and where that does not give objects.
fn spread_objects(bytes: &[u8], start: usize) -> Option<Vec<RawRow>> {
    let rest = bytes.get(start..)?.trim_ascii_start();
    let line = rest.split(|&b| b == b'\n').next()?.trim_ascii_end();
    // A whole first row, or one that is broken in itself, is for the reader of lines.
    let is_start = |line: &[u8]| match serde_json::from_slice::<serde::de::IgnoredAny>(line) {
        Ok(_) => false,
        Err(error) => error.is_eof() && matches!(line, [b'{', ..]),
    };
    let cut_in_string = line.iter().filter(|&&b| b == b'"').count() % 2 == 1;
    if !is_start(line) || cut_in_string || line.len() == rest.trim_ascii_end().len() {
        return None;
    }
    let mut rows = Vec::new();
    let (mut depth, mut line) = (0usize, 1usize);
    let (mut in_string, mut escaped) = (false, false);
    let (mut first, mut first_line) = (start, 1);
    for (at, &byte) in bytes.iter().enumerate().skip(start) {
        if byte == b'\n' {
            line = line.saturating_add(1);
        }
        match byte {
            _ if escaped => escaped = false,
            b'\\' if in_string => escaped = true,
            b'"' => in_string = !in_string,
            _ if in_string => {}
            b'{' | b'[' => depth = depth.saturating_add(1),
            b'}' | b']' => {
                depth = depth.saturating_sub(1);
                if depth == 0 {
                    push_trimmed(&mut rows, bytes, first..at.saturating_add(1), first_line);
                    first = at.saturating_add(1);
                    first_line = line;
                }
            }
            _ => {}
        }
    }
    push_trimmed(&mut rows, bytes, first..bytes.len(), first_line);
    let first = bytes.get(rows.first()?.bytes.clone())?;
    serde_json::from_slice::<serde::de::IgnoredAny>(first).ok()?;
    Some(rows)
}

fn lines(bytes: &[u8], mut start: usize) -> Vec<RawRow> {
    let mut rows = Vec::new();
    let mut line: usize = 1;
    while let Some(rest @ [_, ..]) = bytes.get(start..) {
        let length = rest.iter().position(|&b| b == b'\n');
        let end = length.map_or(bytes.len(), |length| start.saturating_add(length));
        push_trimmed(&mut rows, bytes, start..end, line);
        start = end.saturating_add(1);
        line = line.saturating_add(1);
    }
    rows
}

/// The elements of the array that starts at or after `start`, found by nesting and strings alone, so
/// that a broken element is reported at its own line. What follows the array is a row too, and with
/// it an error.
fn array_elements(bytes: &[u8], start: usize) -> Vec<RawRow> {
    let mut rows = Vec::new();
    let mut line: usize = 1;
    let mut depth = 0usize;
    let mut in_string = false;
    let mut escaped = false;
    let mut element = start;
    let mut element_line = 1;
    let mut closed = false;
    for (at, &byte) in bytes.iter().enumerate().skip(start) {
        if byte == b'\n' {
            line = line.saturating_add(1);
        }
        if in_string {
            match byte {
                _ if escaped => escaped = false,
                b'\\' => escaped = true,
                b'"' => in_string = false,
                _ => {}
            }
            continue;
        }
        if closed {
            continue;
        }
        match byte {
            b'"' => in_string = true,
            b'[' | b'{' => {
                depth = depth.saturating_add(1);
                if depth == 1 {
                    element = at.saturating_add(1);
                    element_line = line;
                }
            }
            b']' | b'}' => {
                depth = depth.saturating_sub(1);
                if depth == 0 {
                    // A closing bracket directly after the opening one or a last comma.
                    push_trimmed(&mut rows, bytes, element..at, element_line);
                    element = at.saturating_add(1);
                    element_line = line;
                    closed = true;
                }
            }
            b',' if depth == 1 => {
                push_trimmed(&mut rows, bytes, element..at, element_line);
                element = at.saturating_add(1);
                element_line = line;
            }
            _ => {}
        }
    }
    push_trimmed(&mut rows, bytes, element..bytes.len(), element_line);
    rows
}

/// Adds `range` without the white space around it, where anything is left.
fn push_trimmed(rows: &mut Vec<RawRow>, bytes: &[u8], range: Range<usize>, line: usize) {
    let text = bytes.get(range.clone()).unwrap_or_default();
    let blank = |b: &u8| b.is_ascii_whitespace();
    let Some(first) = text.iter().position(|b| !blank(b)) else {
        return;
    };
    let last = text.iter().rposition(|b| !blank(b)).unwrap_or(first);
    let skipped = text.iter().take(first).filter(|&&b| b == b'\n').count();
    let at = |place: usize| range.start.saturating_add(place);
    rows.push(RawRow {
        line: line.saturating_add(skipped),
        bytes: at(first)..at(last).saturating_add(1),
    });
}

/// A row's JSON object.
pub(crate) fn parse_row(
    bytes: &[u8],
) -> Result<serde_json::Map<String, serde_json::Value>, BadReason> {
    let text = std::str::from_utf8(bytes).map_err(|error| BadReason::Utf8 {
        offset: error.valid_up_to(),
    })?;
    match json::parse(text.as_bytes()) {
        Ok(serde_json::Value::Object(map)) => Ok(map),
        Ok(other) => Err(BadReason::NotAnObject {
            found: type_name(&other),
        }),
        Err(detail) => Err(BadReason::Json { detail }),
    }
}

/// SHA-256 of `bytes`, in hexadecimal.
pub(crate) fn sha256_hex(bytes: &[u8]) -> String {
    use std::fmt::Write as _;
    let mut text = String::with_capacity(64);
    for byte in Sha256::digest(bytes) {
        let _ = write!(text, "{byte:02x}");
    }
    text
}

/// The JSON type of a value, in words.
pub(crate) fn type_name(value: &serde_json::Value) -> &'static str {
    use serde_json::Value;
    match value {
        Value::Null => "null",
        Value::Bool(_) => "a boolean",
        Value::Number(_) => "a number",
        Value::String(_) => "a string",
        Value::Array(_) => "a list",
        Value::Object(_) => "an object",
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    fn rows(name: &str, text: &str) -> Vec<(usize, String)> {
        split_rows_of(Path::new(name), text.as_bytes())
            .into_iter()
            .map(|row| (row.line, text[row.bytes].to_owned()))
            .collect()
    }

    #[test]
    fn lines_keep_their_numbers_past_blank_lines_bom_and_crlf() {
        assert_eq!(
            rows(
                "a.jsonl",
                "\u{FEFF}{\"a\":1}\r\n\r\n  \n {\"b\":2} \r\n{\"c\":3}"
            ),
            [
                (1, "{\"a\":1}".to_owned()),
                (4, "{\"b\":2}".to_owned()),
                (5, "{\"c\":3}".to_owned())
            ]
        );
        assert!(rows("a.jsonl", "").is_empty());
    }

    #[test]
    fn array_elements_start_on_their_own_lines() {
        assert_eq!(
            rows(
                "a.json",
                "[\n  {\"a\": \"],}\\\"\"},\n\n  {\"b\":\n [1, 2]}\n]\n"
            ),
            [
                (2, "{\"a\": \"],}\\\"\"}".to_owned()),
                (4, "{\"b\":\n [1, 2]}".to_owned())
            ]
        );
        assert!(rows("a.json", "[]").is_empty());
        // Broken: no closing bracket, text after the array.
        assert_eq!(
            rows("a.json", "[{\"a\":1},\n{\"b\"")[1],
            (2, "{\"b\"".to_owned())
        );
        assert_eq!(rows("a.json", "[1]\nx")[1], (2, "x".to_owned()));
    }

    #[test]
    fn a_json_file_with_one_object_a_line_is_read_by_lines() {
        assert_eq!(rows("a.json", "{\"a\":1}\n{\"a\":2}\n").len(), 2);
    }

    #[test]
    fn objects_over_several_lines_are_rows() {
        let text = "\u{feff}{\n \"a\": \"}\\\"\",\n \"b\": [1]\n}\n{\n}\n\n{\"c\":\n 1}\n x";
        let lines: Vec<usize> = rows("a.jsonl", text)
            .iter()
            .map(|(line, _)| *line)
            .collect();
        assert_eq!(lines, [1, 5, 8, 10]);
        // A first row that is cut short or broken stays one of lines.
        for broken in [
            "{\"a\": 1\n{\"a\": 2}\n",
            "{\"a\": \"x\n{\"a\": 2}\n",
            "{\n",
            "{x\n}",
        ] {
            let lines = broken.lines().count();
            assert_eq!(rows("a.jsonl", broken).len(), lines, "{broken}");
        }
    }

    #[test]
    fn directories_give_their_data_files_by_name() {
        let dir = tempfile::tempdir().unwrap();
        for name in ["b.jsonl", "a.JSON", "c.parquet", "README.md", ".b.jsonl"] {
            std::fs::write(dir.path().join(name), "").unwrap();
        }
        let found = expand_paths(&[dir.path().to_owned()]).unwrap();
        let names = |files: &[PathBuf]| -> Vec<_> {
            let names = files.iter().map(|f| f.file_name().unwrap());
            names
                .map(|name| name.to_str().unwrap().to_owned())
                .collect()
        };
        assert_eq!(names(&found.files), ["a.JSON", "b.jsonl"]);
        assert_eq!(names(&found.left_out), ["c.parquet"]);
        let empty = tempfile::tempdir().unwrap();
        std::fs::create_dir(empty.path().join("data")).unwrap();
        std::fs::write(empty.path().join("x.parquet"), "").unwrap();
        let error = expand_paths(&[empty.path().to_owned()]).unwrap_err();
        assert!(
            error.to_string().ends_with("there are: data/, x.parquet"),
            "{error}"
        );
        assert!(matches!(
            expand_paths(&[empty.path().to_owned()]),
            Err(DataError::NoFiles { .. })
        ));
        assert!(matches!(
            expand_paths(&[empty.path().join("none.jsonl")]),
            Err(DataError::Read { .. })
        ));
        assert!(matches!(expand_paths(&[]), Err(DataError::NoPaths)));
    }
}
