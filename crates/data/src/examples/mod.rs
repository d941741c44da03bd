//! From data files to examples: reading, encoding, truncating, and saying what became of every row.

mod note;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use crate::error::{BAD_ROWS_SHOWN, BadReason, BadRow, DataError, RowRef};
use crate::files::{RawRow, expand_paths, foreign_kind, parse_row, sha256_hex, split_rows_of};
use crate::masks::{IGNORED, TrainOn};
use crate::records::{EncodedRow, RecordContext, RecordFormat, Remark, check_arguments};
use crate::tokenizer::Tokenizer;

pub use note::Note;

/// Which data, and what to do with rows that do not fit.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct DataSpec {
    /// Files and directories, in order.
    pub paths: Vec<PathBuf>,
    /// The rows' format.
    pub format: RecordFormat,
    /// The longest row, in tokens; `None` is no limit.
    pub max_length: Option<usize>,
    /// What happens to longer rows.
    pub truncation: Truncation,
    /// What happens to rows that cannot be trained on.
    pub on_bad_row: OnBadRow,
    /// Which tokens are trained (formats `messages` and `prompt_completion`).
    pub train_on: TrainOn,
    /// Further variables for the chat template; a row's `chat_template_kwargs` come before them.
    pub template_arguments: Map<String, Value>,
    /// Columns to read rows without, as if they were not there.
    pub ignore_columns: Vec<String>,
}

/// What happens to a row longer than `max_length`.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Truncation {
    /// It is a bad row.
    #[default]
    Error,
    /// Its first `max_length` tokens are kept.
    KeepStart,
    /// Its last `max_length` tokens are kept.
    KeepEnd,
    /// It is left out and counted.
    Drop,
}

/// What happens to a bad row.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum OnBadRow {
    /// All bad rows are reported in one error.
    #[default]
    Error,
    /// It is left out and listed.
    Skip,
}

/// One row ready to train on.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Example {
    /// Token ids.
    pub input_ids: Vec<u32>,
    /// `labels[i]` is the label of token `i` ([`IGNORED`] where it is not trained); the model shifts.
    pub labels: Vec<i64>,
    /// Where the row came from.
    pub source: RowRef,
    /// Its position among the examples it was loaded with.
    pub index: usize,
}

impl Example {
    /// Tokens that are predicted and trained: labels at position 1 and later that are not ignored
    /// (nothing precedes the first token, so nothing predicts it).
    pub fn trained_tokens(&self) -> usize {
        trained_tokens(&self.labels)
    }
}

/// A data file as it was read.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DataFile {
    /// Its path, as given.
    pub path: PathBuf,
    /// SHA-256 of its bytes, in hexadecimal.
    pub sha256: String,
    /// The format its rows were read in.
    pub format: RecordFormat,
    /// How many rows it has, good and bad.
    pub rows: usize,
}

/// Everything that came out of the data files.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Examples {
    /// The rows to train on, in file order.
    pub rows: Vec<Example>,
    /// Bad rows that were left out (`on_bad_row = "skip"`).
    pub skipped: Vec<BadRow>,
    /// How many of `rows` were shortened.
    pub truncated: usize,
    /// How many rows `truncation = "drop"` left out.
    pub dropped: usize,
    /// What is worth saying.
    pub notes: Vec<Note>,
    /// The files, in order.
    pub files: Vec<DataFile>,
}

impl Examples {
    /// All tokens of all rows.
    pub fn tokens(&self) -> usize {
        self.rows.iter().map(|row| row.input_ids.len()).sum()
    }

    /// The tokens that are predicted and trained.
    pub fn trained_tokens(&self) -> usize {
        self.rows.iter().map(Example::trained_tokens).sum()
    }

    /// Adds a note where rows have more tokens than a model of `positions` positions was made for.
    pub fn note_positions(&mut self, positions: usize) {
        let mut past = RowCount::default();
        let mut longest = 0;
        for row in &self.rows {
            past.count(row.input_ids.len() > positions, &row.source);
            longest = longest.max(row.input_ids.len());
        }
        if let Some((rows, first)) = past.found() {
            self.notes.push(Note::PastPositions {
                rows,
                first,
                longest,
                positions,
            });
        }
    }
}

