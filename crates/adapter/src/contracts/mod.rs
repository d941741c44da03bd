//! What every method must do: one table of configurations, and tests that go through all of it.
#![allow(clippy::unwrap_used, clippy::expect_used)]

mod allocator;
mod bf16;
mod compute;
mod dropout;
mod facts;
mod files;
mod fused;
mod packed;
mod refusals;
mod several;

use burn::tensor::Device;

use crate::layers::adaptable::{Adaptable, SlotRef};
use crate::testing::{Tiny, difference, perturb};
use crate::{
    AdaLoraConfig, AdapterConfig, Bias, FullConfig, Ia3Config, InitLokr, InitLora, InitMiss,
    LohaConfig, LokrConfig, LoraConfig, MissConfig, Targets, TokenIndices, VeraConfig, attach,
};

/// One configuration and what is known of it beforehand.
struct Case {
    name: &'static str,
    config: AdapterConfig,
    /// Whether the adapted model computes what the base does before anything is trained.
    starts_unchanged: bool,
    /// Trained elements, counted by hand.
    count: usize,
}

// The tiny model's sizes, summed by hand. A block's seven layers have 64, 32, 32, 64, 96, 96, 64 outputs
// and 64, 64, 64, 64, 64, 64, 96 inputs; there are two blocks.
/// Outputs of all layers but the head.
const OUTS: usize = 2 * (64 + 32 + 32 + 64 + 96 + 96 + 64);
/// Inputs and outputs of all layers but the head: what a LoRA of rank 1 trains.
const SIDES: usize = OUTS + 2 * (6 * 64 + 96);
/// The same for q_proj and v_proj alone.
const QV: usize = 2 * (64 + 64 + 64 + 32);
/// Elements of the base: weights, biases, norms; table, last norm, head.
const BASE: usize =
    2 * (2 * 64 * 64 + 2 * 32 * 64 + 3 * 96 * 64 + 64) + OUTS + 256 * 64 + 64 + 256 * 64 + 256;

fn list(names: &[&str]) -> Option<Targets> {
    Some(Targets::List(strings(names)))
}

fn strings(names: &[&str]) -> Vec<String> {
    names.iter().map(|name| (*name).to_string()).collect()
}

/// A LoRA of rank 4 and scale 4 on every linear layer.
fn lora() -> LoraConfig {
    LoraConfig {
        r: 4,
        lora_alpha: 16.0,
        target_modules: Some(Targets::AllLinear),
        ..LoraConfig::default()
    }
}

fn loha(r: usize) -> LohaConfig {
    LohaConfig {
        r,
        alpha: 16.0,
        target_modules: Some(Targets::AllLinear),
        ..LohaConfig::default()
    }
}

fn lokr(r: usize) -> LokrConfig {
    LokrConfig {
        r,
        alpha: 8.0,
        target_modules: Some(Targets::AllLinear),
        ..LokrConfig::default()
    }
}

fn adalora() -> AdaLoraConfig {
    AdaLoraConfig {
        init_r: 6,
        target_r: 2,
        // Large, because E starts at zero and A and B near it.
        lora_alpha: 240.0,
        total_step: Some(10),
        target_modules: Some(Targets::AllLinear),
        ..AdaLoraConfig::default()
    }
}

fn vera() -> VeraConfig {
    VeraConfig {
        r: 8,
        target_modules: Some(Targets::AllLinear),
        ..VeraConfig::default()
    }
}

fn ia3() -> Ia3Config {
    Ia3Config {
        target_modules: Some(Targets::AllLinear),
        ..Ia3Config::default()
    }
}

/// Sizes that r divides with `bat`, and ones that it does not divide otherwise.
fn miss(init_weights: InitMiss) -> MissConfig {
    MissConfig {
        r: if init_weights == InitMiss::Bat { 8 } else { 5 },
        mini_r: if init_weights == InitMiss::Mini { 8 } else { 1 },
        target_modules: Some(Targets::AllLinear),
        init_weights,
        ..MissConfig::default()
    }
}

/// Every method in every form.
fn cases() -> Vec<Case> {
    let mut all = lora_cases();
    all.extend(other_cases());
    all
}

fn case(
    name: &'static str,
    config: impl Into<AdapterConfig>,
    starts_unchanged: bool,
    count: usize,
) -> Case {
    Case {
        name,
        config: config.into(),
        starts_unchanged,
        count,
    }
}

