//! mlx-lm's adapters: `adapters.safetensors` with `lora_a` `[in, r]` and `lora_b` `[r, out]` beside each
//! layer, the scale as a plain factor in `adapter_config.json`.
//!
//! Formulas as in mlx-lm's `tuner/lora.py` and `tuner/dora.py`: `y = W·x + scale·((x·a)·b)`, and DoRA's
//! `m / ‖W + scale·bᵀ·aᵀ‖` by rows, the length a constant in the backward pass: PEFT's, transposed.

use std::collections::BTreeMap;

use serde_json::{Map, Value, json};

use crate::error::shown;
use crate::files::store::Stored;
use crate::plan::PREFIX;

const A: &str = ".lora_a";
const B: &str = ".lora_b";
const M: &str = ".m";

/// Whether `adapter_config.json` is mlx-lm's.
pub(crate) fn is_mlx(config: &Value) -> bool {
    config.get("peft_type").is_none()
        && ["fine_tune_type", "lora_parameters", "lora_layers"]
            .iter()
            .any(|key| config.get(key).is_some())
}

/// The configuration that PEFT would have for it. The modules are those that the file of weights has `keys`
/// for: which layers are the last ones would depend on the model.
///
/// # Errors
/// What of it has no place here, one line each.
pub(crate) fn config(value: &Value, keys: &[&str]) -> Result<Value, Vec<String>> {
    const WHO: &str = "this is an mlx-lm adapter";
    let kind = value.get("fine_tune_type").and_then(Value::as_str);
    let kind = kind.unwrap_or("lora");
    if !["lora", "dora"].contains(&kind) {
        return Err(vec![format!(
            "{WHO} of fine_tune_type {kind:?}, which holds whole weights; make a model of it with mlx_lm.fuse"
        )]);
    }
    let empty = Map::new();
    let own = value.get("lora_parameters").and_then(Value::as_object);
    let own = own.unwrap_or(&empty);
    let number = |key: &str| own.get(key).and_then(Value::as_f64);
    let rank = own.get("rank").and_then(Value::as_u64);
    let (Some(rank), Some(scale)) = (rank.filter(|rank| *rank > 0), number("scale")) else {
        return Err(vec![format!(
            "{WHO}, and lora_parameters says no rank and scale; add them, or make a model of it with mlx_lm.fuse"
        )]);
    };
    let mut targets: Vec<&str> = keys.iter().filter_map(|key| module(key)).collect();
    targets.sort_unstable();
    targets.dedup();
    if targets.is_empty() {
        return Err(vec![format!("{WHO} without a single layer in its weights")]);
    }
    // On a table mlx-lm draws A and counts the table as the head too, which PEFT's files cannot say.
    let tables: Vec<String> = targets
        .iter()
        .filter(|name| name.ends_with("embed_tokens"))
        .map(|name| {
            format!(
                "{WHO} on {}, an embedding, which is not read; make a model of it with mlx_lm.fuse",
                shown(name)
            )
        })
        .collect();
    if !tables.is_empty() {
        return Err(tables);
    }
    Ok(json!({
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": value.get("model").and_then(Value::as_str),
        "r": rank,
        "lora_alpha": scale * rank as f64,
        "lora_dropout": number("dropout").filter(|p| (0.0..1.0).contains(p)).unwrap_or(0.0),
        "use_dora": kind == "dora",
        "target_modules": targets,
    }))
}

fn module(key: &str) -> Option<&str> {
    [A, B, M].iter().find_map(|end| key.strip_suffix(end))
}

/// The tensors under PEFT's keys and in its layout.
///
/// # Errors
/// Tensors that are no part of a LoRA on linear layers.
pub(crate) fn tensors(
    stored: BTreeMap<String, Stored>,
) -> Result<BTreeMap<String, Stored>, Vec<String>> {
    let mut problems = Vec::new();
    let mut all = BTreeMap::new();
    for (key, tensor) in stored {
        let put = |own: &str| format!("{PREFIX}{}.{own}", module(&key).unwrap_or(&key));
        let (own, tensor) = match tensor.shape.len() {
            2 if key.ends_with(A) => (put("lora_A.weight"), tensor.transposed()),
            2 if key.ends_with(B) => (put("lora_B.weight"), tensor.transposed()),
            1 if key.ends_with(M) => (put("lora_magnitude_vector"), tensor),
            _ => {
                problems.push(format!(
                    "{} {:?} is no part of an mlx-lm LoRA on linear layers",
                    shown(&key),
                    tensor.shape
                ));
                continue;
            }
        };
        all.insert(own, tensor);
    }
    match problems.is_empty() {
        true => Ok(all),
        false => Err(problems),
    }
}
