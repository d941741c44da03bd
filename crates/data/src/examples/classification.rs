//! Rows of a sequence classifier: a text, or two, with a class.

use std::collections::BTreeSet;
use std::ops::Range;
use std::path::Path;

use serde_json::{Map, Value};

use super::load::{Labels, Reading, load};
use super::{DataSpec, Row, Rows};
use crate::error::{BadReason, BadRow, DataError, RowRef, shown};
use crate::files::type_name;
use crate::records::tokens::{BESIDE_IDS, real_ids};
use crate::records::{EncodedRow, columns, keys_of};
use crate::tokenizer::Tokenizer;

/// Where in a row the text and the class are.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct ClassSpec {
    /// The column of the text, or those of a pair; empty to find them by their usual names.
    pub text_columns: Vec<String>,
    /// The column of the class.
    pub label_column: String,
    /// Whether rows without a class will do, as they do where classes are predicted.
    pub optional: bool,
}

/// The columns that texts are usually in: those of GLUE's tasks and of most data sets on the Hub (as transformers'
/// `run_glue.py` names them).
const TEXT_COLUMNS: &[(&str, Option<&str>)] = &[
    ("text", Some("text_pair")),
    ("text", None),
    ("sentence1", Some("sentence2")),
    ("premise", Some("hypothesis")),
    ("question1", Some("question2")),
    ("question", Some("sentence")),
    ("question", Some("passage")),
    ("sentence", None),
];

/// Rows that are tokenised already.
const INPUT_IDS: &str = "input_ids";

/// The largest class number: above it, a number is something else.
const LARGEST_CLASS: i64 = u16::MAX as i64;

/// A class as a row names it.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub enum ClassLabel {
    /// By its number, from 0.
    Index(usize),
    /// By its name.
    Name(String),
}

/// A row of a classifier before its class has a number.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LabelledText {
    /// Token ids.
    pub input_ids: Vec<u32>,
    /// Its class; `None` only where that is allowed.
    pub label: Option<ClassLabel>,
    /// Where the row came from.
    pub source: RowRef,
    /// Its position among the rows it was loaded with.
    pub index: usize,
}

/// One row ready to train a classifier on.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ClassifiedText {
    /// Token ids.
    pub input_ids: Vec<u32>,
    /// The number of its class; `None` only where that is allowed.
    pub label: Option<usize>,
    /// Where the row came from.
    pub source: RowRef,
    /// Its position among the rows it was loaded with.
    pub index: usize,
}

impl ClassifiedText {
    /// A text that comes from no file, without a class.
    pub fn unlabelled(input_ids: Vec<u32>) -> Self {
        Self {
            input_ids,
            label: None,
            source: RowRef {
                file: Path::new("").into(),
                line: 0,
            },
            index: 0,
        }
    }

    /// Whether it comes from no file.
    pub fn is_unplaced(&self) -> bool {
        self.source.line == 0
    }
}

impl Row for ClassifiedText {
    fn source(&self) -> &RowRef {
        &self.source
    }

    fn tokens(&self) -> usize {
        self.input_ids.len()
    }

    fn trained(&self) -> usize {
        usize::from(self.label.is_some())
    }

    fn input_ids(&self) -> &[u32] {
        &self.input_ids
    }
}

/// Reads, encodes and checks all rows of `spec`.
///
/// # Errors
/// As [`load_examples`](crate::load_examples).
pub fn load_labelled(
    spec: &DataSpec,
    columns: &ClassSpec,
    tokenizer: &Tokenizer,
) -> Result<Rows<LabelledText>, DataError> {
    let given = match columns.text_columns.as_slice() {
        [] => None,
        [text] => Some((text.as_str(), None)),
        [text, pair] => Some((text.as_str(), Some(pair.as_str()))),
        more => {
            return Err(DataError::Spec {
                field: "text_columns",
                detail: format!("names {} columns; there is one text, or a pair", more.len()),
            });
        }
    };
    load(
        spec,
        &Classified {
            columns,
            given,
            tokenizer,
        },
    )
}

/// The columns of one or two texts.
type TextColumns<'a> = (&'a str, Option<&'a str>);

struct Classified<'a> {
    columns: &'a ClassSpec,
    given: Option<TextColumns<'a>>,
    tokenizer: &'a Tokenizer,
}

impl<'a> Reading for Classified<'a> {
    /// `None` where a file has no column that is known.
    type Format = Option<TextColumns<'a>>;
    type Labels = Option<ClassLabel>;
    type Row = LabelledText;

    fn given(&self) -> Option<Self::Format> {
        self.given.map(Some)
    }

