//! Reading, encoding and truncating the rows of data files, whatever a task makes of them.

use std::collections::BTreeMap;
use std::ops::Range;
use std::path::Path;
use std::sync::Arc;

use serde_json::{Map, Value};

use super::{DataFile, DataSpec, Note, OnBadRow, RowCount, Rows, Truncation, bad_rows};
use crate::error::{BadReason, BadRow, DataError, RowRef};
use crate::files::{RawRow, expand_paths, foreign_kind, parse_row, sha256_hex, split_rows_of};
use crate::records::{EncodedRow, Remark};

/// What a task makes of the rows of data files.
pub(super) trait Reading: Sync {
    /// How a file's rows are laid out.
    type Format: Copy + Send + Sync;
    /// What is trained of a row.
    type Labels: Labels;
    /// What comes of a row.
    type Row;

    /// The format of all files, if the recipe names one.
    fn given(&self) -> Option<Self::Format>;
    /// The format that a row's keys say it has.
    fn detect(&self, row: &Map<String, Value>) -> Option<Self::Format>;
    /// The format of a file of which no row has any.
    fn unknown(&self) -> Self::Format;
    /// A format's name, for messages.
    fn name(format: Self::Format) -> &'static str;
    /// The columns of a row that nothing reads.
    ///
    /// # Errors
    /// Columns that would change the training elsewhere.
    fn unused<'r>(
        &self,
        format: Self::Format,
        row: &'r Map<String, Value>,
    ) -> Result<Vec<&'r str>, BadReason>;
    /// The row as ids and labels.
    fn encode(
        &self,
        format: Self::Format,
        row: &Map<String, Value>,
    ) -> Result<EncodedRow<Self::Labels>, BadReason>;
    /// The row with its place among the others.
    fn row(ids: Vec<u32>, labels: Self::Labels, source: RowRef, index: usize) -> Self::Row;
}

/// What is trained of a row.
pub(super) trait Labels: Send {
    /// Whether anything is.
    fn any(&self) -> bool;
    /// Keeps what belongs to these of the row's tokens.
    fn keep(&mut self, tokens: Range<usize>);
}

/// Reads, encodes and checks all rows of `spec`. The result does not depend on the number of threads.
///
/// # Errors
/// [`DataError::BadRows`] names all bad rows at once; [`DataError::NoRows`] where nothing is left.
pub(super) fn load<K: Reading>(spec: &DataSpec, reading: &K) -> Result<Rows<K::Row>, DataError> {
    if let Some(max_length @ 0..2) = spec.max_length {
        return Err(DataError::Spec {
            field: "max_length",
            detail: format!("must be at least 2, is {max_length}"),
        });
    }
    let mut all = Rows::default();
    let mut bad = Vec::new();
    let mut unclosed = RowCount::default();
    let mut straddling = RowCount::default();
    let mut remarks: BTreeMap<Remark, RowCount> = BTreeMap::new();
    let found = expand_paths(&spec.paths)?;
    for path in found.files {
        let bytes = std::fs::read(&path).map_err(|source| DataError::Read {
            path: path.clone(),
            source,
        })?;
        if let Some((kind, advice)) = foreign_kind(&path, &bytes) {
            return Err(DataError::ForeignFile { path, kind, advice });
        }
        let rows = split_rows_of(&path, &bytes);
        let format = match reading.given() {
            None => detect_format(&rows, &bytes, spec, reading),
            Some(format) => format,
        };
        all.files.push(DataFile {
            path: path.clone(),
            sha256: sha256_hex(&bytes),
            format: K::name(format),
            rows: rows.len(),
        });
        let file: Arc<Path> = Arc::from(path.as_path());
        let (outcomes, unused) = encode_rows(&rows, &bytes, format, spec, reading);
        if !unused.is_empty() {
            all.notes
                .push(Note::unused_columns(&path, K::name(format), unused));
        }
        for (row, outcome) in rows.iter().zip(outcomes) {
            let source = RowRef {
                file: Arc::clone(&file),
                line: row.line,
            };
            match outcome {
                Ok(Fitted::Dropped) => all.dropped = all.dropped.saturating_add(1),
                Ok(Fitted::Kept { row, truncated }) => {
                    let truncated = usize::from(truncated);
                    all.truncated = all.truncated.saturating_add(truncated);
                    unclosed.count(!row.closed, &source);
                    straddling.count(row.straddling > 0, &source);
                    for remark in row.remarks {
                        remarks.entry(remark).or_default().count(true, &source);
                    }
                    let index = all.rows.len();
                    all.rows.push(K::row(row.ids, row.labels, source, index));
                }
                Err(BadReason::NoChatTemplate) => {
                    return Err(DataError::NoChatTemplate { row: source });
                }
                Err(BadReason::NoTokenizer { reason }) => {
                    let row = Some(source);
                    return Err(DataError::NoTokenizer { row, reason });
                }
                Err(reason) => bad.push(BadRow { source, reason }),
            }
        }
    }
    if !bad.is_empty() && spec.on_bad_row == OnBadRow::Error {
        return Err(bad_rows(bad));
    }
    all.skipped = bad;
    if all.rows.is_empty() {
        return Err(no_rows(&all));
    }
    if let Some((rows, first)) = unclosed.found() {
        all.notes.push(Note::NoEndOfTurn { rows, first });
    }
    if let Some((rows, first)) = straddling.found() {
        all.notes.push(Note::StraddlingToken { rows, first });
    }
    for (remark, count) in remarks {
        if let Some((rows, first)) = count.found() {
            all.notes.push(Note::Remark {
                remark,
                rows,
                first,
            });
        }
    }
    if !found.left_out.is_empty() {
        all.notes.push(Note::FilesLeftOut {
            files: found.left_out,
        });
    }
    Ok(all)
}

