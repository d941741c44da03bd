//! From data files to examples: reading, encoding, truncating, and saying what became of every row.

mod classification;
mod language_model;
mod load;
mod note;

use std::path::PathBuf;

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use crate::error::{BAD_ROWS_SHOWN, BadRow, DataError, RowRef};
use crate::masks::{IGNORED, TrainOn};
use crate::records::RecordFormat;

pub use classification::{
    ClassLabel, ClassSpec, Classes, ClassifiedText, LabelledText, load_labelled,
};
pub use language_model::load_examples;
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
    pub format: &'static str,
    /// How many rows it has, good and bad.
    pub rows: usize,
}

/// What training needs to know of a row, whatever is in it.
pub trait Row: Clone + std::fmt::Debug + Send + Sync + 'static {
    /// Where it came from.
    fn source(&self) -> &RowRef;
    /// How long it is, in tokens.
    fn tokens(&self) -> usize;
    /// How many labels the loss counts.
    fn trained(&self) -> usize;
    /// Its tokens.
    fn input_ids(&self) -> &[u32];
    /// The label of each token ([`IGNORED`] for none), where tokens have labels.
    fn token_labels(&self) -> Option<&[i64]> {
        None
    }
}

impl Row for Example {
    fn source(&self) -> &RowRef {
        &self.source
    }

    fn tokens(&self) -> usize {
        self.input_ids.len()
    }

    fn trained(&self) -> usize {
        self.trained_tokens()
    }

    fn input_ids(&self) -> &[u32] {
        &self.input_ids
    }

    fn token_labels(&self) -> Option<&[i64]> {
        Some(&self.labels)
    }
}

/// Everything that came out of the data files.
#[derive(Debug, Clone, PartialEq)]
pub struct Rows<R> {
    /// The rows to train on, in file order.
    pub rows: Vec<R>,
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

/// The rows of a language model.
pub type Examples = Rows<Example>;

impl<R> Default for Rows<R> {
    fn default() -> Self {
        Self {
            rows: Vec::new(),
            skipped: Vec::new(),
            truncated: 0,
            dropped: 0,
            notes: Vec::new(),
            files: Vec::new(),
        }
    }
}

impl<R> Rows<R> {
    /// The same with other rows: each of them made into another, or all reasons why one cannot be.
    ///
    /// # Errors
    /// [`DataError::BadRows`] with the rows that `change` refuses.
    pub fn try_map<S>(
        self,
        mut change: impl FnMut(R) -> Result<S, BadRow>,
    ) -> Result<Rows<S>, DataError> {
        let mut rows = Vec::with_capacity(self.rows.len());
        let mut bad = Vec::new();
        for row in self.rows {
            match change(row) {
                Ok(row) => rows.push(row),
                Err(row) => bad.push(row),
            }
        }
        if !bad.is_empty() {
            return Err(bad_rows(bad));
        }
        Ok(Rows {
            rows,
            skipped: self.skipped,
            truncated: self.truncated,
            dropped: self.dropped,
            notes: self.notes,
            files: self.files,
        })
    }
}

impl<R: Row> Rows<R> {
    /// All tokens of all rows.
    pub fn tokens(&self) -> usize {
        self.rows.iter().map(R::tokens).sum()
    }

    /// The labels that the loss counts.
    pub fn trained(&self) -> usize {
        self.rows.iter().map(R::trained).sum()
    }

    /// Adds a note where rows have more tokens than a model of `positions` positions was made for.
    pub fn note_positions(&mut self, positions: usize) {
        let mut past = RowCount::default();
        let mut longest = 0;
        for row in &self.rows {
            past.count(row.tokens() > positions, row.source());
            longest = longest.max(row.tokens());
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

fn bad_rows(mut rows: Vec<BadRow>) -> DataError {
    let total = rows.len();
    rows.truncate(BAD_ROWS_SHOWN);
    DataError::BadRows { rows, total }
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
