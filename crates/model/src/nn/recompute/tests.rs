#![allow(clippy::unwrap_used)]

use std::num::NonZeroUsize;
use std::sync::{Mutex, MutexGuard, PoisonError};

use burn::module::{Module, ModuleMapper, ModuleVisitor, Param};
use burn::optim::{AdamWConfig, GradientsAccumulator, GradientsParams};
use burn::tensor::{Device, Gradients, Tensor, TensorData};
use enamel_adapter::{
    AdaLoraConfig, AdapterConfig, FullConfig, Ia3Config, InitMiss, LohaConfig, LokrConfig,
    LoraConfig, MissConfig, Targets, VeraConfig, attach,
};
use serde_json::json;

use super::block_seed;
use crate::testing::{devices, ids, tiny_config, values};
use crate::{Model, ModelInput};

/// Five blocks: two segments of two leave one over.
const BLOCKS: usize = 5;

/// Held while a test draws: all threads share a backend's generator.
fn generator() -> MutexGuard<'static, ()> {
    static GENERATOR: Mutex<()> = Mutex::new(());
    GENERATOR.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Moves every trained parameter off its start, where many a gradient is zero.
struct Stir(u64);

impl ModuleMapper for Stir {
    fn map_float<const D: usize>(&mut self, param: Param<Tensor<D>>) -> Param<Tensor<D>> {
        let value = param.val();
        if !value.is_require_grad() {
            return param;
        }
        self.0 += 1;
        let numbers = (0..value.shape().num_elements() as u64)
            .map(|i| (((i * 17 + self.0 * 31) % 13) as f32 - 6.0) / 100.0)
            .collect::<Vec<_>>();
        let noise = Tensor::from_data(TensorData::new(numbers, value.shape()), &value.device());
        let value = Tensor::from_inner(value.inner() + noise.inner());
        Param::initialized(param.id, value.require_grad())
    }
}

fn model(config: &AdapterConfig, device: &Device) -> Model {
    let shape = tiny_config(json!({ "num_hidden_layers": BLOCKS }));
    let mut model = Model::random(&shape, 7, device).unwrap();
    attach(&mut model, config, 3).unwrap();
    let model = model.fork(&device.clone().autodiff()).train();
    model.map(&mut Stir(0))
}

fn with(model: &Model, every: usize) -> Model {
    let mut model = model.clone();
    model.set_recompute(NonZeroUsize::new(every));
    model
}

fn loss(model: &Model, row: &[i64], seed: Option<u64>) -> Tensor<1> {
    let input = ModelInput {
        seed,
        ..ModelInput::new(ids(&[row], &model.device()))
    };
    let hidden = model.forward_hidden(&input, None);
    let [_, tokens, width] = hidden.dims();
    let labels: Vec<i64> = row.iter().map(|id| (id * 7 + 1) % 40).collect();
    enamel_kernels::linear_cross_entropy(
        hidden.reshape([tokens, width]),
        model.head_weight().values(),
        &labels,
    )
}

const ROW: [i64; 7] = [3, 14, 1, 39, 9, 2, 6];

/// Bits of every parameter's gradient, or of the parameters themselves.
struct Bits<'a>(Option<&'a Gradients>, Vec<Option<Vec<u32>>>);

impl ModuleVisitor for Bits<'_> {
    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
        let value = match self.0 {
            Some(grads) => param.val().grad(grads),
            None => Some(param.val()),
        };
        let bits = |t| values(t).into_iter().map(f32::to_bits).collect();
        self.1.push(value.map(bits));
    }
}

fn bits(model: &Model, grads: Option<&Gradients>) -> Vec<Option<Vec<u32>>> {
    let mut all = Bits(grads, Vec::new());
    model.visit(&mut all);
    all.1
}

/// Loss and gradients.
fn outcome(model: &Model, seed: Option<u64>) -> (Vec<f32>, Vec<Option<Vec<u32>>>) {
    let loss = loss(model, &ROW, seed);
    let grads = loss.clone().backward();
    (values(loss), bits(model, Some(&grads)))
}

fn all_linear() -> Option<Targets> {
    Some(Targets::AllLinear)
}

fn lora(lora_dropout: f64) -> LoraConfig {
    LoraConfig {
        r: 3,
        lora_dropout,
        target_modules: all_linear(),
        ..LoraConfig::default()
    }
}

