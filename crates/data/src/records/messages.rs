//! `messages`: conversations, rendered by the chat template and trained on the assistant's turns.

use serde_json::{Map, Value};

use super::chat_columns::{CHAT_COLUMNS, arguments, tools};
use super::{EncodedRow, Record, RecordContext, Remark, columns, weights, wrong_type};
use crate::chat_template::{ChatTemplate, RenderOptions};
use crate::error::{BadReason, shown};
use crate::files::json;
use crate::masks::{Selection, TrainOn, labels_in, mask_conversation};
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

/// Other names of those roles: ShareGPT's, and Gemini's `model`.
const OTHER_ROLES: [(&str, &str); 6] = [
    ("human", "user"),
    ("gpt", "assistant"),
    ("model", "assistant"),
    ("function_call", "assistant"),
    ("observation", "tool"),
    ("function_response", "tool"),
];

pub(super) struct Messages;

impl Record for Messages {
    fn name(&self) -> &'static str {
        "messages"
    }

    fn keys(&self) -> &'static [&'static str] {
        &["messages"]
    }

    fn optional(&self, _: &Map<String, Value>) -> &'static [&'static str] {
        CHAT_COLUMNS
    }

    fn is_chat(&self, _: &Map<String, Value>) -> bool {
        true
    }

    fn encode(
        &self,
        row: &Map<String, Value>,
        context: &RecordContext<'_>,
    ) -> Result<EncodedRow, BadReason> {
        let value = row.get("messages").unwrap_or(&Value::Null);
        let conversation = match value {
            // A list that a table of plain texts holds as its JSON.
            Value::String(text) => match json::parse(text.as_bytes()) {
                Ok(list @ Value::Array(_)) => {
                    Conversation::parse(&list, "messages", 0, context.train_on)?
                }
                _ => return Err(wrong_type("messages", "a list of messages", value)),
            },
            value => Conversation::parse(value, "messages", 0, context.train_on)?,
        };
        encode_conversation(row, &conversation, context)
    }
}

/// Messages, and what they say about their training.
pub(super) struct Conversation {
    pub(super) messages: Vec<Message>,
    /// Whether each is trained, where it says so itself.
    flags: Vec<Option<bool>>,
    /// The first message that belongs to the trained part.
    pub(super) first: usize,
    /// Whether roles were read under other names.
    pub(super) renamed: bool,
    train_on: TrainOn,
}

impl Conversation {
    pub(super) fn of(messages: Vec<Message>) -> Self {
        Self {
            flags: vec![None; messages.len()],
            messages,
            first: 0,
            renamed: false,
            train_on: TrainOn::default(),
        }
    }

    /// The messages in `value`, the row's `field`, checked; `offset` is the number of messages before them.
    pub(super) fn parse(
        value: &Value,
        field: &str,
        offset: usize,
        train_on: TrainOn,
    ) -> Result<Self, BadReason> {
        let Value::Array(items) = value else {
            return Err(wrong_type(field, "a list of messages", value));
        };
        if items.is_empty() {
            return Err(BadReason::Empty {
                field: field.to_owned(),
            });
        }
        let mut conversation = Self {
            train_on,
            ..Self::of(Vec::new())
        };
        for (i, item) in items.iter().enumerate() {
            conversation.add(item, &format!("{field}[{i}]"), offset.saturating_add(i))?;
        }
        Ok(conversation)
    }

    pub(super) fn extend(&mut self, more: Self) {
        self.messages.extend(more.messages);
        self.flags.extend(more.flags);
        self.renamed |= more.renamed;
    }

    pub(super) fn put_first(&mut self, message: Message) {
        self.messages.insert(0, message);
        self.flags.insert(0, None);
    }

    fn add(&mut self, item: &Value, path: &str, index: usize) -> Result<(), BadReason> {
        let Value::Object(fields) = item else {
            return Err(wrong_type(path, "an object with role and content", item));
        };
        // As in transformers, a null says that the key is not there.
        let mut fields: Map<String, Value> = fields
            .iter()
            .filter(|(_, value)| !value.is_null())
            .map(|(key, value)| (key.clone(), value.clone()))
            .collect();
        for (theirs, ours) in [("from", "role"), ("value", "content")] {
            if !fields.contains_key(ours)
                && let Some(value) = fields.shift_remove(theirs)
            {
                fields.insert(ours.to_owned(), value);
            }
        }
        let role = role(&fields, path, index)?;
        if fields.get("role").and_then(Value::as_str) != Some(role) {
            self.renamed = true;
            if fields.get("role").and_then(Value::as_str) == Some("function_call") {
                call_tools(&mut fields, path)?;
            }
            fields.insert("role".to_owned(), Value::String(role.to_owned()));
        }
        check_content(&fields, path)?;
        columns::check_media(&fields, path)?;
        self.flags
            .push(weights::trained(&fields, role, path, self.train_on)?);
        self.messages.push(Message::from_fields(fields));
        Ok(())
    }
}

/// The message's role by the name that templates know.
fn role(fields: &Map<String, Value>, path: &str, index: usize) -> Result<&'static str, BadReason> {
    let role = match fields.get("role") {
        Some(Value::String(role)) => role.as_str(),
        Some(other) => return Err(wrong_type(format!("{path}.role"), "a string", other)),
        None => return Err(missing(fields, path, "role")),
    };
    let other = OTHER_ROLES.iter().find(|(theirs, _)| *theirs == role);
    let known = ROLES.iter().find(|known| **known == role);
    known
        .copied()
        .or(other.map(|(_, ours)| *ours))
        .ok_or_else(|| BadReason::UnknownRole {
            index,
            role: shown(role),
            known: ROLES.join(", "),
        })
}

