//! `input_ids`: rows that are already tokenized, with `labels` or masks beside them.
//!
//! As in TRL, `labels` stand as they are; without them `assistant_masks` always count and `completion_mask` counts
//! unless everything is trained. Tokens that `attention_mask` leaves out at either end are padding, and dropped.

use serde_json::{Map, Value};

use super::{EncodedRow, Record, RecordContext, wrong_type};
use crate::error::BadReason;
use crate::masks::{IGNORED, TrainOn};

pub(super) struct Tokens;

/// Columns with an entry for each token, besides `labels`.
const MASKS: [&str; 2] = ["completion_mask", "assistant_masks"];

impl Record for Tokens {
    fn name(&self) -> &'static str {
        "tokens"
    }

    fn keys(&self) -> &'static [&'static str] {
        &["input_ids"]
    }

    fn optional(&self, _: &Map<String, Value>) -> &'static [&'static str] {
        &[
            "labels",
            "completion_mask",
            "assistant_masks",
            "attention_mask",
            "position_ids",
            "seq_lengths",
        ]
    }

    fn encode(
        &self,
        row: &Map<String, Value>,
        context: &RecordContext<'_>,
    ) -> Result<EncodedRow, BadReason> {
        let vocab_size = context.tokenizer.vocab_size();
        let mut ids = all_ids(row, vocab_size)?;
        let input_ids: Vec<i64> = ids.iter().map(|id| i64::from(*id)).collect();
        let mut labels = labels(row, &input_ids, context)?;
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
        let (start, end) = real_tokens(row, ids.len())?;
        check_positions(row, start, end)?;
        keep(&mut ids, start, end);
        labels.truncate(end);
        labels.drain(..start);
        let closed = labels
            .iter()
            .rev()
            .find(|&&label| label != IGNORED)
            .and_then(|&label| u32::try_from(label).ok())
            .is_some_and(|label| context.tokenizer.is_special(label));
        Ok(EncodedRow::new(ids, labels, closed))
    }
}

/// The columns beside `input_ids` that say which of them are real, and where they stand.
pub(crate) const BESIDE_IDS: [&str; 2] = ["attention_mask", "position_ids"];

/// The real tokens of a row, all of which the vocabulary has.
pub(crate) fn real_ids(row: &Map<String, Value>, vocab_size: usize) -> Result<Vec<u32>, BadReason> {
    let mut ids = all_ids(row, vocab_size)?;
    let (start, end) = real_tokens(row, ids.len())?;
    check_positions(row, start, end)?;
    keep(&mut ids, start, end);
    Ok(ids)
}

/// The same with the padding, at least one.
fn all_ids(row: &Map<String, Value>, vocab_size: usize) -> Result<Vec<u32>, BadReason> {
    let ids = integers(row, "input_ids")?;
    if ids.is_empty() {
        return Err(BadReason::Empty {
            field: "input_ids".to_owned(),
        });
    }
    let of_vocabulary = ids.iter().enumerate().map(|(index, &id)| {
        in_vocabulary(id, vocab_size).ok_or(BadReason::OutOfVocabulary {
            field: "input_ids",
            index,
            id,
            vocab_size,
        })
    });
    of_vocabulary.collect()
}

fn keep(ids: &mut Vec<u32>, start: usize, end: usize) {
    ids.truncate(end);
    ids.drain(..start);
}

/// A label for each token, before padding is dropped.
fn labels(
    row: &Map<String, Value>,
    input_ids: &[i64],
    context: &RecordContext<'_>,
) -> Result<Vec<i64>, BadReason> {
    let mut labels = optional_integers(row, "labels", input_ids.len())?;
    for name in MASKS {
        let Some(mask) = bits(row, name, input_ids.len())? else {
            continue;
        };
        if let Some(labels) = &labels {
            let trained = |(&label, &on): (&i64, &bool)| label != IGNORED && !on;
            if let Some(index) = labels.iter().zip(&mask).position(trained) {
                return Err(BadReason::Unsupported {
                    field: name.to_owned(),
                    detail: format!(
                        "leaves out token {index}, which `labels` train; remove one of the two"
                    ),
                });
            }
        }
    }
    if labels.is_none() {
        let mut found = input_ids.to_vec();
        for name in MASKS {
            if name == "completion_mask" && context.train_on == TrainOn::All {
                continue;
            }
            for (label, on) in found
                .iter_mut()
                .zip(bits(row, name, input_ids.len())?.unwrap_or_default())
            {
                if !on {
                    *label = IGNORED;
                }
            }
        }
        labels = Some(found);
    }
    Ok(labels.unwrap_or_default())
}

