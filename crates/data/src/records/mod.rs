//! Record formats: how a row of a data file becomes token ids and labels.
//!
//! A new format is one file here and one line in the list below.

mod chat_columns;
pub(crate) mod columns;
mod instruction;
mod messages;
mod prompt_completion;
mod sharegpt;
mod text;
pub(crate) mod tokens;
mod weights;

pub use chat_columns::check_arguments;

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use crate::chat_template::ChatTemplate;
use crate::error::{BadReason, DataError, shown};
use crate::files::type_name;
use crate::masks::{IGNORED, TrainOn};
use crate::tokenizer::{Encoded, Tokenizer};

macro_rules! record_formats {
    ($($(#[$doc:meta])* $variant:ident => $record:expr,)*) => {
        /// The format of a data file's rows.
        #[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
        #[serde(rename_all = "snake_case")]
        pub enum RecordFormat {
            /// Decided for each file by the keys of its first readable row.
            #[default]
            Auto,
            $($(#[$doc])* $variant,)*
        }

        /// All formats, in the order automatic detection asks them.
        const FORMATS: &[(RecordFormat, &dyn Record)] = &[$((RecordFormat::$variant, &$record),)*];
    };
}

record_formats! {
    /// Conversations: `messages`, a list of objects with `role` and `content`.
    Messages => messages::Messages,
    /// `prompt` and `completion`: two texts, or two lists of messages.
    PromptCompletion => prompt_completion::PromptCompletion,
    /// Already tokenized: `input_ids`, optionally `labels` (-100 is not trained).
    Tokens => tokens::Tokens,
    /// ShareGPT: `conversations`, a list of objects with `from` and `value`.
    Sharegpt => sharegpt::ShareGpt,
    /// Plain text: `text`, all of it trained.
    Text => text::Text,
    /// Alpaca: `instruction`, perhaps `input`, and `output`: a question and its answer.
    Alpaca => instruction::ALPACA,
    /// Dolly: `instruction`, perhaps `context`, and `response`.
    Dolly => instruction::DOLLY,
}

/// What one format does with a row.
trait Record: Sync {
    /// The format's name, as in a recipe.
    fn name(&self) -> &'static str;
    /// The keys that make a row one of this format.
    fn keys(&self) -> &'static [&'static str];
    /// Further keys of which the row's meaning takes notice.
    fn optional(&self, _row: &Map<String, Value>) -> &'static [&'static str] {
        &[]
    }
    /// Whether the row is rendered by the chat template.
    fn is_chat(&self, _row: &Map<String, Value>) -> bool {
        false
    }
    /// The row as ids and labels.
    fn encode(
        &self,
        row: &Map<String, Value>,
        context: &RecordContext<'_>,
    ) -> Result<EncodedRow, BadReason>;
}

/// What formats need beyond the row.
pub(crate) struct RecordContext<'a> {
    pub(crate) tokenizer: &'a Tokenizer,
    pub(crate) train_on: TrainOn,
    pub(crate) template_arguments: &'a Map<String, Value>,
}

/// A row as ids and labels, before truncation.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct EncodedRow<L = Vec<i64>> {
    pub(crate) ids: Vec<u32>,
    /// What is trained of it: for a language model, a label for each token.
    pub(crate) labels: L,
    /// Whether the trained text ends with an end-of-turn or EOS token.
    pub(crate) closed: bool,
    /// Tokens that lie on both sides of a span's start.
    pub(crate) straddling: usize,
    /// What is worth saying about the row.
    pub(crate) remarks: Vec<Remark>,
}

/// Something about a row that is no error: what a file's rows have in common is said once.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Remark {
    /// The chat template never reads `tools`, and the row has some.
    ToolsUnread,
    /// The chat template never reads `tool_calls`, and a message has some.
    CallsUnread,
    /// The chat template never reads one of the variables it is given.
    ArgumentsUnread,
    /// A tool call's arguments are JSON text, which the template has encoded once more.
    ArgumentsEncodedTwice,
    /// Roles were read under other names (`human`, `gpt`, `model`).
    RolesRenamed,
}

impl<L> EncodedRow<L> {
    pub(crate) fn new(ids: Vec<u32>, labels: L, closed: bool) -> Self {
        Self {
            ids,
            labels,
            closed,
            straddling: 0,
            remarks: Vec::new(),
        }
    }
}

