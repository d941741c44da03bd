//! Columns beside those of a row's format: what other trainers act on is refused by name, what none
//! acts on is reported once a file.

use serde_json::{Map, Value};

use crate::error::BadReason;

/// A family of columns that means something to another trainer.
struct Foreign {
    names: &'static [&'static str],
    meaning: &'static str,
}

const PAIRS: &str = "holds one of two answers to choose between (DPO, ORPO, reward models), which is not trained here";
const WEIGHTS: &str =
    "weighs the row or its tokens in the loss, and here each trained token counts the same";
const MEDIA: &str = "holds images, sound or video, and only text is trained here";
const OF_TOKENS: &str = "belongs to `input_ids`, which are not what this row is read from";

const MEDIA_NAMES: &[&str] = &[
    "image",
    "images",
    "pixel_values",
    "image_grid_thw",
    "audio",
    "audios",
    "input_features",
    "video",
    "videos",
    "pixel_values_videos",
];

const FOREIGN: [Foreign; 9] = [
    Foreign {
        names: &["label", "kto_tag"],
        meaning: "says whether an answer is wanted (KTO) or which class a text is in, neither of which is trained here",
    },
    Foreign {
        names: &["completions"],
        meaning: "holds several answers or steps (GRPO, process rewards), which are not trained here",
    },
    Foreign {
        names: &[
            "weight",
            "weights",
            "sample_weight",
            "sample_weights",
            "loss_weight",
            "loss_weights",
            "instance_weight",
            "instance_weights",
            "token_weights",
        ],
        meaning: WEIGHTS,
    },
    Foreign {
        names: MEDIA_NAMES,
        meaning: MEDIA,
    },
    Foreign {
        names: &[
            "labels",
            "completion_mask",
            "assistant_masks",
            "assistant_mask",
            "attention_mask",
            "position_ids",
            "seq_lengths",
        ],
        meaning: OF_TOKENS,
    },
    Foreign {
        names: &["loss_mask", "loss_masks", "prompt_mask"],
        meaning: "says which tokens count in the loss; beside `input_ids` that is `labels` (-100 is left out), `completion_mask` or `assistant_masks`",
    },
    Foreign {
        names: &[
            "cu_seqlens",
            "cu_seq_lens",
            "seq_idx",
            "segment_ids",
            "decoder_input_ids",
            "inputs_embeds",
            "prompt_input_ids",
            "completion_input_ids",
        ],
        meaning: "lays out packed rows, or feeds another kind of model, neither of which is done here",
    },
    Foreign {
        names: &["functions", "documents"],
        meaning: "is for the chat template, which gets `tools` and `chat_template_kwargs` alone",
    },
    Foreign {
        names: &["system", "system_prompt"],
        meaning: "holds a system prompt, and this format takes it as the first message, of role system",
    },
];

/// What `column` means to another trainer; `format_is_chat` is whether the row is a conversation.
fn meaning(column: &str, format_is_chat: bool) -> Option<&'static str> {
    if column == "token_type_ids" {
        return Some(OF_TOKENS);
    }
    let of_pair = |name: &&str| column == *name || column.starts_with(&format!("{name}_"));
    if ["chosen", "rejected"].iter().any(of_pair)
        || ["preferred_output", "non_preferred_output"].contains(&column)
    {
        return Some(PAIRS);
    }
    let foreign = FOREIGN
        .iter()
        .find(|family| family.names.contains(&column))?;
    // What only a chat template or a conversation would take says nothing to plain text.
    let of_chat = ["functions", "documents", "system", "system_prompt"].contains(&column);
    (format_is_chat || !of_chat).then_some(foreign.meaning)
}

/// Whether the value says nothing, whatever the column means: null (Arrow fills columns with it), an empty list or
/// text, the weight 1, or token types that are all the same 0.
fn says_nothing(column: &str, value: &Value) -> bool {
    match value {
        Value::Null => true,
        Value::Array(items) if column == "token_type_ids" => {
            items.iter().all(|item| item.as_i64() == Some(0))
        }
        Value::Array(items) => items.is_empty(),
        Value::String(text) => text.is_empty(),
        Value::Number(number) => {
            column.contains("weight") && !column.ends_with('s') && number.as_f64() == Some(1.0)
        }
        _ => false,
    }
}

/// Refuses a message at `path` with images, sound or video beside its text.
pub(super) fn check_media(fields: &Map<String, Value>, path: &str) -> Result<(), BadReason> {
    let media = |(name, value): &(&String, &Value)| {
        MEDIA_NAMES.contains(&name.as_str()) && !says_nothing(name, value)
    };
    match fields.iter().find(media) {
        None => Ok(()),
        Some((name, _)) => Err(BadReason::Unsupported {
            field: format!("{path}.{name}"),
            detail: MEDIA.to_owned(),
        }),
    }
}

/// The columns of `row` that its format does not read, `own` being those it does.
///
/// # Errors
/// [`BadReason::ForeignColumns`] with all columns that would change the training elsewhere.
pub(crate) fn unused(
    row: &Map<String, Value>,
    own: impl Fn(&str) -> bool,
    format_is_chat: bool,
) -> Result<Vec<&str>, BadReason> {
    let mut columns = Vec::new();
    let mut unused = Vec::new();
    for (name, value) in row {
        if own(name) || value.is_null() {
            continue;
        }
        match meaning(name, format_is_chat) {
            Some(_) if says_nothing(name, value) => {}
            Some(meaning) => columns.push((name.clone(), meaning)),
            None => unused.push(name.as_str()),
        }
    }
    match columns.is_empty() {
        true => Ok(unused),
        false => Err(BadReason::ForeignColumns { columns }),
    }
}
