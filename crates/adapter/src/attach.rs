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
