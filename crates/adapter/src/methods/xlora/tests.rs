//! What an X-LoRA must do: the classifier, its choice among experts, its directory.
#![allow(clippy::unwrap_used, clippy::expect_used)]

mod refusals;

use std::fs;

use burn::tensor::TensorData;
use serde_json::{Value, json};
use tempfile::TempDir;

use super::*;
use crate::layers::adaptable::{Slot, SlotRef};
use crate::testing::{HIDDEN, Tiny, difference, fill, ids, perturb};
use crate::{
    LoraConfig, SaveMeta, Targets, attach, export_trainable, load_config, load_pretrained,
    save_pretrained,
};

/// The tests' model with room for a classifier.
#[derive(Module, Debug)]
struct Roomy {
    tiny: Tiny,
    gate: Option<XLora>,
}

impl Adaptable for Roomy {
    fn for_each_slot(&mut self, f: &mut dyn FnMut(&str, Slot<'_>)) {
        self.tiny.for_each_slot(f);
    }
    fn for_each_slot_ref(&self, f: &mut dyn FnMut(&str, SlotRef<'_>)) {
        self.tiny.for_each_slot_ref(f);
    }
    fn model_part(&self) -> Option<&dyn ModelPart> {
        Some(&self.gate)
    }
    fn model_part_mut(&mut self) -> Option<&mut dyn ModelPart> {
        Some(&mut self.gate)
    }
}

fn roomy() -> Roomy {
    Roomy {
        tiny: Tiny::new(&Device::flex()),
        gate: None,
    }
}

/// A folder with `count` experts "e0", "e1", …, of which each adapts other modules.
fn experts(count: usize) -> TempDir {
    let dir = TempDir::new().unwrap();
    for i in 0..count {
        let targets = [["q_proj", "down_proj"], ["v_proj", "q_proj"]][i % 2];
        let cfg = LoraConfig {
            r: 2 + i,
            target_modules: Some(Targets::List(targets.map(String::from).to_vec())),
            ..LoraConfig::default()
        };
        write_expert(&dir, &format!("e{i}"), &cfg, i);
    }
    dir
}

fn write_expert(dir: &TempDir, name: &str, cfg: &LoraConfig, salt: usize) {
    let mut model = Tiny::new(&Device::flex());
    attach(&mut model, cfg, salt as u64).unwrap();
    perturb(&mut model);
    save_pretrained(&model, cfg, &SaveMeta::default(), &dir.path().join(name)).unwrap();
}

fn config(dir: &TempDir, count: usize, options: Value) -> XLoraConfig {
    let mut all = json!({"peft_type": "XLORA"});
    let adapters: serde_json::Map<_, _> = (0..count)
        .map(|i| (i.to_string(), json!(dir.path().join(format!("e{i}")))))
        .collect();
    all["adapters"] = Value::Object(adapters);
    all.as_object_mut()
        .unwrap()
        .extend(options.as_object().unwrap().clone());
    XLoraConfig::from_json(&all, "test").unwrap()
}

fn mixed(options: Value) -> (Roomy, XLoraConfig, TempDir) {
    let dir = experts(2);
    let cfg = config(&dir, 2, options);
    let mut model = roomy();
    attach(&mut model, &cfg, 5).unwrap();
    (model, cfg, dir)
}

fn values<const D: usize>(tensor: Tensor<D>) -> Vec<f32> {
    tensor.into_data().try_into_vec().unwrap()
}

fn hidden() -> Tensor<3> {
    fill([2, 5, HIDDEN], 3, &Device::flex()) * 20.0
}

/// The shares that are left of these, by the rules of `options`, for four experts.
fn chosen(options: Value, shares: &[f32]) -> Vec<f32> {
    let dir = experts(4);
    let cfg = config(&dir, 4, options);
    let mut model = roomy();
    attach(&mut model, &cfg, 5).unwrap();
    let shares = Tensor::<3>::from_data(
        TensorData::new(shares.to_vec(), [shares.len() / 4, 1, 4]),
        &Device::flex(),
    );
    values(model.gate.unwrap().chosen(shares).values)
}

#[test]
fn the_classifier_is_linear_layers_with_relu_and_a_softmax_between_experts() {
    let options = json!({
        "xlora_depth": 3, "xlora_size": 8, "layerwise_scalings": true, "softmax_temperature": 0.5,
    });
    let (model, ..) = mixed(options);
    let gate = model.gate.unwrap();
    assert_eq!(
        gate.layers.iter().map(|l| l.index).collect::<Vec<_>>(),
        [0, 3, 6]
    );
    // q, v and down in two blocks.
    assert_eq!(
        (gate.adapted_layers(), gate.experts()),
        (6, &["0".into(), "1".into()][..])
    );
    let ours = gate.scalings(hidden());
    assert_eq!(ours.dims(), [2, 5, 6, 2]);
    let mut x: Vec<Vec<f64>> = values(hidden())
        .chunks(HIDDEN)
        .map(|r| r.iter().map(|v| f64::from(*v)).collect())
        .collect();
    for (i, layer) in gate.layers.iter().enumerate() {
        let (weight, bias) = (values(layer.weight.val()), values(layer.bias.val()));
        for row in &mut x {
            let width = row.len();
            *row = bias
                .iter()
                .zip(weight.chunks(width))
                .map(|(b, w)| {
                    let y = f64::from(*b)
                        + w.iter()
                            .zip(row.iter())
                            .map(|(w, x)| f64::from(*w) * x)
                            .sum::<f64>();
                    if i < 2 { y.max(0.0) } else { y }
                })
                .collect();
        }
    }
    let theirs: Vec<f32> = x
        .iter()
        .flat_map(|row| row.chunks(2))
        .flat_map(|pair| {
            let weights = [(pair[0] / 0.5).exp(), (pair[1] / 0.5).exp()];
            let sum = weights[0] + weights[1];
            weights.map(|w| (w / sum) as f32)
        })
        .collect();
    assert!(difference(&values(ours), &theirs) < 1e-5);
}

#[test]
fn without_dropout_its_places_are_closer_together() {
    let (model, ..) = mixed(json!({"xlora_depth": 3, "xlora_size": 8, "xlora_dropout_p": 0.0}));
    let index: Vec<_> = model.gate.unwrap().layers.iter().map(|l| l.index).collect();
    assert_eq!(index, [0, 2, 4]);
}

#[test]
fn the_largest_shares_stay_and_of_equals_the_first() {
    let shares = [
        0.1, 0.4, 0.3, 0.2, 0.25, 0.25, 0.25, 0.25, -1.0, -3.0, -2.0, -0.5,
    ];
    let left = chosen(
        json!({"top_k_lora": 2, "global_scaling_weight": 2.0}),
        &shares,
    );
    assert_eq!(
        left,
        [0.0, 0.8, 0.6, 0.0, 0.5, 0.5, 0.0, 0.0, -2.0, 0.0, 0.0, -1.0]
    );
}

#[test]
fn what_is_left_is_normalised_on_request_and_none_stays_none() {
    let options = json!({"top_k_lora": 2, "enable_softmax": false, "enable_softmax_topk": true});
    let left = chosen(options.clone(), &[1.0, 3.0, 2.0, 0.0, 0.0, 0.0, 0.0, 0.0]);
    let first = 1.0 / (1.0 + (-1.0_f32).exp());
    let expected = [0.0, first, 1.0 - first, 0.0, 0.0, 0.0, 0.0, 0.0];
    assert!(difference(&left, &expected) < 1e-6, "{left:?}");
    let one = json!({"top_k_lora": 1, "enable_softmax": false, "enable_softmax_topk": true});
    assert_eq!(chosen(one, &[0.1, -2.0, 0.3, 0.2]), [0.0, 0.0, 1.0, 0.0]);
}

#[test]
fn each_token_and_layer_gets_its_own_mixture() {
    let (model, cfg, dir) = mixed(json!({"layerwise_scalings": true}));
    let of_expert = |i: usize| {
        let mut model = Tiny::new(&Device::flex());
        load_pretrained(&mut model, &dir.path().join(format!("e{i}")), false).unwrap();
        model.logits()
    };
    let with = |share: &dyn Fn(usize, usize) -> f32| {
        let all: Vec<f32> = (0..60)
            .flat_map(|at| [share(at, 0), share(at, 1)])
            .collect();
        let gates = Gates {
            names: model.gate.as_ref().unwrap().mixing.names.clone(),
            values: Tensor::from_data(TensorData::new(all, [10, 6, 2]), &Device::flex()),
        };
        for_second_pass(&model, gates).tiny.logits()
    };
    assert_eq!(cfg.count(), 2);
    // All of one expert is that expert, none is the base.
    assert!(difference(&with(&|_, e| [1.0, 0.0][e]), &of_expert(0)) < 1e-5);
    assert!(difference(&with(&|_, e| [0.0, 1.0][e]), &of_expert(1)) < 1e-5);
    assert!(difference(&with(&|_, _| 0.0), &Tiny::new(&Device::flex()).logits()) < 1e-6);
    // Tokens do not touch each other in this model, so each can have an expert of its own.
    let by_token = with(&|at, e| if (at / 6) % 2 == e { 1.0 } else { 0.0 });
    let (zero, one) = (of_expert(0), of_expert(1));
    for (token, ours) in by_token.chunks(256).enumerate() {
        let theirs = [&zero, &one][token % 2];
        assert!(
            difference(ours, &theirs[token * 256..(token + 1) * 256]) < 1e-5,
            "token {token}"
        );
    }
    // The places count in the model's order, over both experts' layers: q, v, down of each block.
    let mut places = Vec::new();
    model.for_each_slot_ref(&mut |name, slot| {
        if let SlotRef::Linear(linear) = slot
            && !linear.parts.is_empty()
        {
            places.push((name.to_string(), linear.place));
        }
    });
    let names = ["self_attn.q_proj", "self_attn.v_proj", "mlp.down_proj"];
    let wanted: Vec<_> = (0..6)
        .map(|i| (format!("model.layers.{}.{}", i / 3, names[i % 3]), i))
        .collect();
    assert_eq!(places, wanted);
}

#[test]
fn experts_of_an_embedding_are_mixed_too() {
    let dir = TempDir::new().unwrap();
    for i in 0..2 {
        let cfg = LoraConfig {
            target_modules: Some(Targets::List(vec!["embed_tokens".into(), "q_proj".into()])),
            ..LoraConfig::default()
        };
        write_expert(&dir, &format!("e{i}"), &cfg, 7 * i);
    }
    let mut model = roomy();
    attach(&mut model, &config(&dir, 2, json!({})), 1).unwrap();
    let gates = |shares: [f32; 2]| Gates {
        names: model.gate.as_ref().unwrap().mixing.names.clone(),
        values: Tensor::<1>::from_data(shares, &Device::flex())
            .reshape([1, 1, 2])
            .expand([10, 1, 2]),
    };
    let mut alone = Tiny::new(&Device::flex());
    load_pretrained(&mut alone, &dir.path().join("e1"), false).unwrap();
    let mixed = for_second_pass(&model, gates([0.0, 1.0])).tiny.logits();
    assert!(difference(&mixed, &alone.logits()) < 1e-5);
}

#[test]
fn the_first_pass_is_the_base_or_a_fixed_share_and_leaves_no_graph() {
    let device = Device::flex().autodiff();
    for (value, is_base) in [(0.0, true), (0.5, false)] {
        let dir = experts(2);
        let options = json!({"scaling_pass_value": value, "use_trainable_adapters": true});
        let mut model = Roomy {
            tiny: Tiny::new(&device),
            gate: None,
        };
        attach(&mut model, &config(&dir, 2, options), 1).unwrap();
        let model = model.train();
        let first = for_first_pass(&model, model.gate.as_ref().unwrap(), 10, &device);
        let y = first.tiny.forward(ids(&device));
        assert!(!y.is_tracked());
        let base = Tiny::new(&Device::flex()).logits();
        assert_eq!(values(y.inner()) == base, is_base);
    }
}

#[test]
fn a_directory_comes_back_to_the_bit_and_says_where_its_experts_are() {
    let (mut model, cfg, dir) =
        mixed(json!({"layerwise_scalings": true, "xlora_depth": 2, "xlora_size": 8}));
    perturb(&mut model);
    // Beside the experts, so that both can be moved together.
    let meta = SaveMeta {
        base_model_name_or_path: Some("some/base".into()),
        ..SaveMeta::default()
    };
    save_pretrained(&model, &cfg, &meta, dir.path()).unwrap();
    let written: Value =
        serde_json::from_slice(&fs::read(dir.path().join("adapter_config.json")).unwrap()).unwrap();
    assert_eq!(written["adapters"], json!({"0": "e0", "1": "e1"}));
    assert_eq!(written["hidden_size"], json!(HIDDEN));
    assert_eq!(written["base_model_name_or_path"], json!("some/base"));
    assert!(written.get("target_modules").is_none());
    let moved = TempDir::new().unwrap();
    let to = moved.path().join("there");
    fs::rename(dir.path(), &to).unwrap();
    let mut again = roomy();
    load_pretrained(&mut again, &to, true).unwrap();
    assert_eq!(
        export_trainable(&again).unwrap(),
        export_trainable(&model).unwrap()
    );
    // And elsewhere, by their absolute path; the same adapter gives the same bytes.
    let (one, two) = (TempDir::new().unwrap(), TempDir::new().unwrap());
    let loaded = load_config(&to).unwrap();
    for other in [&one, &two] {
        save_pretrained(&again, &loaded, &meta, other.path()).unwrap();
        load_pretrained(&mut roomy(), other.path(), false).unwrap();
    }
    for file in [
        "adapter_config.json",
        "adapter_model.safetensors",
        "README.md",
    ] {
        let read = |dir: &TempDir| fs::read(dir.path().join(file)).unwrap();
        assert_eq!(read(&one), read(&two), "{file}");
    }
}

#[test]
fn many_experts_keep_their_order_though_the_file_sorts_them_as_text() {
    let mut cfg = XLoraConfig::default();
    for name in ["0", "1", "10", "2", "3", "4", "5", "6", "7", "8", "9"] {
        cfg.adapters.push((name.into(), format!("e{name}")));
    }
    let order: Vec<_> = cfg
        .ordered()
        .into_iter()
        .map(|(_, path)| path.clone())
        .collect();
    assert_eq!(order, (0..11).map(|i| format!("e{i}")).collect::<Vec<_>>());
    // Other names stand in the order of the file.
    cfg.adapters = ["law", "art", "2"].map(|n| (n.into(), n.into())).to_vec();
    let order: Vec<_> = cfg
        .ordered()
        .into_iter()
        .map(|(name, _)| name.as_str())
        .collect();
    assert_eq!(order, ["law", "art", "2"]);
}

#[test]
fn experts_that_are_trained_along_are_stored_with_it() {
    let (mut model, cfg, _dir) = mixed(json!({"use_trainable_adapters": true}));
    let state = export_trainable(&model).unwrap();
    // Weight and bias of one layer; A and B of two modules in two blocks for each expert.
    assert_eq!(state.len(), 2 + 2 * 8);
    assert!(
        state
            .iter()
            .any(|(key, ..)| key.starts_with("1/base_model.model.model.layers.0."))
    );
    perturb(&mut model);
    let moved = export_trainable(&model).unwrap();
    assert!(state.iter().zip(&moved).all(|(a, b)| a.2 != b.2));
    let out = TempDir::new().unwrap();
    save_pretrained(&model, &cfg, &SaveMeta::default(), out.path()).unwrap();
    for expert in ["0", "1"] {
        load_pretrained(
            &mut Tiny::new(&Device::flex()),
            &out.path().join(expert),
            false,
        )
        .unwrap();
    }
    let mut again = roomy();
    load_pretrained(&mut again, out.path(), true).unwrap();
    assert_eq!(export_trainable(&again).unwrap(), moved);
    crate::import_trainable(&mut again, state.clone()).unwrap();
    assert_eq!(export_trainable(&again).unwrap(), state);
}