    fn detect(&self, row: &Map<String, Value>) -> Option<Self::Format> {
        let has = |name: &str| row.get(name).is_some_and(|value| !value.is_null());
        if has(INPUT_IDS) {
            return Some(Some((INPUT_IDS, None)));
        }
        let found = TEXT_COLUMNS
            .iter()
            .find(|(text, pair)| has(text) && pair.is_none_or(has));
        found.map(|columns| Some(*columns))
    }

    fn unknown(&self) -> Self::Format {
        None
    }

    fn name(_: Self::Format) -> &'static str {
        "classification"
    }

    fn unused<'r>(
        &self,
        format: Self::Format,
        row: &'r Map<String, Value>,
    ) -> Result<Vec<&'r str>, BadReason> {
        let own = |name: &str| {
            name == self.columns.label_column
                || format.is_some_and(|(text, pair)| {
                    name == text
                        || Some(name) == pair
                        || (text == INPUT_IDS && BESIDE_IDS.contains(&name))
                })
        };
        columns::unused(row, own, false)
    }

    fn encode(
        &self,
        format: Self::Format,
        row: &Map<String, Value>,
    ) -> Result<EncodedRow<Self::Labels>, BadReason> {
        let Some((text, pair)) = format else {
            let known = TEXT_COLUMNS.iter().map(|(text, pair)| match pair {
                Some(pair) => format!("{text} and {pair}"),
                None => (*text).to_owned(),
            });
            let known = known.chain([INPUT_IDS.to_owned()]);
            return Err(BadReason::UnknownFormat {
                found: keys_of(row),
                expected: format!(
                    "{}; or name the columns in data.text_columns",
                    known.collect::<Vec<_>>().join(", or ")
                ),
            });
        };
        if text == INPUT_IDS {
            let ids = real_ids(row, self.tokenizer.vocab_size())?;
            return Ok(EncodedRow::new(ids, self.label(row)?, true));
        }
        let text = self.text(row, text)?;
        let pair = pair.map(|pair| self.text(row, pair)).transpose()?;
        let ids = self
            .tokenizer
            .encode_pair(text, pair)
            .map_err(|error| match error {
                DataError::NoTokenizer { reason, .. } => BadReason::NoTokenizer { reason },
                error => BadReason::Tokenizer {
                    detail: error.to_string(),
                },
            })?;
        if ids.is_empty() {
            return Err(BadReason::NothingTrained {
                detail: "the tokenizer makes no token of the text".to_owned(),
            });
        }
        Ok(EncodedRow::new(ids, self.label(row)?, true))
    }

    fn row(input_ids: Vec<u32>, label: Self::Labels, source: RowRef, index: usize) -> LabelledText {
        LabelledText {
            input_ids,
            label,
            source,
            index,
        }
    }
}

impl Classified<'_> {
    fn missing(&self, field: &str, row: &Map<String, Value>) -> BadReason {
        BadReason::MissingField {
            field: field.to_owned(),
            format: "classification",
            found: keys_of(row),
        }
    }

    fn text<'r>(&self, row: &'r Map<String, Value>, column: &str) -> Result<&'r str, BadReason> {
        match row.get(column) {
            Some(Value::String(text)) => Ok(text),
            Some(other) => Err(BadReason::WrongType {
                field: column.to_owned(),
                expected: "a string",
                found: type_name(other),
            }),
            None => Err(self.missing(column, row)),
        }
    }

    fn label(&self, row: &Map<String, Value>) -> Result<Option<ClassLabel>, BadReason> {
        let column = &self.columns.label_column;
        let unsupported = |detail: String| BadReason::Unsupported {
            field: column.clone(),
            detail,
        };
        match row.get(column) {
            None | Some(Value::Null) if self.columns.optional => Ok(None),
            None => Err(self.missing(column, row)),
            Some(Value::String(name)) => Ok(Some(ClassLabel::Name(name.clone()))),
            Some(Value::Bool(flag)) => Ok(Some(ClassLabel::Name(flag.to_string()))),
            Some(Value::Number(number)) => match number.as_i64() {
                Some(-1) if self.columns.optional => Ok(None),
                Some(class @ 0..=LARGEST_CLASS) => {
                    let class = usize::try_from(class).unwrap_or_default();
                    Ok(Some(ClassLabel::Index(class)))
                }
                Some(class) => Err(unsupported(format!(
                    "{class} is no class: numbers of classes are 0 to {LARGEST_CLASS} (-1 stands for no label in \
                     GLUE's test files, on which nothing can be trained)"
                ))),
                None => Err(unsupported(format!(
                    "{number} is no class: give a whole number or a name; regression is not trained here"
                ))),
            },
            Some(Value::Array(_)) => Err(unsupported(
                "is a list: a row has one class; several at once are not trained here".to_owned(),
            )),
            Some(other) => Err(BadReason::WrongType {
                field: column.clone(),
                expected: "a class's name or number",
                found: type_name(other),
            }),
        }
    }
}

