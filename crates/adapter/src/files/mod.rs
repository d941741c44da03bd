//! PEFT's adapter directory and a model: `adapter_config.json`, `adapter_model.safetensors`,
//! `README.md`.
#![deny(
    clippy::string_slice,
    clippy::indexing_slicing,
    clippy::arithmetic_side_effects
)]

mod compare;
pub(crate) mod exact_json;
pub(crate) mod foreign;
pub mod infer_modules;
pub mod model_card;
pub mod store;
pub(crate) mod tied;

use std::collections::{BTreeMap, HashMap};
use std::path::Path;

use crate::base::module_shape::ModuleShape;
use crate::base::routing::DEFAULT;
use crate::base::routing::check_name;
use crate::config::{Made, SaveMeta, Targets};
use crate::error::{AdapterError, Result};
use crate::files::foreign::moved;
use crate::files::model_card::model_card;
use crate::files::store::{AdapterFile, CONFIG, Stored, WEIGHTS, load_config, read_tensors};
use crate::layers::adaptable::{Adaptable, SlotRef};
use crate::methods::{AdapterConfig, InitContext, LoadedAdapter, MethodConfig};
use crate::model::attach::{SharedValues, Values, attached, install, shapes};
use crate::model::plan::plan_for_load;
use crate::model::trainable::{
    HostTensor, export_origin_of, export_params_of, export_shared_of, for_each_param_of_mut,
};
use crate::plan::AdapterPlan;

use compare::{agree, compared};
pub(crate) use compare::{expected, made_for};

/// Where an adapter that took a part of the base's weights keeps what it started from, in the form
/// that PEFT wants for `path_initial_model_for_weight_conversion`.
pub(crate) const ORIGIN: &str = "initial_adapter";

/// In what form an adapter is written that started with a part of the base's weights (PiSSA, OLoRA).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SaveForm {
    /// As plain LoRA of twice the rank, which any program loads on the untouched base.
    Exchange,
    /// As it is trained, with what it started from beside it: to go on from there.
    Resume,
}

/// Writes the model's adapter called [`DEFAULT`] as a directory that PEFT loads. Each file is complete
/// or absent, and the same adapter gives the same bytes.
///
/// # Errors
/// No adapter; a configuration that is not the adapter's; a value that is not finite; a disk that
/// refuses.
pub fn save_pretrained<M: Adaptable, C: Clone + Into<AdapterConfig>>(
    model: &M,
    cfg: &C,
    meta: &SaveMeta,
    dir: &Path,
) -> Result<()> {
    save_pretrained_as(model, DEFAULT, cfg, meta, dir, SaveForm::Exchange)
}

/// The same for the adapter called `adapter`, in either form.
pub fn save_pretrained_as<M: Adaptable, C: Clone + Into<AdapterConfig>>(
    model: &M,
    adapter: &str,
    cfg: &C,
    meta: &SaveMeta,
    dir: &Path,
    form: SaveForm,
) -> Result<()> {
    if attached(model, Some(adapter)).is_none() {
        return Err(AdapterError::NoAdapter);
    }
    let config: AdapterConfig = cfg.clone().into();
    if let Some(saved) = config.save_from_model(model, meta, dir) {
        return saved;
    }
    let config = resolved(model, adapter, config, meta);
    let mut plan = plan_for_load(&shapes(model), &config)?;
    let mut tensors = export_params_of(model, adapter)?;
    tensors.extend(
        export_shared_of(model, adapter)?
            .into_iter()
            .filter(|_| config.stores_shared()),
    );
    agree(model, adapter, &config, &plan, &tensors, dir)?;
    let origin = export_origin_of(model, adapter)?;
    let mut file = AdapterFile {
        config,
        tensors,
        made: meta.made.clone(),
    };
    match (origin, form) {
        (None, _) => {}
        (Some(origin), SaveForm::Exchange) => {
            file = with_start(file, origin);
            // What is handed over has another rank than what was trained.
            plan = plan_for_load(&shapes(model), &file.config)?;
        }
        (Some(origin), SaveForm::Resume) => {
            let start = AdapterFile {
                config: file.config.clone(),
                tensors: origin,
                made: Made::default(),
            };
            start.write(&dir.join(ORIGIN), None)?;
        }
    }
    if plan.tied {
        file.tensors.extend(tied::head(&file.tensors));
    }
    let card = model_card(&file.config, &plan, meta);
    file.write(dir, Some(&card))
}

