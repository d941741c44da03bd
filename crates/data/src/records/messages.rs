//! `messages`: conversations, rendered by the chat template and trained on the assistant's turns.

use serde_json::{Map, Value};

use super::{EncodedRow, Record, RecordContext, wrong_type};
use crate::chat_template::RenderOptions;
use crate::error::BadReason;
use crate::masks::{TrainOn, labels_in, mask_conversation};
use crate::message::Message;

/// The roles chat templates know.
const ROLES: [&str; 7] = [
    "system",
    "developer",
    "user",
    "assistant",
    "tool",
    "function",
    "ipython",
];

pub(super) struct Messages;

impl Record for Messages {
    fn name(&self) -> &'static str {
        "messages"
    }

    fn keys(&self) -> &'static [&'static str] {
        &["messages"]
    }

    fn encode(
        &self,
        row: &Map<String, Value>,
        context: &RecordContext<'_>,
    ) -> Result<EncodedRow, BadReason> {
        let messages = parse_messages(row, "messages", 0)?;
        encode_conversation(row, &messages, 0, context)
    }
}

/// Renders and tokenizes a conversation whose trained part starts at message `first`; the row's
/// `tools` go to the template.
pub(super) fn encode_conversation(
    row: &Map<String, Value>,
    messages: &[Message],
    first: usize,
    context: &RecordContext<'_>,
) -> Result<EncodedRow, BadReason> {
    let template = context.template()?;
    let options = RenderOptions {
        add_generation_prompt: false,
        tools: row.get("tools").filter(|tools| !tools.is_null()),
        arguments: Some(context.template_arguments),
    };
    let trains_all = context.train_on == TrainOn::All;
    let has_turn = messages[first..].iter().any(|m| m.role() == "assistant");
    if !has_turn && !trains_all {
        return Err(BadReason::NothingTrained {
            detail: "the conversation has no assistant message".to_owned(),
        });
    }
    if !has_turn {
        let text = template.render_with(messages, options)?;
        let whole = std::iter::once(0..text.len()).collect();
        return finish(&text, whole, false, context);
    }
    let mut masked = mask_conversation(context.tokenizer, template, messages, options, first)?;
    match context.train_on {
        TrainOn::Assistant => {}
        TrainOn::LastAssistant => {
            let earlier = masked.spans.len().saturating_sub(1);
            masked.spans.drain(..earlier);
        }
        TrainOn::All => masked.spans = std::iter::once(0..masked.text.len()).collect(),
    }
    finish(&masked.text, masked.spans, masked.closed, context)
}

fn finish(
    text: &str,
    spans: Vec<std::ops::Range<usize>>,
    closed: bool,
    context: &RecordContext<'_>,
) -> Result<EncodedRow, BadReason> {
    // The template has written every special token, BOS included.
    let encoded = context.encode_text(text, false)?;
    let (labels, straddling) = labels_in(&encoded, &spans);
    Ok(EncodedRow {
        ids: encoded.ids,
        labels,
        closed,
        straddling,
    })
}

/// The messages in `field`, checked; `offset` is the number of messages before them.
pub(super) fn parse_messages(
    row: &Map<String, Value>,
    field: &str,
    offset: usize,
) -> Result<Vec<Message>, BadReason> {
    let value = row.get(field).unwrap_or(&Value::Null);
    let Value::Array(items) = value else {
        return Err(wrong_type(field, "a list of messages", value));
    };
    if items.is_empty() {
        return Err(BadReason::Empty {
            field: field.to_owned(),
        });
    }
    items
        .iter()
        .enumerate()
        .map(|(i, item)| parse_message(item, &format!("{field}[{i}]"), offset + i))
        .collect()
}

fn parse_message(item: &Value, path: &str, index: usize) -> Result<Message, BadReason> {
    let Value::Object(fields) = item else {
        return Err(wrong_type(path, "an object with role and content", item));
    };
    let missing = |key: &str| BadReason::MissingField {
        field: format!("{path}.{key}"),
        format: "messages",
        found: super::keys_of(fields),
    };
    let role = match fields.get("role") {
        Some(Value::String(role)) => role,
        Some(other) => return Err(wrong_type(format!("{path}.role"), "a string", other)),
        None => return Err(missing("role")),
    };
    if !ROLES.contains(&role.as_str()) {
        return Err(BadReason::UnknownRole {
            index,
            role: role.clone(),
            known: ROLES.join(", "),
        });
    }
    let calls_tools = fields
        .get("tool_calls")
        .is_some_and(|calls| calls.as_array().is_some_and(|calls| !calls.is_empty()));
    match fields.get("content") {
        Some(Value::String(_)) => {}
        Some(Value::Array(parts)) => {
            for (i, part) in parts.iter().enumerate() {
                let text = part.get("text").and_then(Value::as_str);
                if part.get("type").and_then(Value::as_str) != Some("text") || text.is_none() {
                    return Err(wrong_type(
                        format!("{path}.content[{i}]"),
                        "a part {\"type\": \"text\", \"text\": …}",
                        part,
                    ));
                }
            }
        }
        Some(Value::Null) | None if calls_tools => {}
        Some(other) => return Err(wrong_type(format!("{path}.content"), "a string", other)),
        None => return Err(missing("content")),
    }
    Ok(Message::from_fields(fields.clone()))
}
