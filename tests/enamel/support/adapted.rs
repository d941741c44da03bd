//! What every case of an adapter's goldens goes through: the same bodies for LoRA and all other methods.

use std::collections::BTreeMap;
use std::path::PathBuf;

use burn::module::Module;
use burn::tensor::{Device, Tensor};
use enamel_adapter::methods::adalora::allocator::orthogonality;
use enamel_adapter::{
    Adaptable, AdapterConfig, LoadedAdapter, SlotRef, detach, export_gradients, load_pretrained,
    merge, merge_adapters, set_enabled, unmerge,
};
use enamel_kernels::linear_cross_entropy;
use enamel_model::{Model, ModelInput};
use serde_json::Value;

use crate::parity::llama::{assert_logits, floats, ids, load, load_case, logits, mask, shifted};
use crate::support::goldens::{
    FAMILIES, Generation, LORAS, Tensors, assert_close, assert_close_to_largest, fixtures, json,
};

/// Everything about one case of [`LORAS`] or of [`METHODS`](crate::support::goldens::METHODS).
pub fn folder(case: &str) -> PathBuf {
    let family = case.strip_suffix("_lora").unwrap_or(case);
    let kind = if LORAS.contains(&case) {
        "lora"
    } else if FAMILIES.contains(&family) {
        "families"
    } else {
        "methods"
    };
    fixtures().join(kind).join(case)
}

pub fn meta(case: &str) -> Value {
    json(&folder(case).join("meta.json"))
}

/// The model that the case's adapter is for.
pub fn base(case: &str, device: &Device) -> Model {
    let meta = meta(case);
    let base = meta["base"].as_str().expect("meta.json names the base");
    match FAMILIES.contains(&base) {
        true => load(&folder(base), device),
        false => load_case(base, Generation::Five, device),
    }
}

/// The case's base with PEFT's adapter on it.
pub fn load_adapted(case: &str, trainable: bool, device: &Device) -> (Model, LoadedAdapter) {
    let mut model = base(case, device);
    let loaded = load_pretrained(&mut model, &folder(case).join("adapter"), trainable)
        .unwrap_or_else(|e| panic!("{case}: {e}"));
    (model, loaded)
}

/// The case's one batch and what PEFT made of it.
pub struct Batch {
    pub golden: Tensors,
    pub input: ModelInput,
    pub mask: Vec<Vec<i64>>,
}

pub fn batch(case: &str, device: &Device) -> Batch {
    let golden = Tensors::open(folder(case).join("case.safetensors"));
    let (input, mask) = input(&golden, "right.", device);
    Batch {
        golden,
        input,
        mask,
    }
}

/// Ids and mask under these names, and the mask's rows.
pub fn input(golden: &Tensors, prefix: &str, device: &Device) -> (ModelInput, Vec<Vec<i64>>) {
    let rows = golden.rows(&format!("{prefix}attention_mask"));
    let input = ModelInput {
        seed: None,
        input_ids: ids(&golden.rows(&format!("{prefix}input_ids")), device),
        attention_mask: Some(mask(&rows)),
    };
    (input, rows)
}

/// Logits of order one, as without an adapter: the same 1e-5.
pub fn check_logits(case: &str, device: &Device) {
    let (model, _) = load_adapted(case, false, device);
    let batch = batch(case, device);
    let theirs = batch.golden.floats("right.logits").values;
    let ours = logits(&model, &batch.input);
    assert_logits(case, &ours, &theirs, &batch.mask, 1e-5);
}

/// Mean loss of the case's labels, without what a method adds to it.
pub fn task_loss(model: &Model, input: &ModelInput, labels: &[Vec<i64>]) -> Tensor<1> {
    let hidden = model.forward_hidden(input, None);
    let [b, t, h] = hidden.dims();
    let labels = shifted(labels);
    let count = labels.iter().filter(|l| **l >= 0).count();
    let sum = linear_cross_entropy(
        hidden.reshape([b * t, h]),
        model.head_weight().dense(),
        &labels,
    );
    sum.div_scalar(count as f64)
}

/// What the method adds to the loss in training.
pub fn added_loss(model: &Model, config: &AdapterConfig) -> Option<Tensor<1>> {
    match config {
        AdapterConfig::AdaLora(config) => orthogonality(model, config.orth_reg_weight),
        _ => None,
    }
}

/// Loss and every gradient; what adds a term of its own is also looked at without it.
pub fn check_gradients(case: &str, device: &Device) {
    let device = &device.clone().autodiff();
    let (model, loaded) = load_adapted(case, true, device);
    let model = model.train();
    let batch = batch(case, device);
    let loss = || task_loss(&model, &batch.input, &batch.golden.rows("right.labels"));
    match added_loss(&model, &loaded.config) {
        Some(term) => {
            compare_gradients(case, "_task", loss(), &model, &batch.golden);
            compare_gradients(case, "", loss() + term, &model, &batch.golden);
        }
        None => compare_gradients(case, "", loss(), &model, &batch.golden),
    }
}

