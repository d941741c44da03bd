//! What an adapter's directory says by itself, wrong or not; and writing one without its model.
#![deny(
    clippy::string_slice,
    clippy::indexing_slicing,
    clippy::arithmetic_side_effects
)]

use std::path::Path;

use crate::base::module_shape::ModuleShape;
use crate::config::SaveMeta;
use crate::config::{Pattern, Targets};
use crate::error::{AdapterError, Result};
use crate::files::expected;
use crate::files::foreign::MLX_WEIGHTS;
use crate::files::infer_modules::{kind_of, modules_of};
use crate::files::model_card::model_card;
use crate::files::store::{AdapterFile, CONFIG, Stored, WEIGHTS, load_config, read_tensors};
use crate::files::tied::take_head_if_tied;
use crate::methods::AdapterConfig;
use crate::methods::facts::InputWidth;
use crate::model::plan::plan_for_load;
use crate::offline::{AdapterOnDisk, ReadBase};
use crate::plan::AdapterPlan;
use crate::plan::PREFIX;
use crate::staging::{self, StagedDir};

/// One tensor of an adapter's file.
#[derive(Clone, Debug, PartialEq)]
pub struct TensorFacts {
    /// Its key.
    pub key: String,
    /// Its shape.
    pub shape: Vec<usize>,
    /// Its type in the file, as safetensors spells it.
    pub dtype: String,
    /// Whether all values are zero.
    pub zero: bool,
    /// How many values are NaN or infinite.
    pub not_finite: usize,
}

/// All that an adapter's two files say without the base.
#[derive(Clone, Debug)]
pub struct AdapterFacts {
    /// The configuration.
    pub config: AdapterConfig,
    /// Every tensor, by key.
    pub tensors: Vec<TensorFacts>,
    /// The modules that the tensors are for.
    pub modules: Vec<ModuleShape>,
    /// What the configuration makes of these modules; nothing where it does not fit them.
    pub plan: Option<AdapterPlan>,
    /// What is missing, superfluous, misshapen or not a number.
    pub problems: Vec<String>,
    /// Bytes of both files.
    pub bytes: u64,
}

impl AdapterFacts {
    /// Reads a directory. A tensor that does not fit is a line among the problems, not an error.
    ///
    /// # Errors
    /// Files that are missing, damaged or for another method.
    pub fn read(dir: &Path) -> Result<Self> {
        let config = load_config(dir)?;
        let mut stored = read_tensors(dir, &config)?.tensors;
        take_head_if_tied(&config, &mut stored);
        let shapes: Vec<_> = stored
            .iter()
            .map(|(k, s)| (k.as_str(), s.shape.as_slice()))
            .collect();
        let modules = modules_of(&config, &shapes);
        let mut problems = Vec::new();
        let plan = match plan_for_load(&modules, &config) {
            Ok(plan) => Some(plan),
            Err(
                AdapterError::Plan { problems: all } | AdapterError::Config { problems: all, .. },
            ) => {
                problems.extend(all);
                None
            }
            Err(other) => return Err(other),
        };
        if let Some(plan) = &plan {
            let want = expected(&modules, &config, plan);
            for (key, shape) in &want {
                let made_anew = !crate::methods::MethodConfig::stores_shared(&config)
                    && plan.shared.iter().any(|(k, _)| k == key);
                match stored.get(key) {
                    None if !made_anew => problems.push(format!("{key} is missing")),
                    Some(tensor) if tensor.shape != *shape => problems.push(format!(
                        "{key} is {:?} where the configuration asks for {shape:?}",
                        tensor.shape
                    )),
                    _ => {}
                }
            }
            let strange = |key: &&String| !want.contains_key(*key) && !may_be_base(key, &modules);
            problems.extend(
                stored
                    .keys()
                    .filter(strange)
                    .map(|key| format!("{key} is not called for by the configuration")),
            );
        }
        let tensors: Vec<TensorFacts> =
            stored.iter().map(|(key, s)| tensor_facts(key, s)).collect();
        for tensor in &tensors {
            if tensor.not_finite > 0 {
                problems.push(format!(
                    "{} holds {} values that are NaN or infinite",
                    tensor.key, tensor.not_finite
                ));
            }
        }
        for (key, tensor) in stored.iter().filter(|(_, tensor)| tensor.values.is_none()) {
            problems.push(tensor.unreadable(key));
        }
        let weights = match dir.join(WEIGHTS).exists() {
            true => WEIGHTS,
            false => MLX_WEIGHTS,
        };
        let size = |name: &str| std::fs::metadata(dir.join(name)).map_or(0, |meta| meta.len());
        Ok(Self {
            config,
            tensors,
            modules,
            plan,
            problems,
            bytes: size(CONFIG).saturating_add(size(weights)),
        })
    }