/// Each method, and whether it draws.
fn methods() -> Vec<(&'static str, AdapterConfig, bool)> {
    let dora = |dropout| LoraConfig {
        use_dora: true,
        ..lora(dropout)
    };
    let whole = LoraConfig {
        modules_to_save: Some(vec![
            "post_attention_layernorm".into(),
            "embed_tokens".into(),
        ]),
        ..lora(0.0)
    };
    let last = LoraConfig {
        layers_to_transform: Some(vec![3]),
        target_modules: Some(Targets::List(vec!["q_proj".into(), "up_proj".into()])),
        ..lora(0.0)
    };
    let loha = |rank_dropout, module_dropout| LohaConfig {
        r: 2,
        rank_dropout,
        module_dropout,
        target_modules: all_linear(),
        ..LohaConfig::default()
    };
    let lokr = LokrConfig {
        r: 2,
        target_modules: all_linear(),
        ..LokrConfig::default()
    };
    let adalora = AdaLoraConfig {
        init_r: 3,
        target_r: 2,
        total_step: Some(10),
        lora_dropout: 0.2,
        target_modules: all_linear(),
        ..AdaLoraConfig::default()
    };
    let vera = VeraConfig {
        r: 4,
        vera_dropout: 0.2,
        target_modules: all_linear(),
        ..VeraConfig::default()
    };
    let ia3 = Ia3Config {
        target_modules: all_linear(),
        feedforward_modules: Some(Targets::List(vec!["down_proj".into()])),
        ..Ia3Config::default()
    };
    let miss = |miss_dropout, init_weights| MissConfig {
        r: 4,
        miss_dropout,
        init_weights,
        target_modules: all_linear(),
        ..MissConfig::default()
    };
    vec![
        ("LoRA", lora(0.0).into(), false),
        ("LoRA with dropout", lora(0.1).into(), true),
        ("DoRA", dora(0.0).into(), false),
        ("DoRA with dropout", dora(0.1).into(), true),
        ("LoRA, norms and table trained whole", whole.into(), false),
        ("LoRA in one block", last.into(), false),
        ("LoHa", loha(0.0, 0.0).into(), false),
        ("LoHa with both dropouts", loha(0.3, 0.3).into(), true),
        ("LoKr", lokr.into(), false),
        ("AdaLoRA", adalora.into(), true),
        ("VeRA", vera.into(), true),
        ("(IA)³", ia3.into(), false),
        ("MiSS", miss(0.2, InitMiss::Default).into(), true),
        ("MiSS with bat", miss(0.0, InitMiss::Bat).into(), false),
        ("all of the base", FullConfig::default().into(), false),
    ]
}

#[test]
fn every_method_has_the_same_loss_and_gradients_to_the_bit() {
    let _drawing = generator();
    for device in devices() {
        for (name, config, draws) in methods() {
            let plain = model(&config, &device);
            let want = outcome(&plain, Some(11));
            assert!(want.1.iter().flatten().count() > 0, "{name}");
            assert!(
                want.1.iter().flatten().flatten().any(|bits| *bits != 0),
                "{name}: all gradients are zero"
            );
            assert_eq!(draws, want != outcome(&plain, Some(12)), "{name}");
            for every in [1, 2, 3, BLOCKS, BLOCKS + 4] {
                let got = outcome(&with(&plain, every), Some(11));
                assert_eq!(got.0, want.0, "{name}, every {every}: loss");
                assert!(got.1 == want.1, "{name}, every {every}: gradients");
            }
        }
    }
}

#[test]
fn without_a_seed_both_runs_of_a_segment_still_draw_the_same() {
    let _drawing = generator();
    for device in devices() {
        let plain = model(&lora(0.5).into(), &device);
        let autodiff = plain.device();
        let run = |every| {
            autodiff.seed(5);
            outcome(&with(&plain, every), None)
        };
        assert!(run(1) == run(1) && run(1) == run(3));
        autodiff.seed(6);
        assert!(outcome(&with(&plain, 1), None) != run(1));
    }
}

#[test]
fn blocks_draw_apart_from_each_other_and_from_step_to_step() {
    let mut seeds: Vec<u64> = (0..8)
        .flat_map(|seed| (0..40).map(move |block| block_seed(seed, block)))
        .collect();
    seeds.sort_unstable();
    seeds.dedup();
    assert_eq!(seeds.len(), 8 * 40);
}

#[test]
fn five_steps_of_adamw_on_accumulated_gradients_end_at_the_same_parameters() {
    let _drawing = generator();
    for device in devices() {
        for (name, config) in [
            ("LoRA", AdapterConfig::from(lora(0.1))),
            ("all of the base", FullConfig::default().into()),
        ] {
            let start = model(&config, &device);
            let train = |every: usize| {
                let mut model = with(&start, every);
                let mut optimizer = AdamWConfig::new().init();
                for step in 0..5 {
                    let mut sum = GradientsAccumulator::new();
                    for (part, row) in [&ROW[..4], &ROW[4..]].into_iter().enumerate() {
                        let seed = Some(2 * step + part as u64);
                        let grads = loss(&model, row, seed).backward();
                        sum.accumulate(&model, GradientsParams::from_grads(grads, &model));
                    }
                    model = optimizer.step(1e-2, model, sum.grads());
                }
                bits(&model, None)
            };
            let plain = train(0);
            assert!(plain != bits(&start, None));
            for every in [1, 2] {
                assert!(train(every) == plain, "{name}, every {every}");
            }
        }
    }
}

#[test]
fn inference_and_validation_are_left_alone() {
    let plain = model(&lora(0.5).into(), &Device::flex());
    let run = |model: &Model| {
        let input = ModelInput::new(ids(&[&ROW], &model.device()));
        values(model.forward_hidden(&input, None))
    };
    assert_eq!(run(&plain.valid()), run(&with(&plain, 2).valid()));
}
