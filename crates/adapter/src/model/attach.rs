//! Putting adapters on a model and taking them off.

use std::collections::HashMap;

use burn::module::{Module, Param};
use burn::tensor::{Device, Tensor};

use crate::base::module_shape::ModuleShape;
use crate::base::routing::check_name;
use crate::base::routing::{DEFAULT, Routing};
use crate::base::to_host;
use crate::error::{AdapterError, Result};
use crate::layers::adaptable::{Adaptable, Slot, SlotRef, model_part};
use crate::layers::embedding::EmbeddingPart;
use crate::layers::frozen::{Frozen, FrozenPart};
use crate::layers::linear::{Linear, LinearPart, SavedLinear};
use crate::methods::tokens::TrainableTokens;
use crate::methods::{InitContext, InitFactorsFor, MethodConfig, Placement, adapter_param_id};
use crate::model::active::{refuse_merged, route};
use crate::model::plan::plan;
use crate::plan::AdapterPlan;
use crate::plan::PREFIX;
use crate::plan::TargetPlan;

/// Attaches a new adapter called [`DEFAULT`] and puts it in use. Its parameters are drawn from `seed`
/// and their own names, so that they do not depend on order, threads or which other modules are
/// adapted. They require gradients (once the model is in training: `model.train()`); everything else
/// the model shows is frozen.
///
/// # Errors
/// A configuration that does not fit the model, with all that is wrong; an adapter that is there
/// already.
pub fn attach<M: Adaptable, C: MethodConfig>(
    model: &mut M,
    cfg: &C,
    seed: u64,
) -> Result<AdapterPlan> {
    attach_as(model, DEFAULT, cfg, seed)
}

/// The same under a name of its own, beside adapters that are there already.
pub fn attach_as<M: Adaptable, C: MethodConfig>(
    model: &mut M,
    name: &str,
    cfg: &C,
    seed: u64,
) -> Result<AdapterPlan> {
    attach_given(model, name, cfg, seed, None)
}

/// The same, with first values of the factors from elsewhere where `given` has some for a module (EVA,
/// LoftQ).
pub fn attach_given<M: Adaptable, C: MethodConfig>(
    model: &mut M,
    name: &str,
    cfg: &C,
    seed: u64,
    given: Option<&InitFactorsFor<'_>>,
) -> Result<AdapterPlan> {
    check_name(name)?;
    if let Some(plan) = cfg.attach_to_model(model, name, seed) {
        return plan;
    }
    if cfg.trains_everything() {
        refuse_packed(model)?;
    }
    let plan = plan(&shapes(model), cfg)?;
    let shared = plan.shared.iter().zip(cfg.initial_shared(&plan.shared));
    let shared = shared
        .map(|((key, shape), values)| (*key, *shape, values))
        .collect();
    install(
        model,
        name,
        cfg,
        &plan,
        true,
        shared,
        &mut |target, weight| {
            let values = cfg.initial(
                target,
                &InitContext {
                    seed,
                    weight,
                    given,
                },
            )?;
            let origin = cfg.subtracts_initial().then(|| values.clone());
            Ok(Values { values, origin })
        },
    )?;
    Ok(plan)
}

/// Quantised weights cannot be trained themselves.
fn refuse_packed<M: Adaptable>(model: &M) -> Result<()> {
    let mut problems = Vec::new();
    model.for_each_slot_ref(&mut |name, slot| {
        let packed = match &slot {
            SlotRef::Linear(linear) => linear.weight.packed(),
            SlotRef::Embedding(table) => table.weight.packed(),
            SlotRef::Norm(_) | SlotRef::Conv(_) | SlotRef::Param(_) => None,
        };
        if let Some(packed) = packed {
            let format = packed.rows().name();
            problems.push(format!(
                "{name} is held in {format}, which cannot be trained; load the base dense, or train an adapter"
            ));
        }
    });
    match problems.is_empty() {
        true => Ok(()),
        false => Err(AdapterError::Plan { problems }),
    }
}

/// Removes every adapter and trained copy; the base is as it was.
pub fn detach<M: Adaptable>(model: &mut M) {
    crate::model::merge::unmerge(model);
    model.for_each_slot(&mut |_, mut slot| {
        slot.remove(None);
        slot.release_base();
        slot.route(&Routing::default());
        slot.enable(true);
    });
    if let Some(part) = model.model_part_mut() {
        part.remove();
    }
}

/// Switches all adapters on or off. Off, the model is the base model again, biases included.
pub fn set_enabled<M: Adaptable>(model: &mut M, enabled: bool) {
    model.for_each_slot(&mut |_, mut slot| slot.enable(enabled));
    if let Some(part) = model.model_part_mut() {
        part.enable(enabled);
    }
}

/// The modules of a loaded model.
pub fn shapes<M: Adaptable>(model: &M) -> Vec<ModuleShape> {
    let mut shapes = Vec::new();
    model.for_each_slot_ref(&mut |name, slot| shapes.push(slot.shape(name, model.is_head(name))));
    shapes
}