    /// The settings that differ from PEFT's defaults: key, value, default, as in the file. What every file
    /// says of its base and of the program that wrote it is left out.
    pub fn settings(&self) -> Vec<(String, serde_json::Value, serde_json::Value)> {
        const ABOUT: [&str; 8] = [
            "peft_type",
            "peft_version",
            "base_model_name_or_path",
            "revision",
            "task_type",
            "inference_mode",
            "auto_mapping",
            "target_modules",
        ];
        let kind = serde_json::json!({ "peft_type": self.config.peft_type() });
        let default = AdapterConfig::from_json(&kind, "default").map(|config| config.to_json());
        let default = default.unwrap_or_default();
        let of_default = |key: &str| default.get(key).unwrap_or(&serde_json::Value::Null);
        let own = self.config.to_json();
        let own = own.as_object().into_iter().flatten();
        let differs = own.filter(|(key, value)| {
            let same = match of_default(key) {
                // Older and newer versions write more keys than these; those switched off say nothing.
                serde_json::Value::Null => !crate::config::fields::asks(value),
                default => default == *value,
            };
            !same && !ABOUT.contains(&key.as_str())
        });
        let lines =
            differs.map(|(key, value)| (key.clone(), value.clone(), of_default(key).clone()));
        lines.collect()
    }
}

fn tensor_facts(key: &str, stored: &Stored) -> TensorFacts {
    let values = stored.values.as_deref().unwrap_or_default();
    TensorFacts {
        key: key.to_string(),
        shape: stored.shape.clone(),
        dtype: format!("{:?}", stored.dtype),
        zero: !values.is_empty() && values.iter().all(|v| *v == 0.0),
        not_finite: values.iter().filter(|v| !v.is_finite()).count(),
    }
}

/// PEFT stores weights of the base along where embeddings or heads are targets.
fn may_be_base(key: &str, modules: &[ModuleShape]) -> bool {
    let name = key
        .strip_prefix(PREFIX)
        .and_then(|k| k.strip_suffix(".weight"));
    name.is_some_and(|name| {
        let name = name.strip_suffix(".base_layer").unwrap_or(name);
        modules.iter().any(|m| m.name == name)
            && ["embed_tokens", "lm_head"].contains(&kind_of(name))
    })
}

/// Reads an adapter for the modules that its own tensors tell of, or for those of a model.
///
/// # Errors
/// As [`AdapterOnDisk::read`]; an adapter whose tensors do not say how wide its modules are, where `modules` is not
/// given.
pub fn open(
    dir: &Path,
    modules: Option<&[ModuleShape]>,
    base: Option<&ReadBase<'_>>,
) -> Result<AdapterOnDisk> {
    if let Some(modules) = modules {
        return AdapterOnDisk::read(dir, modules, base);
    }
    let facts = AdapterFacts::read(dir)?;
    let mut kinds: Vec<&str> = facts.modules.iter().map(|m| kind_of(&m.name)).collect();
    kinds.sort_unstable();
    kinds.dedup();
    let stored = |key: &str| facts.tensors.iter().any(|t| t.key == key);
    let told = match facts.config.input_width() {
        InputWidth::Told => true,
        InputWidth::Shared => {
            kinds.len() <= 1 && facts.config.shared_keys().iter().all(|k| stored(k))
        }
        InputWidth::Untold => false,
    };
    if !told {
        return Err(AdapterError::Choice {
            problems: vec![format!(
                "{}: a {} adapter does not say how wide its modules ({}) are; name the base with --model",
                dir.display(),
                facts.config.label(),
                kinds.join(", ")
            )],
        });
    }
    AdapterOnDisk::read(dir, &facts.modules, None)
}

