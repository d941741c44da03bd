//! Which messages are trained, where the messages say so themselves: OpenAI's `weight` (0 or 1) and axolotl's
//! `train`.

use serde_json::{Map, Value};

use crate::error::BadReason;

/// The names under which a message says whether it is trained.
const FLAGS: [&str; 3] = ["weight", "train", "training"];
/// Finer weights, of which there is no equal here.
const DETAILS: [&str; 4] = ["train_detail", "training_detail", "weights", "loss_weight"];

/// Whether the message at `path` is trained; `None` where it does not say.
///
/// # Errors
/// Weights between and beyond 0 and 1, parts of a message, messages of other roles that are to be trained, and two
/// flags that contradict each other.
pub(super) fn trained(
    fields: &Map<String, Value>,
    role: &str,
    path: &str,
) -> Result<Option<bool>, BadReason> {
    let unsupported = |name: &str, detail: String| BadReason::Unsupported {
        field: format!("{path}.{name}"),
        detail,
    };
    for name in DETAILS {
        match fields.get(name) {
            None | Some(Value::Null) => {}
            Some(Value::Array(parts)) if parts.is_empty() => {}
            Some(_) => {
                return Err(unsupported(
                    name,
                    "weighs parts of a message, and a message is trained whole or not at all here"
                        .to_owned(),
                ));
            }
        }
    }
    let mut found: Option<(&str, bool)> = None;
    for name in FLAGS {
        let on = match fields.get(name) {
            None | Some(Value::Null) => continue,
            Some(Value::Bool(on)) => *on,
            Some(Value::Number(number)) if number.as_f64() == Some(0.0) => false,
            Some(Value::Number(number)) if number.as_f64() == Some(1.0) => true,
            Some(other) => {
                let mut value = other.to_string();
                value.truncate(value.floor_char_boundary(20));
                return Err(unsupported(
                    name,
                    format!(
                        "is {value}, and a message is trained (1, true) or not (0, false) here"
                    ),
                ));
            }
        };
        if on && role != "assistant" {
            return Err(unsupported(
                name,
                format!("asks to train a message of role {role}, and only the assistant's are"),
            ));
        }
        match found {
            Some((other, value)) if value != on => {
                return Err(unsupported(name, format!("contradicts `{other}`")));
            }
            _ => found = Some((name, on)),
        }
    }
    Ok(found.map(|(_, on)| on))
}