/// A row after truncation.
enum Fitted<L> {
    Kept { row: EncodedRow<L>, truncated: bool },
    Dropped,
}

/// A row's object without the columns that are to be ignored.
fn read_row(row: &RawRow, bytes: &[u8], spec: &DataSpec) -> Result<Map<String, Value>, BadReason> {
    let bytes = bytes.get(row.bytes.clone()).unwrap_or_default();
    let mut object = parse_row(bytes)?;
    if !spec.ignore_columns.is_empty() {
        object.retain(|name, _| !spec.ignore_columns.contains(name));
    }
    Ok(object)
}

/// The format of the first row that is readable and has a format's keys.
fn detect_format<K: Reading>(
    rows: &[RawRow],
    bytes: &[u8],
    spec: &DataSpec,
    reading: &K,
) -> K::Format {
    rows.iter()
        .filter_map(|row| read_row(row, bytes, spec).ok())
        .find_map(|row| reading.detect(&row))
        .unwrap_or_else(|| reading.unknown())
}

/// Columns that no row's format reads, with the number of rows that have them.
type Unused = BTreeMap<String, usize>;

type Outcome<L> = Result<Fitted<L>, BadReason>;

/// Encodes rows on all cores; results are in row order.
fn encode_rows<K: Reading>(
    rows: &[RawRow],
    bytes: &[u8],
    format: K::Format,
    spec: &DataSpec,
    reading: &K,
) -> (Vec<Outcome<K::Labels>>, Unused) {
    // Rows may each have columns of their own.
    const MOST_COLUMNS: usize = 1000;
    let encode = |row: &RawRow, unused: &mut Unused| -> Outcome<K::Labels> {
        let object = read_row(row, bytes, spec)?;
        for name in reading.unused(format, &object)? {
            if let Some(count) = unused.get_mut(name) {
                *count = count.saturating_add(1);
            } else if unused.len() < MOST_COLUMNS {
                unused.insert(name.to_owned(), 1);
            }
        }
        fit(reading.encode(format, &object)?, spec)
    };
    let encode_all = |rows: &[RawRow]| {
        let mut unused = Unused::new();
        let outcomes = rows.iter().map(|row| encode(row, &mut unused));
        (outcomes.collect::<Vec<_>>(), unused)
    };
    // Below this many rows a thread costs more than it saves.
    const ROWS_PER_THREAD: usize = 64;
    let threads = std::thread::available_parallelism()
        .map_or(1, usize::from)
        .min(rows.len() / ROWS_PER_THREAD);
    if threads < 2 {
        return encode_all(rows);
    }
    let encode_all = &encode_all;
    std::thread::scope(|scope| {
        let workers: Vec<_> = rows
            .chunks(rows.len().div_ceil(threads))
            .map(|chunk| scope.spawn(move || encode_all(chunk)))
            .collect();
        let mut outcomes = Vec::with_capacity(rows.len());
        let mut unused = Unused::new();
        for worker in workers {
            match worker.join() {
                Ok((some, columns)) => {
                    outcomes.extend(some);
                    for (name, count) in columns {
                        let sum = unused.entry(name).or_default();
                        *sum = usize::saturating_add(*sum, count);
                    }
                }
                Err(panic) => std::panic::resume_unwind(panic),
            }
        }
        (outcomes, unused)
    })
}

/// Truncates a row as `spec` says and refuses one in which nothing is trained.
fn fit<L: Labels>(mut row: EncodedRow<L>, spec: &DataSpec) -> Result<Fitted<L>, BadReason> {
    if !row.labels.any() {
        return Err(BadReason::NothingTrained {
            detail: "every label is ignored".to_owned(),
        });
    }
    let tokens = row.ids.len();
    let Some(max_length) = spec.max_length.filter(|&max| tokens > max) else {
        return Ok(Fitted::Kept {
            row,
            truncated: false,
        });
    };
    let (kept, side) = match spec.truncation {
        Truncation::Error => return Err(BadReason::TooLong { tokens, max_length }),
        Truncation::Drop => return Ok(Fitted::Dropped),
        Truncation::KeepStart => (0..max_length, "first"),
        Truncation::KeepEnd => (tokens.saturating_sub(max_length)..tokens, "last"),
    };
    row.ids.truncate(kept.end);
    row.ids.drain(..kept.start);
    row.labels.keep(kept);
    if !row.labels.any() {
        return Err(BadReason::NothingTrained {
            detail: format!(
                "the {side} {max_length} of {tokens} tokens hold none; raise max_length"
            ),
        });
    }
    Ok(Fitted::Kept {
        row,
        truncated: true,
    })
}

fn no_rows<R>(all: &Rows<R>) -> DataError {
    let files: Vec<String> = all
        .files
        .iter()
        .map(|file| file.path.display().to_string())
        .collect();
    let mut detail = Vec::new();
    if all.dropped > 0 {
        detail.push(format!("{} dropped as too long", all.dropped));
    }
    if let Some(first) = all.skipped.first() {
        detail.push(format!("{} skipped, first {first}", all.skipped.len()));
    }
    DataError::NoRows {
        files: files.join(", "),
        detail: match detail.is_empty() {
            true => ": there are no rows".to_owned(),
            false => format!(": {}", detail.join("; ")),
        },
    }
}
