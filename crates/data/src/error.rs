//! What can be wrong with a data file, a row, a tokenizer or a template, in words for its author.

use std::fmt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use crate::chat_template::TemplateError;

/// How many bad rows an error names before it only counts.
pub const BAD_ROWS_SHOWN: usize = 20;

/// Where a row came from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RowRef {
    /// The data file, as given.
    pub file: Arc<Path>,
    /// The line the row starts on, from 1.
    pub line: usize,
}

impl fmt::Display for RowRef {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}", self.file.display(), self.line)
    }
}

/// A row that cannot be trained on, and why.
#[derive(Debug, Clone, PartialEq)]
pub struct BadRow {
    /// Where the row is.
    pub source: RowRef,
    /// What is wrong with it.
    pub reason: BadReason,
}

impl fmt::Display for BadRow {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.source, self.reason)
    }
}

/// What is wrong with a row.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
pub enum BadReason {
    /// The bytes are not UTF-8.
    #[error("not valid UTF-8 (byte {offset} of the row)")]
    Utf8 {
        /// Where in the row the first wrong byte is.
        offset: usize,
    },
    /// The text is not JSON.
    #[error("invalid JSON: {detail}")]
    Json {
        /// The parser's message.
        detail: String,
    },
    /// The row is JSON, but not an object.
    #[error("a row must be a JSON object, this is {found}")]
    NotAnObject {
        /// The JSON type found.
        found: &'static str,
    },
    /// The row matches no record format.
    #[error("no known format: keys are {found}; expected {expected}")]
    UnknownFormat {
        /// The row's keys.
        found: String,
        /// The formats' keys.
        expected: String,
    },
    /// A field the format needs is absent.
    #[error("missing field `{field}` (format {format}); the row has {found}")]
    MissingField {
        /// The absent field.
        field: String,
        /// The format in force for the file.
        format: &'static str,
        /// The row's keys.
        found: String,
    },
    /// A field has the wrong JSON type.
    #[error("field `{field}` must be {expected}, not {found}")]
    WrongType {
        /// The field, with its path in the row.
        field: String,
        /// What it should be.
        expected: &'static str,
        /// What it is.
        found: &'static str,
    },
    /// A message has a role no template knows.
    #[error("message {index}: unknown role {role:?}; known roles are {known}")]
    UnknownRole {
        /// The message's position, from 0.
        index: usize,
        /// The role found.
        role: String,
        /// The roles accepted.
        known: String,
    },
    /// Columns that another trainer would act on and this one does not: name and meaning of each.
    #[error(
        "{}; remove such columns, or name them in data.ignore_columns",
        show_columns(columns)
    )]
    ForeignColumns {
        /// The columns, in the row's order, with what they mean elsewhere.
        columns: Vec<(String, &'static str)>,
    },
    /// A value that means something which is not done here.
    #[error("`{field}`: {detail}")]
    Unsupported {
        /// The field, with its path in the row.
        field: String,
        /// What it means, and what to do.
        detail: String,
    },
    /// There is nothing in the row.
    #[error("`{field}` is empty")]
    Empty {
        /// The empty field.
        field: String,
    },
    /// The row is a conversation and the tokenizer has no chat template.
    #[error("a conversation needs a chat template and this tokenizer has none")]
    NoChatTemplate,
    /// The row is text and the model has no tokenizer.
    #[error("text needs a tokenizer: {reason}")]
    NoTokenizer {
        /// Why there is none.
        reason: String,
    },
    /// The chat template failed on the conversation.
    #[error(transparent)]
    Template(#[from] TemplateError),
    /// The template's turn boundaries cannot be established for this conversation.
    #[error(
        "message {index}: cannot find where the assistant's turn lies in the rendered text: {detail}; \
         mark it in the chat template with {{% generation %}} … {{% endgeneration %}}"
    )]
    Boundary {
        /// The assistant message's position, from 0.
        index: usize,
        /// What did not fit.
        detail: String,
    },
    /// Nothing in the row is trained.
    #[error("no trained token: {detail}")]
    NothingTrained {
        /// Why.
        detail: String,
    },
    /// The row is too long and the recipe does not allow truncation.
    #[error(
        "{tokens} tokens, more than max_length = {max_length}; raise it or set truncation to \
         \"keep_start\", \"keep_end\" or \"drop\""
    )]
    TooLong {
        /// The row's length.
        tokens: usize,
        /// The limit.
        max_length: usize,
    },
    /// A token id the tokenizer does not have.
    #[error("{field}[{index}] = {id} is outside the vocabulary of {vocab_size} tokens")]
    OutOfVocabulary {
        /// `input_ids` or `labels`.
        field: &'static str,
        /// Position in the field.
        index: usize,
        /// The id.
        id: i64,
        /// The vocabulary's size.
        vocab_size: usize,
    },
    /// A column beside `input_ids` does not have an entry for each token.
    #[error("`{field}` has {entries} entries, `input_ids` has {input_ids}")]
    Length {
        /// `labels` or a mask.
        field: &'static str,
        /// Number of its entries.
        entries: usize,
        /// Number of input ids.
        input_ids: usize,
    },
    /// The tokenizer failed on the row's text.
    #[error("the tokenizer failed: {detail}")]
    Tokenizer {
        /// The tokenizer's message.
        detail: String,
    },
}

