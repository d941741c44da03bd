//! Putting an adapter on a model and taking it off.

use std::collections::HashMap;

use burn::module::{Module, Param};
use burn::tensor::Tensor;
use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{RngCore, SeedableRng};

use crate::error::{AdapterError, Result};
use crate::frozen::{fnv1a, param_id};
use crate::linear::SavedLinear;
use crate::methods::{MethodConfig, Placement};
use crate::plan::{AdapterPlan, PREFIX, TargetPlan, plan};
use crate::slot::{Adaptable, ModuleShape, Slot, SlotRef};

/// Attaches a new adapter. Its parameters are drawn from `seed` and their own names, so that they do
/// not depend on order, threads or which other modules are adapted. They require gradients (once the
/// model is in training: `model.train()`); everything else the model shows is frozen.
pub fn attach<M: Adaptable, C: MethodConfig>(
    model: &mut M,
    cfg: &C,
    seed: u64,
) -> Result<AdapterPlan> {
    let plan = plan(&shapes(model), cfg)?;
    install(model, cfg, &plan, true, &mut |target, name| {
        cfg.initial(target, name, &mut rng(seed, &target.key(name)))
    })?;
    Ok(plan)
}

/// Removes the adapter and the trained copies; the base is as it was.
pub fn detach<M: Adaptable>(model: &mut M) {
    model.for_each_slot(&mut |_, slot| match slot {
        Slot::Linear(linear) => {
            linear.adapter = None;
            linear.saved = None;
            linear.enabled = true;
        }
        Slot::Embedding(table) => table.drop_saved(),
        Slot::Norm(norm) => norm.drop_saved(),
    });
}

/// Switches the adapter and the trained copies on or off. Off, the model is the base model again,
/// biases included.
pub fn set_enabled<M: Adaptable>(model: &mut M, enabled: bool) {
    model.for_each_slot(&mut |_, slot| match slot {
        Slot::Linear(linear) => linear.enabled = enabled,
        Slot::Embedding(table) => table.enabled = enabled,
        Slot::Norm(norm) => norm.enabled = enabled,
    });
}

/// The modules of a loaded model.
pub fn shapes<M: Adaptable>(model: &M) -> Vec<ModuleShape> {
    let mut shapes = Vec::new();
    model.for_each_slot_ref(&mut |name, slot| shapes.push(slot.shape(name, model.is_head(name))));
    shapes
}

/// The name of the first module that carries an adapter or a trained copy.
pub(crate) fn attached<M: Adaptable>(model: &M) -> Option<String> {
    let mut first = None;
    model.for_each_slot_ref(&mut |name, slot| {
        let busy = match slot {
            SlotRef::Linear(linear) => linear.adapter.is_some() || linear.saved.is_some(),
            SlotRef::Embedding(table) => table.saved.is_some(),
            SlotRef::Norm(norm) => norm.saved.is_some(),
        };
        if busy && first.is_none() {
            first = Some(name.to_string());
        }
    });
    first
}

/// Builds the parameters of `plan` from `values(target, parameter)` and freezes the rest. Trained
/// copies start as the base.
pub(crate) fn install<M: Adaptable, C: MethodConfig>(
    model: &mut M,
    cfg: &C,
    plan: &AdapterPlan,
    trainable: bool,
    values: &mut dyn FnMut(&TargetPlan, &'static str) -> Vec<f32>,
) -> Result<()> {
    if let Some(name) = attached(model) {
        return Err(AdapterError::Attached(name));
    }
    let targets: HashMap<&str, &TargetPlan> =
        plan.targets.iter().map(|t| (t.name.as_str(), t)).collect();
    let saved = |name: &str| plan.saved.iter().any(|s| s.name == name);
    model.for_each_slot(&mut |name, slot| match slot {
        Slot::Linear(linear) => {
            linear.enabled = true;
            freeze(&mut linear.weight);
            linear.bias.iter_mut().for_each(freeze);
            if let Some(target) = targets.get(name) {
                let parameters = cfg.parameters(target);
                let values = parameters
                    .iter()
                    .map(|(parameter, _)| values(target, parameter))
                    .collect();
                let place = Placement {
                    device: &linear.weight.device(),
                    trainable,
                };
                linear.adapter = Some(cfg.build(target, values, &place));
            }
            if saved(name) {
                linear.saved = Some(SavedLinear {
                    weight: copy(&format!("{PREFIX}{name}.weight"), &linear.weight, trainable),
                    bias: linear
                        .bias
                        .as_ref()
                        .map(|b| copy(&format!("{PREFIX}{name}.bias"), b, trainable)),
                });
            }
        }
        Slot::Embedding(table) => table.install(name, saved(name), trainable),
        Slot::Norm(norm) => norm.install(name, saved(name), trainable),
    });
    Ok(())
}

pub(crate) fn freeze<const D: usize>(param: &mut Param<Tensor<D>>) {
    *param = param.clone().no_grad();
}

/// A parameter of its own that starts with another's values.
pub(crate) fn copy<const D: usize>(
    key: &str,
    from: &Param<Tensor<D>>,
    trainable: bool,
) -> Param<Tensor<D>> {
    Param::initialized(param_id(key), from.val().detach()).set_require_grad(trainable)
}

/// The generator of the parameter called `name`.
fn rng(seed: u64, name: &str) -> ChaCha8Rng {
    let mut key = [0; 32];
    key[..8].copy_from_slice(&seed.to_le_bytes());
    key[8..16].copy_from_slice(&fnv1a(name).to_le_bytes());
    ChaCha8Rng::from_seed(key)
}

/// Uniform over `[-bound, bound)`. Written out, because a library's distributions may change what
/// they draw from one version to the next.
pub(crate) fn uniform(rng: &mut ChaCha8Rng, count: usize, bound: f64) -> Vec<f32> {
    (0..count)
        .map(|_| ((unit(rng) * 2.0 - 1.0) * bound) as f32)
        .collect()
}

/// Normal with mean 0 (Box and Muller).
pub(crate) fn gaussian(rng: &mut ChaCha8Rng, count: usize, deviation: f64) -> Vec<f32> {
    let mut values = Vec::with_capacity(count + 1);
    while values.len() < count {
        // 1 - u lies in (0, 1], where the logarithm is finite.
        let radius = deviation * (-2.0 * (1.0 - unit(rng)).ln()).sqrt();
        let angle = std::f64::consts::TAU * unit(rng);
        values.extend([(radius * angle.cos()) as f32, (radius * angle.sin()) as f32]);
    }
    values.truncate(count);
    values
}

/// Uniform over `[0, 1)`, of 53 bits.
fn unit(rng: &mut ChaCha8Rng) -> f64 {
    (rng.next_u64() >> 11) as f64 / (1_u64 << 53) as f64
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used)]
mod tests {
    use super::*;
    use crate::config::{InitLora, LoraConfig, Targets};
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
                        l.weight.val().grad(&grads).is_some() || l.weight.val().is_require_grad()
                    }
                    SlotRef::Embedding(e) => e.weight.val().grad(&grads).is_some(),
                    SlotRef::Norm(n) => n.weight.val().grad(&grads).is_some(),
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
                ids.push(l.weight.id);
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
}
