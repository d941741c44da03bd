//! Putting adapters on a model and taking them off.

use std::collections::HashMap;

use burn::module::{Module, Param};
use burn::tensor::{Device, Tensor};

use crate::config::Bias;
use crate::choose::{refuse_merged, route};
use crate::embedding::EmbeddingPart;
use crate::error::{AdapterError, Result};
use crate::frozen::FrozenPart;
use crate::linear::{Linear, LinearPart, SavedLinear};
use crate::methods::tokens::TrainableTokens;
use crate::methods::{MethodConfig, Placement, Start, adapter_param_id, to_host};
use crate::plan::{AdapterPlan, PREFIX, TargetPlan, plan};
use crate::routing::{DEFAULT, Routing};
use crate::slot::{Adaptable, ModuleShape, Slot, SlotRef};
use crate::store::check_name;

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

/// The same, with first values of A from elsewhere where `given` has some for a module (EVA).
pub fn attach_given<M: Adaptable, C: MethodConfig>(
    model: &mut M,
    name: &str,
    cfg: &C,
    seed: u64,
    given: Option<&dyn Fn(&str) -> Option<Vec<f32>>>,
) -> Result<AdapterPlan> {
    check_name(name)?;
    if let Some(config) = cfg.xlora() {
        return crate::xlora::attach(model, name, config, seed);
    }
    let plan = plan(&shapes(model), cfg)?;
    let shared = plan.shared.iter().zip(cfg.initial_shared(&plan.shared));
    let shared = shared
        .map(|((key, shape), values)| (*key, *shape, values))
        .collect();
    install(model, name, cfg, &plan, true, shared, &mut |target, weight| {
        let values = cfg.initial(
            target,
            &Start {
                seed,
                weight,
                given,
            },
        )?;
        let origin = cfg.takes_from_base().then(|| values.clone());
        Ok(Values { values, origin })
    })?;
    Ok(plan)
}

/// Removes every adapter and trained copy; the base is as it was.
pub fn detach<M: Adaptable>(model: &mut M) {
    crate::merge::unmerge(model);
    model.for_each_slot(&mut |_, mut slot| {
        slot.remove(None);
        slot.release_base();
        slot.route(&Routing::default());
        slot.enable(true);
    });
    if let Some(place) = model.gate_place() {
        *place = None;
    }
}

/// Switches all adapters on or off. Off, the model is the base model again, biases included.
pub fn set_enabled<M: Adaptable>(model: &mut M, enabled: bool) {
    model.for_each_slot(&mut |_, mut slot| slot.enable(enabled));
    if let Some(gate) = model.gate_mut() {
        gate.enabled = enabled;
    }
}

/// The modules of a loaded model.
pub fn shapes<M: Adaptable>(model: &M) -> Vec<ModuleShape> {
    let mut shapes = Vec::new();
    model.for_each_slot_ref(&mut |name, slot| shapes.push(slot.shape(name, model.is_head(name))));
    shapes
}

