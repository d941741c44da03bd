//! Putting an X-LoRA on a model, writing it and reading it.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;

use burn::nn::DropoutConfig;
use burn::tensor::Device;

use super::config::Expert;
use super::{GateLayer, Mixing, XLora, XLoraConfig, classifier_of, key, place_in};
use crate::base::module_shape::ModuleKind;
use crate::base::module_shape::ModuleShape;
use crate::base::module_shape::elements;
use crate::base::routing::{DEFAULT, Routing};
use crate::config::{Purpose, SaveMeta};
use crate::error::{AdapterError, Result};
use crate::files::model_card::model_card;
use crate::files::store::{AdapterFile, CONFIG, WEIGHTS, not_finite, read_tensors};
use crate::files::{SaveForm, load_pretrained_as, save_pretrained_as};
use crate::layers::adaptable::{Adaptable, Slot};
use crate::methods::{LoadedAdapter, MethodConfig, Placement};
use crate::model::active::route;
use crate::model::attach::{attached, detach, device, shapes};
use crate::model::plan::plan_for_load;
use crate::model::trainable::export_params_of;
use crate::plan::AdapterPlan;
use crate::plan::TargetPlan;

/// What an X-LoRA would be on a model of these modules: the experts' configurations are read, their
/// weights are not. Each adapted layer has the largest rank that an expert has there.
pub(crate) fn plan(modules: &[ModuleShape], config: &XLoraConfig) -> Result<AdapterPlan> {
    Ok(prepared(modules, config)?.plan)
}

/// Everything about an X-LoRA but its values.
struct Prepared {
    plan: AdapterPlan,
    experts: Vec<Expert>,
    /// The classifier's layers: place in PEFT's sequence, outputs, inputs.
    layers: Vec<(usize, usize, usize)>,
}

fn prepared(modules: &[ModuleShape], config: &XLoraConfig) -> Result<Prepared> {
    let problems = config.problems(Purpose::Initialise);
    if !problems.is_empty() {
        return Err(AdapterError::Config {
            origin: "X-LoRA".into(),
            problems,
        });
    }
    let experts = config.experts()?;
    let mut problems = Vec::new();
    let mut targets: BTreeMap<usize, TargetPlan> = BTreeMap::new();
    for expert in &experts {
        let at = format!("expert {} ({})", expert.name, expert.dir.display());
        let plan = match plan_for_load(modules, &expert.config) {
            Ok(plan) => plan,
            Err(error) => {
                problems.push(format!("{at}: {error}"));
                continue;
            }
        };
        for target in plan.targets {
            let Some(i) = modules.iter().position(|m| m.name == target.name) else {
                continue;
            };
            if modules[i].kind == ModuleKind::Head {
                problems.push(format!(
                    "{at} adapts {}: the output layer sees single tokens out of their place and cannot be mixed",
                    target.name
                ));
            }
            targets
                .entry(i)
                .and_modify(|known| {
                    let params = known.params + target.params;
                    if target.r > known.r {
                        *known = target.clone();
                    }
                    known.params = params;
                })
                .or_insert(target);
        }
    }
    // What the last norm yields is what the classifier reads.
    let norm = modules.iter().rev().find(|m| m.kind == ModuleKind::Norm);
    let width = norm.and_then(|norm| norm.shape.first()).copied();
    match (width, config.hidden_size) {
        (None, _) => problems.push("X-LoRA needs a model with a norm at its end".into()),
        (Some(width), Some(asked)) if asked != width => problems.push(format!(
            "hidden_size = {asked}, but the model's hidden states are {width} wide"
        )),
        _ => {}
    }
    if !problems.is_empty() {
        return Err(AdapterError::Plan { problems });
    }
    let layers = classifier(config, width.unwrap_or_default(), targets.len());
    let own: usize = layers.iter().map(|(_, out, width)| out * width + out).sum();
    let of_experts: usize = targets.values().map(|t| t.params).sum();
    let base: usize = modules.iter().map(elements).sum();
    let along = if config.use_trainable_adapters {
        of_experts
    } else {
        0
    };
    Ok(Prepared {
        plan: AdapterPlan {
            targets: targets.into_values().collect(),
            trainable: own + along,
            total: base + of_experts + own,
            ..AdapterPlan::default()
        },
        experts,
        layers,
    })
}