/// The targets of several configurations as one (PEFT's `_check_add_weighted_adapter`).
///
/// # Errors
/// Lists of names and patterns together.
pub fn joined_targets(all: &[(&str, Option<&Targets>)]) -> std::result::Result<Targets, String> {
    let mut names: Vec<String> = Vec::new();
    let mut patterns: Vec<String> = Vec::new();
    for (_, targets) in all {
        match targets {
            Some(Targets::List(list)) => names.extend(list.iter().cloned()),
            None => names.extend(
                crate::plan::target::DEFAULT_TARGETS
                    .iter()
                    .map(|n| (*n).to_string()),
            ),
            Some(Targets::Regex(pattern)) => patterns.push(format!("({pattern})")),
            Some(Targets::AllLinear) => return Ok(Targets::AllLinear),
            Some(Targets::Nothing) => {}
        }
    }
    match (names.is_empty(), patterns.is_empty()) {
        (false, false) => Err(
            "target_modules is a list of names in some adapters and a pattern in others, which PEFT does not \
             combine; write the pattern as a list of names"
                .to_string(),
        ),
        (true, false) => Ok(Targets::Regex(patterns.join("|"))),
        _ => {
            names.sort();
            names.dedup();
            Ok(Targets::List(names))
        }
    }
}

/// Names the modules of a LoRA configuration so that it means exactly `targets`, among `modules`: as they
/// are named, or by their full names where that would match others, too.
pub fn name_targets(
    config: &mut crate::methods::lora::config::LoraConfig,
    modules: &[ModuleShape],
    targets: &[&str],
) {
    let meant =
        |config: &crate::methods::lora::config::LoraConfig| match plan_for_load(modules, config) {
            Ok(plan) => plan
                .targets
                .iter()
                .map(|t| t.name.as_str())
                .eq(targets.iter().copied()),
            Err(_) => false,
        };
    // `all-linear` would mean other modules on another base.
    if config.target_modules != Some(Targets::AllLinear) && meant(config) {
        return;
    }
    config.target_modules = Some(Targets::List(
        targets.iter().map(|t| (*t).to_string()).collect(),
    ));
    config.exclude_modules = None;
    config.layers_to_transform = None;
    config.layers_pattern = None;
}

/// The commonest value as the rule, and a pattern for the modules that differ.
pub fn patterned<T: Copy + Ord>(of_modules: &[(&str, T)]) -> Option<(T, Pattern<T>)> {
    let mut counts = std::collections::BTreeMap::new();
    for (_, value) in of_modules {
        let count = counts.entry(*value).or_insert(0_usize);
        *count = count.saturating_add(1);
    }
    let (rule, _) = counts.into_iter().max_by_key(|(_, count)| *count)?;
    let differ = of_modules.iter().filter(|(_, value)| *value != rule);
    let pattern = differ
        .map(|(name, value)| ((*name).to_string(), *value))
        .collect();
    Some((rule, pattern))
}

/// Writes an adapter for a model of these modules, with a card that ends in `extra`. The directory is
/// complete or absent.
///
/// # Errors
/// Tensors that are not those of the configuration; values that are not finite; a directory that is there
/// already; a disk that refuses.
pub fn write_new(
    file: &AdapterFile,
    modules: &[ModuleShape],
    extra: String,
    dir: &Path,
) -> Result<()> {
    let plan = plan_for_load(modules, &file.config)?;
    let want = expected(modules, &file.config, &plan);
    let have = file.tensors.iter().map(|(key, shape, _)| (key, shape));
    if !want.iter().eq(have) {
        let differs = file
            .tensors
            .iter()
            .filter(|(key, shape, _)| want.get(key) != Some(shape));
        let mut problems: Vec<String> = differs
            .map(|(key, shape, _)| format!("{key} {shape:?} is not called for"))
            .collect();
        let missing = want
            .keys()
            .filter(|key| !file.tensors.iter().any(|(k, ..)| k == *key));
        problems.extend(missing.map(|key| format!("{key} is missing")));
        return Err(AdapterError::Mismatch {
            path: dir.to_path_buf(),
            problems,
            note: "The adapter was not written.".into(),
        });
    }
    let meta = SaveMeta {
        extra_readme: Some(extra),
        ..SaveMeta::default()
    };
    let unknown_total = AdapterPlan { total: 0, ..plan };
    let card = model_card(&file.config, &unknown_total, &meta);
    let io = |path: &Path| {
        let path = path.to_path_buf();
        move |source| AdapterError::Io { path, source }
    };
    let staged = StagedDir::beside(dir).map_err(io(staging::parent(dir)))?;
    file.write(staged.path(), Some(&card))?;
    // Onto an empty folder or none; one that holds something refuses.
    staged.finish(dir).map_err(io(dir))?;
    Ok(())
}
