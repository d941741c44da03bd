//! The adapter directory: what PEFT wrote is read in full, what we write is what PEFT would have.

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;

use enamel_adapter::{
    AdapterConfig, LoadedAdapter, SaveMeta, attach, detach, export_trainable, load_config,
    load_pretrained, plan, save_pretrained,
};
use enamel_model::Model;
use serde_json::{Value, json};
use tempfile::TempDir;

use crate::parity::llama::load_case;
use crate::parity::matching::lora;
use crate::support::adapted;
use crate::support::adapted::{folder, load_adapted, meta};
use crate::support::devices::device;
use crate::support::goldens::{Generation, LORAS, METHODS, Tensors, copy, json as read};

fn base(case: &str) -> Model {
    adapted::base(case, &device("flex"))
}

pub fn save_meta() -> SaveMeta {
    SaveMeta {
        base_model_name_or_path: Some("some/base".into()),
        task_type: Some("CAUSAL_LM".into()),
        ..SaveMeta::default()
    }
}

#[test]
fn a_peft_adapter_survives_a_round_trip_to_the_bit() {
    for case in LORAS.iter().chain(&METHODS) {
        let (model, loaded) = load_adapted(case, false, &device("flex"));
        // AdaLoRA keeps each module's rank as a parameter in PEFT, which its total counts.
        let ranks = match &loaded.config {
            AdapterConfig::AdaLora(_) => loaded.plan.targets.len(),
            _ => 0,
        };
        let meta = meta(case);
        assert_eq!(
            Some(loaded.plan.trainable as u64),
            meta["trainable"].as_u64(),
            "{case}"
        );
        assert_eq!(
            Some((loaded.plan.total + ranks) as u64),
            meta["total"].as_u64(),
            "{case}"
        );
        check_round_trip(case, &folder(case).join("adapter"), &model, &loaded);
    }
}

/// Saves what was loaded from `theirs` and compares every tensor and every key of the configuration.
pub fn check_round_trip(case: &str, theirs: &Path, model: &Model, loaded: &LoadedAdapter) {
    let out = TempDir::new().expect("a temporary directory");
    save_pretrained(model, &loaded.config, &save_meta(), out.path())
        .unwrap_or_else(|e| panic!("{case}: {e}"));
    let (a, b) = (
        Tensors::open(theirs.join("adapter_model.safetensors")),
        Tensors::open(out.path().join("adapter_model.safetensors")),
    );
    assert_eq!(a.names(), b.names(), "{case}");
    for name in a.names() {
        assert_eq!(a.floats(&name), b.floats(&name), "{case}: {name}");
    }
    assert!(out.path().join("README.md").is_file());
    assert_same_config(
        case,
        &read(&theirs.join("adapter_config.json")),
        &read(&out.path().join("adapter_config.json")),
    );

    // And once more: what we wrote is what we read.
    let mut model = model.clone();
    detach(&mut model);
    let again =
        load_pretrained(&mut model, out.path(), false).unwrap_or_else(|e| panic!("{case}: {e}"));
    assert_eq!(again.plan, loaded.plan, "{case}");
}

/// The same keys, each with the same meaning.
fn assert_same_config(case: &str, theirs: &Value, ours: &Value) {
    for (key, value) in ours.as_object().expect("an object") {
        if ["peft_version", "base_model_name_or_path"].contains(&key.as_str()) {
            continue;
        }
        let Some(theirs) = theirs.get(key) else {
            panic!("{case}: PEFT writes no {key}")
        };
        assert_eq!(normal(value), normal(theirs), "{case}: {key}");
    }
    for key in theirs.as_object().expect("an object").keys() {
        assert!(ours.get(key).is_some(), "{case}: PEFT writes {key} as well");
    }
}

/// Lists that PEFT treats as sets, numbers without regard to their spelling, one layer as a list.
fn normal(value: &Value) -> Value {
    match value {
        Value::Array(list) if list.iter().all(Value::is_string) => {
            json!(
                list.iter()
                    .filter_map(Value::as_str)
                    .collect::<BTreeSet<_>>()
            )
        }
        Value::String(one) => json!([one]),
        Value::Number(n) => json!(n.as_f64()),
        other => other.clone(),
    }
}

#[test]
fn an_attached_adapter_is_saved_under_pefts_names() {
    for case in LORAS.iter().chain(&METHODS) {
        let theirs = folder(case).join("adapter");
        let config = load_config(&theirs).unwrap_or_else(|e| panic!("{case}: {e}"));
        let mut model = base(case);
        let plan = attach(&mut model, &config, 7).unwrap_or_else(|e| panic!("{case}: {e}"));
        let out = TempDir::new().expect("a temporary directory");
        save_pretrained(&model, &config, &save_meta(), out.path())
            .unwrap_or_else(|e| panic!("{case}: {e}"));
        let shapes = |dir: &Path| -> Vec<(String, Vec<usize>)> {
            let file = Tensors::open(dir.join("adapter_model.safetensors"));
            let names = file.names().into_iter();
            names
                .map(|name| {
                    let shape = file.floats(&name).shape;
                    (name, shape)
                })
                .collect()
        };
        assert_eq!(shapes(out.path()), shapes(&theirs), "{case}");
        assert_eq!(
            Some(plan.trainable as u64),
            meta(case)["trainable"].as_u64(),
            "{case}"
        );
    }
}

