//! What attaching does and leaves alone.
#![allow(clippy::unwrap_used, clippy::expect_used)]

use super::*;
use crate::base::ids::param_id;
use crate::config::Targets;
use crate::methods::lora::config::InitLora;
use crate::methods::lora::config::LoraConfig;
use crate::testing::{LlamaSizes, Tiny, difference, ids, perturb};
use crate::{export_gradients, export_trainable, trainable};
use burn::tensor::Device;

fn all_linear() -> LoraConfig {
    LoraConfig {
        target_modules: Some(Targets::AllLinear),
        ..LoraConfig::default()
    }
}

fn with_saved() -> LoraConfig {
    let saved = ["lm_head", "embed_tokens", "model.norm"]
        .map(String::from)
        .to_vec();
    LoraConfig {
        modules_to_save: Some(saved),
        ..all_linear()
    }
}

#[test]
fn the_output_is_unchanged_to_the_bit_at_first() {
    for cfg in [all_linear(), with_saved()] {
        let mut model = Tiny::new(&Device::flex());
        let base = model.logits();
        attach(&mut model, &cfg, 1).unwrap();
        assert_eq!(model.logits(), base);
    }
}

#[test]
fn switched_off_and_taken_off_it_is_the_base_again_to_the_bit() {
    let mut model = Tiny::new(&Device::flex());
    let base = model.logits();
    attach(&mut model, &with_saved(), 1).unwrap();
    perturb(&mut model);
    let adapted = model.logits();
    assert!(difference(&base, &adapted) > 1e-2);
    set_enabled(&mut model, false);
    assert_eq!(model.logits(), base);
    set_enabled(&mut model, true);
    assert_eq!(model.logits(), adapted);
    detach(&mut model);
    assert_eq!(model.logits(), base);
    assert!(trainable(&model).is_empty());
}

#[test]
fn a_parameter_depends_on_the_seed_and_its_name_alone() {
    let export = |cfg: &LoraConfig, seed| {
        let mut model = Tiny::new(&Device::flex());
        attach(&mut model, cfg, seed).unwrap();
        export_trainable(&model).unwrap()
    };
    let all = export(&all_linear(), 7);
    assert_eq!(all, export(&all_linear(), 7));
    let some = export(&LoraConfig::default(), 7);
    assert_eq!(some.len(), 8);
    assert!(some.iter().all(|tensor| all.contains(tensor)));
    let other = export(&LoraConfig::default(), 8);
    assert_ne!(some[0].2, other[0].2);
    assert_ne!(
        some[0].2, some[2].2,
        "two modules of one shape start differently"
    );
}

#[test]
fn initial_values_have_pefts_distributions() {
    let values = |init: InitLora| {
        let cfg = LoraConfig {
            r: 16,
            init_lora_weights: init,
            ..LoraConfig::default()
        };
        let mut model = Tiny::new(&Device::flex());
        attach(&mut model, &cfg, 3).unwrap();
        let state = export_trainable(&model).unwrap();
        let of = |name: &str| {
            let matching = state.iter().filter(|(key, ..)| key.ends_with(name));
            matching
                .flat_map(|(.., values)| values.clone())
                .map(f64::from)
                .collect::<Vec<f64>>()
        };
        (of("lora_A.weight"), of("lora_B.weight"))
    };
    // 4096 draws in each: a standard deviation is known to 1.1 % (one sigma), the mean to 1.6 % of it.
    let deviation = |v: &[f64]| (v.iter().map(|x| x * x).sum::<f64>() / v.len() as f64).sqrt();
    let mean = |v: &[f64]| v.iter().sum::<f64>() / v.len() as f64;
    let bound = 1.0 / 8.0;
    let (a, b) = values(InitLora::Default);
    assert!(a.iter().all(|v| v.abs() <= bound) && a.iter().any(|v| v.abs() > 0.99 * bound));
    assert!((deviation(&a) / (bound / 3.0_f64.sqrt()) - 1.0).abs() < 0.05);
    assert!(mean(&a).abs() < 0.08 * deviation(&a));
    assert!(b.iter().all(|v| *v == 0.0));
    let (a, b) = values(InitLora::Gaussian);
    assert!((deviation(&a) * 16.0 - 1.0).abs() < 0.05);
    assert!(mean(&a).abs() < 0.08 * deviation(&a));
    assert!(b.iter().all(|v| *v == 0.0));
    let (_, b) = values(InitLora::Random);
    assert!(b.iter().all(|v| v.abs() <= 0.25) && b.iter().any(|v| v.abs() > 0.24));
}

