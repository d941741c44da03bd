//! PEFT's adapter directory: `adapter_config.json`, `adapter_model.safetensors`, `README.md`.

use std::collections::{BTreeMap, HashMap};
use std::fs::File;
use std::io::Write;
use std::path::Path;

use half::{bf16, f16};
use safetensors::tensor::{Dtype, SafeTensors, TensorView};
use serde_json::Value;

use crate::attach::{attached, install, shapes};
use crate::config::{LoraConfig, Targets};
use crate::error::{AdapterError, Result};
use crate::linear::Linear;
use crate::methods::MethodConfig;
use crate::model_card::{SaveMeta, model_card};
use crate::plan::{AdapterPlan, PREFIX, plan_for_load};
use crate::slot::{Adaptable, SlotRef};
use crate::target::DEFAULT_TARGETS;
use crate::trainable::{HostTensor, export_trainable, for_each_trainable_mut};

const CONFIG: &str = "adapter_config.json";
const WEIGHTS: &str = "adapter_model.safetensors";
const PICKLE: &str = "adapter_model.bin";

/// An adapter that has been read and attached.
#[derive(Clone, Debug)]
pub struct LoadedAdapter {
    /// Its configuration, as in the file.
    pub config: LoraConfig,
    /// What was attached.
    pub plan: AdapterPlan,
}

/// Writes the model's adapter as a directory that PEFT loads. Each file is complete or absent, and the
/// same adapter gives the same bytes.
pub fn save_pretrained<M: Adaptable>(
    model: &M,
    cfg: &LoraConfig,
    meta: &SaveMeta,
    dir: &Path,
) -> Result<()> {
    if attached(model).is_none() {
        return Err(AdapterError::NoAdapter);
    }
    let config = resolved(model, cfg, meta);
    let plan = plan_for_load(&shapes(model), &config)?;
    let tensors = export_trainable(model)?;
    agree(model, &config, &plan, &tensors, dir)?;
    if let Some((key, ..)) = tensors
        .iter()
        .find(|(_, _, values)| values.iter().any(|v| !v.is_finite()))
    {
        return Err(AdapterError::NonFinite(key.clone()));
    }
    let weights = dir.join(WEIGHTS);
    let bytes = serialize(&tensors).map_err(|e| AdapterError::Format {
        path: weights.clone(),
        reason: e.to_string(),
    })?;
    let mut json =
        serde_json::to_string_pretty(&config.to_json()).map_err(|e| AdapterError::Format {
            path: dir.join(CONFIG),
            reason: e.to_string(),
        })?;
    json.push('\n');
    std::fs::create_dir_all(dir).map_err(|source| AdapterError::Io {
        path: dir.to_path_buf(),
        source,
    })?;
    // The configuration last: without it nothing takes the directory for an adapter.
    write(&weights, &bytes)?;
    write(
        &dir.join("README.md"),
        model_card(&config, &plan, meta).as_bytes(),
    )?;
    write(&dir.join(CONFIG), json.as_bytes())
}

/// Reads `adapter_config.json`; what is not supported is refused by name.
pub fn load_config(dir: &Path) -> Result<LoraConfig> {
    let path = dir.join(CONFIG);
    let text = std::fs::read_to_string(&path).map_err(|e| unreadable(&path, e))?;
    let value: Value = serde_json::from_str(&text).map_err(|e| AdapterError::Format {
        path: path.clone(),
        reason: format!("not JSON: {e}"),
    })?;
    LoraConfig::from_json(&value, &path.display().to_string())
}

/// Reads an adapter directory (PEFT's or ours) and attaches it. Everything is checked before the model
/// is touched: each parameter must be in the file, with its shape and finite, and the file must hold
/// nothing else; all differences come in one error. `trainable` says whether the parameters require
/// gradients.
pub fn load_pretrained<M: Adaptable>(
    model: &mut M,
    dir: &Path,
    trainable: bool,
) -> Result<LoadedAdapter> {
    let config = load_config(dir)?;
    if let Some(name) = attached(model) {
        return Err(AdapterError::Attached(name));
    }
    let weights = dir.join(WEIGHTS);
    if !weights.exists() && dir.join(PICKLE).exists() {
        return Err(AdapterError::Pickle(dir.to_path_buf()));
    }
    let plan = plan_for_load(&shapes(model), &config).map_err(|error| match error {
        AdapterError::Plan { problems } => AdapterError::Mismatch {
            path: dir.join(CONFIG),
            problems,
            note: made_for(&config),
        },
        other => other,
    })?;
    let mut values = read_weights(&weights, model, &config, &plan)?;
    install(model, &config, &plan, trainable, &mut |target, name| {
        values.remove(&target.key(name)).unwrap_or_default()
    })?;
    // What is left are the trained copies, which `install` has started from the base.
    for_each_trainable_mut(model, &mut |key, mut param| {
        if let Some(values) = values.remove(key) {
            param.write(values);
        }
    });
    Ok(LoadedAdapter { config, plan })
}