/// The classifier's linear layers. In PEFT's sequence each but the last is followed by an activation
/// and, if its probability is not zero, by a dropout.
fn classifier(config: &XLoraConfig, width: usize, adapted: usize) -> Vec<(usize, usize, usize)> {
    let classes = config.count()
        * if config.layerwise_scalings {
            adapted
        } else {
            1
        };
    let step = if config.xlora_dropout_p > 0.0 { 3 } else { 2 };
    let last = config.xlora_depth - 1;
    (0..config.xlora_depth)
        .map(|i| {
            let inputs = if i == 0 { width } else { config.xlora_size };
            let outputs = if i == last {
                classes
            } else {
                config.xlora_size
            };
            (i * step, outputs, inputs)
        })
        .collect()
}

/// Loads the experts and puts a new classifier beside them. Its weights and biases are uniform within
/// ±1/√inputs, as torch's linear layers start, drawn from the seed and their own names.
pub(crate) fn attach<M: Adaptable>(
    model: &mut M,
    name: &str,
    config: &XLoraConfig,
    seed: u64,
) -> Result<AdapterPlan> {
    let prepared = ready(model, name, config)?;
    let values = prepared
        .layers
        .iter()
        .map(|(index, outputs, inputs)| {
            let bound = 1.0 / (*inputs as f64).sqrt();
            let draw = |own: &str, count| {
                crate::linalg::random::uniform(
                    &mut crate::linalg::random::rng(seed, &key(*index, own)),
                    count,
                    bound,
                )
            };
            (draw("weight", outputs * inputs), draw("bias", *outputs))
        })
        .collect();
    install(model, config, prepared, values, true)
}

/// Reads an X-LoRA directory and the experts it names. `config` is its configuration.
pub(crate) fn load<M: Adaptable>(
    model: &mut M,
    name: &str,
    config: XLoraConfig,
    dir: &Path,
    trainable: bool,
) -> Result<LoadedAdapter> {
    let prepared = ready(model, name, &config)?;
    let path = dir.join(WEIGHTS);
    let mut stored = read_tensors(dir, &config.clone().into())?.tensors;
    let empty = stored.is_empty();
    let mut problems = Vec::new();
    let mut take = |key: String, shape: &[usize]| -> Vec<f32> {
        match stored.remove(&key) {
            None => problems.push(format!("{key} {shape:?} is missing")),
            Some(tensor) if tensor.shape != shape => problems.push(format!(
                "{key} is {:?} where the model and the configuration need {shape:?}",
                tensor.shape
            )),
            Some(tensor) => match &tensor.values {
                None => problems.push(tensor.unreadable(&key)),
                Some(values) if values.iter().any(|v| !v.is_finite()) => {
                    problems.push(not_finite(&key))
                }
                Some(_) => return tensor.values.unwrap_or_default(),
            },
        }
        Vec::new()
    };
    let values = prepared
        .layers
        .iter()
        .map(|(index, outputs, inputs)| {
            (
                take(key(*index, "weight"), &[*outputs, *inputs]),
                take(key(*index, "bias"), &[*outputs]),
            )
        })
        .collect();
    problems.extend(
        stored
            .keys()
            .map(|key| format!("{key} does not belong to a classifier of this configuration")),
    );
    if !problems.is_empty() {
        let note = if empty {
            "PEFT from 0.20 on saves an X-LoRA without its classifier; save it with 0.18."
                .to_string()
        } else {
            format!(
                "The classifier is for {} experts that adapt {} layers.",
                prepared.experts.len(),
                prepared.plan.targets.len()
            )
        };
        return Err(AdapterError::Mismatch {
            path,
            problems,
            note,
        });
    }
    let plan = install(model, &config, prepared, values, trainable)?;
    Ok(LoadedAdapter {
        config: config.into(),
        plan,
    })
}

