//! Answers before and after training, so that a person sees what changed.

use std::ops::ControlFlow;

use enamel_data::{Example, Message, Tokenizer};
use enamel_model::{Model, Sampling, generate};
use serde_json::Value;

use crate::base::OpenBase;
use crate::error::TrainError;
use crate::recipe::TrainSettings;
use crate::task::{Prompt, spread};

/// The prompts that the recipe names, else the first questions of `rows`, evenly spaced.
///
/// # Errors
/// When a prompt cannot be rendered or tokenised.
pub fn prompts(
    settings: &TrainSettings,
    rows: &[Example],
    tokenizer: &Tokenizer,
) -> Result<Vec<Prompt>, TrainError> {
    if !settings.sample_prompts.is_empty() {
        return settings
            .sample_prompts
            .iter()
            .map(|p| written(p, tokenizer))
            .collect();
    }
    spread(rows, settings.samples)
        .map(|row| from_row(row, tokenizer))
        .collect()
}

fn written(text: &str, tokenizer: &Tokenizer) -> Result<Prompt, TrainError> {
    let ids = match tokenizer.chat_template() {
        Some(_) => tokenizer.encode_chat(&[Message::new("user", text)], true)?,
        None => tokenizer.encode(text, true)?,
    };
    Ok(Prompt {
        text: text.to_string(),
        ids,
        reference: None,
    })
}

/// Everything before a row's first trained token is the question, the trained stretch after it the
/// answer: so it works for every record format.
fn from_row(row: &Example, tokenizer: &Tokenizer) -> Result<Prompt, TrainError> {
    let first = row.labels.iter().position(|l| *l >= 0).unwrap_or(0).max(1);
    let answer: Vec<u32> = row.input_ids[first..]
        .iter()
        .zip(&row.labels[first..])
        .take_while(|(_, label)| **label >= 0)
        .map(|(id, _)| *id)
        .collect();
    let ids = row.input_ids[..first].to_vec();
    let text = match question_in(row) {
        Some(text) => text,
        None => tokenizer.decode(&ids, true)?.trim().to_string(),
    };
    let reference = Some(tokenizer.decode(&answer, true)?.trim().to_string());
    Ok(Prompt {
        text,
        ids,
        reference,
    })
}

/// The question as it stands in the data file, without the template's words around it.
fn question_in(row: &Example) -> Option<String> {
    let text = std::fs::read_to_string(&row.source.file).ok()?;
    let value: Value =
        serde_json::from_str(text.lines().nth(row.source.line.checked_sub(1)?)?).ok()?;
    let text_of = |v: &Value| v.as_str().map(str::to_string);
    match value.get("messages").and_then(Value::as_array) {
        Some(messages) => messages
            .iter()
            .take_while(|m| m.get("role").and_then(Value::as_str) != Some("assistant"))
            .filter(|m| m.get("role").and_then(Value::as_str) == Some("user"))
            .last()
            .and_then(|m| m.get("content"))
            .and_then(text_of),
        None => value.get("prompt").and_then(text_of),
    }
}

/// Greedy answers of `model`, adapters as they stand.
///
/// # Errors
/// When the model's output is not a number or the device fails.
pub fn answers(
    model: &Model,
    base: &OpenBase,
    prompts: &[Prompt],
    max_new_tokens: usize,
) -> Result<Vec<String>, TrainError> {
    let sampling = Sampling::greedy(max_new_tokens);
    let (tokenizer, stop) = (&base.tokenizer, base.stop_ids());
    let context = model.config().context_length();
    let answer = |p: &Prompt| {
        // A row that is too long for the model is no reason to end a run for the sake of a sample.
        if p.ids.len() > context {
            let tokens = p.ids.len();
            return Ok(format!(
                "(not asked: {tokens} tokens, the model's context is {context})"
            ));
        }
        let ids = generate(model, &p.ids, &stop, &sampling, &mut |_| {
            ControlFlow::Continue(())
        })?;
        Ok(tokenizer.decode(&ids, true)?.trim().to_string())
    };
    prompts.iter().map(answer).collect()
}