/// The name of the first module that carries the adapter, or any; the classifier of an X-LoRA is its.
pub(crate) fn attached<M: Adaptable>(model: &M, adapter: Option<&str>) -> Option<String> {
    let mut first = None;
    model.for_each_slot_ref(&mut |name, slot| {
        let trains_base = match &slot {
            SlotRef::Linear(l) => l.trains_base,
            SlotRef::Embedding(e) => e.trains_base,
            SlotRef::Norm(n) => n.trains_base,
        };
        let mut parts = slot.adapters().into_iter();
        let busy = trains_base || parts.any(|part| adapter.is_none_or(|adapter| part == adapter));
        if busy && first.is_none() {
            first = Some(name.to_string());
        }
    });
    let mixes = model.gate().is_some() && adapter.is_none_or(|adapter| adapter == DEFAULT);
    first.or_else(|| mixes.then(|| "X-LoRA's classifier".to_string()))
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
                        weight: linear.weight.val(),
                        origin,
                    };
                    part.adapter = Some(cfg.build(target, value, &place));
                }
                if saved(name) {
                    let bias = linear.bias.as_ref();
                    part.saved = Some(SavedLinear {
                        weight: copier.copy(&key(name, "weight"), &linear.weight),
                        bias: bias.map(|b| copier.copy(&key(name, "bias"), b)),
                    });
                }
                if let (Some(plan), Some(base)) = (bias(name), &linear.bias) {
                    part.bias = Some(copier.copy(&plan.key, base));
                }
                if part.adapter.is_some() || part.saved.is_some() || part.bias.is_some() {
                    linear.parts.push(part);
                }
            }
            Slot::Embedding(table) => {
                freeze(&mut table.weight);
                let mut part = EmbeddingPart {
                    name: adapter.to_string(),
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
                        weight: table.weight.val(),
                        origin,
                    };
                    part.lora = cfg.build_embedding(target, value, &place);
                }
                if saved(name) {
                    part.saved = Some(copier.copy(&key(name, "weight"), &table.weight));
                }
                if let Some(plan) = tokens(name) {
                    let id = adapter_param_id(adapter, &plan.key);
                    part.tokens = Some(TrainableTokens::from_table(
                        id,
                        &plan.indices,
                        table.weight.val(),
                        trainable,
                    ));
                }
                if part.lora.is_some() || part.saved.is_some() || part.tokens.is_some() {
                    table.parts.push(part);
                }
            }
            Slot::Norm(norm) => {
                freeze(&mut norm.weight);
                if saved(name) {
                    norm.parts.push(FrozenPart {
                        name: adapter.to_string(),
                        saved: copier.copy(&key(name, "weight"), &norm.weight),
                    });
                }
            }
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
            SlotRef::Linear(linear) => linear.weight.val(),
            SlotRef::Embedding(table) => table.weight.val(),
            SlotRef::Norm(_) => return,
        };
        if failed.is_some() {
            return;
        }
        match values(target, &|| to_host(name, weight.clone())) {
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
    model.for_each_slot(&mut |_, slot| match slot {
        Slot::Linear(linear) => {
            linear.trains_base = true;
            set(&mut linear.weight, trainable);
            linear.bias.iter_mut().for_each(|b| set(b, trainable));
        }
        Slot::Embedding(table) => {
            table.trains_base = true;
            set(&mut table.weight, trainable);
        }
        Slot::Norm(norm) => {
            norm.trains_base = true;
            set(&mut norm.weight, trainable);
        }
    });
}

pub(crate) fn device<M: Adaptable>(model: &M) -> Device {
    let mut device = None;
    model.for_each_slot_ref(&mut |_, slot| {
        device.get_or_insert_with(|| match slot {
            SlotRef::Linear(linear) => linear.weight.device(),
            SlotRef::Embedding(table) => table.weight.device(),
            SlotRef::Norm(norm) => norm.weight.device(),
        });
    });
    device.unwrap_or_default()
}

fn freeze_linear(linear: &mut Linear) {
    freeze(&mut linear.weight);
    linear.bias.iter_mut().for_each(freeze);
}

fn freeze<const D: usize>(param: &mut Param<Tensor<D>>) {
    *param = param.clone().no_grad();
}

/// Makes trained copies of base parameters for one adapter.
struct Copier<'a> {
    adapter: &'a str,
    trainable: bool,
}

impl Copier<'_> {
    /// A parameter of its own that starts with another's values.
    fn copy<const D: usize>(&self, key: &str, from: &Param<Tensor<D>>) -> Param<Tensor<D>> {
        Param::initialized(adapter_param_id(self.adapter, key), from.val().detach())
            .set_require_grad(self.trainable)
    }
}

/// Whether `bias` trains that of a module that is a target or not.
pub(crate) fn trains_bias(bias: Bias, is_target: bool) -> bool {
    match bias {
        Bias::None => false,
        Bias::All => true,
        Bias::LoraOnly => is_target,
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used)]
mod tests {
    use super::*;
    use crate::config::{InitLora, LoraConfig, Targets};
    use crate::frozen::param_id;
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
