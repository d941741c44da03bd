//! What a file is that is no JSON lines, by its first bytes.

use std::path::Path;

/// What kind of file this is and what to do with it, where it is not one of rows as JSON text.
pub(crate) fn foreign_kind(path: &Path, bytes: &[u8]) -> Option<(&'static str, &'static str)> {
    const PANDAS: &str = "convert it to JSON lines, for instance with Python: \
        pandas.read_parquet(\"in.parquet\").to_json(\"out.jsonl\", orient=\"records\", lines=True)";
    const ARROW: &str = "convert it to JSON lines, for instance with Python: \
        datasets.Dataset.from_file(\"in.arrow\").to_json(\"out.jsonl\")";
    const SHEET: &str = "convert it to JSON lines, for instance with Python: \
        pandas.read_excel(\"in.xlsx\").to_json(\"out.jsonl\", orient=\"records\", lines=True)";
    const CSV: &str = "convert it to JSON lines, for instance with Python: \
        pandas.read_csv(\"in.csv\").to_json(\"out.jsonl\", orient=\"records\", lines=True)";
    const UNPACK: &str = "unpack it first";
    const OTHER: &str = "give a file of JSON lines";
    const UTF16: &str = "convert it to UTF-8, for instance with: iconv -f UTF-16 -t UTF-8 IN > OUT";
    const UTF32: &str = "convert it to UTF-8, for instance with: iconv -f UTF-32 -t UTF-8 IN > OUT";
    // The longer of two that begin alike comes first.
    const KINDS: &[(&[u8], &str, &str)] = &[
        (b"PAR1", "a Parquet file", PANDAS),
        (b"PARE", "an encrypted Parquet file", PANDAS),
        (b"ARROW1", "an Arrow file", ARROW),
        (b"\xFF\xFF\xFF\xFF", "an Arrow stream", ARROW),
        (b"FEA1", "a Feather file", ARROW),
        (b"ORC", "an ORC file", OTHER),
        (b"Obj\x01", "an Avro file", OTHER),
        (
            b"\x1F\x8B",
            "compressed with gzip",
            "unpack it first: gzip -d FILE",
        ),
        (
            b"\x28\xB5\x2F\xFD",
            "compressed with zstd",
            "unpack it first: zstd -d FILE",
        ),
        (
            b"\xFD7zXZ\x00",
            "compressed with xz",
            "unpack it first: xz -d FILE",
        ),
        (
            b"BZh",
            "compressed with bzip2",
            "unpack it first: bzip2 -d FILE",
        ),
        (
            b"\x04\x22\x4D\x18",
            "compressed with lz4",
            "unpack it first: lz4 -d FILE",
        ),
        (b"7z\xBC\xAF\x27\x1C", "a 7-zip archive", UNPACK),
        (b"Rar!", "a RAR archive", UNPACK),
        (b"\xD0\xCF\x11\xE0", "an old Excel or Word file", SHEET),
        (b"%PDF", "a PDF file", OTHER),
        (b"SQLite format 3\0", "an SQLite database", OTHER),
        (b"\x93NUMPY", "a NumPy array", OTHER),
        (b"\x89HDF", "an HDF5 file", OTHER),
        (b"\x89PNG", "an image", OTHER),
        (b"\xFF\xD8\xFF", "an image", OTHER),
        (b"GGUF", "a GGUF model", OTHER),
        (b"\xFF\xFE\x00\x00", "text in UTF-32", UTF32),
        (b"\x00\x00\xFE\xFF", "text in UTF-32", UTF32),
        (b"\xFF\xFE", "text in UTF-16", UTF16),
        (b"\xFE\xFF", "text in UTF-16", UTF16),
        (
            b"version https://git-lfs.github.com/",
            "a pointer of Git LFS, not the file it stands for",
            "fetch the file: git lfs pull",
        ),
    ];
    let begins = |magic: &&(&[u8], &str, &str)| bytes.starts_with(magic.0);
    if let Some((_, kind, advice)) = KINDS.iter().find(begins) {
        return Some((kind, advice));
    }
    let head = bytes.get(..4096).unwrap_or(bytes);
    if bytes.starts_with(b"PK\x03\x04") {
        let is_sheet = head.windows(3).any(|w| w == b"xl/")
            || head.windows(19).any(|w| w == b"[Content_Types].xml");
        return Some(match is_sheet {
            true => ("an Excel workbook", SHEET),
            false => ("a zip archive", UNPACK),
        });
    }
    // Text of ASCII letters has a zero byte beside each of them.
    match head {
        [0, 0, 0, b, ..] if *b != 0 => return Some(("text in UTF-32", UTF32)),
        [b, 0, 0, 0, ..] if *b != 0 => return Some(("text in UTF-32", UTF32)),
        [0, b'{' | b'[', 0, _, ..] | [b'{' | b'[', 0, _, 0, ..] => {
            return Some(("text in UTF-16", UTF16));
        }
        _ => {}
    }
    let text = head.trim_ascii_start();
    let lower = text.get(..15).unwrap_or(text).to_ascii_lowercase();
    if lower.starts_with(b"<!doctype html") || lower.starts_with(b"<html") {
        return Some((
            "a web page, perhaps one that says why the data could not be fetched",
            "fetch the data again",
        ));
    }
    let extension = path
        .extension()
        .and_then(|e| e.to_str())
        .unwrap_or_default();
    if matches!(text.first(), None | Some(b'{' | b'[')) {
        return None;
    }
    let (commas, tabs) = (
        "a table of comma-separated values",
        "a table of tab-separated values",
    );
    match extension.to_ascii_lowercase().as_str() {
        "csv" => Some((commas, CSV)),
        "tsv" => Some((tabs, CSV)),
        _ if is_header(text, b'\t') => Some((tabs, CSV)),
        _ if is_header(text, b',') => Some((commas, CSV)),
        _ => None,
    }
}

