//! What `adapter_config.json` must do.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::string_slice,
    clippy::indexing_slicing,
    clippy::arithmetic_side_effects
)]

use serde_json::Map;

use super::*;
use crate::error::{AdapterError, Result};

fn read(value: Value) -> Result<LoraConfig> {
    LoraConfig::from_json(&value, "adapter_config.json")
}

fn problems(value: Value) -> Vec<String> {
    match read(value) {
        Err(AdapterError::Config { problems, .. }) => problems,
        other => panic!("expected problems, got {other:?}"),
    }
}

#[test]
fn a_bare_file_has_pefts_defaults() {
    let config = read(json!({"peft_type": "LORA"})).unwrap();
    assert_eq!(config, LoraConfig::default());
    assert_eq!(
        (config.r, config.lora_alpha, config.lora_dropout),
        (8, 8.0, 0.0)
    );
}

#[test]
fn every_field_survives_reading_and_writing() {
    let config = LoraConfig {
        r: 4,
        lora_alpha: 7.5,
        lora_dropout: 0.25,
        target_modules: Some(Targets::List(vec!["q_proj".into()])),
        exclude_modules: Some(Targets::Regex("x.*".into())),
        modules_to_save: Some(vec!["lm_head".into()]),
        layers_to_transform: Some(vec![1, 2]),
        layers_pattern: Some(vec!["layers".into()]),
        use_rslora: true,
        init_lora_weights: InitLora::Gaussian,
        // Not in alphabetical order: the order decides.
        rank_pattern: vec![("v_proj".into(), 2), ("q_proj".into(), 3)],
        alpha_pattern: vec![("q_proj".into(), 5.0)],
        task_type: Some("CAUSAL_LM".into()),
        base_model_name_or_path: Some("org/model".into()),
        revision: Some("main".into()),
        ..LoraConfig::default()
    };
    let back = read(config.to_json()).unwrap();
    assert_eq!(
        LoraConfig {
            other: Map::new(),
            ..back.clone()
        },
        config
    );
    assert_eq!(back.to_json(), config.to_json());
    assert!(back.unknown_keys().is_empty());
}

#[test]
fn the_file_is_what_peft_writes() {
    let json = LoraConfig::default().to_json();
    let keys: Vec<&String> = json.as_object().unwrap().keys().collect();
    assert!(keys.is_sorted());
    assert_eq!(keys.len(), 36);
    // As Python writes whole numbers.
    assert_eq!(json["lora_alpha"].to_string(), "8");
    assert_eq!(json["inference_mode"], json!(true));
    assert_eq!(json["peft_type"], json!("LORA"));
}

#[test]
fn unknown_keys_are_kept_and_told() {
    let config =
        read(json!({"peft_type": "LORA", "use_magic": true, "later": null, "peft_version": "9.9"}))
            .unwrap();
    assert_eq!(config.unknown_keys(), ["use_magic"]);
    let written = config.to_json();
    assert_eq!(written["use_magic"], json!(true));
    assert_eq!(written["peft_version"], json!("9.9"));
    assert!(written.as_object().unwrap().contains_key("later"));
}

#[test]
fn single_values_stand_for_lists() {
    let config = read(json!({
        "peft_type": "LORA", "target_modules": ["q_proj"], "layers_to_transform": 3, "layers_pattern": "layers",
    }))
    .unwrap();
    assert_eq!(config.layers_to_transform, Some(vec![3]));
    assert_eq!(config.layers_pattern, Some(vec!["layers".into()]));
    let config = read(json!({"peft_type": "LORA", "target_modules": "ALL-linear"})).unwrap();
    assert_eq!(config.target_modules, Some(Targets::AllLinear));
}

