//! What is worth saying about examples though it is no error.

use std::collections::BTreeMap;
use std::fmt;
use std::path::{Path, PathBuf};

use crate::error::{RowRef, shown};
use crate::records::Remark;

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
    /// What a row's format has to say about these rows.
    Remark {
        /// What.
        remark: Remark,
        /// How many rows.
        rows: usize,
        /// The first of them.
        first: RowRef,
    },
    /// These rows have more tokens than the model's configuration has positions.
    PastPositions {
        /// How many rows.
        rows: usize,
        /// The first of them.
        first: RowRef,
        /// Tokens of the longest.
        longest: usize,
        /// Positions the model was made for.
        positions: usize,
    },
    /// Columns of a file that nothing reads.
    UnusedColumns {
        /// The file.
        file: PathBuf,
        /// The format of its rows.
        format: &'static str,
        /// The columns and how many rows have them, the commonest first.
        columns: Vec<(String, usize)>,
    },
    /// Files of a given directory that look like data and are not read.
    FilesLeftOut {
        /// The files.
        files: Vec<PathBuf>,
    },
}

impl Note {
    pub(crate) fn unused_columns(
        file: &Path,
        format: &'static str,
        columns: BTreeMap<String, usize>,
    ) -> Self {
        let mut columns: Vec<(String, usize)> = columns.into_iter().collect();
        columns.sort_by_key(|(_, rows)| std::cmp::Reverse(*rows));
        Self::UnusedColumns {
            file: file.to_owned(),
            format,
            columns,
        }
    }
}

impl fmt::Display for Note {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        /// Names listed before they are only counted.
        const MOST: usize = 10;
        match self {
            Self::NoEndOfTurn { rows, first } => write!(
                f,
                "in {} (first {first}) what is trained has no end-of-turn token at its end: the model \
                 does not learn to stop",
                count(*rows)
            ),
            Self::StraddlingToken { rows, first } => write!(
                f,
                "in {} (first {first}) a token joins the end of the prompt and the start \
                 of the answer; it is trained. A prompt without a space at its end avoids that",
                count(*rows)
            ),
            Self::Remark {
                remark,
                rows,
                first,
            } => write!(f, "in {} (first {first}) {remark}", count(*rows)),
            Self::PastPositions {
                rows,
                first,
                longest,
                positions,
            } => write!(
                f,
                "WARNING: longer than the model's {positions} positions (max_position_embeddings and rope_scaling of \
                 its config.json): {} (first {first}), the longest by {} tokens; the model was never trained that far; \
                 set data.max_length = {positions}",
                count(*rows),
                longest.saturating_sub(*positions)
            ),
            Self::UnusedColumns {
                file,
                format,
                columns,
            } => {
                let names: Vec<String> = columns
                    .iter()
                    .take(MOST)
                    .map(|(name, rows)| format!("{} ({})", shown(name), count(*rows)))
                    .collect();
                write!(
                    f,
                    "{} (format {format}): columns that are not used: {}",
                    file.display(),
                    names.join(", ")
                )?;
                match columns.len().saturating_sub(MOST) {
                    0 => Ok(()),
                    more => write!(f, ", and {more} more"),
                }
            }
            Self::FilesLeftOut { files } => {
                let names: Vec<String> = files
                    .iter()
                    .take(MOST)
                    .map(|file| shown(&file.display().to_string()))
                    .collect();
                write!(
                    f,
                    "{} files are not read, since they are not .jsonl, .ndjson or .json: {}{}",
                    files.len(),
                    names.join(", "),
                    if files.len() > MOST { ", …" } else { "" }
                )
            }
        }
    }
}

/// `n` rows, in words.
fn count(n: usize) -> String {
    match n {
        1 => "1 row".to_owned(),
        n => format!("{n} rows"),
    }
}

impl fmt::Display for Remark {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::ToolsUnread => {
                "there are `tools`, and the chat template never reads them: the model does not see them"
            }
            Self::CallsUnread => {
                "messages have `tool_calls`, and the chat template never reads them: the model does not see them"
            }
            Self::ArgumentsUnread => {
                "the chat template never reads some of the variables in chat_template_kwargs"
            }
            Self::ArgumentsEncodedTwice => {
                "a tool call's `arguments` are JSON text, which the chat template has encoded once more (\"{\\\"…), as \
                 transformers does; most templates want them as an object"
            }
            Self::RolesRenamed => {
                "roles named human, gpt, model, function_call, observation or function_response were read as user, \
                 assistant and tool"
            }
        })
    }
}
