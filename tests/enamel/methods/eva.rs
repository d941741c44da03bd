//! EVA's start against PEFT's: directions, ranks, alphas, and how much each layer had to see.
//!
//! PEFT's own decomposition is randomised; the goldens here are those made with an exact one in its place.

use std::fs;

use burn::tensor::{Device, Tensor};
use enamel_adapter::{AdapterConfig, LoraConfig, attach_given, export_trainable};
use enamel_data::{Example, RowRef};
use enamel_train::inputs::eva::start;
use serde_json::{Value, json};

use crate::on_every_device;
use crate::parity::llama::floats;
use crate::support::adapted::{base, folder, meta};
use crate::support::goldens::{Tensors, assert_close};

on_every_device!(directions_ranks_and_alphas_agree);

/// The goldens with an exact decomposition.
const CASES: [&str; 5] = [
    "eva_rho1_exact",
    "eva_rho2_exact",
    "eva_rho2_fixed_scale",
    "eva_whiten",
    "eva_all_tokens",
];

const CASE: &str = "init_eva";

fn rows() -> Vec<Example> {
    let path = folder(CASE).join("rows.jsonl");
    let text = fs::read_to_string(&path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
    let parse = |(index, line): (usize, &str)| {
        let row: Value = serde_json::from_str(line).expect("a row");
        let list = |key: &str| -> Vec<i64> {
            let values = row[key].as_array().expect("a list");
            values
                .iter()
                .map(|v| v.as_i64().expect("a number"))
                .collect()
        };
        let ids = list("input_ids");
        Example {
            input_ids: ids
                .iter()
                .map(|id| u32::try_from(*id).expect("an id"))
                .collect(),
            labels: list("labels"),
            source: RowRef {
                file: path.as_path().into(),
                line: index + 1,
            },
            index,
        }
    };
    text.lines().enumerate().map(parse).collect()
}

fn config(eva: &Value) -> LoraConfig {
    let json = json!({
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 4, "lora_alpha": 8,
        "target_modules": ["q_proj", "k_proj", "o_proj", "down_proj"],
        "init_lora_weights": "eva", "eva_config": eva,
    });
    LoraConfig::from_json(&json, "the test").unwrap_or_else(|e| panic!("{e}"))
}

fn directions_ranks_and_alphas_agree(device: &Device) {
    let meta = meta(CASE);
    let all = rows();
    let rows: Vec<&Example> = all.iter().collect();
    for case in CASES {
        let golden = &meta["cases"][case];
        assert_eq!(golden["exact_svd"], json!(true), "{case}");
        let mut model = base(CASE, device);
        let config = config(&golden["eva_config"]);
        let (config, start) =
            start(&model, &rows, config, 0, 4, &|_| {}).unwrap_or_else(|e| panic!("{case}: {e}"));

        let ranks: serde_json::Map<_, _> = start
            .ranks
            .iter()
            .map(|(name, r)| (name.clone(), json!(r)))
            .collect();
        assert_eq!(Value::Object(ranks), golden["ranks"], "{case}");
        let written = AdapterConfig::from(config.clone()).to_json();
        assert_eq!(written["rank_pattern"], golden["rank_pattern"], "{case}");
        let alphas = config
            .alpha_pattern
            .iter()
            .map(|(name, a)| (name.clone(), json!(a)));
        let alphas = Value::Object(alphas.collect());
        assert_eq!(alphas, golden["alpha_pattern"], "{case}");

        // The first of PEFT's passes compares inputs, as the first batch here is run once more for.
        assert_eq!(json!(start.batches + 1), golden["forward_passes"], "{case}");
        for (name, seen) in golden["samples"].as_object().expect("samples") {
            assert_eq!(json!(start.learned[name]), *seen, "{case}: {name}");
            let theirs: Vec<f32> = golden["explained_variance_ratio"][name]
                .as_array()
                .expect("shares")
                .iter()
                .map(|v| v.as_f64().expect("a number") as f32)
                .collect();
            let ours: Vec<f32> = start.shares[name].iter().map(|v| *v as f32).collect();
            assert_close(&format!("{case}: {name}: shares"), &ours, &theirs, 1e-5);
        }

        let plan = attach_given(&mut model, "default", &config, 1, Some(&start.given()))
            .unwrap_or_else(|e| panic!("{case}: {e}"));
        for target in &plan.targets {
            assert_eq!(
                json!(target.scale),
                golden["scaling"][&target.name],
                "{case}"
            );
        }
        let file = Tensors::open(folder(CASE).join(format!("{case}.safetensors")));
        let state = export_trainable(&model).unwrap_or_else(|e| panic!("{case}: {e}"));
        let names: Vec<_> = state.iter().map(|(name, ..)| name.clone()).collect();
        assert_eq!(sorted(names), file.names(), "{case}");
        for (name, shape, mut values) in state {
            let theirs = file.floats(&name);
            assert_eq!(shape, theirs.shape, "{case}: {name}");
            let shared = name.contains("q_proj.lora_A") || name.contains("k_proj.lora_A");
            if case == "eva_whiten" && shared {
                // PEFT whitens in place what two layers with one input share, and so does it twice: by
                // the singular value, not by its root. Here every layer's is done once.
                for row in values.chunks_mut(shape[1]) {
                    let length = row.iter().map(|v| v * v).sum::<f32>().sqrt();
                    row.iter_mut().for_each(|v| *v *= length);
                }
            }
            // Signs agree as well. Some tens of decompositions lie behind it, in f32 here and in f64 there: up to
            // 1.03e-4 apart with AVX2, less on the other paths.
            assert_close(&format!("{case}: {name}"), &values, &theirs.values, 2e-4);
        }
    }
}

#[test]
fn the_adapter_changes_nothing_before_it_is_trained() {
    let device = Device::flex();
    let mut model = base(CASE, &device);
    let all = rows();
    let rows: Vec<&Example> = all.iter().collect();
    let (config, start) =
        start(&model, &rows, config(&json!({})), 0, 4, &|_| {}).unwrap_or_else(|e| panic!("{e}"));
    let ids = Tensor::from_data([[5, 9, 101, 44]], &device);
    let input = enamel_model::ModelInput::new(ids);
    let before = floats(model.forward_hidden(&input, None));
    attach_given(&mut model, "default", &config, 1, Some(&start.given()))
        .unwrap_or_else(|e| panic!("{e}"));
    assert_eq!(floats(model.forward_hidden(&input, None)), before);
}

fn sorted(mut names: Vec<String>) -> Vec<String> {
    names.sort();
    names
}