/// Trap: `fork` and `to_device` do not switch autodiff on, `train` does, and it is `Param`'s own
/// memory of trainability that decides what it restores.
#[test]
fn gradients_reach_the_adapter_alone_after_every_way_into_training() {
    let plain = Device::flex();
    let autodiff = Device::flex().autodiff();
    let mut on_plain = Tiny::new(&plain);
    attach(&mut on_plain, &with_saved(), 1).unwrap();
    let mut on_autodiff = Tiny::new(&autodiff);
    attach(&mut on_autodiff, &with_saved(), 1).unwrap();
    let trained = on_plain.clone().train();
    for (how, model) in [
        ("train", trained.clone()),
        ("built on autodiff", on_autodiff.clone()),
        ("train, fork", trained.clone().fork(&autodiff)),
        ("valid, train", trained.valid().train()),
        ("attach, perturb", {
            let mut model = trained.clone();
            perturb(&mut model);
            model
        }),
    ] {
        let loss = model.forward(ids(&autodiff)).powf_scalar(2.0).mean();
        let grads = loss.backward();
        let found = export_gradients(&model, &grads).unwrap();
        assert_eq!(found.len(), 2 * 7 * 2 + 4, "{how}");
        let moved = |key: &str| {
            found
                .iter()
                .any(|(k, _, g)| k.ends_with(key) && g.iter().any(|v| *v != 0.0))
        };
        assert!(
            moved("lora_B.weight") && moved("lm_head.weight") && moved("lm_head.bias"),
            "{how}"
        );
        assert!(
            moved("embed_tokens.weight") && moved("model.norm.weight"),
            "{how}"
        );
        model.for_each_slot_ref(&mut |name, slot| {
            let base = match slot {
                SlotRef::Linear(l) => {
                    l.weight.dense().grad(&grads).is_some() || l.weight.dense().is_require_grad()
                }
                SlotRef::Embedding(e) => e.weight.dense().grad(&grads).is_some(),
                SlotRef::Norm(n) => n.weight.val().grad(&grads).is_some(),
                SlotRef::Conv(n) => n.weight.val().grad(&grads).is_some(),
                SlotRef::Param(n) => n.weight.val().grad(&grads).is_some(),
            };
            assert!(!base, "{how}: {name}");
            if let SlotRef::Linear(l) = slot {
                assert!(
                    l.bias
                        .as_ref()
                        .is_none_or(|b| b.val().grad(&grads).is_none()),
                    "{how}: {name}.bias"
                );
            }
        });
    }
    let valid = trained.valid();
    assert!(!valid.forward(ids(&plain)).is_autodiff());
    assert!(difference(&valid.logits(), &trained.logits()) < 1e-6);
}

#[test]
fn ids_follow_from_names_and_differ() {
    let mut model = Tiny::new(&Device::flex());
    attach(&mut model, &with_saved(), 1).unwrap();
    let all = trainable(&model);
    assert!(all.iter().all(|(key, id, _)| *id == param_id(key)));
    assert_eq!(all[0].0, "base_model.model.model.embed_tokens.weight");
    assert_eq!(
        all[1].0,
        "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
    );
    let mut ids: Vec<_> = all.iter().map(|(_, id, _)| *id).collect();
    model.for_each_slot_ref(&mut |_, slot| {
        if let SlotRef::Linear(l) = slot {
            ids.push(l.weight.param().unwrap().id);
        }
    });
    let count = ids.len();
    ids.sort();
    ids.dedup();
    assert_eq!(ids.len(), count);
}

#[test]
fn a_second_adapter_and_a_tied_head_are_refused_without_change() {
    let mut model = Tiny::with(&Device::flex(), false);
    let cfg = LoraConfig {
        modules_to_save: Some(vec!["lm_head".into()]),
        ..LoraConfig::default()
    };
    assert!(
        attach(&mut model, &cfg, 1)
            .unwrap_err()
            .to_string()
            .contains("tied")
    );
    assert!(trainable(&model).is_empty());
    attach(&mut model, &LoraConfig::default(), 1).unwrap();
    let before = export_trainable(&model).unwrap();
    assert!(matches!(
        attach(&mut model, &all_linear(), 2),
        Err(AdapterError::Attached(_))
    ));
    assert_eq!(export_trainable(&model).unwrap(), before);
}

#[test]
#[allow(deprecated)]
fn flex_and_ndarray_agree() {
    let run = |device: &Device| {
        let mut model = Tiny::new(device);
        attach(&mut model, &with_saved(), 1).unwrap();
        perturb(&mut model);
        let model = model.train();
        let grads = model
            .forward(ids(&device.clone().autodiff()))
            .powf_scalar(2.0)
            .mean()
            .backward();
        (
            model.valid().logits(),
            export_gradients(&model, &grads).unwrap(),
        )
    };
    let (flex, ndarray) = (run(&Device::flex()), run(&Device::ndarray()));
    // f32 sums of at most 96 products of values below 1, added in different orders.
    assert!(difference(&flex.0, &ndarray.0) < 1e-5);
    for ((key, _, a), (_, _, b)) in flex.1.iter().zip(&ndarray.1) {
        let size = a.iter().fold(0.0_f32, |m, v| m.max(v.abs()));
        assert!(difference(a, b) <= 1e-4 * size + 1e-9, "{key}");
    }
}

#[test]
fn the_plan_counts_what_is_attached() {
    let mut model = Tiny::new(&Device::flex());
    let plan = attach(&mut model, &with_saved(), 1).unwrap();
    let elements = |shape: &Vec<usize>| shape.iter().product::<usize>();
    assert_eq!(
        plan.trainable,
        trainable(&model)
            .iter()
            .map(|(.., shape)| elements(shape))
            .sum::<usize>()
    );
    assert_eq!(plan.total, model.num_params());
    // And a model known by its sizes alone has the same modules, but for the biases.
    let sizes = LlamaSizes {
        layers: 2,
        hidden: 64,
        kv: 32,
        inner: 96,
        vocab: 256,
        tied: false,
    };
    let names = |shapes: Vec<ModuleShape>| {
        shapes
            .into_iter()
            .map(|s| (s.name, s.kind))
            .collect::<Vec<_>>()
    };
    let here = names(shapes(&model));
    assert!(
        here.iter()
            .all(|module| names(sizes.modules()).contains(module))
    );
}