/// Checks all that can be checked before anything changes.
fn ready<M: Adaptable>(model: &mut M, name: &str, config: &XLoraConfig) -> Result<Prepared> {
    let refuse = |problem: &str| {
        Err(AdapterError::Choice {
            problems: vec![problem.to_string()],
        })
    };
    if place_in(model).is_none() {
        return refuse(
            "this model has no place for X-LoRA's classifier; it mixes the experts of language models",
        );
    }
    if name != DEFAULT {
        return refuse("an X-LoRA is the adapter called \"default\"; it cannot have another name");
    }
    if let Some(module) = attached(model, None) {
        return Err(AdapterError::Attached(module));
    }
    prepared(&shapes(model), config)
}

/// Weight and bias of each layer, row-major.
type LayerValues = Vec<(Vec<f32>, Vec<f32>)>;

fn install<M: Adaptable>(
    model: &mut M,
    config: &XLoraConfig,
    prepared: Prepared,
    values: LayerValues,
    trainable: bool,
) -> Result<AdapterPlan> {
    let Prepared {
        plan,
        experts,
        layers,
    } = prepared;
    for expert in &experts {
        let trained = trainable && config.use_trainable_adapters;
        if let Err(error) = load_pretrained_as(model, &expert.name, &expert.dir, trained) {
            // There was no adapter before, so this is the model as it came.
            detach(model);
            return Err(error);
        }
    }
    let device = device(model);
    let names: Arc<[String]> = experts.iter().map(|e| e.name.clone()).collect();
    let gate = XLora {
        layers: built(&layers, values, &device, trainable),
        dropout: DropoutConfig::new(config.xlora_dropout_p).init(),
        mixing: Mixing {
            config: config.clone(),
            experts: Arc::from(experts),
            names,
            layers: plan.targets.len(),
        },
        enabled: true,
    };
    if let Some(place) = place_in(model) {
        *place = Some(gate);
    }
    model.for_each_slot(&mut |name, slot| {
        let Some(place) = plan.targets.iter().position(|t| t.name == name) else {
            return;
        };
        match slot {
            Slot::Linear(linear) => linear.place = place,
            Slot::Embedding(table) => table.place = place,
            Slot::Norm(_) | Slot::Conv(_) | Slot::Param(_) => {}
        }
    });
    route(model, &Routing::to(DEFAULT));
    Ok(plan)
}

fn built(
    layers: &[(usize, usize, usize)],
    values: LayerValues,
    device: &Device,
    trainable: bool,
) -> Vec<GateLayer> {
    let place = Placement {
        device,
        trainable,
        adapter: DEFAULT,
        shared: &[],
        weight: burn::tensor::Tensor::zeros([1, 1], device).into(),
        origin: None,
    };
    layers
        .iter()
        .zip(values)
        .map(|((index, outputs, inputs), (weight, bias))| GateLayer {
            weight: place.param(&key(*index, "weight"), weight, [*outputs, *inputs]),
            bias: place.param(&key(*index, "bias"), bias, [*outputs]),
            index: *index,
        })
        .collect()
}

