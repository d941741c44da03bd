//! Alpaca and Dolly: an instruction, perhaps a text it is about, and the answer, read as a conversation of two
//! messages. Instruction and text stand on lines of their own, as LLaMA-Factory joins them.

use serde_json::{Map, Value};

use super::messages::{Conversation, encode_conversation};
use super::sharegpt::put_system_first;
use super::{EncodedRow, Record, RecordContext, text_field, wrong_type};
use crate::error::BadReason;
use crate::message::Message;

pub(super) struct Instruction {
    name: &'static str,
    /// Instruction and answer.
    keys: &'static [&'static str; 2],
    /// The column of the text that the instruction is about, and further ones.
    optional: &'static [&'static str],
}

pub(super) const ALPACA: Instruction = Instruction {
    name: "alpaca",
    keys: &["instruction", "output"],
    optional: &["input", "system", "history", "chat_template_kwargs"],
};

pub(super) const DOLLY: Instruction = Instruction {
    name: "dolly",
    keys: &["instruction", "response"],
    optional: &["context", "system", "history", "chat_template_kwargs"],
};

impl Record for Instruction {
    fn name(&self) -> &'static str {
        self.name
    }

    fn keys(&self) -> &'static [&'static str] {
        self.keys
    }

    fn optional(&self, _: &Map<String, Value>) -> &'static [&'static str] {
        self.optional
    }

    fn is_chat(&self, _: &Map<String, Value>) -> bool {
        true
    }

    fn encode(
        &self,
        row: &Map<String, Value>,
        context: &RecordContext<'_>,
    ) -> Result<EncodedRow, BadReason> {
        let [instruction, answer] = *self.keys;
        let mut question = text_field(row, instruction)?.to_owned();
        let about = self.optional.first().copied().unwrap_or_default();
        if row.get(about).is_some_and(|value| !value.is_null()) {
            let about = text_field(row, about)?;
            if !question.is_empty() && !about.is_empty() {
                question.push('\n');
            }
            question.push_str(about);
        }
        let answer_text = text_field(row, answer)?;
        for (field, text) in [(instruction, question.as_str()), (answer, answer_text)] {
            if text.is_empty() {
                return Err(BadReason::Empty {
                    field: field.to_owned(),
                });
            }
        }
        let mut messages = history(row)?;
        messages.extend([Message::user(&question), Message::assistant(answer_text)]);
        let mut conversation = Conversation::of(messages);
        put_system_first(row, &mut conversation)?;
        encode_conversation(row, &conversation, context)
    }
}

/// Earlier turns: LLaMA-Factory's `history`, a list of pairs of question and answer.
fn history(row: &Map<String, Value>) -> Result<Vec<Message>, BadReason> {
    let turns = match row.get("history") {
        None | Some(Value::Null) => return Ok(Vec::new()),
        Some(Value::Array(turns)) => turns,
        Some(other) => return Err(wrong_type("history", "a list of pairs of texts", other)),
    };
    let mut messages = Vec::new();
    for (i, turn) in turns.iter().enumerate() {
        let pair = turn.as_array().map(Vec::as_slice);
        let Some([Value::String(question), Value::String(answer)]) = pair else {
            return Err(wrong_type(
                format!("history[{i}]"),
                "a pair of texts: question and answer",
                turn,
            ));
        };
        messages.extend([Message::user(question), Message::assistant(answer)]);
    }
    Ok(messages)
}
