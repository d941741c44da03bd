//! From data files to examples: reading, encoding, truncating, and saying what became of every row.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use crate::error::{BAD_ROWS_SHOWN, BadReason, BadRow, DataError, RowRef};
use crate::files::{RawRow, expand_paths, parse_row, sha256_hex, split_rows_of};
use crate::masks::{IGNORED, TrainOn};
use crate::records::{EncodedRow, RecordContext, RecordFormat};
use crate::tokenizer::Tokenizer;

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
    /// Further variables for the chat template.
    pub template_arguments: Map<String, Value>,
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

/// Something about the examples that is no error but worth saying.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Note {
    /// In these rows the trained text does not end with a special token: nothing teaches the model
    /// to stop.
    NoEndOfTurn {
        /// How many rows.
        rows: usize,
        /// The first of them.
        first: RowRef,
    },
    /// In these rows a token lies on both sides of the boundary between prompt and answer; it is
    /// trained.
    StraddlingToken {
        /// How many rows.
        rows: usize,
        /// The first of them.
        first: RowRef,
    },
}

impl std::fmt::Display for Note {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::NoEndOfTurn { rows, first } => write!(
                f,
                "{rows} rows (first {first}) are trained without an end-of-turn token: the model \
                 does not learn to stop"
            ),
            Self::StraddlingToken { rows, first } => write!(
                f,
                "in {rows} rows (first {first}) a token joins the end of the prompt and the start \
                 of the answer; it is trained. A prompt without a space at its end avoids that"
            ),
        }
    }
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
    let context = RecordContext {
        tokenizer,
        train_on: spec.train_on,
        template_arguments: &spec.template_arguments,
    };
    let mut examples = Examples::default();
    let mut bad = Vec::new();
    let mut unclosed = RowCount::default();
    let mut straddling = RowCount::default();
    for path in expand_paths(&spec.paths)? {
        let bytes = std::fs::read(&path).map_err(|source| DataError::Read {
            path: path.clone(),
            source,
        })?;
        let rows = split_rows_of(&path, &bytes);
        let format = match spec.format {
            RecordFormat::Auto => detect_format(&rows, &bytes),
            format => format,
        };
        examples.files.push(DataFile {
            path: path.clone(),
            sha256: sha256_hex(&bytes),
            format,
            rows: rows.len(),
        });
        let file: Arc<Path> = Arc::from(path.as_path());
        for (row, outcome) in rows
            .iter()
            .zip(encode_rows(&rows, &bytes, format, spec, &context))
        {
            let source = RowRef {
                file: Arc::clone(&file),
                line: row.line,
            };
            match outcome {
                Ok(Fitted::Dropped) => examples.dropped += 1,
                Ok(Fitted::Kept { row, truncated }) => {
                    examples.truncated += usize::from(truncated);
                    unclosed.count(!row.closed, &source);
                    straddling.count(row.straddling > 0, &source);
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
            self.rows += 1;
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

/// The format of the first row that is readable and has a format's keys.
fn detect_format(rows: &[RawRow], bytes: &[u8]) -> RecordFormat {
    rows.iter()
        .filter_map(|row| parse_row(&bytes[row.bytes.clone()]).ok())
        .find_map(|row| RecordFormat::detect(&row))
        .unwrap_or(RecordFormat::Auto)
}

/// Encodes rows on all cores; results are in row order.
fn encode_rows(
    rows: &[RawRow],
    bytes: &[u8],
    format: RecordFormat,
    spec: &DataSpec,
    context: &RecordContext<'_>,
) -> Vec<Result<Fitted, BadReason>> {
    let encode = |row: &RawRow| -> Result<Fitted, BadReason> {
        let object = parse_row(&bytes[row.bytes.clone()])?;
        fit(format.encode(&object, context)?, spec)
    };
    // Below this many rows a thread costs more than it saves.
    const ROWS_PER_THREAD: usize = 64;
    let threads = std::thread::available_parallelism()
        .map_or(1, usize::from)
        .min(rows.len() / ROWS_PER_THREAD);
    if threads < 2 {
        return rows.iter().map(encode).collect();
    }
    std::thread::scope(|scope| {
        let workers: Vec<_> = rows
            .chunks(rows.len().div_ceil(threads))
            .map(|chunk| scope.spawn(move || chunk.iter().map(encode).collect::<Vec<_>>()))
            .collect();
        workers
            .into_iter()
            .flat_map(|worker| match worker.join() {
                Ok(results) => results,
                Err(panic) => std::panic::resume_unwind(panic),
            })
            .collect()
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
            row.ids.drain(..tokens - max_length);
            row.labels.drain(..tokens - max_length);
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