/// The configuration as it is written: for this base, and with the modules by name, as PEFT does it.
fn resolved<M: Adaptable>(model: &M, cfg: &LoraConfig, meta: &SaveMeta) -> LoraConfig {
    let mut config = cfg.clone();
    let set = |field: &mut Option<String>, value: &Option<String>| {
        if value.is_some() {
            field.clone_from(value);
        }
    };
    set(
        &mut config.base_model_name_or_path,
        &meta.base_model_name_or_path,
    );
    set(&mut config.revision, &meta.revision);
    set(&mut config.task_type, &meta.task_type);
    config
        .other
        .insert("inference_mode".into(), Value::Bool(true));
    match config.target_modules {
        None => {
            config.target_modules = Some(Targets::List(DEFAULT_TARGETS.map(String::from).to_vec()))
        }
        Some(Targets::AllLinear) => {
            let mut names = Vec::new();
            model.for_each_slot_ref(&mut |name, slot| {
                if matches!(slot, SlotRef::Linear(linear) if linear.adapter.is_some()) {
                    names.push(name.to_string());
                }
            });
            config.target_modules = Some(Targets::List(names));
        }
        Some(_) => {}
    }
    config
}

/// A file that an adapter directory must have.
fn unreadable(path: &Path, source: std::io::Error) -> AdapterError {
    let path = path.to_path_buf();
    match source.kind() {
        std::io::ErrorKind::NotFound => AdapterError::Format {
            path,
            reason: "there is no such file; an adapter directory has adapter_config.json and \
                     adapter_model.safetensors"
                .into(),
        },
        _ => AdapterError::Io { path, source },
    }
}

/// Keys and shapes of every tensor of the file.
fn expected<C: MethodConfig>(config: &C, plan: &AdapterPlan) -> BTreeMap<String, Vec<usize>> {
    let mut all = BTreeMap::new();
    for target in &plan.targets {
        all.extend(
            config
                .parameters(target)
                .into_iter()
                .map(|(name, shape)| (target.key(name), shape)),
        );
    }
    for saved in &plan.saved {
        all.insert(
            format!("{PREFIX}{}.weight", saved.name),
            saved.shape.clone(),
        );
        if saved.bias {
            all.insert(
                format!("{PREFIX}{}.bias", saved.name),
                saved.shape[..1].to_vec(),
            );
        }
    }
    all
}

