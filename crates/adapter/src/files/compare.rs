//! What a directory's files hold against what its configuration asks for.

use std::collections::{BTreeMap, HashMap};
use std::path::Path;

use super::IsBase;
use crate::base::module_shape::ModuleKind;
use crate::base::module_shape::ModuleShape;
use crate::error::shown;
use crate::error::{AdapterError, Result};
use crate::files::store::{CONFIG, Stored, not_finite};
use crate::layers::adaptable::{Adaptable, SlotRef};
use crate::methods::{AdapterConfig, MethodConfig};
use crate::model::attach::shapes;
use crate::model::trainable::HostTensor;
use crate::plan::AdapterPlan;
use crate::plan::PREFIX;

/// Keys and shapes of every tensor of the file.
pub(crate) fn expected(
    modules: &[ModuleShape],
    config: &AdapterConfig,
    plan: &AdapterPlan,
) -> BTreeMap<String, Vec<usize>> {
    let mut all = BTreeMap::new();
    if config.trains_everything() {
        all.extend(modules.iter().flat_map(ModuleShape::parameters));
    }
    for target in &plan.targets {
        let parameters = config.parameters(target).into_iter();
        all.extend(parameters.map(|(name, shape)| (target.key(name), shape)));
    }
    for saved in &plan.saved {
        let key = |own: &str| format!("{PREFIX}{}.{own}", saved.name);
        all.insert(key("weight"), saved.shape.clone());
        if saved.bias {
            all.insert(key("bias"), saved.shape.iter().take(1).copied().collect());
        }
    }
    let shared = plan.shared.iter();
    all.extend(shared.map(|(key, shape)| ((*key).to_string(), shape.to_vec())));
    all.extend(plan.biases.iter().map(|b| (b.key.clone(), vec![b.len])));
    let tokens = plan.tokens.iter();
    all.extend(tokens.map(|t| (t.key.clone(), vec![t.indices.len(), t.width])));
    all
}

/// Refuses to write a configuration that does not describe the adapter beside it.
pub(super) fn agree<M: Adaptable>(
    model: &M,
    adapter: &str,
    config: &AdapterConfig,
    plan: &AdapterPlan,
    tensors: &[HostTensor],
    dir: &Path,
) -> Result<()> {
    let have: BTreeMap<_, _> = tensors.iter().map(|(key, shape, _)| (key, shape)).collect();
    let mut want = expected(&shapes(model), config, plan);
    want.retain(|key, _| {
        have.contains_key(key)
            || config.stores_shared()
            || !plan.shared.iter().any(|(k, _)| k == key)
    });
    let mut problems = Vec::new();
    for (key, shape) in want
        .iter()
        .filter(|(key, shape)| have.get(key) != Some(shape))
    {
        problems.push(format!("{key} {shape:?} is not what is attached"));
    }
    for (key, shape) in have.iter().filter(|(key, _)| !want.contains_key(**key)) {
        problems.push(format!("{key} {shape:?} is attached, but not asked for"));
    }
    model.for_each_slot_ref(&mut |name, slot| {
        let scale = match slot {
            SlotRef::Linear(linear) => {
                let part = linear.part(adapter).and_then(|p| p.adapter.as_ref());
                part.map(|adapter| adapter.scale())
            }
            SlotRef::Embedding(table) => {
                let part = table.part(adapter).and_then(|p| p.lora.as_ref());
                part.map(|lora| lora.scale)
            }
            SlotRef::Norm(_) | SlotRef::Conv(_) | SlotRef::Param(_) => None,
        };
        let target = plan.targets.iter().find(|t| t.name == name);
        if let (Some(scale), Some(target)) = (scale, target)
            && target.scale != scale
        {
            problems.push(format!(
                "{name} is scaled by {scale}, not by {}",
                target.scale
            ));
        }
    });
    if problems.is_empty() {
        return Ok(());
    }
    let note = "Save with the configuration that the adapter was attached with.".into();
    Err(AdapterError::Mismatch {
        path: dir.join(CONFIG),
        problems,
        note,
    })
}

/// Takes every wanted tensor out of a file as f32, or reports all that is wrong with the file.
pub(super) fn compared(
    path: &Path,
    base: (&[ModuleShape], &IsBase<'_>),
    config: &AdapterConfig,
    mut stored: BTreeMap<String, Stored>,
    want: &BTreeMap<String, Vec<usize>>,
) -> Result<HashMap<String, Vec<f32>>> {
    let mut problems = Vec::new();
    let mut found = HashMap::new();
    for (key, shape) in want {
        let Some(tensor) = stored.remove(key) else {
            problems.push(format!("{key} {shape:?} is missing"));
            continue;
        };
        if tensor.shape != *shape {
            problems.push(format!(
                "{key} is {:?} where the model and the configuration need {shape:?}",
                tensor.shape
            ));
            continue;
        }
        match tensor.values {
            None => problems.push(tensor.unreadable(key)),
            Some(values) if values.iter().any(|v| !v.is_finite()) => problems.push(not_finite(key)),
            Some(values) => {
                found.insert(key.clone(), values);
            }
        }
    }
    let strangers = stored
        .iter()
        .filter(|(key, tensor)| !is_copy_of_base(key, tensor, base));
    problems.extend(strangers.map(|(key, _)| {
        let key = shown(key);
        format!("{key} does not belong to an adapter of this configuration on this model")
    }));
    if problems.is_empty() {
        return Ok(found);
    }
    Err(AdapterError::Mismatch {
        path: path.to_path_buf(),
        problems,
        note: made_for(config),
    })
}

/// PEFT also writes base weights of embeddings and heads that are targets. They are harmless as long as
/// they are this base's.
fn is_copy_of_base(key: &str, stored: &Stored, base: (&[ModuleShape], &IsBase<'_>)) -> bool {
    let Some(name) = key
        .strip_prefix(PREFIX)
        .and_then(|k| k.strip_suffix(".weight"))
    else {
        return false;
    };
    let name = name.strip_suffix(".base_layer").unwrap_or(name);
    let (modules, is_base) = base;
    modules.iter().any(|module| {
        let may = match module.kind {
            // A head that shares the embedding's weights has no place of its own.
            ModuleKind::Embedding => name == "lm_head" || module.name == name,
            ModuleKind::Linear | ModuleKind::Head => module.name == name,
            ModuleKind::Norm | ModuleKind::Conv | ModuleKind::Param => false,
        };
        may && is_base(&module.name, stored)
    })
}

pub(crate) fn made_for(config: &AdapterConfig) -> String {
    match config.base_model_name_or_path() {
        Some(base) => {
            let base = shown(base);
            format!("The adapter says it was made for {base}: is this the same base model?")
        }
        None => "The adapter does not say which base model it was made for.".into(),
    }
}
