//! What an X-LoRA refuses, and what it says then.

use std::fs;

use serde_json::{Value, json};

use super::*;
use crate::{
    AdapterError, attach_as, delete, detach, hotswap, load_pretrained_as, plan, set_rows, shapes,
};

fn problems(error: &AdapterError) -> &[String] {
    match error {
        AdapterError::Config { problems, .. }
        | AdapterError::Plan { problems }
        | AdapterError::Mismatch { problems, .. }
        | AdapterError::Choice { problems } => problems,
        other => panic!("{other}"),
    }
}

#[test]
fn wrong_settings_are_all_reported_at_once() {
    let error = XLoraConfig::from_json(
        &json!({
            "peft_type": "XLORA", "adapters": {}, "xlora_depth": 0, "top_k_lora": 3, "hidden_size": 0,
            "softmax_temperature": 0, "xlora_dropout_p": 1.0,
        }),
        "test",
    )
    .unwrap_err();
    let all = problems(&error).join("\n");
    for key in [
        "adapters",
        "xlora_depth",
        "top_k_lora",
        "hidden_size",
        "softmax_temperature",
        "xlora_dropout_p",
    ] {
        assert!(all.contains(key), "{key} not in {all}");
    }
    let error = XLoraConfig::from_json(
        &json!({"peft_type": "XLORA", "adapters": ["a"], "top_k_lora": -1, "xlora_size": "big"}),
        "test",
    )
    .unwrap_err();
    assert_eq!(problems(&error).len(), 3, "{error}");
}

#[test]
fn every_expert_that_cannot_be_one_is_named_and_the_model_stays_as_it_was() {
    let dir = experts(1);
    let lora = |changes: &dyn Fn(&mut LoraConfig)| {
        let mut cfg = LoraConfig::default();
        changes(&mut cfg);
        cfg
    };
    write_expert(&dir, "dora", &lora(&|c| c.use_dora = true), 1);
    write_expert(&dir, "bias", &lora(&|c| c.lora_bias = true), 1);
    write_expert(
        &dir,
        "norm",
        &lora(&|c| c.modules_to_save = Some(vec!["model.norm".into()])),
        1,
    );
    let mut other = Tiny::new(&Device::flex());
    let loha = crate::LohaConfig::default();
    attach(&mut other, &loha, 1).unwrap();
    save_pretrained(
        &other,
        &loha,
        &SaveMeta::default(),
        &dir.path().join("loha"),
    )
    .unwrap();
    fs::create_dir(dir.path().join("empty")).unwrap();
    let at = |name: &str| dir.path().join(name).display().to_string();
    let mut cfg = XLoraConfig::default();
    for name in [
        "e0",
        "dora",
        "bias",
        "norm",
        "loha",
        "empty",
        "user/model",
        "../not-there",
    ] {
        cfg.adapters.push((name.into(), at(name)));
    }
    cfg.adapters.push(("none".into(), String::new()));
    let mut model = roomy();
    let error = attach(&mut model, &cfg, 1).unwrap_err();
    let all = problems(&error);
    assert_eq!(all.len(), 8, "{error}");
    for (name, what) in [
        ("dora", "DoRA cannot be mixed"),
        ("bias", "lora_bias"),
        ("norm", "modules_to_save"),
        ("loha", "this is LOHA"),
        ("empty", "has no adapter_config.json"),
        ("user/model", "there is no such directory"),
        ("../not-there", "there is no such directory"),
        ("none", "no directory is named"),
    ] {
        let start = format!("adapters.{name:?} = ");
        assert!(
            all.iter()
                .any(|p| p.starts_with(&start) && p.contains(what)),
            "{name}: {error}"
        );
    }
    assert!(model.gate.is_none() && crate::adapters(&model).is_empty());
    // An expert that is broken only in its weights is found when the first is attached already.
    let broken = dir.path().join("broken");
    write_expert(&dir, "broken", &LoraConfig::default(), 2);
    fs::write(broken.join("adapter_model.safetensors"), "short").unwrap();
    cfg.adapters = vec![("0".into(), at("e0")), ("1".into(), at("broken"))];
    let error = attach(&mut model, &cfg, 1).unwrap_err().to_string();
    assert!(
        error.contains("broken") && error.contains("safetensors"),
        "{error}"
    );
    assert!(crate::adapters(&model).is_empty());
    assert_eq!(model.tiny.logits(), Tiny::new(&Device::flex()).logits());
    attach(&mut model, &config(&dir, 1, json!({})), 1).unwrap();
}