#[test]
fn what_is_not_supported_is_refused_by_name_all_at_once() {
    let found = problems(json!({
        "peft_type": "LORA", "use_dora": true, "lora_bias": true, "alora_invocation_tokens": [1],
        "target_parameters": ["w"], "layer_replication": [[0, 1]], "megatron_config": {"a": 1},
        "init_lora_weights": "loftq", "lora_dropout": 1.0, "kasa_config": {"beta": 0.1},
        "rank_pattern": {"q": 0}, "use_qalora": true, "arrow_config": {"top_k": 1},
        "task_type": "POETRY",
    }));
    for name in [
        "lora_bias = true: DoRA",
        "lora_bias = true: PEFT",
        "alora_invocation_tokens",
        "target_parameters",
        "layer_replication",
        "megatron_config",
        "init_lora_weights",
        "lora_dropout",
        "kasa_config",
        "rank_pattern",
        "use_qalora",
        "arrow_config",
        "task_type",
    ] {
        assert!(
            found.iter().any(|p| p.starts_with(name)),
            "{name} not in {found:#?}"
        );
    }
    assert_eq!(found.len(), 13, "{found:#?}");
    assert!(problems(json!({"peft_type": "LOHA"}))[0].contains("LOHA"));
    assert!(problems(json!({"r": 8}))[0].contains("peft_type"));
    assert!(problems(json!([1]))[0].contains("not a JSON object"));
}

#[test]
fn values_of_the_wrong_type_are_all_reported() {
    let found = problems(json!({
        "peft_type": "LORA", "r": -1, "lora_alpha": "big", "target_modules": 3, "rank_pattern": {"q": "x"},
    }));
    assert_eq!(found.len(), 4, "{found:#?}");
    assert!(found[0].starts_with("r = -1"));
}

#[test]
fn layer_options_need_a_list() {
    let found = problems(
        json!({"peft_type": "LORA", "target_modules": ".*q_proj", "layers_to_transform": [1]}),
    );
    assert!(found[0].contains("layers_to_transform needs"));
    let found =
        problems(json!({"peft_type": "LORA", "target_modules": ["q"], "layers_pattern": "h"}));
    assert!(found[0].contains("layers_pattern needs layers_to_transform"));
}

#[test]
fn every_option_that_has_a_field_is_read_into_it() {
    let config = read(json!({
        "peft_type": "LORA", "use_dora": true, "bias": "lora_only", "fan_in_fan_out": true,
        "trainable_token_indices": [1, 7], "init_lora_weights": "PiSSA_niter_16",
    }))
    .unwrap();
    assert!(config.use_dora);
    assert_eq!(config.bias, Bias::LoraOnly);
    assert_eq!(config.init_lora_weights, InitLora::PissaNiter(16));
    let tokens = config.trainable_token_indices.as_ref().unwrap();
    assert_eq!(tokens.for_module("model.embed_tokens"), Some(&[1, 7][..]));
    assert_eq!(tokens.for_module("my_embed_tokens"), None);
    // It is about how the base is stored, so it is kept and means nothing.
    assert_eq!(config.to_json()["fan_in_fan_out"], json!(true));
    assert!(config.unknown_keys().is_empty());
    let config = read(json!({
        "peft_type": "LORA", "bias": "all", "lora_bias": true, "trainable_token_indices": {"wte": [2]},
    }))
    .unwrap();
    assert_eq!((config.bias, config.lora_bias), (Bias::All, true));
    let tokens = config.trainable_token_indices.unwrap();
    assert_eq!(tokens.for_module("transformer.wte"), Some(&[2][..]));
    assert_eq!(tokens.for_module("model.embed_tokens"), None);
}

#[test]
fn an_initialisation_that_cannot_be_started_may_be_read_if_it_left_the_base_alone() {
    let config =
        read(json!({"peft_type": "LORA", "init_lora_weights": "orthogonal", "r": 3})).unwrap();
    assert!(config.unsupported(Purpose::Load).is_empty());
    assert!(config.unsupported(Purpose::Initialise)[0].contains("even ranks, not 3"));
    for known in [
        "orthogonal",
        "pissa",
        "pissa_niter_2",
        "olora",
        "gaussian",
        "eva",
    ] {
        let config = read(json!({"peft_type": "LORA", "init_lora_weights": known})).unwrap();
        assert!(config.unsupported(Purpose::Load).is_empty(), "{known}");
        assert!(
            config.unsupported(Purpose::Initialise).is_empty(),
            "{known}"
        );
        assert_eq!(config.to_json()["init_lora_weights"], json!(known));
    }
    for other in ["loftq", "corda", "pissa_niter_many"] {
        let found = problems(json!({"peft_type": "LORA", "init_lora_weights": other}));
        assert!(
            found[0].contains(other) && found[0].contains("base weights"),
            "{found:?}"
        );
    }
}
