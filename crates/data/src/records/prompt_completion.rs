//! `prompt` and `completion`: two texts joined as they are, or two lists of messages; the completion
//! is trained.

use serde_json::{Map, Value};

use super::messages::{encode_conversation, parse_messages};
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

    fn encode(
        &self,
        row: &Map<String, Value>,
        context: &RecordContext<'_>,
    ) -> Result<EncodedRow, BadReason> {
        match (row.get("prompt"), row.get("completion")) {
            (Some(Value::Array(_)), Some(Value::Array(_))) => {
                let mut messages = parse_messages(row, "prompt", 0)?;
                let first = messages.len();
                messages.extend(parse_messages(row, "completion", first)?);
                return encode_conversation(row, &messages, first, context);
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
            ids: encoded.ids,
            labels,
            closed: false,
            straddling,
        };
        Ok(row.with_trained_eos(context.tokenizer.eos_id()))
    }
}