impl RecordFormat {
    /// Every format but `auto`.
    pub fn all() -> impl Iterator<Item = Self> {
        FORMATS.iter().map(|(format, _)| *format)
    }

    /// The name used in recipes.
    pub fn name(self) -> &'static str {
        self.record().map_or("auto", Record::name)
    }

    /// The format a row's keys say it has.
    pub(crate) fn detect(row: &Map<String, Value>) -> Option<Self> {
        FORMATS
            .iter()
            .find(|(_, record)| record.keys().iter().all(|key| row.contains_key(*key)))
            .map(|(format, _)| *format)
    }

    /// The columns of `row` that nothing reads.
    ///
    /// # Errors
    /// [`BadReason::ForeignColumns`] where one of them would change the training elsewhere.
    pub(crate) fn unused(self, row: &Map<String, Value>) -> Result<Vec<&str>, BadReason> {
        let (keys, optional, chat): (&[&str], _, _) = match self.record() {
            Some(record) => (record.keys(), record.optional(row), record.is_chat(row)),
            None => (&[], &[][..], false),
        };
        let own = |name: &str| keys.contains(&name) || optional.contains(&name);
        columns::unused(row, own, chat)
    }

    /// The row as ids and labels.
    pub(crate) fn encode(
        self,
        row: &Map<String, Value>,
        context: &RecordContext<'_>,
    ) -> Result<EncodedRow, BadReason> {
        let Some(record) = self.record() else {
            let formats = FORMATS.iter().map(|(_, record)| record.keys());
            return Err(BadReason::UnknownFormat {
                found: keys_of(row),
                expected: formats
                    .map(|keys| keys.join(" and "))
                    .collect::<Vec<_>>()
                    .join(", or "),
            });
        };
        for key in record.keys() {
            if !row.contains_key(*key) {
                return Err(BadReason::MissingField {
                    field: (*key).to_owned(),
                    format: record.name(),
                    found: keys_of(row),
                });
            }
        }
        record.encode(row, context)
    }

    fn record(self) -> Option<&'static dyn Record> {
        FORMATS
            .iter()
            .find(|(format, _)| *format == self)
            .map(|(_, record)| *record)
    }
}

impl<'a> RecordContext<'a> {
    fn template(&self) -> Result<&'a ChatTemplate, BadReason> {
        if let Some(reason) = self.tokenizer.stands_in() {
            let reason = reason.to_owned();
            return Err(BadReason::NoTokenizer { reason });
        }
        self.tokenizer
            .chat_template()
            .ok_or(BadReason::NoChatTemplate)
    }

    fn encode_text(&self, text: &str, add_special: bool) -> Result<Encoded, BadReason> {
        self.tokenizer
            .encode_with_offsets(text, add_special)
            .map_err(|error| match error {
                DataError::NoTokenizer { reason, .. } => BadReason::NoTokenizer { reason },
                error => BadReason::Tokenizer {
                    detail: error.to_string(),
                },
            })
    }
}

impl EncodedRow {
    /// Appends EOS as TRL does, unless the row ends with it already, and trains it.
    fn with_trained_eos(mut self, eos: Option<u32>) -> Self {
        if let Some(eos) = eos {
            if self.ids.last() != Some(&eos) {
                self.ids.push(eos);
                self.labels.push(IGNORED);
            }
            if let Some(label) = self.labels.last_mut() {
                *label = i64::from(eos);
            }
        }
        self.closed = eos.is_some();
        self
    }
}

pub(crate) fn keys_of(row: &Map<String, Value>) -> String {
    if row.is_empty() {
        return "none".to_owned();
    }
    const MOST: usize = 20;
    let mut keys: Vec<String> = row
        .keys()
        .take(MOST)
        .map(|key| format!("`{}`", shown(key)))
        .collect();
    if let Some(more @ 1..) = row.len().checked_sub(MOST) {
        keys.push(format!("and {more} more"));
    }
    keys.join(", ")
}

fn wrong_type(field: impl Into<String>, expected: &'static str, found: &Value) -> BadReason {
    BadReason::WrongType {
        field: field.into(),
        expected,
        found: type_name(found),
    }
}

/// A field as text.
fn text_field<'r>(row: &'r Map<String, Value>, field: &str) -> Result<&'r str, BadReason> {
    match row.get(field) {
        Some(Value::String(text)) => Ok(text),
        other => Err(wrong_type(field, "a string", other.unwrap_or(&Value::Null))),
    }
}