fn lora_cases() -> Vec<Case> {
    let init = |init_lora_weights| LoraConfig {
        init_lora_weights,
        ..lora()
    };
    let some = |names: &[&str]| LoraConfig {
        target_modules: list(names),
        ..lora()
    };
    vec![
        case("LoRA", lora(), true, 4 * SIDES),
        case(
            "LoRA, rank-stabilised",
            LoraConfig {
                use_rslora: true,
                ..lora()
            },
            true,
            4 * SIDES,
        ),
        case(
            "LoRA with patterns",
            LoraConfig {
                rank_pattern: vec![("v_proj".into(), 2), ("up_proj".into(), 3)],
                alpha_pattern: vec![("q_proj".into(), 5.0)],
                ..lora()
            },
            true,
            4 * SIDES - 2 * 2 * 96 - 2 * 160,
        ),
        case(
            "LoRA and all biases",
            LoraConfig {
                bias: Bias::All,
                ..some(&["q_proj", "v_proj"])
            },
            true,
            4 * QV + OUTS + 256,
        ),
        case(
            "LoRA and its biases",
            LoraConfig {
                bias: Bias::LoraOnly,
                ..some(&["q_proj", "v_proj"])
            },
            true,
            4 * QV + 2 * (64 + 32),
        ),
        case(
            "LoRA with a bias of its own",
            LoraConfig {
                lora_bias: true,
                ..lora()
            },
            true,
            4 * SIDES + OUTS,
        ),
        case(
            "LoRA on embedding and head",
            some(&["embed_tokens", "lm_head", "q_proj"]),
            true,
            2 * 4 * (256 + 64) + 2 * 4 * 128,
        ),
        case(
            "LoRA and token rows",
            LoraConfig {
                trainable_token_indices: Some(TokenIndices::Input(vec![79, 5, 255])),
                ..some(&["q_proj", "v_proj"])
            },
            true,
            4 * QV + 3 * 64,
        ),
        case(
            "LoRA and whole modules",
            LoraConfig {
                modules_to_save: Some(strings(&["lm_head", "embed_tokens", "model.norm"])),
                ..lora()
            },
            true,
            4 * SIDES + 2 * 256 * 64 + 256 + 64,
        ),
        case(
            "DoRA",
            LoraConfig {
                use_dora: true,
                ..lora()
            },
            true,
            4 * SIDES + OUTS,
        ),
        case(
            "DoRA on an embedding",
            LoraConfig {
                use_dora: true,
                ..some(&["embed_tokens", "q_proj"])
            },
            true,
            4 * (256 + 64) + 64 + 2 * (4 * 128 + 64),
        ),
        case("LoRA, gaussian", init(InitLora::Gaussian), true, 4 * SIDES),
        case(
            "LoRA, orthogonal",
            init(InitLora::Orthogonal),
            true,
            4 * SIDES,
        ),
        case("LoRA, random", init(InitLora::Random), false, 4 * SIDES),
        case("PiSSA", init(InitLora::Pissa), true, 4 * SIDES),
        case(
            "PiSSA, fast",
            init(InitLora::PissaNiter(4)),
            true,
            4 * SIDES,
        ),
        case("OLoRA", init(InitLora::Olora), true, 4 * SIDES),
        case(
            "PiSSA with patterns",
            LoraConfig {
                use_rslora: true,
                rank_pattern: vec![("v_proj".into(), 2)],
                alpha_pattern: vec![("up_proj".into(), 5.0)],
                init_lora_weights: InitLora::Pissa,
                ..lora()
            },
            true,
            4 * SIDES - 2 * 2 * 96,
        ),
        case(
            "PiSSA beside an embedding",
            LoraConfig {
                init_lora_weights: InitLora::Pissa,
                modules_to_save: Some(strings(&["model.norm"])),
                ..some(&["embed_tokens", "q_proj"])
            },
            true,
            4 * (256 + 64) + 2 * 4 * 128 + 64,
        ),
    ]
}

