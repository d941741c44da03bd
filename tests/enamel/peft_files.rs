//! The adapter directory: what PEFT wrote is read in full, what we write is what PEFT would have.

use std::collections::BTreeSet;
use std::fs;

use enamel_adapter::{
    Adaptable, SaveMeta, SlotRef, attach, detach, export_trainable, load_pretrained, plan,
    save_pretrained,
};
use enamel_model::causal_lm::CausalLm;
use serde_json::{Value, json};
use tempfile::TempDir;

use crate::devices::device;
use crate::goldens::{Generation, LORAS, Tensors, copy, json as read};
use crate::matching::lora;
use crate::parity_llama::load_case;
use crate::parity_lora::{folder, meta};

/// Calls `f` with every base weight of a linear layer, by its name in a checkpoint.
pub fn for_each_weight(model: &CausalLm, f: &mut dyn FnMut(&str, Vec<f32>)) {
    model.for_each_slot_ref(&mut |name, slot| {
        if let SlotRef::Linear(linear) = slot {
            let values = linear
                .weight
                .val()
                .into_data()
                .try_to_vec()
                .expect("f32 values");
            f(&format!("{name}.weight"), values);
        }
    });
}

fn base(case: &str) -> CausalLm {
    let base = meta(case)["base"].as_str().expect("a base").to_owned();
    load_case(&base, Generation::Five, &device("flex"))
}

fn save_meta() -> SaveMeta {
    SaveMeta {
        base_model_name_or_path: Some("some/base".into()),
        revision: None,
        task_type: Some("CAUSAL_LM".into()),
        extra_readme: None,
    }
}

#[test]
fn a_peft_adapter_survives_a_round_trip_to_the_bit() {
    for case in LORAS {
        let theirs = folder(case).join("adapter");
        let mut model = base(case);
        let loaded =
            load_pretrained(&mut model, &theirs, false).unwrap_or_else(|e| panic!("{case}: {e}"));
        let meta = meta(case);
        assert_eq!(
            Some(loaded.plan.trainable as u64),
            meta["trainable"].as_u64(),
            "{case}"
        );
        assert_eq!(
            Some(loaded.plan.total as u64),
            meta["total"].as_u64(),
            "{case}"
        );

        let out = TempDir::new().expect("a temporary directory");
        save_pretrained(&model, &loaded.config, &save_meta(), out.path())
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
        detach(&mut model);
        let again = load_pretrained(&mut model, out.path(), false)
            .unwrap_or_else(|e| panic!("{case}: {e}"));
        assert_eq!(again.plan, loaded.plan, "{case}");
    }
}

/// Every key of ours that PEFT wrote too means the same; keys of newer versions may be left out.
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
    for case in LORAS {
        let config = lora(&read(&folder(case).join("adapter/adapter_config.json")))
            .unwrap_or_else(|e| panic!("{case}: {e}"));
        let mut model = base(case);
        let plan = attach(&mut model, &config, 7).unwrap_or_else(|e| panic!("{case}: {e}"));
        let theirs = Tensors::open(folder(case).join("adapter/adapter_model.safetensors"));
        let mut ours: Vec<_> = export_trainable(&model)
            .unwrap_or_else(|e| panic!("{case}: {e}"))
            .into_iter()
            .map(|(name, shape, _)| (name, shape))
            .collect();
        ours.sort();
        let wanted: Vec<_> = theirs
            .names()
            .into_iter()
            .map(|n| (n.clone(), theirs.floats(&n).shape))
            .collect();
        assert_eq!(ours, wanted, "{case}");
        assert_eq!(
            Some(plan.trainable as u64),
            meta(case)["trainable"].as_u64(),
            "{case}"
        );
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
    let modules = crate::matching::modules(&read(
        &crate::goldens::fixtures().join("llama/tied/config.json"),
    ));
    let config = lora(&json!({ "target_modules": ["lm_head"] })).expect("valid options");
    let error = plan(&modules, &config)
        .expect_err("there is no head of its own")
        .to_string();
    assert!(error.contains("tied"), "{error}");
}