/// The range of tokens that are no padding.
fn real_tokens(row: &Map<String, Value>, len: usize) -> Result<(usize, usize), BadReason> {
    let Some(mask) = bits(row, "attention_mask", len)? else {
        return Ok((0, len));
    };
    let unsupported = |detail: String| BadReason::Unsupported {
        field: "attention_mask".to_owned(),
        detail,
    };
    let (Some(start), Some(last)) = (
        mask.iter().position(|&on| on),
        mask.iter().rposition(|&on| on),
    ) else {
        return Err(unsupported(
            "is 0 everywhere: the row is padding".to_owned(),
        ));
    };
    let hole = mask.iter().enumerate().skip(start).find(|(_, on)| !**on);
    match hole {
        Some((hole, _)) if hole < last => Err(unsupported(format!(
            "is 0 at token {hole}, between tokens that are read; padding at the ends is dropped, and nothing else"
        ))),
        _ => Ok((start, last.saturating_add(1))),
    }
}

/// Refuses rows that hold several documents: attention is not kept within each of them.
fn check_positions(row: &Map<String, Value>, start: usize, end: usize) -> Result<(), BadReason> {
    let unsupported = |field: &str, detail: String| BadReason::Unsupported {
        field: field.to_owned(),
        detail,
    };
    const PACKED: &str = "packs several documents into a row, which would read each other here; give each document a row of its own";
    if let Some(lengths) = listed(row, "seq_lengths")? {
        let tokens = end.saturating_sub(start);
        match lengths.as_slice() {
            [length] if usize::try_from(*length) == Ok(tokens) => {}
            [_] => {
                return Err(unsupported(
                    "seq_lengths",
                    format!("is not the row's length, {tokens}"),
                ));
            }
            _ => return Err(unsupported("seq_lengths", PACKED.to_owned())),
        }
    }
    if let Some(positions) = listed(row, "position_ids")? {
        let real: Vec<i64> = positions.iter().copied().take(end).skip(start).collect();
        let counted = |(i, &position): (usize, &i64)| usize::try_from(position) != Ok(i);
        if let Some((i, position)) = real
            .iter()
            .enumerate()
            .find(|(i, position)| counted((*i, position)))
        {
            let detail = match position {
                0 => PACKED.to_owned(),
                _ => format!("is {position} at token {i}; positions count from 0 in each row here"),
            };
            return Err(unsupported("position_ids", detail));
        }
        if real.len() != end.saturating_sub(start) {
            return Err(BadReason::Length {
                field: "position_ids",
                entries: positions.len(),
                input_ids: end,
            });
        }
    }
    Ok(())
}

fn in_vocabulary(id: i64, vocab_size: usize) -> Option<u32> {
    u32::try_from(id)
        .ok()
        .filter(|&id| (id as usize) < vocab_size)
}

/// A column of integers, or none where it is absent.
fn listed(row: &Map<String, Value>, field: &'static str) -> Result<Option<Vec<i64>>, BadReason> {
    match row.get(field) {
        None | Some(Value::Null) => Ok(None),
        Some(_) => integers(row, field).map(Some),
    }
}

/// A column with an entry for each of `len` tokens.
fn optional_integers(
    row: &Map<String, Value>,
    field: &'static str,
    len: usize,
) -> Result<Option<Vec<i64>>, BadReason> {
    let list = listed(row, field)?;
    match &list {
        Some(list) if list.len() != len => Err(BadReason::Length {
            field,
            entries: list.len(),
            input_ids: len,
        }),
        _ => Ok(list),
    }
}

/// A mask of 0 and 1 (or false and true) with an entry for each of `len` tokens.
fn bits(
    row: &Map<String, Value>,
    field: &'static str,
    len: usize,
) -> Result<Option<Vec<bool>>, BadReason> {
    let items = match row.get(field) {
        None | Some(Value::Null) => return Ok(None),
        Some(Value::Array(items)) => items,
        Some(other) => return Err(wrong_type(field, "a list of 0 and 1", other)),
    };
    if items.len() != len {
        return Err(BadReason::Length {
            field,
            entries: items.len(),
            input_ids: len,
        });
    }
    let bit = |(i, item): (usize, &Value)| match (item.as_bool(), item.as_i64()) {
        (Some(on), _) => Ok(on),
        (None, Some(on @ 0..=1)) => Ok(on == 1),
        _ => Err(wrong_type(format!("{field}[{i}]"), "0 or 1", item)),
    };
    let bits: Result<Vec<bool>, _> = items.iter().enumerate().map(bit).collect();
    bits.map(Some)
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