fn other_cases() -> Vec<Case> {
    let module = |block: usize, name: &str| format!("model.layers.{block}.{name}.lora_E");
    let kept = |ranks: [u8; 6]| ranks.map(|kept| kept == 1).to_vec();
    // 64 = 8·8, 32 = 4·8, 96 = 8·12; a product stands for a factor with a side above 2·r.
    let (square, small, wide) = (2 * 16 + 2 * 16, 2 * 12 + 2 * 16, 2 * 16 + 2 * 20);
    let both = 2 * (2 * square + 2 * small + 3 * wide);
    vec![
        case("LoHa, factored", loha(2), true, 2 * 2 * SIDES),
        case("LoHa, dense", loha(16), true, 2 * 16 * SIDES),
        case(
            "LoHa, random",
            LohaConfig {
                init_weights: false,
                ..loha(2)
            },
            false,
            2 * 2 * SIDES,
        ),
        case(
            "LoKr, both factors products",
            LokrConfig {
                decompose_both: true,
                ..lokr(2)
            },
            true,
            both,
        ),
        case(
            "LoKr, both factors whole",
            lokr(16),
            true,
            2 * (2 * (64 + 64) + 2 * (32 + 64) + 3 * (64 + 96)),
        ),
        case(
            "LoKr with a factor of 4",
            LokrConfig {
                decompose_factor: 4,
                ..lokr(2)
            },
            true,
            // w1 is [4, 4]; w2 is of [16, 16], [8, 16] and [24, 16] or [16, 24].
            2 * (7 * 16 + 2 * (2 * 32) + 2 * (2 * 24) + 3 * (2 * 40)),
        ),
        case(
            "LoKr, as LyCORIS starts",
            LokrConfig {
                decompose_both: true,
                init_weights: InitLokr::Lycoris,
                ..lokr(2)
            },
            true,
            both,
        ),
        case("AdaLoRA", adalora(), true, 6 * SIDES + 14 * 6),
        case(
            "AdaLoRA with its budget spent",
            AdaLoraConfig {
                rank_pattern: Some(vec![
                    (module(0, "self_attn.q_proj"), kept([0; 6])),
                    (module(1, "mlp.down_proj"), kept([1, 0, 0, 1, 0, 0])),
                ]),
                ..adalora()
            },
            true,
            6 * SIDES + 14 * 6 - 6 * (128 + 1) - 4 * (160 + 1),
        ),
        case("VeRA", vera(), true, OUTS + 14 * 8),
        case(
            "VeRA without its projection",
            VeraConfig {
                save_projection: false,
                projection_prng_key: 7,
                ..vera()
            },
            true,
            OUTS + 14 * 8,
        ),
        case("IA3", ia3(), true, OUTS - 2 * 64 + 2 * 96),
        case(
            "IA3 with inputs of its own",
            Ia3Config {
                target_modules: list(&["q_proj", "gate_proj"]),
                feedforward_modules: list(&["gate_proj"]),
                ..Ia3Config::default()
            },
            true,
            2 * (64 + 64),
        ),
        case("MiSS", miss(InitMiss::Default), true, 5 * OUTS),
        case(
            "MiSS, pieces of equal size",
            MissConfig {
                r: 16,
                ..miss(InitMiss::Default)
            },
            true,
            16 * OUTS,
        ),
        case("MiSS, random", miss(InitMiss::Random), false, 5 * OUTS),
        case("MiSS, mini", miss(InitMiss::Mini), true, 14 * 5 * 8),
        case("MiSS, bat", miss(InitMiss::Bat), true, 8 * OUTS),
        case("Full", FullConfig::default(), true, BASE),
    ]
}

impl Case {
    fn is_full(&self) -> bool {
        matches!(self.config, AdapterConfig::Full(_))
    }

    /// Whether the exchange form is another than the one that is trained.
    fn is_converted(&self) -> bool {
        matches!(&self.config, AdapterConfig::Lora(c) if c.init_lora_weights.subtracts_initial())
    }

    /// A model with the adapter as it starts.
    fn fresh(&self, device: &Device) -> Tiny {
        let mut model = Tiny::new(device);
        attach(&mut model, &self.config, 3).unwrap();
        model
    }

    /// A model with the adapter as if it had been trained.
    fn adapted(&self, device: &Device) -> Tiny {
        let mut model = self.fresh(device);
        perturb(&mut model);
        model
    }
}

/// Every parameter of the base by name.
fn base_of(model: &Tiny) -> Vec<(String, Vec<f32>)> {
    let mut all = Vec::new();
    model.for_each_slot_ref(&mut |name, slot| {
        let mut add = |own: &str, values: Vec<f32>| all.push((format!("{name}.{own}"), values));
        match slot {
            SlotRef::Linear(linear) => {
                add(
                    "weight",
                    linear.weight.dense().into_data().try_into_vec().unwrap(),
                );
                if let Some(bias) = &linear.bias {
                    add("bias", bias.val().into_data().try_into_vec().unwrap());
                }
            }
            SlotRef::Embedding(table) => {
                add(
                    "weight",
                    table.weight.dense().into_data().try_into_vec().unwrap(),
                );
            }
            SlotRef::Conv(_) | SlotRef::Param(_) => {}
            SlotRef::Norm(norm) => {
                add(
                    "weight",
                    norm.weight.val().into_data().try_into_vec().unwrap(),
                );
            }
        }
    });
    all
}

/// Two outputs that are the same but for rounding: the difference, as a part of the largest value.
fn apart(a: &[f32], b: &[f32]) -> f32 {
    let largest = a.iter().fold(0.0_f32, |most, v| most.max(v.abs()));
    difference(a, b) / largest
}