impl Labels for Option<ClassLabel> {
    fn any(&self) -> bool {
        // The whole row has one class, or one is predicted for it.
        true
    }

    fn keep(&mut self, _: Range<usize>) {}
}

/// The classes of a task: their names, in the order of their numbers.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Classes {
    names: Vec<String>,
}

impl Classes {
    /// Classes with these names.
    pub fn new(names: Vec<String>) -> Self {
        Self { names }
    }

    /// `count` classes with the names that transformers gives where nobody does: `LABEL_0`, `LABEL_1`, ….
    pub fn unnamed(count: usize) -> Self {
        Self::new((0..count).map(|class| format!("LABEL_{class}")).collect())
    }

    /// The classes that occur in `rows`: names in their order as bytes (that of `run_glue.py`), or numbers up to
    /// the largest.
    ///
    /// # Errors
    /// Where some rows name their class and others number it, and where there are fewer than two classes.
    pub fn found_in(rows: &[LabelledText]) -> Result<Self, DataError> {
        let labels: BTreeSet<&ClassLabel> =
            rows.iter().filter_map(|row| row.label.as_ref()).collect();
        let mut names = Vec::new();
        let mut count: usize = 0;
        for label in &labels {
            match label {
                ClassLabel::Name(name) => names.push(name.clone()),
                ClassLabel::Index(class) => count = class.saturating_add(1),
            }
        }
        let wrong = |detail: String| DataError::Spec {
            field: "train",
            detail,
        };
        if count > 0
            && let Some(name) = names.first()
        {
            let of = |kind: fn(&ClassLabel) -> bool| {
                let row = rows.iter().find(|row| row.label.as_ref().is_some_and(kind));
                row.map_or_else(String::new, |row| row.source.to_string())
            };
            return Err(wrong(format!(
                "has classes by name ({}, {}) and by number ({}): choose one of the two",
                shown(name),
                of(|label| matches!(label, ClassLabel::Name(_))),
                of(|label| matches!(label, ClassLabel::Index(_)))
            )));
        }
        let classes = match names.is_empty() {
            true => Self::unnamed(count),
            false => Self::new(names),
        };
        match classes.names.len() {
            0 | 1 => Err(wrong(format!(
                "has {} in its rows: a classifier needs two classes",
                match classes.names.first() {
                    Some(only) => format!("only the class {}", shown(only)),
                    None => "no class".to_owned(),
                }
            ))),
            _ => Ok(classes),
        }
    }

    /// Their names.
    pub fn names(&self) -> &[String] {
        &self.names
    }

    /// How many there are.
    pub fn len(&self) -> usize {
        self.names.len()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.names.is_empty()
    }

    /// The number of a class; `None` if it is none of these.
    pub fn number(&self, label: &ClassLabel) -> Option<usize> {
        match label {
            ClassLabel::Index(class) => Some(*class).filter(|class| *class < self.names.len()),
            ClassLabel::Name(name) => self.names.iter().position(|other| other == name),
        }
    }

    /// Whether all classes of `rows` are among these.
    pub fn hold(&self, rows: &[LabelledText]) -> bool {
        let mut labels = rows.iter().filter_map(|row| row.label.as_ref());
        labels.all(|label| self.number(label).is_some())
    }

    /// The rows with the numbers of their classes.
    ///
    /// # Errors
    /// All rows whose class is none of these.
    pub fn apply(&self, rows: Rows<LabelledText>) -> Result<Rows<ClassifiedText>, DataError> {
        rows.try_map(|row| {
            let label = match &row.label {
                None => None,
                Some(label) => match self.number(label) {
                    Some(class) => Some(class),
                    None => {
                        return Err(BadRow {
                            reason: self.unknown(label),
                            source: row.source,
                        });
                    }
                },
            };
            Ok(ClassifiedText {
                input_ids: row.input_ids,
                label,
                source: row.source,
                index: row.index,
            })
        })
    }

    fn unknown(&self, label: &ClassLabel) -> BadReason {
        const MOST: usize = 10;
        let mut names: Vec<String> = self.names.iter().take(MOST).map(|n| shown(n)).collect();
        if let Some(more @ 1..) = self.names.len().checked_sub(MOST) {
            names.push(format!("and {more} more"));
        }
        let found = match label {
            ClassLabel::Name(name) => shown(name),
            ClassLabel::Index(class) => format!("number {class}"),
        };
        BadReason::Unsupported {
            field: "label".to_owned(),
            detail: format!(
                "{found} is none of the {} classes {}; correct the row, or name all classes in data.labels",
                self.names.len(),
                names.join(", ")
            ),
        }
    }
}