/// Refuses to write a configuration that does not describe the adapter beside it.
fn agree<M: Adaptable>(
    model: &M,
    config: &LoraConfig,
    plan: &AdapterPlan,
    tensors: &[HostTensor],
    dir: &Path,
) -> Result<()> {
    let have: BTreeMap<_, _> = tensors.iter().map(|(key, shape, _)| (key, shape)).collect();
    let want = expected(config, plan);
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
        let SlotRef::Linear(Linear {
            adapter: Some(adapter),
            ..
        }) = slot
        else {
            return;
        };
        let target = plan.targets.iter().find(|t| t.name == name);
        if let Some(target) = target.filter(|t| t.scale != adapter.scale()) {
            problems.push(format!(
                "{name} is scaled by {}, not by {}",
                adapter.scale(),
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

fn serialize(tensors: &[HostTensor]) -> std::result::Result<Vec<u8>, safetensors::SafeTensorError> {
    let bytes = |values: &[f32]| {
        values
            .iter()
            .flat_map(|v| v.to_le_bytes())
            .collect::<Vec<u8>>()
    };
    let raw: Vec<_> = tensors
        .iter()
        .map(|(key, shape, values)| (key, shape, bytes(values)))
        .collect();
    let mut views = Vec::with_capacity(raw.len());
    for (key, shape, bytes) in &raw {
        views.push((
            key.as_str(),
            TensorView::new(Dtype::F32, shape.to_vec(), bytes)?,
        ));
    }
    // Tensors are sorted by name on the way out. Transformers wants to know who wrote the file.
    safetensors::serialize(
        views,
        Some(HashMap::from([("format".to_string(), "pt".to_string())])),
    )
}

fn write(path: &Path, bytes: &[u8]) -> Result<()> {
    let io = |source| AdapterError::Io {
        path: path.to_path_buf(),
        source,
    };
    let mut builder = tempfile::Builder::new();
    #[cfg(unix)]
    {
        // As an ordinary file; a temporary one would be its owner's alone.
        use std::os::unix::fs::PermissionsExt;
        builder.permissions(std::fs::Permissions::from_mode(0o666));
    }
    let mut file = builder
        .tempfile_in(path.parent().unwrap_or(Path::new(".")))
        .map_err(io)?;
    file.write_all(bytes).map_err(io)?;
    file.as_file().sync_all().map_err(io)?;
    file.persist(path).map_err(|e| io(e.error))?;
    Ok(())
}

/// Reads every tensor of the plan as f32, or reports all that is wrong with the file.
fn read_weights<M: Adaptable>(
    path: &Path,
    model: &M,
    config: &LoraConfig,
    plan: &AdapterPlan,
) -> Result<HashMap<String, Vec<f32>>> {
    let format = |reason: String| AdapterError::Format {
        path: path.to_path_buf(),
        reason,
    };
    let io = |source| AdapterError::Io {
        path: path.to_path_buf(),
        source,
    };
    let file = File::open(path).map_err(|e| unreadable(path, e))?;
    if file.metadata().map_err(io)?.len() == 0 {
        return Err(format("the file is empty".into()));
    }
    // SAFETY: the map is only read, and dropped before this function returns; a file that another
    // process cuts short meanwhile is the one case that cannot be guarded against.
    let map = unsafe { memmap2::Mmap::map(&file) }.map_err(io)?;
    // Checks that the header fits the file and that the tensors cover it without gap or overlap.
    let file = SafeTensors::deserialize(&map).map_err(|e| {
        format(format!(
            "not a whole safetensors file ({e}); copy or download it again"
        ))
    })?;
    let mut problems = Vec::new();
    let mut values = HashMap::new();
    let want = expected(config, plan);
    for (key, shape) in &want {
        match file.tensor(key) {
            Err(_) => problems.push(format!("{key} {shape:?} is missing")),
            Ok(view) if view.shape() != shape.as_slice() => {
                problems.push(format!(
                    "{key} is {:?} where the model and r need {shape:?}",
                    view.shape()
                ));
            }
            Ok(view) => match decode(&view) {
                None => problems.push(format!(
                    "{key} is {:?}; only F32, F16 and BF16 are read",
                    view.dtype()
                )),
                Some(read) if read.iter().any(|v| !v.is_finite()) => {
                    problems.push(format!("{key} holds a value that is not finite"));
                }
                Some(read) => {
                    values.insert(key.clone(), read);
                }
            },
        }
    }
    let mut names = file.names();
    names.sort_unstable();
    for key in names.into_iter().filter(|key| !want.contains_key(*key)) {
        if !file
            .tensor(key)
            .is_ok_and(|view| is_copy_of_base(key, &view, model))
        {
            problems.push(format!(
                "{key} does not belong to an adapter of this configuration on this model"
            ));
        }
    }
    if problems.is_empty() {
        return Ok(values);
    }
    Err(AdapterError::Mismatch {
        path: path.to_path_buf(),
        problems,
        note: made_for(config),
    })
}

/// PEFT also writes base weights of embeddings and heads that are targets. They are harmless as long as
/// they are this base's.
fn is_copy_of_base<M: Adaptable>(key: &str, view: &TensorView<'_>, model: &M) -> bool {
    let Some(name) = key
        .strip_prefix(PREFIX)
        .and_then(|k| k.strip_suffix(".weight"))
    else {
        return false;
    };
    let name = name.strip_suffix(".base_layer").unwrap_or(name);
    let Some(stored) = decode(view) else {
        return false;
    };
    let mut same = false;
    model.for_each_slot_ref(&mut |slot_name, slot| {
        let base = match slot {
            _ if slot_name != name => return,
            SlotRef::Linear(linear) => &linear.weight,
            SlotRef::Embedding(table) => &table.weight,
            SlotRef::Norm(_) => return,
        };
        let base = crate::methods::to_host(key, base.val()).unwrap_or_default();
        let rounded = |v: f32| match view.dtype() {
            Dtype::F16 => f16::from_f32(v).to_f32(),
            Dtype::BF16 => bf16::from_f32(v).to_f32(),
            _ => v,
        };
        same =
            base.len() == stored.len() && base.iter().zip(&stored).all(|(b, s)| rounded(*b) == *s);
    });
    same
}

fn decode(view: &TensorView<'_>) -> Option<Vec<f32>> {
    let data = view.data();
    let halves = || data.chunks_exact(2).map(|b| [b[0], b[1]]);
    Some(match view.dtype() {
        Dtype::F32 => data
            .chunks_exact(4)
            .map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]]))
            .collect(),
        Dtype::F16 => halves().map(|b| f16::from_le_bytes(b).to_f32()).collect(),
        Dtype::BF16 => halves().map(|b| bf16::from_le_bytes(b).to_f32()).collect(),
        _ => return None,
    })
}

fn made_for(config: &LoraConfig) -> String {
    match &config.base_model_name_or_path {
        Some(base) => {
            format!("The adapter says it was made for {base}: is this the same base model?")
        }
        None => "The adapter does not say which base model it was made for.".into(),
    }
}

#[cfg(test)]
mod tests;
