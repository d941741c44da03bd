//! `input_ids` and `labels`: rows that are already tokenized.

use serde_json::{Map, Value};

use super::{EncodedRow, Record, RecordContext, wrong_type};
use crate::error::BadReason;
use crate::masks::IGNORED;

pub(super) struct Tokens;

impl Record for Tokens {
    fn name(&self) -> &'static str {
        "tokens"
    }

    fn keys(&self) -> &'static [&'static str] {
        &["input_ids"]
    }

    fn encode(
        &self,
        row: &Map<String, Value>,
        context: &RecordContext<'_>,
    ) -> Result<EncodedRow, BadReason> {
        let vocab_size = context.tokenizer.vocab_size();
        let input_ids = integers(row, "input_ids")?;
        if input_ids.is_empty() {
            return Err(BadReason::Empty {
                field: "input_ids".to_owned(),
            });
        }
        let ids = input_ids
            .iter()
            .enumerate()
            .map(|(index, &id)| {
                in_vocabulary(id, vocab_size).ok_or(BadReason::OutOfVocabulary {
                    field: "input_ids",
                    index,
                    id,
                    vocab_size,
                })
            })
            .collect::<Result<Vec<u32>, _>>()?;
        let labels = match row.get("labels") {
            None | Some(Value::Null) => input_ids,
            Some(_) => integers(row, "labels")?,
        };
        if labels.len() != ids.len() {
            return Err(BadReason::LabelsLength {
                labels: labels.len(),
                input_ids: ids.len(),
            });
        }
        for (index, &id) in labels.iter().enumerate() {
            if id != IGNORED && in_vocabulary(id, vocab_size).is_none() {
                return Err(BadReason::OutOfVocabulary {
                    field: "labels",
                    index,
                    id,
                    vocab_size,
                });
            }
        }
        let closed = labels
            .iter()
            .rev()
            .find(|&&label| label != IGNORED)
            .and_then(|&label| u32::try_from(label).ok())
            .is_some_and(|label| context.tokenizer.is_special(label));
        Ok(EncodedRow {
            ids,
            labels,
            closed,
            straddling: 0,
        })
    }
}

fn in_vocabulary(id: i64, vocab_size: usize) -> Option<u32> {
    u32::try_from(id)
        .ok()
        .filter(|&id| (id as usize) < vocab_size)
}

fn integers(row: &Map<String, Value>, field: &'static str) -> Result<Vec<i64>, BadReason> {
    let value = row.get(field).unwrap_or(&Value::Null);
    let Value::Array(items) = value else {
        return Err(wrong_type(field, "a list of integers", value));
    };
    items
        .iter()
        .enumerate()
        .map(|(i, item)| {
            item.as_i64()
                .ok_or_else(|| wrong_type(format!("{field}[{i}]"), "an integer", item))
        })
        .collect()
}
