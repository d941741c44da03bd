//! ShareGPT: `conversations`, a list of messages with `from` and `value`; `system` and `tools` beside it as
//! LLaMA-Factory has them.

use serde_json::{Map, Value};

use super::messages::{Conversation, encode_conversation};
use super::{EncodedRow, Record, RecordContext, wrong_type};
use crate::error::BadReason;
use crate::message::Message;

pub(super) struct ShareGpt;

impl Record for ShareGpt {
    fn name(&self) -> &'static str {
        "sharegpt"
    }

    fn keys(&self) -> &'static [&'static str] {
        &["conversations"]
    }

    fn optional(&self, _: &Map<String, Value>) -> &'static [&'static str] {
        &["system", "tools", "chat_template_kwargs"]
    }

    fn is_chat(&self, _: &Map<String, Value>) -> bool {
        true
    }

    fn encode(
        &self,
        row: &Map<String, Value>,
        context: &RecordContext<'_>,
    ) -> Result<EncodedRow, BadReason> {
        let value = row.get("conversations").unwrap_or(&Value::Null);
        let mut conversation = Conversation::parse(value, "conversations", 0, context.train_on)?;
        put_system_first(row, &mut conversation)?;
        // The format's own names are no surprise.
        conversation.renamed = false;
        encode_conversation(row, &conversation, context)
    }
}

/// The text of the row's `system` column as the first message.
pub(super) fn put_system_first(
    row: &Map<String, Value>,
    conversation: &mut Conversation,
) -> Result<(), BadReason> {
    match row.get("system") {
        None | Some(Value::Null) => Ok(()),
        Some(Value::String(text)) if text.is_empty() => Ok(()),
        Some(Value::String(text)) => {
            if conversation.messages.first().map(Message::role) == Some("system") {
                return Err(BadReason::Unsupported {
                    field: "system".to_owned(),
                    detail: "and the first message are both system prompts; keep one of them"
                        .to_owned(),
                });
            }
            conversation.put_first(Message::system(text));
            Ok(())
        }
        Some(other) => Err(wrong_type("system", "a string", other)),
    }
}