/// The name of the first module that carries the adapter, or any; a part at the model itself is [`DEFAULT`]'s.
pub(crate) fn attached<M: Adaptable>(model: &M, adapter: Option<&str>) -> Option<String> {
    let mut first = None;
    model.for_each_slot_ref(&mut |name, slot| {
        let mut parts = slot.adapters().into_iter();
        let busy =
            slot.trains_base() || parts.any(|part| adapter.is_none_or(|adapter| part == adapter));
        if busy && first.is_none() {
            first = Some(name.to_string());
        }
    });
    let asked = adapter.is_none_or(|adapter| adapter == DEFAULT);
    let part = model_part(model).filter(|_| asked);
    first.or_else(|| Some(part?.occupant()?.to_string()))
}

/// The values of one target's parameters.
pub(crate) struct Values {
    /// In the order of [`MethodConfig::parameters`].
    pub values: Vec<Vec<f32>>,
    /// What they started from, where that matters.
    pub origin: Option<Vec<Vec<f32>>>,
}

/// A shared tensor on the host: key, shape, values.
pub(crate) type SharedValues = Vec<(&'static str, [usize; 2], Vec<f32>)>;

/// Reads a base weight.
pub(crate) type ReadWeight<'a> = dyn Fn() -> Result<Vec<f32>> + 'a;

/// Builds the parameters of `plan` from `values(target, base weight)` and freezes the rest. Trained
/// copies start as the base. All values are made before the model is touched.
pub(crate) fn install<M: Adaptable, C: MethodConfig>(
    model: &mut M,
    adapter: &str,
    cfg: &C,
    plan: &AdapterPlan,
    trainable: bool,
    shared: SharedValues,
    values: &mut dyn FnMut(&TargetPlan, &ReadWeight<'_>) -> Result<Values>,
) -> Result<()> {
    if let Some(module) = attached(model, Some(adapter)) {
        return Err(AdapterError::Attached(module));
    }
    refuse_merged(model)?;
    if cfg.trains_everything() {
        train_everything(model, trainable);
        return Ok(());
    }
    let mut ready = make_values(model, plan, values)?;
    let targets: HashMap<&str, &TargetPlan> =
        plan.targets.iter().map(|t| (t.name.as_str(), t)).collect();
    let device = device(model);
    let shared: Vec<(&'static str, Tensor<2>)> = shared
        .into_iter()
        .map(|(key, shape, values)| {
            let data = burn::tensor::TensorData::new(values, shape);
            (key, Tensor::from_data(data, &device))
        })
        .collect();
    let saved = |name: &str| plan.saved.iter().any(|s| s.name == name);
    let bias = |name: &str| plan.biases.iter().find(|b| b.name == name);
    let tokens = |name: &str| plan.tokens.iter().find(|t| t.name == name);
    let key = |name: &str, parameter: &str| format!("{PREFIX}{name}.{parameter}");
    let copier = Copier { adapter, trainable };
    model.for_each_slot(&mut |name, mut slot| {
        slot.enable(true);
        let target = targets.get(name).copied();
        let (value, origin) = match target.and_then(|_| ready.remove(name)) {
            Some(made) => (made.values, made.origin),
            None => (Vec::new(), None),
        };
        match slot {
            Slot::Linear(linear) => {
                freeze_linear(linear);
                let mut part = LinearPart {
                    name: adapter.to_string(),
                    adapter: None,
                    saved: None,
                    bias: None,
                };
                if let Some(target) = target {
                    let place = Placement {
                        device: &linear.weight.device(),
                        trainable,
                        adapter,
                        shared: &shared,
                        weight: linear.weight.get(),
                        origin,
                    };
                    part.adapter = Some(cfg.build(target, value, &place));
                }
                if saved(name) {
                    let bias = linear.bias.as_ref();
                    part.saved = Some(SavedLinear {
                        weight: copier.copy(&key(name, "weight"), linear.weight.dense()),
                        bias: bias.map(|b| copier.copy(&key(name, "bias"), b.val())),
                    });
                }
                if let (Some(plan), Some(base)) = (bias(name), &linear.bias) {
                    part.bias = Some(copier.copy(&plan.key, base.val()));
                }
                if part.adapter.is_some() || part.saved.is_some() || part.bias.is_some() {
                    linear.parts.push(part);
                }
            }
            Slot::Embedding(table) => {
                table.weight.set_frozen();
                let mut part = EmbeddingPart {
                    name: adapter.to_string(),
                    tied: plan.tied,
                    lora: None,
                    saved: None,
                    tokens: None,
                };
                if let Some(target) = target {
                    let place = Placement {
                        device: &table.weight.device(),
                        trainable,
                        adapter,
                        shared: &shared,
                        weight: table.weight.get(),
                        origin,
                    };
                    part.lora = cfg.build_embedding(target, value, &place);
                }
                if saved(name) {
                    part.saved = Some(copier.copy(&key(name, "weight"), table.weight.dense()));
                }
                if let Some(plan) = tokens(name) {
                    let id = adapter_param_id(adapter, &plan.key);
                    part.tokens = Some(TrainableTokens::from_table(
                        id,
                        &plan.indices,
                        table.weight.dense(),
                        trainable,
                    ));
                }
                if part.lora.is_some() || part.saved.is_some() || part.tokens.is_some() {
                    table.parts.push(part);
                }
            }
            Slot::Norm(norm) => attach_whole(norm, name, plan, &copier),
            Slot::Conv(conv) => attach_whole(conv, name, plan, &copier),
            Slot::Param(param) => attach_whole(param, name, plan, &copier),
        }
    });
    route(model, &Routing::to(adapter));
    Ok(())
}

/// First values of every target, before anything changes.
fn make_values<M: Adaptable>(
    model: &M,
    plan: &AdapterPlan,
    values: &mut dyn FnMut(&TargetPlan, &ReadWeight<'_>) -> Result<Values>,
) -> Result<HashMap<String, Values>> {
    let mut ready = HashMap::new();
    let mut failed = None;
    model.for_each_slot_ref(&mut |name, slot| {
        let Some(target) = plan.targets.iter().find(|t| t.name == name) else {
            return;
        };
        let weight = match slot {
            SlotRef::Linear(linear) => linear.weight.get(),
            SlotRef::Embedding(table) => table.weight.get(),
            SlotRef::Norm(_) | SlotRef::Conv(_) | SlotRef::Param(_) => return,
        };
        if failed.is_some() {
            return;
        }
        match values(target, &|| to_host(name, weight.dense())) {
            Ok(made) => {
                ready.insert(name.to_string(), made);
            }
            Err(error) => failed = Some(error),
        }
    });
    failed.map_or(Ok(ready), Err)
}

/// Full fine-tuning: the base's own parameters are the trained ones.
fn train_everything<M: Adaptable>(model: &mut M, trainable: bool) {
    fn set<const D: usize>(param: &mut Param<Tensor<D>>, trainable: bool) {
        *param = param.clone().set_require_grad(trainable);
    }
    fn train_whole<const D: usize>(module: &mut Frozen<D>, trainable: bool) {
        module.trains_base = true;
        set(&mut module.weight, trainable);
        module.bias.iter_mut().for_each(|bias| set(bias, trainable));
    }
    model.for_each_slot(&mut |_, slot| match slot {
        Slot::Linear(linear) => {
            linear.trains_base = true;
            linear.weight.widen(trainable);
            linear.bias.iter_mut().for_each(|b| set(b, trainable));
        }
        Slot::Embedding(table) => {
            table.trains_base = true;
            table.weight.widen(trainable);
        }
        Slot::Norm(norm) => train_whole(norm, trainable),
        Slot::Conv(conv) => train_whole(conv, trainable),
        Slot::Param(param) => train_whole(param, trainable),
    });
}

pub(crate) fn device<M: Adaptable>(model: &M) -> Device {
    let mut device = None;
    model.for_each_slot_ref(&mut |_, slot| {
        device.get_or_insert_with(|| match slot {
            SlotRef::Linear(linear) => linear.weight.device(),
            SlotRef::Embedding(table) => table.weight.device(),
            SlotRef::Norm(norm) => norm.weight.device(),
            SlotRef::Conv(conv) => conv.weight.device(),
            SlotRef::Param(param) => param.weight.device(),
        });
    });
    device.unwrap_or_default()
}

fn freeze_linear(linear: &mut Linear) {
    linear.weight.set_frozen();
    linear.bias.iter_mut().for_each(freeze);
}

fn freeze<const D: usize>(param: &mut Param<Tensor<D>>) {
    *param = param.clone().no_grad();
}

/// Freezes a module that is used as a whole, and makes the copies that the plan asks for.
fn attach_whole<const D: usize>(
    module: &mut Frozen<D>,
    name: &str,
    plan: &AdapterPlan,
    copier: &Copier<'_>,
) {
    freeze(&mut module.weight);
    module.bias.iter_mut().for_each(freeze);
    let key = |parameter: &str| format!("{PREFIX}{name}.{parameter}");
    let whole = plan.saved.iter().any(|saved| saved.name == name);
    let bias_key = match plan.biases.iter().find(|bias| bias.name == name) {
        Some(plan) => Some(plan.key.clone()),
        None => whole.then(|| key("bias")),
    };
    let bias = bias_key.zip(module.bias.as_ref());
    let part = FrozenPart {
        name: copier.adapter.to_string(),
        saved: whole.then(|| copier.copy(&key("weight"), module.weight.val())),
        bias: bias.map(|(key, bias)| copier.copy(&key, bias.val())),
    };
    if part.saved.is_some() || part.bias.is_some() {
        module.parts.push(part);
    }
}

/// Makes trained copies of base parameters for one adapter.
struct Copier<'a> {
    adapter: &'a str,
    trainable: bool,
}

impl Copier<'_> {
    /// A parameter of its own that starts with another's values.
    fn copy<const D: usize>(&self, key: &str, from: Tensor<D>) -> Param<Tensor<D>> {
        Param::initialized(adapter_param_id(self.adapter, key), from.detach())
            .set_require_grad(self.trainable)
    }
}

#[cfg(test)]
mod tests;
