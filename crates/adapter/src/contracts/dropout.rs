//! What is dropped, and when.

use burn::module::Module;
use burn::tensor::Device;

use super::{adalora, loha, lokr, lora, miss, vera};
use crate::testing::{Tiny, fill, generator, ids, perturb};
use crate::{
    AdaLoraConfig, AdapterConfig, InitMiss, LohaConfig, LokrConfig, LoraConfig, MissConfig,
    VeraConfig, attach,
};

/// Each method with a dropout of one half and without it.
pub(super) fn pairs() -> Vec<(&'static str, AdapterConfig, AdapterConfig)> {
    let dora = LoraConfig {
        use_dora: true,
        ..lora()
    };
    let pissa = LoraConfig {
        init_lora_weights: crate::InitLora::Pissa,
        ..lora()
    };
    let lora_dropout = |config: &LoraConfig| LoraConfig {
        lora_dropout: 0.5,
        ..config.clone()
    };
    let miss_dropout = |form| MissConfig {
        miss_dropout: 0.5,
        ..miss(form)
    };
    vec![
        ("LoRA", lora_dropout(&lora()).into(), lora().into()),
        ("DoRA", lora_dropout(&dora).into(), dora.into()),
        ("PiSSA", lora_dropout(&pissa).into(), pissa.into()),
        (
            "AdaLoRA",
            AdaLoraConfig {
                lora_dropout: 0.5,
                ..adalora()
            }
            .into(),
            adalora().into(),
        ),
        (
            "VeRA",
            VeraConfig {
                vera_dropout: 0.5,
                ..vera()
            }
            .into(),
            vera().into(),
        ),
        (
            "MiSS",
            miss_dropout(InitMiss::Default).into(),
            miss(InitMiss::Default).into(),
        ),
        (
            "MiSS, mini",
            miss_dropout(InitMiss::Mini).into(),
            miss(InitMiss::Mini).into(),
        ),
        (
            "LoHa, outputs",
            LohaConfig {
                rank_dropout: 0.5,
                ..loha(2)
            }
            .into(),
            loha(2).into(),
        ),
        (
            "LoHa, outputs of a dense update",
            LohaConfig {
                rank_dropout: 0.5,
                ..loha(16)
            }
            .into(),
            loha(16).into(),
        ),
        (
            "LoHa, all",
            LohaConfig {
                module_dropout: 0.5,
                ..loha(2)
            }
            .into(),
            loha(2).into(),
        ),
        (
            "LoKr, outputs",
            LokrConfig {
                rank_dropout: 0.5,
                ..lokr(2)
            }
            .into(),
            lokr(2).into(),
        ),
        (
            "LoKr, outputs, scaled",
            LokrConfig {
                rank_dropout: 0.5,
                rank_dropout_scale: true,
                ..lokr(2)
            }
            .into(),
            lokr(2).into(),
        ),
        (
            "LoKr, all",
            LokrConfig {
                module_dropout: 0.5,
                ..lokr(2)
            }
            .into(),
            lokr(2).into(),
        ),
    ]
}

fn adapted(config: &AdapterConfig) -> Tiny {
    let mut model = Tiny::new(&Device::flex());
    attach(&mut model, config, 3).unwrap();
    perturb(&mut model);
    model
}

#[test]
fn nothing_is_dropped_out_of_training_to_the_bit() {
    for (name, with, without) in pairs() {
        let (with, without) = (adapted(&with), adapted(&without));
        assert_eq!(with.logits(), without.logits(), "{name}");
        assert_eq!(with.train().valid().logits(), without.logits(), "{name}");
    }
}

#[test]
fn in_training_what_is_dropped_changes_and_follows_the_seed() {
    let _alone = generator();
    let device = Device::flex().autodiff();
    for (name, with, without) in pairs() {
        let (model, plain) = (adapted(&with).train(), adapted(&without).train());
        device.seed(11);
        let (first, second) = (model.logits(), model.logits());
        assert_ne!(first, second, "{name}");
        assert_ne!(first, plain.logits(), "{name}");
        device.seed(11);
        assert_eq!([model.logits(), model.logits()], [first, second], "{name}");
        // And it does not keep the backward pass from what it left.
        let grads = model
            .forward(ids(&device))
            .powf_scalar(2.0)
            .mean()
            .backward();
        assert!(
            !crate::export_gradients(&model, &grads).unwrap().is_empty(),
            "{name}"
        );
    }
}

/// `rank_dropout` leaves out rows of the update for the whole batch; what is left is divided by its share
/// where PEFT does so.
#[test]
fn dropped_outputs_are_the_bases_and_the_others_whole() {
    let _alone = generator();
    let device = Device::flex().autodiff();
    for (name, with, without) in pairs() {
        if !name.contains("outputs") {
            continue;
        }
        let scaled = !name.ends_with("outputs") || name.starts_with("LoHa");
        let (model, plain) = (adapted(&with).train(), adapted(&without).train());
        let (dropping, whole) = (&model.layers[0], &plain.layers[0]);
        let x = fill([5, 64], 3, &device) * 10.0;
        device.seed(4);
        let (dropping, whole) = (dropping.first(), whole.first());
        let base = whole.base().forward(x.clone());
        let part = |y: burn::tensor::Tensor<2>| {
            let part = y - base.clone();
            part.into_data().try_into_vec::<f32>().unwrap()
        };
        let (some, all) = (
            part(dropping.forward(x.clone())),
            part(whole.forward(x.clone())),
        );
        let moved = |i: usize| (0..5).any(|row| some[64 * row + i].abs() > 1e-4);
        let is_kept: Vec<bool> = (0..64).map(moved).collect();
        let share = is_kept.iter().filter(|k| **k).count() as f32 / 64.0;
        assert!(share > 0.2 && share < 0.8, "{name}: {share}");
        let factor = if scaled { 1.0 / share } else { 1.0 };
        for (i, (some, all)) in some.iter().zip(&all).enumerate() {
            let expected = if is_kept[i % 64] { all * factor } else { 0.0 };
            // The base's output is taken off again, which leaves a rounding of it.
            assert!(
                (some - expected).abs() < 1e-4,
                "{name}: {i}: {some} {expected}"
            );
        }
    }
}

#[test]
fn a_module_is_dropped_as_a_whole() {
    let _alone = generator();
    let device = Device::flex().autodiff();
    for (name, with, without) in pairs()
        .into_iter()
        .filter(|(name, ..)| name.ends_with("all"))
    {
        let (model, plain) = (adapted(&with).train(), adapted(&without).train());
        let x = fill([5, 64], 3, &device) * 10.0;
        device.seed(4);
        let values = |y: burn::tensor::Tensor<2>| y.into_data().try_into_vec::<f32>().unwrap();
        let (dropping, whole) = (model.layers[0].first(), plain.layers[0].first());
        let base = values(whole.base().forward(x.clone()));
        let with = values(whole.forward(x.clone()));
        let runs: Vec<_> = (0..200)
            .map(|_| values(dropping.forward(x.clone())))
            .collect();
        let without = runs.iter().filter(|y| **y == base).count();
        assert_eq!(
            runs.iter().filter(|y| **y == with).count(),
            200 - without,
            "{name}"
        );
        // Five standard deviations of 200 throws of a coin.
        assert!((65..=135).contains(&without), "{name}: {without}");
    }
}