/// Why data, a tokenizer or a template could not be used.
#[derive(Debug, thiserror::Error)]
pub enum DataError {
    /// A file or directory could not be read.
    #[error("cannot read {}: {source}", path.display())]
    Read {
        /// The path.
        path: PathBuf,
        /// The system's reason.
        source: std::io::Error,
    },
    /// A directory holds no data file.
    #[error("no .jsonl, .ndjson or .json file in {}{}", path.display(), show_others(others))]
    NoFiles {
        /// The directory.
        path: PathBuf,
        /// What else is there: directories, and files that look like data.
        others: Vec<String>,
    },
    /// A data file is of a kind that is not read.
    #[error("{} is {kind}, not a file of JSON rows\n  help: {advice}", path.display())]
    ForeignFile {
        /// The file.
        path: PathBuf,
        /// What it is.
        kind: &'static str,
        /// What to do with it.
        advice: &'static str,
    },
    /// The data specification names no path.
    #[error("no data files given")]
    NoPaths,
    /// `tokenizer.json` cannot be used.
    #[error("tokenizer.json cannot be used: {detail}")]
    Tokenizer {
        /// What is wrong with it.
        detail: String,
    },
    /// A file beside `tokenizer.json` has a field of the wrong shape.
    #[error("{file}: `{field}` {detail}")]
    TokenizerConfig {
        /// The file.
        file: &'static str,
        /// The field.
        field: String,
        /// What is wrong with it.
        detail: String,
    },
    /// The text begins or ends with a token that there is none of.
    #[error(
        "{file}: `{field}` names {token:?}, which no file of the tokenizer declares, and the embedding's {rows} \
         rows have none for a new token\n  help: name a token of the vocabulary there, or bring the added_tokens.json \
         that belongs to the model"
    )]
    SpecialToken {
        /// The file that names it.
        file: &'static str,
        /// `bos_token` or `eos_token`.
        field: String,
        /// The token.
        token: String,
        /// Rows of the embedding.
        rows: usize,
    },
    /// Files that contradict each other about ids.
    #[error(
        "the tokenizer's files contradict each other:{}\n  help: all must be of one model; remove the file that is \
         of another, or correct it",
        show_list(wrong)
    )]
    TokenIds {
        /// Each token with the files and their ids.
        wrong: Vec<String>,
    },
    /// The chat template cannot be used.
    #[error(transparent)]
    Template(#[from] TemplateError),
    /// Conversations need a chat template and there is none.
    #[error(
        "{row}: a conversation needs a chat template and this tokenizer has none; \
         give one, or use rows of prompt and completion"
    )]
    NoChatTemplate {
        /// The first row that needs it.
        row: RowRef,
    },
    /// There is text and no tokenizer.
    #[error("{}text needs a tokenizer: {reason}", row.as_ref().map(|row| format!("{row}: ")).unwrap_or_default())]
    NoTokenizer {
        /// The first row that is text, if it comes from rows.
        row: Option<RowRef>,
        /// Why there is none and what to do.
        reason: String,
    },
    /// Rows that cannot be trained on, all of them.
    #[error("{}", show_bad_rows(rows, *total))]
    BadRows {
        /// The first of them, at most [`BAD_ROWS_SHOWN`].
        rows: Vec<BadRow>,
        /// How many there are in all.
        total: usize,
    },
    /// No row is left to train on.
    #[error("no usable row in {files}{detail}")]
    NoRows {
        /// The files read.
        files: String,
        /// What became of the rows.
        detail: String,
    },
    /// A value of the data specification is out of range.
    #[error("data.{field} {detail}")]
    Spec {
        /// The field.
        field: &'static str,
        /// What is wrong with it.
        detail: String,
    },
}

fn show_others(others: &[String]) -> String {
    const MOST: usize = 5;
    let some = others.iter().take(MOST).cloned().collect::<Vec<_>>();
    match (others.len(), others.len().saturating_sub(MOST)) {
        (0, _) => String::new(),
        (_, 0) => format!("; there are: {}", some.join(", ")),
        (_, more) => format!("; there are: {}, and {more} more", some.join(", ")),
    }
}

fn show_columns(columns: &[(String, &'static str)]) -> String {
    let list: Vec<String> = columns
        .iter()
        .map(|(name, meaning)| format!("column `{}` {meaning}", shown(name)))
        .collect();
    list.join("; ")
}

/// `text` from a data file for a message: control characters escaped, at most 80 characters of it.
pub(crate) fn shown(text: &str) -> String {
    const MOST: usize = 80;
    let mut out = String::new();
    for c in text.chars().take(MOST) {
        match c {
            ' '..='~' => out.push(c),
            // Debug's rule for what can be printed.
            c => {
                let escaped = c.escape_debug();
                match c {
                    '\'' | '"' | '\\' => out.push(c),
                    _ => out.extend(escaped),
                }
            }
        }
    }
    if text.chars().nth(MOST).is_some() {
        out.push('…');
    }
    out
}

/// The first of a list, one a line.
fn show_list(lines: &[String]) -> String {
    let mut text: String = lines
        .iter()
        .take(20)
        .map(|line| format!("\n  - {line}"))
        .collect();
    if let Some(more) = lines.len().checked_sub(20).filter(|more| *more > 0) {
        text.push_str(&format!("\n  - and {more} more"));
    }
    text
}

fn show_bad_rows(rows: &[BadRow], total: usize) -> String {
    use fmt::Write as _;
    let mut text = format!("{total} bad row{}:", if total == 1 { "" } else { "s" });
    for row in rows {
        let _ = write!(text, "\n  {row}");
    }
    if let Some(more @ 1..) = total.checked_sub(rows.len()) {
        let _ = write!(text, "\n  … and {more} more");
    }
    text.push_str("\nCorrect them, or set on_bad_row = \"skip\" to train without them.");
    text
}