/// Whether the first line is a table's: names of columns, several or one that rows are known to have.
fn is_header(text: &[u8], separator: u8) -> bool {
    const COLUMNS: [&[u8]; 6] = [
        b"text",
        b"messages",
        b"prompt",
        b"instruction",
        b"conversations",
        b"input_ids",
    ];
    let text = text.strip_prefix(b"\xEF\xBB\xBF").unwrap_or(text);
    let line = text.split(|&b| b == b'\n').next().unwrap_or_default();
    let names: Vec<&[u8]> = line
        .trim_ascii_end()
        .split(|&b| b == separator)
        .map(|name| match name {
            [b'"', name @ .., b'"'] => name,
            name => name,
        })
        .collect();
    let is_name = |name: &&[u8]| {
        let letter = |b: &u8| b.is_ascii_alphanumeric() || b"_- .".contains(b);
        name.first().is_some_and(u8::is_ascii_alphabetic) && name.iter().all(letter)
    };
    // A line of JSON that is no object may look like it, but for the line's end.
    let several = names.len() > 1 && text.len() > line.len();
    let is_known = separator == b',' && names.iter().any(|name| COLUMNS.contains(name));
    names.iter().all(is_name) && (several || is_known)
}

/// Whether a file's name says that it holds data of a kind that is not read.
pub(crate) fn looks_like_data(name: &str) -> bool {
    const EXTENSIONS: [&str; 15] = [
        "parquet", "arrow", "feather", "csv", "tsv", "txt", "gz", "zst", "xz", "bz2", "zip", "7z",
        "xlsx", "xls", "orc",
    ];
    let extension = name.rsplit_once('.').map_or("", |(_, extension)| extension);
    EXTENSIONS.contains(&extension.to_ascii_lowercase().as_str())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn kind(name: &str, bytes: &[u8]) -> &'static str {
        foreign_kind(Path::new(name), bytes).map_or("", |(kind, _)| kind)
    }

    #[test]
    fn files_are_known_by_their_first_bytes() {
        let utf16: Vec<u8> = "{\"text\""
            .encode_utf16()
            .flat_map(u16::to_le_bytes)
            .collect();
        let big: Vec<u8> = "{\"text\""
            .encode_utf16()
            .flat_map(u16::to_be_bytes)
            .collect();
        let utf32: Vec<u8> = "{\"a"
            .chars()
            .flat_map(|c| (c as u32).to_le_bytes())
            .collect();
        for (bytes, expected) in [
            (b"PAR1\x15\x04".to_vec(), "a Parquet file"),
            (b"\x1F\x8B\x08\x00".to_vec(), "compressed with gzip"),
            (b"\x28\xB5\x2F\xFD\x24".to_vec(), "compressed with zstd"),
            (b"ARROW1\0\0".to_vec(), "an Arrow file"),
            (b"\xFF\xFF\xFF\xFF\x10\0\0\0".to_vec(), "an Arrow stream"),
            (
                b"PK\x03\x04....[Content_Types].xml".to_vec(),
                "an Excel workbook",
            ),
            (b"PK\x03\x04....rows.jsonl".to_vec(), "a zip archive"),
            (
                [b"\xFF\xFE".to_vec(), utf16.clone()].concat(),
                "text in UTF-16",
            ),
            (utf16, "text in UTF-16"),
            (big, "text in UTF-16"),
            (b"\xFF\xFE\0\0{\0\0\0".to_vec(), "text in UTF-32"),
            (utf32, "text in UTF-32"),
            (
                b"\n<!DOCTYPE html><html>".to_vec(),
                "a web page, perhaps one that says why the data could not be fetched",
            ),
        ] {
            assert_eq!(kind("rows.jsonl", &bytes), expected, "{bytes:?}");
        }
        assert_eq!(
            kind("a.csv", b"prompt,completion\n"),
            "a table of comma-separated values"
        );
        for (text, expected) in [
            (
                "prompt,completion\na,b\n",
                "a table of comma-separated values",
            ),
            (
                "\u{FEFF}\"id\",\"the text\"\r\n1,2\r\n",
                "a table of comma-separated values",
            ),
            ("text\nHello\n", "a table of comma-separated values"),
            (
                "prompt\tcompletion\na\tb\n",
                "a table of tab-separated values",
            ),
        ] {
            assert_eq!(kind("rows.jsonl", text.as_bytes()), expected, "{text}");
        }
        for rows in [
            "{\"text\": 1}",
            "\u{FEFF}{}",
            "",
            "\n[{}]",
            "[1]",
            "{}",
            "NaN",
            "null\n",
            "Hello, there\n{\"text\": 1}",
            "no rows at all\n",
        ] {
            assert_eq!(kind("rows.jsonl", rows.as_bytes()), "", "{rows}");
        }
        assert_eq!(kind("a.csv", b"{\"text\": 1}"), "");
    }
}
