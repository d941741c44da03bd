#![allow(clippy::unwrap_used)]

use super::*;
use crate::config::{ConfigError, RopeScaling};
use serde_json::{Map, json};

fn version_5() -> Value {
    json!({
        "model_type": "llama", "hidden_size": 64, "intermediate_size": 96, "vocab_size": 256,
        "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
        "rms_norm_eps": 1e-5, "max_position_embeddings": 128, "dtype": "bfloat16",
        "rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 5000.0},
        "eos_token_id": [2, 7], "bos_token_id": 1, "pad_token_id": null,
        "something_new": {"kept": [1, 2]}
    })
}

fn edited(edit: impl FnOnce(&mut Map<String, Value>)) -> Result<ArchConfig, ConfigError> {
    let mut json = version_5();
    edit(json.as_object_mut().unwrap());
    ArchConfig::from_json(&json)
}

#[test]
fn both_generations_mean_the_same() {
    let five = ArchConfig::from_json(&version_5()).unwrap();
    let four = edited(|map| {
        map.remove("rope_parameters");
        map.remove("dtype");
        map.insert("rope_theta".into(), json!(5000.0));
        map.insert(
            "rope_scaling".into(),
            json!({"type": "linear", "factor": 4.0}),
        );
        map.insert("torch_dtype".into(), json!("bfloat16"));
    })
    .unwrap();
    assert_eq!(five.decoder().rope, four.decoder().rope);
    assert_eq!(five.decoder().rope.theta, 5000.0);
    assert_eq!(
        five.decoder().rope.scaling,
        RopeScaling::Linear { factor: 4.0 }
    );
    assert_eq!(five.dtype, four.dtype);
    assert_eq!(five.modules(), four.modules());
}

#[test]
fn defaults_ids_and_unknown_keys() {
    let config = ArchConfig::from_json(&version_5()).unwrap();
    assert_eq!(config.decoder().head_dim, 16);
    assert_eq!(config.eos_token_ids, [2, 7]);
    assert_eq!(config.bos_token_id, Some(1));
    assert_eq!(config.pad_token_id, None);
    assert_eq!(config.to_json(), version_5());
    let explicit = edited(|map| {
        map.insert("head_dim".into(), json!(32));
        map.remove("num_key_value_heads");
    })
    .unwrap();
    assert_eq!(
        (
            explicit.decoder().head_dim,
            explicit.decoder().num_key_value_heads
        ),
        (32, 4)
    );
}

#[test]
fn every_problem_is_in_the_one_error() {
    let error = edited(|map| {
        map.remove("vocab_size");
        map.insert("hidden_size".into(), json!("big"));
        map.insert("num_key_value_heads".into(), json!(3));
        map.insert("hidden_act".into(), json!("gelu"));
        map.insert("rope_parameters".into(), json!({"rope_type": "spiral"}));
        map.insert("quantization_config".into(), json!({"bits": 4}));
    })
    .unwrap_err()
    .to_string();
    for part in [
        "`vocab_size` is missing",
        "`hidden_size` must be a positive integer, not \"big\"",
        "not a multiple of num_key_value_heads (3)",
        "`hidden_act` is \"gelu\"",
        "spiral",
        "`quantization_config`",
    ] {
        assert!(error.contains(part), "no {part:?} in {error}");
    }
}

#[test]
fn other_architectures_are_refused_by_name() {
    let error = edited(|map| {
        map.insert("model_type".into(), json!("gpt9"));
    })
    .unwrap_err()
    .to_string();
    assert_eq!(
        error,
        "model_type 'gpt9' is not supported; supported are llama, mistral, qwen2, qwen3, gpt2"
    );
    assert_eq!(
        ArchConfig::from_json(&json!([])),
        Err(ConfigError::NotAnObject)
    );
    assert_eq!(
        ArchConfig::from_json(&json!({})),
        Err(ConfigError::NoModelType {
            supported: "llama, mistral, qwen2, qwen3, gpt2".into()
        })
    );
}

#[test]
fn absurd_sizes_are_errors_not_allocations() {
    for (key, value) in [
        ("num_hidden_layers", json!(1u64 << 30)),
        ("vocab_size", json!(u64::MAX)),
        ("hidden_size", json!(0)),
        ("num_attention_heads", json!(-4)),
    ] {
        let error = edited(|map| {
            map.insert(key.into(), value);
        })
        .unwrap_err();
        assert!(error.to_string().contains(key), "{error}");
    }
}

#[test]
fn module_list_of_llama_3_8b() {
    let config = ArchConfig::from_json(&json!({
        "model_type": "llama", "hidden_size": 4096, "intermediate_size": 14336,
        "vocab_size": 128256, "num_hidden_layers": 32, "num_attention_heads": 32,
        "num_key_value_heads": 8, "rope_theta": 500000.0, "tie_word_embeddings": false
    }))
    .unwrap();
    let parameters: usize = config
        .modules()
        .iter()
        .map(|m| m.shape.iter().product::<usize>())
        .sum();
    assert_eq!(
        parameters, 8_030_261_248,
        "the published size of Llama-3-8B"
    );
}

#[test]
fn windows_follow_the_family() {
    let with = |pairs: Value| {
        edited(|map| map.extend(pairs.as_object().unwrap().clone()))
            .unwrap()
            .decoder()
            .sliding_windows
            .clone()
    };
    assert_eq!(with(json!({})), [None, None]);
    assert_eq!(with(json!({"model_type": "mistral"})), [Some(4096); 2]);
    assert_eq!(
        with(json!({"model_type": "mistral", "sliding_window": null})),
        [None, None]
    );
    let qwen = json!({"model_type": "qwen2", "sliding_window": 8, "max_window_layers": 1,
        "use_sliding_window": true});
    assert_eq!(with(qwen), [None, Some(8)]);
    assert_eq!(
        with(json!({"model_type": "qwen2", "sliding_window": 8})),
        [None, None]
    );
}
