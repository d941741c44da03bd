#![allow(
    clippy::unwrap_used,
    clippy::string_slice,
    clippy::indexing_slicing,
    clippy::arithmetic_side_effects
)]

use std::collections::BTreeMap;

use super::*;

fn keys(keys: &[&str]) -> Result<(Vec<String>, Vec<String>), Vec<String>> {
    let stored: BTreeMap<String, ()> = keys.iter().map(|key| (key.to_string(), ())).collect();
    canonical(stored).map(|(keys, notes)| (keys.into_keys().collect(), notes))
}

/// What PEFT 0.21.2 calls the same parameter in a `state_dict()` and in its file.
#[test]
fn keys_lose_the_adapters_name_and_what_wraps_modules() {
    let q = "base_model.model.model.layers.0.self_attn.q_proj";
    for (own, canonical) in [
        (
            format!("{q}.lora_A.default.weight"),
            format!("{q}.lora_A.weight"),
        ),
        (format!("{q}.lora_B.sft.bias"), format!("{q}.lora_B.bias")),
        (
            format!("{q}.lora_magnitude_vector.default.weight"),
            format!("{q}.lora_magnitude_vector"),
        ),
        (
            format!("{q}.lora_magnitude_vector.weight"),
            format!("{q}.lora_magnitude_vector"),
        ),
        (format!("{q}.lora_E.default"), format!("{q}.lora_E")),
        (format!("{q}.lora_A.default"), format!("{q}.lora_A")),
        (format!("{q}.hada_w1_a.default"), format!("{q}.hada_w1_a")),
        (format!("{q}.ia3_l.default"), format!("{q}.ia3_l")),
        (
            "base_model.vera_A.default".into(),
            "base_model.vera_A".into(),
        ),
        (
            "base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta.default"
                .into(),
            "base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta".into(),
        ),
        (
            "base_model.model.lm_head.modules_to_save.default.weight".into(),
            "base_model.model.lm_head.weight".into(),
        ),
        (
            "module.base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight".into(),
            format!("{q}.lora_A.weight"),
        ),
        (
            "base_model.model._orig_mod.model.layers.0.self_attn.q_proj.lora_A.weight".into(),
            format!("{q}.lora_A.weight"),
        ),
        (
            "base_model.model.base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
                .into(),
            format!("{q}.lora_A.weight"),
        ),
        (
            "model.layers.0.self_attn.q_proj.lora_A.weight".into(),
            format!("{q}.lora_A.weight"),
        ),
    ] {
        let (found, notes) = keys(&[own.as_str()]).unwrap();
        assert_eq!(found, [canonical], "{own}");
        let silent = own.ends_with("q_proj.lora_magnitude_vector.weight");
        assert_eq!(notes.len(), usize::from(!silent), "{own}: {notes:?}");
    }
}

#[test]
fn pefts_own_keys_stay_as_they_are() {
    let own = [
        "base_model.internal_xlora_classifier.layers.0.weight",
        "base_model.model.lm_head.weight",
        "base_model.model.model.layers.0.self_attn.q_proj.base_layer.bias",
        "base_model.model.model.layers.0.self_attn.q_proj.lokr_w1",
        "base_model.model.model.layers.0.self_attn.q_proj.lora_A",
        "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight",
        "base_model.vera_A",
        "lm_head",
    ];
    let (found, notes) = keys(&own).unwrap();
    assert_eq!(found, own);
    assert!(notes.is_empty(), "{notes:?}");
}

#[test]
fn several_adapters_and_twice_the_same_tensor_are_refused() {
    let several = keys(&["a.lora_A.sft.weight", "a.lora_A.dpo.weight"]).unwrap_err();
    assert!(several[0].contains("\"dpo\", \"sft\""), "{several:?}");
    let twice = keys(&[
        "a.lora_A.default.weight",
        "base_model.model.a.lora_A.weight",
    ])
    .unwrap_err();
    assert!(twice[0].contains("under two keys"), "{twice:?}");
}

#[test]
fn keys_for_the_model_without_its_head_find_their_module() {
    let modules = crate::testing::LlamaSizes {
        layers: 2,
        hidden: 64,
        kv: 32,
        inner: 96,
        vocab: 256,
        tied: false,
    }
    .modules();
    let layer = "layers.0.self_attn.q_proj.lora_A.weight";
    let own = format!("base_model.model.model.{layer}");
    for key in [
        format!("base_model.model.{layer}"),
        format!("base_model.model.model.model.{layer}"),
    ] {
        assert_eq!(moved(&key, &modules), Some(own.clone()), "{key}");
    }
    assert_eq!(moved(&own, &modules), None);
    assert_eq!(
        moved(
            "base_model.model.layers.9.self_attn.q_proj.lora_A.weight",
            &modules
        ),
        None
    );
}