#[test]
fn vera_draws_the_projections_that_torch_draws() {
    // They are not in the file, whose key they follow from.
    let golden = Tensors::open(folder("vera_noproj").join("case.safetensors"));
    let (mut model, loaded) = load_adapted("vera_noproj", false, &device("flex"));
    let AdapterConfig::Vera(mut config) = loaded.config else {
        panic!("{}", loaded.config.peft_type());
    };
    detach(&mut model);
    config.save_projection = true;
    attach(&mut model, &config, 1).unwrap_or_else(|e| panic!("{e}"));
    let out = TempDir::new().expect("a temporary directory");
    save_pretrained(&model, &config, &save_meta(), out.path()).unwrap_or_else(|e| panic!("{e}"));
    let ours = Tensors::open(out.path().join("adapter_model.safetensors"));
    for name in ["vera_A", "vera_B"] {
        let ours = ours.floats(&format!("base_model.{name}"));
        assert!(ours == golden.floats(name), "{name} to the bit");
    }
}

#[test]
fn a_new_adapter_starts_as_pefts_does() {
    // B is zero, so the model is unchanged; A is uniform on ±1/sqrt(in) (Kaiming with a = sqrt 5).
    let config = lora(&json!({ "r": 4, "lora_alpha": 8, "target_modules": "all-linear" }))
        .expect("valid options");
    let build = |seed| {
        let mut model = load_case("untied", Generation::Five, &device("flex"));
        attach(&mut model, &config, seed).unwrap_or_else(|e| panic!("{e}"));
        export_trainable(&model).unwrap_or_else(|e| panic!("{e}"))
    };
    let first = build(1);
    for (name, shape, values) in &first {
        if name.contains("lora_B") {
            assert!(values.iter().all(|v| *v == 0.0), "{name}");
            continue;
        }
        let bound = (shape[1] as f32).sqrt().recip();
        let largest = values.iter().fold(0.0_f32, |m, v| m.max(v.abs()));
        // 128 or more draws: the largest is below 0.9 of the bound once in 1e5 tensors.
        assert!(
            largest <= bound && largest > 0.9 * bound,
            "{name}: {largest} of {bound}"
        );
    }
    assert_eq!(first, build(1));
    assert_ne!(first, build(2));
}

#[test]
fn a_file_that_does_not_fit_is_refused_with_every_reason() {
    let dir = TempDir::new().expect("a temporary directory");
    let theirs = folder("all_linear").join("adapter");
    let bytes = fs::read(theirs.join("adapter_model.safetensors")).expect("a fixture");
    let length = u64::from_le_bytes(bytes[..8].try_into().expect("eight bytes")) as usize;
    let mut header: Value = serde_json::from_slice(&bytes[8..8 + length]).expect("a header");
    let key = |rest: &str| format!("base_model.model.model.layers.{rest}.weight");
    let (missing, extra, bent) = (
        key("0.self_attn.q_proj.lora_A"),
        key("5.self_attn.q_proj.lora_A"),
        key("1.mlp.up_proj.lora_A"),
    );
    let tensors = header.as_object_mut().expect("a header");
    let moved = tensors.remove(&missing).expect("a tensor");
    tensors.insert(extra.clone(), moved);
    tensors[&bent]["shape"] = json!([32, 4]);
    let header = header.to_string().into_bytes();
    let damaged = [
        &(header.len() as u64).to_le_bytes(),
        header.as_slice(),
        &bytes[8 + length..],
    ]
    .concat();
    fs::write(dir.path().join("adapter_model.safetensors"), damaged).expect("room on the disk");
    copy(
        &theirs.join("adapter_config.json"),
        &dir.path().join("adapter_config.json"),
    );

    let mut model = base("all_linear");
    let error = load_pretrained(&mut model, dir.path(), false).expect_err("it must not load");
    let error = error.to_string();
    for name in [missing, extra, bent] {
        assert!(error.contains(&name), "{name} is missing: {error}");
    }
    assert!(
        export_trainable(&model).is_ok_and(|all| all.is_empty()),
        "nothing was attached"
    );
}

#[test]
fn an_adapter_for_another_base_is_refused() {
    let mut model = load_case("head_dim", Generation::Five, &device("flex"));
    let error = load_pretrained(&mut model, &folder("all_linear").join("adapter"), false)
        .expect_err("other shapes")
        .to_string();
    assert!(error.contains("q_proj"), "{error}");
}

#[test]
fn a_tied_head_cannot_be_adapted_by_mistake() {
    let modules = crate::parity::matching::modules(&read(
        &crate::support::goldens::fixtures().join("llama/tied/config.json"),
    ));
    let config = lora(&json!({ "target_modules": ["lm_head"] })).expect("valid options");
    let error = plan(&modules, &config)
        .expect_err("there is no head of its own")
        .to_string();
    assert!(error.contains("tied"), "{error}");
}
