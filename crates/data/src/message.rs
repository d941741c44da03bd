//! One chat message, with whatever extra keys its template may read.

use serde_json::{Map, Value};

/// One message of a conversation: a `role`, a `content` and any extra keys the template reads
/// (`tool_calls`, `name`, `reasoning_content`, …), in the order of the data file.
#[derive(Debug, Clone, PartialEq)]
pub struct Message {
    fields: Map<String, Value>,
}

impl Message {
    /// A message of `role` with plain text.
    pub fn new(role: &str, content: &str) -> Self {
        let mut fields = Map::new();
        fields.insert("role".to_owned(), Value::String(role.to_owned()));
        fields.insert("content".to_owned(), Value::String(content.to_owned()));
        Self { fields }
    }

    /// A system message.
    pub fn system(content: &str) -> Self {
        Self::new("system", content)
    }

    /// A user message.
    pub fn user(content: &str) -> Self {
        Self::new("user", content)
    }

    /// An assistant message.
    pub fn assistant(content: &str) -> Self {
        Self::new("assistant", content)
    }

    /// A message from the fields of a JSON object, unchecked: templates read what they know.
    pub fn from_fields(fields: Map<String, Value>) -> Self {
        Self { fields }
    }

    /// All fields, in order.
    pub fn fields(&self) -> &Map<String, Value> {
        &self.fields
    }

    /// The role, or an empty string where it is missing.
    pub fn role(&self) -> &str {
        self.fields
            .get("role")
            .and_then(Value::as_str)
            .unwrap_or_default()
    }

    /// The content, where it is plain text.
    pub fn content(&self) -> Option<&str> {
        self.fields.get("content").and_then(Value::as_str)
    }

    /// The tools it calls, where it has such a list.
    pub(crate) fn tool_calls(&self) -> Option<&Vec<Value>> {
        self.fields.get("tool_calls").and_then(Value::as_array)
    }

    /// The same message with `mark` behind what is likely to be rendered last: the last text among its tool calls'
    /// arguments, else its content. White space at the end stays behind the mark, so that trimming does not
    /// reach it. `None` where there is no such text.
    pub(crate) fn with_mark(&self, mark: &str) -> Option<Self> {
        let mut fields = self.fields.clone();
        let calls = fields.get_mut("tool_calls").and_then(Value::as_array_mut);
        let target = match calls.and_then(|calls| calls.last_mut()) {
            Some(call) => {
                let call = match call.get("function") {
                    Some(_) => call.get_mut("function")?,
                    None => call,
                };
                last_text(call.get_mut("arguments")?)?
            }
            None => match fields.get_mut("content")? {
                Value::String(text) => text,
                Value::Array(parts) => match parts.last_mut()?.get_mut("text")? {
                    Value::String(text) => text,
                    _ => return None,
                },
                _ => return None,
            },
        };
        let end = target.trim_end().len();
        if end == 0 {
            return None;
        }
        target.insert_str(end, mark);
        Some(Self { fields })
    }

    /// The same message with its content replaced; a list of content parts stays a list.
    pub(crate) fn with_content(&self, text: &str) -> Self {
        let mut fields = self.fields.clone();
        let content = match fields.get("content") {
            Some(Value::Array(_)) => serde_json::json!([{ "type": "text", "text": text }]),
            _ => Value::String(text.to_owned()),
        };
        fields.insert("content".to_owned(), content);
        Self { fields }
    }
}

/// The text that is written last of a value, where its last leaf is one.
fn last_text(value: &mut Value) -> Option<&mut String> {
    match value {
        Value::String(text) => Some(text),
        Value::Array(items) => last_text(items.last_mut()?),
        Value::Object(map) => last_text(map.values_mut().next_back()?),
        _ => None,
    }
}
