//! LoRA against PEFT: logits, every gradient, merged weights, from the adapter files PEFT wrote.

use std::path::PathBuf;

use burn::module::Module;
use burn::tensor::Device;
use enamel_adapter::{detach, export_gradients, load_pretrained, merge, set_enabled};
use enamel_kernels::linear_cross_entropy;
use enamel_model::causal_lm::{CausalLm, ModelInput};
use serde_json::Value;

use crate::goldens::{
    Generation, LORAS, Tensors, assert_close, assert_close_to_largest, fixtures, json,
};
use crate::on_every_device;
use crate::parity_llama::{assert_logits, floats, ids, load_case, logits, mask, shifted};

on_every_device!(
    logits_with_a_peft_adapter_agree,
    every_gradient_agrees,
    merged_weights_and_logits_agree,
    an_adapter_switched_off_or_taken_off_leaves_the_base,
);

pub fn folder(case: &str) -> PathBuf {
    fixtures().join("lora").join(case)
}

pub fn meta(case: &str) -> Value {
    json(&folder(case).join("meta.json"))
}

/// The case's base with PEFT's adapter on it.
pub fn load_adapted(case: &str, trainable: bool, device: &Device) -> CausalLm {
    let meta = meta(case);
    let base = meta["base"].as_str().expect("meta.json names the base");
    let mut model = load_case(base, Generation::Five, device);
    load_pretrained(&mut model, &folder(case).join("adapter"), trainable)
        .unwrap_or_else(|e| panic!("{case}: {e}"));
    model
}

struct Batch {
    golden: Tensors,
    input: ModelInput,
    mask: Vec<Vec<i64>>,
}

fn batch(case: &str, device: &Device) -> Batch {
    let golden = Tensors::open(folder(case).join("case.safetensors"));
    let rows = golden.rows("right.attention_mask");
    let input = ModelInput {
        input_ids: ids(&golden.rows("right.input_ids"), device),
        attention_mask: Some(mask(&rows)),
    };
    Batch {
        golden,
        input,
        mask: rows,
    }
}

fn logits_with_a_peft_adapter_agree(device: &Device) {
    for case in LORAS {
        let model = load_adapted(case, false, device);
        let batch = batch(case, device);
        let theirs = batch.golden.floats("right.logits").values;
        // Logits of order one, as without an adapter: the same 1e-5.
        assert_logits(
            case,
            &logits(&model, &batch.input),
            &theirs,
            &batch.mask,
            1e-5,
        );
    }
}

fn every_gradient_agrees(device: &Device) {
    let device = &device.clone().autodiff();
    for case in LORAS {
        let model = load_adapted(case, true, device).train();
        let batch = batch(case, device);
        let hidden = model.forward_hidden(&batch.input, None);
        let [b, t, h] = hidden.dims();
        let labels = shifted(&batch.golden.rows("right.labels"));
        let count = labels.iter().filter(|l| **l >= 0).count();
        let sum = linear_cross_entropy(hidden.reshape([b * t, h]), model.head_weight(), &labels);
        let loss = sum.div_scalar(count as f64);
        let golden = meta(case)["loss"].as_f64().expect("a loss") as f32;
        assert_close(
            &format!("{case}: loss"),
            &floats(loss.clone().inner()),
            &[golden],
            1e-5,
        );

        let grads = loss.backward();
        let ours = export_gradients(&model, &grads).unwrap_or_else(|e| panic!("{case}: {e}"));
        let mut names: Vec<_> = ours
            .iter()
            .map(|(name, ..)| format!("grad.{name}"))
            .collect();
        names.sort();
        let wanted: Vec<_> = batch
            .golden
            .names()
            .into_iter()
            .filter(|n| n.starts_with("grad."))
            .collect();
        assert_eq!(names, wanted, "{case}: parameters with a gradient");
        for (name, shape, values) in ours {
            let theirs = batch.golden.floats(&format!("grad.{name}"));
            assert_eq!(shape, theirs.shape, "{case}: {name}");
            assert_close_to_largest(&format!("{case}: {name}"), &values, &theirs.values, 1e-4);
        }
    }
}

fn merged_weights_and_logits_agree(device: &Device) {
    for case in ["all_linear", "bias", "patterns"] {
        let mut model = load_adapted(case, false, device);
        let batch = batch(case, device);
        merge(&mut model).unwrap_or_else(|e| panic!("{case}: {e}"));
        let theirs = batch.golden.floats("right.logits").values;
        // The merged weight is rounded once more than the sum of two products.
        assert_logits(
            case,
            &logits(&model, &batch.input),
            &theirs,
            &batch.mask,
            2e-5,
        );
        let golden = Tensors::open(folder(case).join("merged.safetensors"));
        let mut seen = 0;
        crate::peft_files::for_each_weight(&model, &mut |name, values| {
            if golden.has(name) {
                seen += 1;
                assert_close(
                    &format!("{case}: {name}"),
                    &values,
                    &golden.floats(name).values,
                    1e-6,
                );
            }
        });
        let weights = golden
            .names()
            .iter()
            .filter(|n| n.ends_with(".weight"))
            .count();
        assert_eq!(seen, weights, "{case}");
    }
}

fn an_adapter_switched_off_or_taken_off_leaves_the_base(device: &Device) {
    for case in LORAS {
        let mut model = load_adapted(case, false, device);
        let batch = batch(case, device);
        let base = load_case(
            meta(case)["base"].as_str().expect("a base"),
            Generation::Five,
            device,
        );
        let plain = logits(&base, &batch.input);
        let adapted = logits(&model, &batch.input);
        assert_ne!(adapted, plain, "{case}");
        set_enabled(&mut model, false);
        assert_eq!(logits(&model, &batch.input), plain, "{case}: switched off");
        set_enabled(&mut model, true);
        assert_eq!(
            logits(&model, &batch.input),
            adapted,
            "{case}: switched on again"
        );
        detach(&mut model);
        assert_eq!(logits(&model, &batch.input), plain, "{case}: taken off");
        assert_eq!(model.num_params(), base.num_params(), "{case}");
    }
}

#[test]
fn every_lora_case_of_the_goldens_is_tested() {
    let mut folders: Vec<_> = std::fs::read_dir(fixtures().join("lora"))
        .expect("fixtures/lora")
        .flatten()
        .map(|e| e.file_name().to_string_lossy().into_owned())
        .collect();
    folders.sort();
    let mut listed = LORAS.map(str::to_owned).to_vec();
    listed.sort();
    assert_eq!(folders, listed);
}