/// Reads, encodes and checks all rows of `spec`. The result does not depend on the number of threads.
///
/// # Errors
/// [`DataError::BadRows`] names all bad rows at once (the first [`BAD_ROWS_SHOWN`] in words);
/// [`DataError::NoRows`] where nothing is left.
pub fn load_examples(spec: &DataSpec, tokenizer: &Tokenizer) -> Result<Examples, DataError> {
    if let Some(max_length @ 0..2) = spec.max_length {
        return Err(DataError::Spec {
            field: "max_length",
            detail: format!("must be at least 2, is {max_length}"),
        });
    }
    check_arguments(&spec.template_arguments).map_err(|detail| DataError::Spec {
        field: "chat_template_kwargs",
        detail,
    })?;
    let context = RecordContext {
        tokenizer,
        train_on: spec.train_on,
        template_arguments: &spec.template_arguments,
    };
    let mut examples = Examples::default();
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
        let format = match spec.format {
            RecordFormat::Auto => detect_format(&rows, &bytes, spec),
            format => format,
        };
        examples.files.push(DataFile {
            path: path.clone(),
            sha256: sha256_hex(&bytes),
            format,
            rows: rows.len(),
        });
        let file: Arc<Path> = Arc::from(path.as_path());
        let (outcomes, unused) = encode_rows(&rows, &bytes, format, spec, &context);
        if !unused.is_empty() {
            examples
                .notes
                .push(Note::unused_columns(&path, format, unused));
        }
        for (row, outcome) in rows.iter().zip(outcomes) {
            let source = RowRef {
                file: Arc::clone(&file),
                line: row.line,
            };
            match outcome {
                Ok(Fitted::Dropped) => examples.dropped = examples.dropped.saturating_add(1),
                Ok(Fitted::Kept { row, truncated }) => {
                    let truncated = usize::from(truncated);
                    examples.truncated = examples.truncated.saturating_add(truncated);
                    unclosed.count(!row.closed, &source);
                    straddling.count(row.straddling > 0, &source);
                    for remark in row.remarks {
                        remarks.entry(remark).or_default().count(true, &source);
                    }
                    examples.rows.push(Example {
                        input_ids: row.ids,
                        labels: row.labels,
                        source,
                        index: examples.rows.len(),
                    });
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
        let total = bad.len();
        bad.truncate(BAD_ROWS_SHOWN);
        return Err(DataError::BadRows { rows: bad, total });
    }
    examples.skipped = bad;
    if examples.rows.is_empty() {
        return Err(no_rows(&examples));
    }
    if let Some((rows, first)) = unclosed.found() {
        examples.notes.push(Note::NoEndOfTurn { rows, first });
    }
    if let Some((rows, first)) = straddling.found() {
        examples.notes.push(Note::StraddlingToken { rows, first });
    }
    for (remark, count) in remarks {
        if let Some((rows, first)) = count.found() {
            examples.notes.push(Note::Remark {
                remark,
                rows,
                first,
            });
        }
    }
    if !found.left_out.is_empty() {
        examples.notes.push(Note::FilesLeftOut {
            files: found.left_out,
        });
    }
    Ok(examples)
}

/// A row after truncation.
enum Fitted {
    Kept { row: EncodedRow, truncated: bool },
    Dropped,
}

#[derive(Default)]
struct RowCount {
    rows: usize,
    first: Option<RowRef>,
}

impl RowCount {
    fn count(&mut self, is_one: bool, source: &RowRef) {
        if is_one {
            self.rows = self.rows.saturating_add(1);
            self.first.get_or_insert_with(|| source.clone());
        }
    }

    fn found(self) -> Option<(usize, RowRef)> {
        self.first.map(|first| (self.rows, first))
    }
}

fn trained_tokens(labels: &[i64]) -> usize {
    labels.iter().skip(1).filter(|&&l| l != IGNORED).count()
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
fn detect_format(rows: &[RawRow], bytes: &[u8], spec: &DataSpec) -> RecordFormat {
    rows.iter()
        .filter_map(|row| read_row(row, bytes, spec).ok())
        .find_map(|row| RecordFormat::detect(&row))
        .unwrap_or(RecordFormat::Auto)
}

/// Columns that no row's format reads, with the number of rows that have them.
type Unused = BTreeMap<String, usize>;

/// Encodes rows on all cores; results are in row order.
fn encode_rows(
    rows: &[RawRow],
    bytes: &[u8],
    format: RecordFormat,
    spec: &DataSpec,
    context: &RecordContext<'_>,
) -> (Vec<Result<Fitted, BadReason>>, Unused) {
    // Rows may each have columns of their own.
    const MOST_COLUMNS: usize = 1000;
    let encode = |row: &RawRow, unused: &mut Unused| -> Result<Fitted, BadReason> {
        let object = read_row(row, bytes, spec)?;
        for name in format.unused(&object)? {
            if let Some(count) = unused.get_mut(name) {
                *count = count.saturating_add(1);
            } else if unused.len() < MOST_COLUMNS {
                unused.insert(name.to_owned(), 1);
            }
        }
        fit(format.encode(&object, context)?, spec)
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
fn fit(mut row: EncodedRow, spec: &DataSpec) -> Result<Fitted, BadReason> {
    if trained_tokens(&row.labels) == 0 {
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
    let side = match spec.truncation {
        Truncation::Error => return Err(BadReason::TooLong { tokens, max_length }),
        Truncation::Drop => return Ok(Fitted::Dropped),
        Truncation::KeepStart => {
            row.ids.truncate(max_length);
            row.labels.truncate(max_length);
            "first"
        }
        Truncation::KeepEnd => {
            // As many labels as ids.
            let first = tokens.saturating_sub(max_length);
            row.ids.drain(..first);
            row.labels.drain(..first);
            "last"
        }
    };
    if trained_tokens(&row.labels) == 0 {
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

fn no_rows(examples: &Examples) -> DataError {
    let files: Vec<String> = examples
        .files
        .iter()
        .map(|file| file.path.display().to_string())
        .collect();
    let mut detail = Vec::new();
    if examples.dropped > 0 {
        detail.push(format!("{} dropped as too long", examples.dropped));
    }
    if let Some(first) = examples.skipped.first() {
        detail.push(format!("{} skipped, first {first}", examples.skipped.len()));
    }
    DataError::NoRows {
        files: files.join(", "),
        detail: match detail.is_empty() {
            true => ": there are no rows".to_owned(),
            false => format!(": {}", detail.join("; ")),
        },
    }
}