/// Writes the classifier and its configuration, and the experts in folders beside it where they were
/// trained too. Experts inside `dir` are named relative to it, others by their absolute path; all under
/// their numbers, the only names under which PEFT finds them.
pub(crate) fn save<M: Adaptable>(
    model: &M,
    config: &XLoraConfig,
    meta: &SaveMeta,
    dir: &Path,
) -> Result<()> {
    let Some(gate) = classifier_of(model) else {
        return Err(AdapterError::NoAdapter);
    };
    agree(&gate.mixing.config, config, dir)?;
    let mut plan = plan_of(model, gate);
    let mut config = config.clone();
    config.hidden_size = gate.layers.first().map(|layer| layer.weight.dims()[1]);
    config.adapters.clear();
    for expert in gate.mixing.experts.iter() {
        let path = if config.use_trainable_adapters {
            let at = dir.join(&expert.name);
            let form = SaveForm::Exchange;
            save_pretrained_as(model, &expert.name, &expert.config, meta, &at, form)?;
            expert.name.clone()
        } else {
            reference(&expert.dir, dir)?
        };
        config.adapters.push((expert.name.clone(), path));
    }
    let mut tensors = Vec::new();
    for (key, shape, values) in export_params_of(model, DEFAULT)? {
        if gate
            .layers
            .iter()
            .any(|l| super::key(l.index, "weight") == key || super::key(l.index, "bias") == key)
        {
            tensors.push((key, shape, values));
        }
    }
    let mut config = crate::methods::AdapterConfig::from(config);
    config.set_origin(
        meta.base_model_name_or_path.as_deref(),
        meta.revision.as_deref(),
        meta.task_type.as_deref(),
    );
    plan.targets.truncate(gate.mixing.layers);
    let card = model_card(&config, &plan, meta);
    let file = AdapterFile {
        config,
        tensors,
        made: meta.made.clone(),
    };
    file.write(dir, Some(&card))
}

/// How the expert in `from` is named in a configuration in `dir`.
fn reference(from: &Path, dir: &Path) -> Result<String> {
    let absolute = |path: &Path| {
        std::path::absolute(path).map_err(|source| AdapterError::Io {
            path: path.to_path_buf(),
            source,
        })
    };
    let from = absolute(from)?;
    let path = match from.strip_prefix(absolute(dir)?) {
        Ok(inside) if !inside.as_os_str().is_empty() => inside.to_path_buf(),
        _ => from,
    };
    Ok(path.display().to_string())
}

/// Refuses to write a configuration that is not the attached one.
fn agree(attached: &XLoraConfig, given: &XLoraConfig, dir: &Path) -> Result<()> {
    let plain = |config: &XLoraConfig| {
        let mut all = config.to_json();
        if let Some(all) = all.as_object_mut() {
            // Where the experts lie and what the file says of its origin may differ.
            for key in [
                "adapters",
                "hidden_size",
                "base_model_name_or_path",
                "revision",
                "task_type",
                "inference_mode",
            ] {
                all.remove(key);
            }
        }
        all
    };
    let (have, want) = (plain(attached), plain(given));
    let mut problems = Vec::new();
    if let (Some(have), Some(want)) = (have.as_object(), want.as_object()) {
        for (key, value) in want {
            if have.get(key) != Some(value) {
                let now = have.get(key).unwrap_or(&serde_json::Value::Null);
                problems.push(format!("{key} = {value}, and it was attached with {now}"));
            }
        }
    }
    if attached.count() != given.count() {
        problems.push(format!(
            "adapters names {} experts, and {} are attached",
            given.count(),
            attached.count()
        ));
    }
    if problems.is_empty() {
        return Ok(());
    }
    Err(AdapterError::Mismatch {
        path: dir.join(CONFIG),
        problems,
        note: "Save with the configuration that the adapter was attached with.".into(),
    })
}

/// The plan of what is attached, without reading any file again.
fn plan_of<M: Adaptable>(model: &M, gate: &XLora) -> AdapterPlan {
    let mut plan = AdapterPlan::default();
    let modules = shapes(model);
    plan.total = modules.iter().map(elements).sum();
    let own: usize = gate
        .layers
        .iter()
        .map(|l| l.weight.dims().iter().product::<usize>() + l.bias.dims()[0])
        .sum();
    plan.trainable = own;
    for expert in gate.mixing.experts.iter() {
        let Ok(of_expert) = plan_for_load(&modules, &expert.config) else {
            continue;
        };
        plan.total += of_expert.trainable;
        if gate.mixing.config.use_trainable_adapters {
            plan.trainable += of_expert.trainable;
        }
        for target in of_expert.targets {
            if !plan.targets.iter().any(|t| t.name == target.name) {
                plan.targets.push(target);
            }
        }
    }
    plan.total += own;
    plan
}
