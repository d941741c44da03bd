//! `prompt` and `completion`: two texts joined as they are, or two lists of messages; the completion
//! is trained.

use serde_json::{Map, Value};

use super::chat_columns::CHAT_COLUMNS;
use super::messages::{Conversation, encode_conversation};
use super::{EncodedRow, Record, RecordContext, text_field, wrong_type};
use crate::error::BadReason;
use crate::masks::{TrainOn, labels_in};

pub(super) struct PromptCompletion;

impl Record for PromptCompletion {
    fn name(&self) -> &'static str {
        "prompt_completion"
    }

    fn keys(&self) -> &'static [&'static str] {
        &["prompt", "completion"]
    }

    fn optional(&self, row: &Map<String, Value>) -> &'static [&'static str] {
        match self.is_chat(row) {
            true => CHAT_COLUMNS,
            false => &[],
        }
    }

    fn is_chat(&self, row: &Map<String, Value>) -> bool {
        row.get("prompt").is_some_and(Value::is_array)
    }

    fn encode(
        &self,
        row: &Map<String, Value>,
        context: &RecordContext<'_>,
    ) -> Result<EncodedRow, BadReason> {
        match (row.get("prompt"), row.get("completion")) {
            (Some(prompt @ Value::Array(_)), Some(completion @ Value::Array(_))) => {
                let mut conversation = Conversation::parse(prompt, "prompt", 0, context.train_on)?;
                conversation.first = conversation.messages.len();
                conversation.extend(Conversation::parse(
                    completion,
                    "completion",
                    conversation.first,
                    context.train_on,
                )?);
                return encode_conversation(row, &conversation, context);
            }
            (Some(Value::Array(_)), Some(other)) => {
                return Err(wrong_type(
                    "completion",
                    "a list of messages, as `prompt`",
                    other,
                ));
            }
            _ => {}
        }
        let prompt = text_field(row, "prompt")?;
        let completion = text_field(row, "completion")?;
        if completion.is_empty() {
            return Err(BadReason::Empty {
                field: "completion".to_owned(),
            });
        }
        let text = format!("{prompt}{completion}");
        let start = if context.train_on == TrainOn::All {
            0
        } else {
            prompt.len()
        };
        let encoded = context.encode_text(&text, true)?;
        let (labels, straddling) = labels_in(&encoded, std::slice::from_ref(&(start..text.len())));
        let row = EncodedRow {
            straddling,
            ..EncodedRow::new(encoded.ids, labels, false)
        };
        Ok(row.with_trained_eos(context.tokenizer.eos_id()))
    }
}