#[test]
fn experts_of_another_base_and_experts_of_the_head_are_refused() {
    let dir = experts(1);
    let head = LoraConfig {
        target_modules: Some(Targets::List(vec!["lm_head".into()])),
        ..LoraConfig::default()
    };
    write_expert(&dir, "head", &head, 1);
    let at = |name: &str| dir.path().join(name).display().to_string();
    let foreign = dir.path().join("foreign");
    fs::create_dir(&foreign).unwrap();
    let other = json!({"peft_type": "LORA", "target_modules": ["c_attn"], "base_model_name_or_path": "gpt2"});
    fs::write(foreign.join("adapter_config.json"), other.to_string()).unwrap();
    let mut cfg = XLoraConfig {
        hidden_size: Some(48),
        adapters: ["e0", "head", "foreign"]
            .map(|name| (name.into(), at(name)))
            .to_vec(),
        ..XLoraConfig::default()
    };
    let error = plan(&shapes(&roomy()), &cfg).unwrap_err();
    let all = problems(&error).join("\n");
    for part in [
        "expert 1",
        "lm_head",
        "expert 2",
        "hidden_size = 48",
        "64 wide",
    ] {
        assert!(all.contains(part), "{part} not in {all}");
    }
    // Right modules, wrong width.
    let wide = dir.path().join("wide");
    write_expert(
        &dir,
        "wide",
        &LoraConfig {
            r: 3,
            ..LoraConfig::default()
        },
        1,
    );
    let file = wide.join("adapter_config.json");
    let mut json: Value = serde_json::from_slice(&fs::read(&file).unwrap()).unwrap();
    json["r"] = json!(5);
    fs::write(&file, json.to_string()).unwrap();
    cfg.hidden_size = None;
    cfg.adapters = vec![("0".into(), at("wide"))];
    let error = attach(&mut roomy(), &cfg, 1).unwrap_err().to_string();
    assert!(
        error.contains("wide") && error.contains("lora_A.weight"),
        "{error}"
    );
}

#[test]
fn a_file_that_is_not_this_classifiers_is_refused_with_all_that_differs() {
    let (model, cfg, dir) =
        mixed(json!({"xlora_depth": 2, "xlora_size": 8, "layerwise_scalings": true}));
    save_pretrained(&model, &cfg, &SaveMeta::default(), dir.path()).unwrap();
    let config = dir.path().join("adapter_config.json");
    let mut json: Value = serde_json::from_slice(&fs::read(&config).unwrap()).unwrap();
    json["xlora_size"] = json!(9);
    json["xlora_dropout_p"] = json!(0);
    fs::write(&config, json.to_string()).unwrap();
    let error = load_pretrained(&mut roomy(), dir.path(), false).unwrap_err();
    let all = problems(&error).join("\n");
    let prefix = "base_model.internal_xlora_classifier.layers";
    for part in [
        format!("{prefix}.0.weight is [8, 64]"),
        format!("{prefix}.0.bias is [8]"),
        format!("{prefix}.2.weight [12, 9] is missing"),
        format!("{prefix}.2.bias [12] is missing"),
        format!("{prefix}.3.weight does not belong"),
        format!("{prefix}.3.bias does not belong"),
    ] {
        assert!(all.contains(&part), "{part} not in {all}");
    }
    assert!(
        error.to_string().contains("2 experts that adapt 6 layers"),
        "{error}"
    );
    // What newer versions of PEFT write.
    let file = crate::AdapterFile {
        config: cfg.clone().into(),
        tensors: Vec::new(),
        made: Default::default(),
    };
    file.write(dir.path(), None).unwrap();
    let error = load_pretrained(&mut roomy(), dir.path(), false)
        .unwrap_err()
        .to_string();
    assert!(error.contains("without its classifier"), "{error}");
    // Saving under another configuration.
    let other = XLoraConfig {
        top_k_lora: Some(1),
        ..cfg.clone()
    };
    let error = save_pretrained(&model, &other, &SaveMeta::default(), dir.path()).unwrap_err();
    assert!(error.to_string().contains("top_k_lora = 1"), "{error}");
}

#[test]
fn it_takes_the_model_for_itself_and_gives_it_back() {
    let (mut model, cfg, dir) = mixed(json!({}));
    let base = Tiny::new(&Device::flex()).logits();
    assert!(in_use(&model).is_some());
    // Without its two passes the model's slots are the base.
    assert_eq!(model.tiny.logits(), base);
    assert!(matches!(
        attach(&mut model, &cfg, 1),
        Err(AdapterError::Attached(_))
    ));
    let lora = LoraConfig::default();
    assert!(matches!(
        attach(&mut model, &lora, 1),
        Err(AdapterError::Attached(_))
    ));
    let error = delete(&mut model, "0").unwrap_err().to_string();
    assert!(error.contains("expert"), "{error}");
    assert!(set_rows(&mut model, &[Some("default"), None]).is_err());
    set_rows(&mut model, &[Some("0"), None]).unwrap();
    assert!(in_use(&model).is_none());
    save_pretrained(&model, &cfg, &SaveMeta::default(), dir.path()).unwrap();
    assert!(hotswap(&mut model, "default", dir.path()).is_err());
    delete(&mut model, "default").unwrap();
    assert!(model.gate.is_none());
    delete(&mut model, "0").unwrap();
    detach(&mut model);
    // Beside another adapter, under another name, or where there is no room: no.
    attach_as(&mut model, "mine", &lora, 1).unwrap();
    assert!(matches!(
        attach(&mut model, &cfg, 1),
        Err(AdapterError::Attached(_))
    ));
    let error = load_pretrained_as(&mut roomy(), "mix", dir.path(), false)
        .unwrap_err()
        .to_string();
    assert!(error.contains("default"), "{error}");
    let error = attach(&mut Tiny::new(&Device::flex()), &cfg, 1)
        .unwrap_err()
        .to_string();
    assert!(error.contains("no place"), "{error}");
}