/// Reads an adapter directory (PEFT's or ours) and attaches it as [`DEFAULT`]. Everything is checked
/// before the model is touched: each parameter must be in the file, with its shape and finite, and the
/// file must hold nothing else; all differences come in one error. `trainable` says whether the
/// parameters require gradients.
///
/// # Errors
/// See above; and an adapter that is there already.
pub fn load_pretrained<M: Adaptable>(
    model: &mut M,
    dir: &Path,
    trainable: bool,
) -> Result<LoadedAdapter> {
    load_pretrained_as(model, DEFAULT, dir, trainable)
}

/// The same under a name of its own, beside adapters that are there already, and puts it in use.
pub fn load_pretrained_as<M: Adaptable>(
    model: &mut M,
    adapter: &str,
    dir: &Path,
    trainable: bool,
) -> Result<LoadedAdapter> {
    check_name(adapter)?;
    let config = load_config(dir)?;
    if let Some(loaded) = config.load_to_model(model, adapter, dir, trainable) {
        return loaded;
    }
    if let Some(name) = attached(model, Some(adapter)) {
        return Err(AdapterError::Attached(name));
    }
    let checked = read_checked(&shapes(model), &is_base_of(model), &config, dir)?;
    let plan = checked.plan.clone();
    install_checked(model, adapter, &config, checked, trainable)?;
    Ok(LoadedAdapter { config, plan })
}

/// Attaches what has been read and checked.
pub(crate) fn install_checked<M: Adaptable>(
    model: &mut M,
    adapter: &str,
    config: &AdapterConfig,
    checked: Checked,
    trainable: bool,
) -> Result<()> {
    let Checked {
        plan,
        mut values,
        shared,
        mut origin,
    } = checked;
    install(
        model,
        adapter,
        config,
        &plan,
        trainable,
        shared,
        &mut |target, weight| {
            let keys: Vec<String> = config
                .parameters(target)
                .iter()
                .map(|(name, _)| target.key(name))
                .collect();
            let take = |from: &mut HashMap<String, Vec<f32>>| {
                let taken = keys.iter().map(|key| from.remove(key).unwrap_or_default());
                taken.collect::<Vec<_>>()
            };
            let origin = match (&mut origin, config.subtracts_initial()) {
                (_, false) => None,
                (Some(origin), true) => Some(take(origin)),
                // The decomposition depends on nothing but the weight.
                (None, true) => Some(config.initial(
                    target,
                    &InitContext {
                        seed: 0,
                        weight,
                        given: None,
                    },
                )?),
            };
            Ok(Values {
                values: take(&mut values),
                origin,
            })
        },
    )?;
    // What is left are trained copies, biases and rows, which `install` has started from the base.
    for_each_param_of_mut(model, adapter, &mut |key, mut param| {
        if let Some(values) = values.remove(key) {
            param.write(values);
        }
    });
    Ok(())
}

