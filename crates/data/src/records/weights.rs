//! Which messages are trained, where the messages say so themselves: OpenAI's `weight` (0 or 1), axolotl's `train`,
//! ms-swift's `loss`, verl's `loss_mask`, torchtune's `masked`.

use serde_json::{Map, Value};

use crate::error::BadReason;
use crate::masks::TrainOn;

/// The names under which a message says whether it is trained, or (the last one) that it is not.
const FLAGS: [&str; 6] = ["weight", "train", "training", "loss", "loss_mask", MASKED];
const MASKED: &str = "masked";
/// Finer weights, of which there is no equal here.
const DETAILS: [&str; 5] = [
    "train_detail",
    "training_detail",
    "weights",
    "loss_weight",
    "loss_scale",
];

/// Whether the message at `path` is trained; `None` where it does not say.
///
/// # Errors
/// Weights between and beyond 0 and 1, parts of a message, messages of other roles that say the opposite of what
/// `train_on` does to them, and two flags that contradict each other.
pub(super) fn trained(
    fields: &Map<String, Value>,
    role: &str,
    path: &str,
    train_on: TrainOn,
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
        let on = on != (name == MASKED);
        let detail = match (role, train_on, on) {
            ("assistant", ..) => None,
            (_, TrainOn::All, false) => Some(format!(
                "leaves out a message of role {role}, and with train_on = \"all\" only the assistant's can be"
            )),
            (_, TrainOn::Assistant | TrainOn::LastAssistant, true) => Some(format!(
                "asks to train a message of role {role}, and only the assistant's are, unless train_on = \"all\""
            )),
            _ => None,
        };
        if let Some(detail) = detail {
            return Err(unsupported(name, detail));
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