fn missing(fields: &Map<String, Value>, path: &str, key: &str) -> BadReason {
    BadReason::MissingField {
        field: format!("{path}.{key}"),
        format: "messages",
        found: super::keys_of(fields),
    }
}

/// ShareGPT's `function_call`: the content is the call as JSON, or a list of calls.
fn call_tools(fields: &mut Map<String, Value>, path: &str) -> Result<(), BadReason> {
    const WANTED: &str = "a tool call as JSON: {\"name\": …, \"arguments\": …}";
    let content = fields.shift_remove("content").unwrap_or(Value::Null);
    let value = match &content {
        Value::String(text) => json::parse(text.as_bytes()).ok(),
        _ => None,
    };
    let calls = match value {
        Some(Value::Array(calls)) => calls,
        Some(call) => vec![call],
        None => Vec::new(),
    };
    let named = |call: &Value| call.get("name").is_some_and(Value::is_string);
    if calls.is_empty() || !calls.iter().all(named) {
        return Err(wrong_type(format!("{path}.value"), WANTED, &content));
    }
    let calls = calls
        .into_iter()
        .map(|call| serde_json::json!({"type": "function", "function": call}))
        .collect();
    fields.insert("tool_calls".to_owned(), Value::Array(calls));
    fields.insert("content".to_owned(), Value::String(String::new()));
    Ok(())
}

fn check_content(fields: &Map<String, Value>, path: &str) -> Result<(), BadReason> {
    let calls_tools = fields
        .get("tool_calls")
        .is_some_and(|calls| calls.as_array().is_some_and(|calls| !calls.is_empty()));
    match fields.get("content") {
        Some(Value::String(_)) => Ok(()),
        Some(Value::Array(parts)) => {
            for (i, part) in parts.iter().enumerate() {
                let text = part.get("text").and_then(Value::as_str);
                if part.get("type").and_then(Value::as_str) != Some("text") || text.is_none() {
                    return Err(wrong_type(
                        format!("{path}.content[{i}]"),
                        "a part {\"type\": \"text\", \"text\": …}, since only text is trained here",
                        part,
                    ));
                }
            }
            Ok(())
        }
        None if calls_tools => Ok(()),
        Some(other) => Err(wrong_type(format!("{path}.content"), "a string", other)),
        None => Err(missing(fields, path, "content")),
    }
}

/// Renders and tokenizes a conversation; the row's `tools` and `chat_template_kwargs` go to the template.
pub(super) fn encode_conversation(
    row: &Map<String, Value>,
    conversation: &Conversation,
    context: &RecordContext<'_>,
) -> Result<EncodedRow, BadReason> {
    let template = context.template()?;
    let tools = tools(row)?;
    let arguments = arguments(row, context.template_arguments)?;
    let options = RenderOptions {
        add_generation_prompt: false,
        tools: tools.as_ref(),
        arguments: Some(&arguments),
    };
    let Conversation {
        messages,
        flags,
        first,
        ..
    } = conversation;
    let has_turn = messages
        .iter()
        .skip(*first)
        .any(|m| m.role() == "assistant");
    if !has_turn && context.train_on != TrainOn::All {
        return Err(BadReason::NothingTrained {
            detail: "the conversation has no assistant message".to_owned(),
        });
    }
    let selection = Selection {
        train_on: context.train_on,
        first: *first,
        masked: (0..flags.len())
            .filter(|i| flags.get(*i) == Some(&Some(false)))
            .filter(|i| messages.get(*i).map(Message::role) == Some("assistant"))
            .collect(),
    };
    let masked = mask_conversation(context.tokenizer, template, messages, options, &selection)?;
    // The template has written every special token, BOS included.
    let encoded = context.encode_text(&masked.text, false)?;
    let (labels, straddling) = labels_in(&encoded, &masked.spans);
    let mut remarks = remarks(template, messages, options, &masked.text);
    if conversation.renamed {
        remarks.push(Remark::RolesRenamed);
    }
    Ok(EncodedRow {
        straddling,
        remarks,
        ..EncodedRow::new(encoded.ids, labels, masked.closed)
    })
}

/// What the template makes of the row that its author may not expect.
fn remarks(
    template: &ChatTemplate,
    messages: &[Message],
    options: RenderOptions<'_>,
    text: &str,
) -> Vec<Remark> {
    let reads = |name: &str| template.source().contains(name);
    let mut remarks = Vec::new();
    let has_tools = |tools: &Value| tools.as_array().is_some_and(|tools| !tools.is_empty());
    if options.tools.is_some_and(has_tools) && !reads("tools") {
        remarks.push(Remark::ToolsUnread);
    }
    if let Some(arguments) = options.arguments
        && arguments.keys().any(|name| !reads(name))
    {
        remarks.push(Remark::ArgumentsUnread);
    }
    let calls = messages.iter().filter_map(Message::tool_calls).flatten();
    let mut some = false;
    let mut twice = false;
    for call in calls {
        some = true;
        let arguments = call
            .get("function")
            .unwrap_or(call)
            .get("arguments")
            .and_then(Value::as_str);
        // Only text with a quote in it looks different when it is encoded.
        twice |= arguments
            .filter(|text| text.contains('"'))
            .is_some_and(|arguments| text.contains(&Value::from(arguments).to_string()));
    }
    if some && !reads("tool_calls") {
        remarks.push(Remark::CallsUnread);
    }
    if twice {
        remarks.push(Remark::ArgumentsEncodedTwice);
    }
    remarks
}