/// Replaces the values of the adapter called `adapter` by those in `dir`, without touching the base:
/// PEFT's `hotswap_adapter`. The configuration must be the same up to what does not change a layer's
/// shape or arithmetic.
///
/// # Errors
/// As for loading; another method, rank, scale or set of modules. Then the old values stay.
pub fn hotswap<M: Adaptable>(model: &mut M, adapter: &str, dir: &Path) -> Result<LoadedAdapter> {
    let have = export_params_of(model, adapter)?;
    if have.is_empty() {
        return Err(AdapterError::NoAdapter);
    }
    crate::model::active::refuse_merged(model)?;
    let config = load_config(dir)?;
    if config.is_of_model() {
        return Err(AdapterError::Choice {
            problems: vec![format!(
                "an adapter of type {} cannot be exchanged in place; detach it and load the other",
                config.peft_type()
            )],
        });
    }
    if config.subtracts_initial() || export_origin_of(model, adapter)?.is_some() {
        return Err(AdapterError::Choice {
            problems: vec![
                "an adapter that took over a part of the base (PiSSA, OLoRA) cannot be exchanged in place; \
                 delete it and load the other"
                    .into(),
            ],
        });
    }
    let checked = read_checked(&shapes(model), &is_base_of(model), &config, dir)?;
    let (plan, mut values) = (checked.plan, checked.values);
    let shared = export_shared_of(model, adapter)?;
    let same = |(key, shape, values): &(&'static str, [usize; 2], Vec<f32>)| {
        shared
            .iter()
            .any(|(k, s, v)| k == key && s == shape && v == values)
    };
    if let Some((key, ..)) = checked.shared.iter().find(|shared| !same(shared)) {
        return Err(AdapterError::Mismatch {
            path: dir.join(WEIGHTS),
            problems: vec![format!(
                "{key} is another matrix than the one that is attached"
            )],
            note: "Delete the adapter and load the other.".into(),
        });
    }
    let tensors: Vec<HostTensor> = have
        .iter()
        .filter_map(|(key, shape, _)| {
            let values = values.remove(key)?;
            Some((key.clone(), shape.clone(), values))
        })
        .collect();
    let mut all = have;
    all.extend(shared.into_iter().filter(|_| config.stores_shared()));
    agree(model, adapter, &config, &plan, &all, dir)?;
    let mut new: HashMap<String, Vec<f32>> = tensors.into_iter().map(|(k, _, v)| (k, v)).collect();
    for_each_param_of_mut(model, adapter, &mut |key, mut param| {
        if let Some(values) = new.remove(key) {
            param.write(values);
        }
    });
    Ok(LoadedAdapter { config, plan })
}

/// An adapter's values by key, read and checked against a model's modules.
#[derive(Clone, Debug)]
pub(crate) struct Checked {
    pub plan: AdapterPlan,
    pub values: HashMap<String, Vec<f32>>,
    pub shared: SharedValues,
    /// What factors that were taken from the base started from, where the directory has it.
    pub origin: Option<HashMap<String, Vec<f32>>>,
}

/// Whether a tensor is the named module's weight in the base.
pub(crate) type IsBase<'a> = dyn Fn(&str, &Stored) -> bool + 'a;

/// The same for a model that is there.
fn is_base_of<M: Adaptable>(model: &M) -> impl Fn(&str, &Stored) -> bool + '_ {
    |module, stored| {
        let Some(values) = &stored.values else {
            return false;
        };
        let mut same = false;
        model.for_each_slot_ref(&mut |name, slot| {
            let base = match slot {
                _ if name != module => return,
                SlotRef::Linear(linear) => &linear.weight,
                SlotRef::Embedding(table) => &table.weight,
                SlotRef::Norm(_) | SlotRef::Conv(_) | SlotRef::Param(_) => return,
            };
            let held = crate::base::to_host(name, base.dense()).unwrap_or_default();
            same = stored.is_rounded(&held, values)
                || crate::base::base_param::are_rounded(values, base, &held);
        });
        same
    }
}

/// Reads a directory and checks it against a model's modules; all differences come in one error.
pub(crate) fn read_checked(
    modules: &[ModuleShape],
    is_base: &IsBase<'_>,
    config: &AdapterConfig,
    dir: &Path,
) -> Result<Checked> {
    let mut stored = placed(read_tensors(dir, config)?.tensors, modules);
    let plan = plan_for_load(modules, config).map_err(|error| match error {
        AdapterError::Plan { problems } => AdapterError::Mismatch {
            path: dir.join(CONFIG),
            problems,
            note: made_for(config),
        },
        other => other,
    })?;
    if plan.tied {
        tied::take_head(&mut stored).map_err(|problems| AdapterError::Mismatch {
            path: dir.join(WEIGHTS),
            problems,
            note: made_for(config),
        })?;
    }
    let mut want = expected(modules, config, &plan);
    // Without them in the file, their own generator makes them again.
    let absent = |key: &str| !config.stores_shared() && !stored.contains_key(key);
    want.retain(|key, _| !(plan.shared.iter().any(|(k, _)| k == key) && absent(key)));
    let mut values = compared(
        &dir.join(WEIGHTS),
        (modules, is_base),
        config,
        stored,
        &want,
    )?;
    let mut made = config.initial_shared(&plan.shared).into_iter();
    let shared = plan.shared.iter().map(|(key, shape)| {
        let made = made.next().unwrap_or_default();
        (*key, *shape, values.remove(*key).unwrap_or(made))
    });
    let shared = shared.collect();
    let start = dir.join(ORIGIN);
    let origin = match (config.subtracts_initial(), start.join(WEIGHTS).exists()) {
        (false, _) => None,
        (true, true) => {
            let stored = read_tensors(&start, config)?.tensors;
            // An embedding's factors take nothing from it.
            let factors: BTreeMap<_, _> = plan
                .targets
                .iter()
                .filter(|target| !target.embedding)
                .flat_map(|target| {
                    let parameters = config.parameters(target).into_iter();
                    parameters.map(|(name, shape)| (target.key(name), shape))
                })
                .collect();
            let path = start.join(WEIGHTS);
            Some(compared(
                &path,
                (modules, is_base),
                config,
                stored,
                &factors,
            )?)
        }
        (true, false) => {
            refuse_unknown_start(config, dir)?;
            None
        }
    };
    Ok(Checked {
        plan,
        values,
        shared,
        origin,
    })
}

