//! The columns that go to the chat template: `tools` and `chat_template_kwargs`.

use serde_json::{Map, Value};

use super::wrong_type;
use crate::error::{BadReason, shown};
use crate::files::{json, type_name};

/// Both columns' names.
pub(super) const CHAT_COLUMNS: &[&str] = &["tools", "chat_template_kwargs"];

/// Variables that rendering sets itself, and arguments of transformers' `apply_chat_template` that are no variables.
const RESERVED: [&str; 15] = [
    "messages",
    "conversation",
    "tools",
    "documents",
    "chat_template",
    "add_generation_prompt",
    "continue_final_message",
    "tokenize",
    "padding",
    "truncation",
    "max_length",
    "return_tensors",
    "return_dict",
    "return_assistant_tokens_mask",
    "tokenizer_kwargs",
];

/// What is wrong with variables for the chat template, if anything is.
///
/// # Errors
/// Names that are not the caller's to set, in words.
pub fn check_arguments(arguments: &Map<String, Value>) -> Result<(), String> {
    let reserved: Vec<&str> = arguments
        .keys()
        .map(String::as_str)
        .filter(|name| RESERVED.contains(name) || name.starts_with("__"))
        .collect();
    match reserved.is_empty() {
        true => Ok(()),
        false => Err(format!(
            "{} cannot be set: the conversation and its rendering decide it",
            shown(&reserved.join(", "))
        )),
    }
}

/// The row's `tools`, as the template gets them: a list of objects, also given as its JSON text (which TRL reads
/// likewise, since Arrow has no type for tools of several shapes); `None` where there are none.
pub(super) fn tools(row: &Map<String, Value>) -> Result<Option<Value>, BadReason> {
    const WANTED: &str = "a list of objects, or such a list as JSON text";
    let value = match row.get("tools") {
        None | Some(Value::Null) => return Ok(None),
        Some(Value::String(text)) => {
            json::parse(text.as_bytes()).map_err(|error| BadReason::Unsupported {
                field: "tools".to_owned(),
                detail: format!("must be {WANTED}; this text is not JSON: {error}"),
            })?
        }
        Some(value) => value.clone(),
    };
    match &value {
        Value::Null => Ok(None),
        Value::Array(tools) => match tools.iter().enumerate().find(|(_, tool)| !tool.is_object()) {
            None => Ok(Some(value)),
            Some((i, tool)) => Err(wrong_type(
                format!("tools[{i}]"),
                "an object that describes a tool",
                tool,
            )),
        },
        other => Err(BadReason::Unsupported {
            field: "tools".to_owned(),
            detail: format!("must be {WANTED}, not {}", type_name(other)),
        }),
    }
}

/// The recipe's variables for the template, with the row's `chat_template_kwargs` over them.
pub(super) fn arguments(
    row: &Map<String, Value>,
    of_recipe: &Map<String, Value>,
) -> Result<Map<String, Value>, BadReason> {
    let mut arguments = of_recipe.clone();
    match row.get("chat_template_kwargs") {
        None | Some(Value::Null) => {}
        Some(Value::Object(own)) => {
            check_arguments(own).map_err(|detail| BadReason::Unsupported {
                field: "chat_template_kwargs".to_owned(),
                detail,
            })?;
            arguments.extend(own.clone());
        }
        Some(other) => {
            return Err(wrong_type(
                "chat_template_kwargs",
                "an object of variables for the chat template",
                other,
            ));
        }
    }
    Ok(arguments)
}
