//! A Vision Transformer by its shape alone (Dosovitskiy et al. 2020): the modules that a `config.json` of
//! transformers' ViT stands for, under the names of its checkpoint files. Enough to plan an adapter; the
//! model itself cannot be run.

use enamel_adapter::{ModuleKind, ModuleShape};
use serde_json::Value;

use crate::config::ConfigError;
use crate::config::{LARGEST_LAYERS, LARGEST_SIZE};

/// The `model_type` of a ViT.
pub(super) const MODEL_TYPE: &str = "vit";

/// Every module with parameters, if `config` is a ViT's with an image classifier's head.
///
/// # Errors
/// Sizes that are missing or make no sense, all at once.
pub(super) fn modules(config: &Value) -> Result<Vec<ModuleShape>, ConfigError> {
    let mut problems = Vec::new();
    let mut size = |key: &str, default: Option<u64>| {
        let found = config.get(key).map_or(default, Value::as_u64);
        // Every layer becomes an entry of the list before any weight is seen.
        let most = match key {
            "num_hidden_layers" => LARGEST_LAYERS,
            _ => LARGEST_SIZE,
        };
        match found {
            Some(n) if (1..=most).contains(&n) => n as usize,
            _ => {
                problems.push(format!("{key} must be a whole number from 1 to {most}"));
                1
            }
        }
    };
    let hidden = size("hidden_size", Some(768));
    let layers = size("num_hidden_layers", Some(12));
    let inner = size("intermediate_size", Some(3072));
    let image = size("image_size", Some(224));
    let patch = size("patch_size", Some(16));
    let channels = size("num_channels", Some(3));
    if !problems.is_empty() {
        return Err(ConfigError::Invalid { problems });
    }
    let bias = config
        .get("qkv_bias")
        .and_then(Value::as_bool)
        .unwrap_or(true);
    let labels = config.get("id2label").and_then(Value::as_object);
    let labels = labels.map_or(2, |labels| labels.len());
    let module = |name: &str, kind, shape: &[usize], bias| ModuleShape {
        name: name.to_owned(),
        kind,
        shape: shape.to_vec(),
        bias,
        transposed: false,
    };
    let side = image.checked_div(patch).unwrap_or(0);
    let positions = side.saturating_mul(side).saturating_add(1);
    let mut all = vec![
        module(
            "vit.embeddings.cls_token",
            ModuleKind::Param,
            &[1, 1, hidden],
            false,
        ),
        module(
            "vit.embeddings.position_embeddings",
            ModuleKind::Param,
            &[1, positions, hidden],
            false,
        ),
        module(
            "vit.embeddings.patch_embeddings.projection",
            ModuleKind::Conv,
            &[hidden, channels, patch, patch],
            true,
        ),
    ];
    for i in 0..layers {
        let name = |rest: &str| format!("vit.encoder.layer.{i}.{rest}");
        let linear = |rest: &str, shape: [usize; 2], bias| {
            module(&name(rest), ModuleKind::Linear, &shape, bias)
        };
        let norm = |rest: &str| module(&name(rest), ModuleKind::Norm, &[hidden], true);
        all.extend([
            linear("attention.attention.query", [hidden, hidden], bias),
            linear("attention.attention.key", [hidden, hidden], bias),
            linear("attention.attention.value", [hidden, hidden], bias),
            linear("attention.output.dense", [hidden, hidden], true),
            linear("intermediate.dense", [inner, hidden], true),
            linear("output.dense", [hidden, inner], true),
            norm("layernorm_before"),
            norm("layernorm_after"),
        ]);
    }
    all.push(module("vit.layernorm", ModuleKind::Norm, &[hidden], true));
    // As PEFT takes it: the classifier is a linear layer like others, and yields the logits.
    all.push(module(
        "classifier",
        ModuleKind::Head,
        &[labels, hidden],
        true,
    ));
    Ok(all)
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use serde_json::{Map, json};

    #[test]
    fn vit_base_has_its_published_size() {
        let labels: Map<String, Value> = (0..101).map(|i| (i.to_string(), json!("x"))).collect();
        let modules = super::modules(&json!({"model_type": "vit", "id2label": labels})).unwrap();
        let count: usize = modules
            .iter()
            .map(|m| m.shape.iter().product::<usize>() + if m.bias { m.shape[0] } else { 0 })
            .sum();
        // 85,798,656 without a head (Dosovitskiy et al. give 86 M), and 768 · 101 + 101.
        assert_eq!(count, 85_798_656 + 77_669);
    }

    /// As transformers' `ViTForImageClassification` has them in its files.
    #[test]
    fn tensors_of_the_embeddings_have_their_names_in_the_files() {
        let config =
            json!({"hidden_size": 8, "image_size": 6, "patch_size": 2, "num_hidden_layers": 1});
        let tensors: Vec<_> = modules(&config)
            .unwrap()
            .iter()
            .flat_map(ModuleShape::tensors)
            .take(4)
            .collect();
        let named =
            |name: &str, shape: &[usize]| (format!("vit.embeddings.{name}"), shape.to_vec());
        let wanted = [
            named("cls_token", &[1, 1, 8]),
            named("position_embeddings", &[1, 10, 8]),
            named("patch_embeddings.projection.bias", &[8]),
            named("patch_embeddings.projection.weight", &[8, 3, 2, 2]),
        ];
        assert_eq!(tensors, wanted);
    }

    #[test]
    fn absurd_sizes_are_errors_not_endless_lists() {
        for key in ["num_hidden_layers", "hidden_size", "image_size"] {
            let error = modules(&json!({key: u64::MAX / 2})).unwrap_err();
            assert!(error.to_string().contains(key), "{error}");
        }
    }

    #[test]
    fn senseless_sizes_are_reported_together() {
        let error = modules(&json!({"hidden_size": 0, "patch_size": "x"})).unwrap_err();
        let text = error.to_string();
        assert!(
            text.contains("hidden_size") && text.contains("patch_size"),
            "{text}"
        );
    }
}