/// The adapter for programs that know nothing of what it took from the base.
pub(crate) fn with_start(file: AdapterFile, origin: Vec<HostTensor>) -> AdapterFile {
    let origin = origin.into_iter().map(|(key, _, values)| (key, values));
    let (config, tensors) = file.config.with_start(file.tensors, origin.collect());
    AdapterFile {
        config,
        tensors,
        ..file
    }
}

/// Tensors under the keys that they have for a model of these modules.
fn placed(stored: BTreeMap<String, Stored>, modules: &[ModuleShape]) -> BTreeMap<String, Stored> {
    let mut placed = BTreeMap::new();
    let mut moving = Vec::new();
    for (key, tensor) in stored {
        match moved(&key, modules) {
            Some(to) => moving.push((key, to, tensor)),
            None => drop(placed.insert(key, tensor)),
        }
    }
    for (key, to, tensor) in moving {
        // Where both are there, the one that is not wanted is told by its own name.
        let key = if placed.contains_key(&to) { key } else { to };
        placed.insert(key, tensor);
    }
    placed
}

/// What cannot be worked out again has to be there.
fn refuse_unknown_start(config: &AdapterConfig, dir: &Path) -> Result<()> {
    let Some(taken) = config.start_is_lost() else {
        return Ok(());
    };
    Err(AdapterError::Format {
        path: dir.join(CONFIG),
        reason: format!(
            "{taken}, and {ORIGIN}/ with it is not there; write the adapter from PEFT with save_pretrained(.., \
             path_initial_model_for_weight_conversion=..)"
        ),
    })
}

/// The configuration as it is written: for this base, and with the modules by name, as PEFT does it.
fn resolved<M: Adaptable>(
    model: &M,
    adapter: &str,
    mut config: AdapterConfig,
    meta: &SaveMeta,
) -> AdapterConfig {
    config.set_origin(
        meta.base_model_name_or_path.as_deref(),
        meta.revision.as_deref(),
        meta.task_type.as_deref(),
    );
    let mut transposed = false;
    model.for_each_slot_ref(&mut |_, slot| {
        if let SlotRef::Linear(linear) = slot {
            let adapted = linear.part(adapter).is_some_and(|p| p.adapter.is_some());
            transposed |= linear.transposed && adapted;
        }
    });
    if transposed {
        config.set_fan_in_fan_out();
    }
    let selection = config.selection();
    let names = match selection.target {
        None => Some(selection.default.iter().map(|n| (*n).to_string()).collect()),
        Some(Targets::AllLinear) => {
            let mut names = Vec::new();
            model.for_each_slot_ref(&mut |name, slot| {
                if let SlotRef::Linear(linear) = slot
                    && linear.part(adapter).is_some_and(|p| p.adapter.is_some())
                {
                    names.push(name.to_string());
                }
            });
            Some(names)
        }
        Some(_) => None,
    };
    if let Some(names) = names {
        config.set_targets(Targets::List(names));
    }
    config
}

#[cfg(test)]
mod tests;