fn compare_gradients(case: &str, kind: &str, loss: Tensor<1>, model: &Model, golden: &Tensors) {
    let wanted = meta(case)[format!("loss{kind}")].as_f64().expect("a loss") as f32;
    let what = format!("{case}: loss{kind}");
    assert_close(&what, &floats(loss.clone().inner()), &[wanted], 1e-5);

    let grads = loss.backward();
    let ours = export_gradients(model, &grads).unwrap_or_else(|e| panic!("{case}: {e}"));
    let prefix = format!("grad{kind}.");
    let mut names: Vec<_> = ours
        .iter()
        .map(|(name, ..)| format!("{prefix}{name}"))
        .collect();
    names.sort();
    let wanted: Vec<_> = golden
        .names()
        .into_iter()
        .filter(|n| n.starts_with(&prefix))
        .collect();
    assert_eq!(names, wanted, "{case}: parameters with a gradient");
    for (name, shape, values) in ours {
        let theirs = golden.floats(&format!("{prefix}{name}"));
        assert_eq!(shape, theirs.shape, "{case}: {name}");
        let what = format!("{case}: {prefix}{name}");
        assert_close_to_largest(&what, &values, &theirs.values, 1e-4);
    }
}

/// Every weight and bias of the base, by its name in a checkpoint.
pub fn base_values(model: &Model) -> BTreeMap<String, Vec<f32>> {
    let mut all = BTreeMap::new();
    model.for_each_slot_ref(&mut |name, slot| {
        let weight = match slot {
            SlotRef::Linear(linear) => {
                if let Some(bias) = &linear.bias {
                    all.insert(format!("{name}.bias"), floats(bias.val().inner()));
                }
                let weight = linear.weight.dense();
                floats(match linear.is_stored_transposed() {
                    true => weight.transpose(),
                    false => weight,
                })
            }
            SlotRef::Embedding(table) => floats(table.weight.dense()),
            SlotRef::Norm(norm) => floats(norm.weight.val()),
            SlotRef::Conv(conv) => floats(conv.weight.val()),
            SlotRef::Param(param) => floats(param.weight.val()),
        };
        all.insert(format!("{name}.weight"), weight);
    });
    // A head that shares the embedding's matrix goes by both names.
    if !all.contains_key("lm_head.weight") {
        let table = all[&format!("{}.weight", model.config().embedding())].clone();
        all.insert("lm_head.weight".into(), table);
    }
    all
}

/// What merging makes of every tensor, that it changes no other, and that it can be undone.
pub fn check_merge(case: &str, device: &Device) {
    let (mut model, _) = load_adapted(case, false, device);
    let batch = batch(case, device);
    let before = base_values(&model);
    let adapted = logits(&model, &batch.input);

    let golden = Tensors::open(folder(case).join("merged.safetensors"));
    // Where PEFT's merged model answers otherwise than the adapted one (an embedding that the head
    // shares), the golden has its answer.
    let theirs = if golden.has("right.logits") {
        golden.floats("right.logits").values
    } else {
        batch.golden.floats("right.logits").values
    };
    let check = |model: &Model, how: &str| {
        // The merged weight is rounded once more than the sum of two products.
        let what = format!("{case}, {how}");
        let ours = logits(model, &batch.input);
        assert_logits(&what, &ours, &theirs, &batch.mask, 2e-5);
        let after = base_values(model);
        for (name, values) in &after {
            if golden.has(name) {
                let what = format!("{what}: {name}");
                assert_close(&what, values, &golden.floats(name).values, 1e-6);
            } else if !name.contains(".layers.1.") && folder(case).starts_with(methods()) {
                // Of a method's case the golden has all that changed outside the second layer.
                assert_eq!(
                    *values, before[name],
                    "{what}: {name} is not PEFT's to change"
                );
            }
        }
        for name in golden.names() {
            assert!(
                after.contains_key(&name) || name == "right.logits",
                "{what}: there is no {name}"
            );
        }
    };

    merge_adapters(&mut model, &["default"]).unwrap_or_else(|e| panic!("{case}: {e}"));
    check(&model, "merged for now");
    unmerge(&mut model);
    assert_eq!(base_values(&model), before, "{case}: merged and unmerged");
    let again = logits(&model, &batch.input);
    assert_eq!(again, adapted, "{case}: merged and unmerged");

    merge(&mut model).unwrap_or_else(|e| panic!("{case}: {e}"));
    check(&model, "merged for good");
}

fn methods() -> PathBuf {
    fixtures().join("methods")
}

/// Switched off, switched on again, taken off.
pub fn check_switch(case: &str, device: &Device) {
    let (mut model, _) = load_adapted(case, false, device);
    let batch = batch(case, device);
    let base = base(case, device);
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
