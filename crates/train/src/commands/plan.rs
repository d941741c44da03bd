//! `enamel plan`: everything a recipe comes to, with nothing large in memory.

use std::collections::BTreeMap;
use std::fmt;
use std::path::Path;

use enamel_adapter::{AdapterConfig, AdapterPlan, ModuleShape};
use enamel_data::{Note, Row};
use enamel_model::ArchConfig;
use enamel_model::arch::described_modules;
use enamel_model::checkpoint::parse_json;
use enamel_model::source::PullProgress;
use serde_json::Value;

use crate::base::OpenBase;
use crate::base::Packed;
use crate::device;
use crate::error::TrainError;
use crate::inputs::Inputs;
use crate::inputs::{for_base, step_counts};
use crate::memory::Estimate;
use crate::recipe::{Cadence, GradientCheckpointing, Recipe, TaskName};
use crate::task::{Task, for_task, provisional_head};

/// What training a recipe would be.
#[derive(Clone, Debug)]
pub struct PlanReport {
    /// The base, as the recipe names it.
    pub model: String,
    /// Where it came from; empty if only its configuration was there.
    pub source: String,
    /// Its shape in words.
    pub shape: String,
    /// The compute dtype and what it comes to, in words; empty for a model that is planned for alone.
    pub computing: String,
    /// The adapter's rank, alpha and dropout in words.
    pub method: String,
    /// Matched modules and counts.
    pub adapter: AdapterPlan,
    /// Which activations training keeps.
    pub checkpointing: GradientCheckpointing,
    /// The memory that training takes; none for a model that is not run here.
    pub memory: Option<Estimate>,
    /// The data, unless only the model was asked about.
    pub data: Option<DataPlan>,
}

/// What the data come to.
#[derive(Clone, Debug)]
pub struct DataPlan {
    /// Rows to train on.
    pub train_rows: usize,
    /// Their tokens.
    pub tokens: usize,
    /// Those of them that are trained.
    pub trained_tokens: usize,
    /// Longest training row, in tokens.
    pub longest: usize,
    /// Rows to validate on.
    pub valid_rows: usize,
    /// Training rows shortened to `max_length`.
    pub truncated: usize,
    /// Training rows left out as unusable or too long.
    pub left_out: usize,
    /// What is worth saying.
    pub notes: Vec<Note>,
    /// Optimizer steps of one epoch.
    pub steps_per_epoch: usize,
    /// Optimizer steps of the run.
    pub steps: usize,
    /// Intervals, batch and schedule in words.
    pub rhythm: String,
}

/// Steps of a run of which only the model is known: AdaLoRA wants a number, and counts do not depend on
/// it.
const PLAN_STEPS: usize = usize::MAX;

/// Opens everything that the recipe names and counts. The base is fetched if it is not there.
pub fn plan(recipe: &Recipe, progress: &mut dyn PullProgress) -> Result<PlanReport, TrainError> {
    for_task!(recipe.task, T => plan_task::<T>(recipe, progress))
}

fn plan_task<T: Task>(
    recipe: &Recipe,
    progress: &mut dyn PullProgress,
) -> Result<PlanReport, TrainError> {
    let inputs = Inputs::<T>::open(recipe, None, progress)?;
    Ok(PlanReport {
        model: recipe.model.base.clone(),
        source: inputs.base.local.source_note.clone(),
        shape: shape(&inputs.base.config),
        computing: inputs.computing(),
        method: method(&inputs.adapter),
        memory: Some(Estimate::of_inputs(recipe, &inputs)),
        checkpointing: recipe.train.gradient_checkpointing,
        data: Some(data_plan(recipe, &inputs)),
        adapter: inputs.plan,
    })
}

/// Counts for a model alone. A directory that holds nothing but `config.json`, or such a file, is
/// enough; so is that of a model that can be planned for and not run.
pub fn plan_model(
    recipe: &Recipe,
    progress: &mut dyn PullProgress,
) -> Result<PlanReport, TrainError> {
    let Known {
        shape,
        modules,
        source,
        config: base,
        bf16,
        packed,
    } = known(recipe, progress)?;
    let (base, modules) = match base {
        Some(base) if recipe.task != TaskName::CausalLm => {
            let base = base.with_head(provisional_head(recipe.task), None);
            let modules = base.modules();
            (Some(base), modules)
        }
        base => (base, modules),
    };
    let config = match &base {
        Some(base) => for_base(recipe, PLAN_STEPS, base),
        None => recipe.adapter.config(PLAN_STEPS),
    };
    // A tied head that the adapter takes hold of becomes a matrix of its own.
    let untied = base.as_ref().map(ArchConfig::untied);
    let (base, modules) = match untied {
        Some(untied) if enamel_adapter::takes_head(&config, &untied.modules()) => {
            let modules = untied.modules();
            (Some(untied), modules)
        }
        _ => (base, modules),
    };
    let adapter = enamel_adapter::plan(&modules, &config)?;
    let device = device::open(recipe.device.parse()?).ok();
    let memory = base.map(|base| {
        let device = device
            .as_ref()
            .map(|(device, choice)| (device, choice.to_string()));
        Estimate::of_config(recipe, (&base, &config, &adapter), (bf16, packed), device)
    });
    Ok(PlanReport {
        model: recipe.model.base.clone(),
        source,
        shape,
        computing: String::new(),
        method: method(&config),
        adapter,
        memory,
        checkpointing: recipe.train.gradient_checkpointing,
        data: None,
    })
}

/// What is known of a model without its weights.
struct Known {
    /// Its shape in words.
    shape: String,
    modules: Vec<ModuleShape>,
    /// Where it came from.
    source: String,
    /// Its configuration, if it is one that can be run.
    config: Option<ArchConfig>,
    /// Whether its matrices are in bf16.
    bf16: bool,
    /// Those that are quantised in its files.
    packed: Packed,
}

fn known(recipe: &Recipe, progress: &mut dyn PullProgress) -> Result<Known, TrainError> {
    let Some(json) = config_only(Path::new(&recipe.model.base))? else {
        let base = OpenBase::open(&recipe.model.base, None, progress)?;
        return Ok(Known {
            shape: shape(&base.config),
            modules: base.config.modules(),
            packed: base.packed(),
            source: base.local.source_note,
            bf16: base.checkpoint.is_bf16(),
            config: Some(base.config),
        });
    };
    if let Some(modules) = described_modules(&json) {
        let modules = modules?;
        let name = json.get("model_type").and_then(Value::as_str);
        let words = format!(
            "{}, {} modules; to plan for, not to run",
            name.unwrap_or_default(),
            modules.len()
        );
        return Ok(Known {
            shape: words,
            modules,
            source: String::new(),
            config: None,
            bf16: false,
            packed: Packed::new(),
        });
    }
    let config = ArchConfig::from_json(&json)?;
    Ok(Known {
        shape: shape(&config),
        modules: config.modules(),
        source: String::new(),
        bf16: config.dtype.as_deref() == Some("bfloat16"),
        packed: Packed::new(),
        config: Some(config),
    })
}

/// The configuration at `path`, if there is one without weights beside it.
fn config_only(path: &Path) -> Result<Option<Value>, TrainError> {
    let file = match path.extension() {
        Some(extension) if extension == "json" => path.to_owned(),
        _ => path.join("config.json"),
    };
    let is_weights = |name: &str| {
        !name.starts_with('.')
            && [".safetensors", ".safetensors.index.json"]
                .iter()
                .any(|end| name.ends_with(end))
    };
    let entries = path.read_dir().into_iter().flatten().flatten();
    let mut names = entries.map(|entry| entry.file_name());
    if !file.is_file() || names.any(|name| is_weights(&name.to_string_lossy())) {
        return Ok(None);
    }
    let bytes = std::fs::read(&file).map_err(TrainError::io(&file, "reading it"))?;
    let json = parse_json(&bytes).map_err(|reason| TrainError::Run {
        path: file.clone(),
        reason,
        help: "give a directory with the model's config.json".to_owned(),
    })?;
    Ok(Some(json))
}

fn data_plan<T: Task>(recipe: &Recipe, inputs: &Inputs<T>) -> DataPlan {
    let train = &inputs.train;
    let (steps_per_epoch, steps) = step_counts(recipe, train.rows.len());
    DataPlan {
        train_rows: train.rows.len(),
        tokens: train.tokens(),
        trained_tokens: train.trained(),
        longest: train.rows.iter().map(T::Row::tokens).max().unwrap_or(0),
        valid_rows: inputs.valid.len(),
        truncated: train.truncated,
        left_out: train.dropped + train.skipped.len(),
        notes: train.notes.clone(),
        steps_per_epoch,
        steps,
        rhythm: rhythm(recipe, steps),
    }
}

fn shape(config: &ArchConfig) -> String {
    format!(
        "{}, {} layers of width {}, {} tokens",
        config.model_type, config.num_hidden_layers, config.hidden_size, config.vocab_size
    )
}

/// The adapter in words: the method and its settings as PEFT's file names them.
fn method(config: &AdapterConfig) -> String {
    let json = config.to_json();
    let mut text = config.label().to_owned();
    for key in config.headline() {
        text.push_str(&format!(", {key} = {}", json[key]));
    }
    for remark in config.remarks() {
        text.push_str(&format!(", {remark}"));
    }
    text
}

fn rhythm(recipe: &Recipe, steps: usize) -> String {
    let train = &recipe.train;
    let every = |cadence| match cadence {
        Cadence::Never => "never".to_owned(),
        Cadence::Steps(n) => format!("every {n} steps"),
        Cadence::Epoch => "every epoch".to_owned(),
    };
    format!(
        "{} × {} rows a step, learning rate {} after {} steps of warm-up, validation {}, checkpoint {}",
        train.batch_size,
        train.gradient_accumulation_steps,
        train.learning_rate,
        train.warmup(steps),
        every(train.eval_cadence()),
        every(train.save_cadence()),
    )
}

impl PlanReport {
    /// Matched modules by pattern: `model.layers.*.self_attn.q_proj`, how many, and of what shape
    /// and rank.
    pub fn groups(&self) -> Vec<ModuleGroup> {
        let mut groups: Vec<ModuleGroup> = Vec::new();
        let mut places: BTreeMap<(String, usize, usize, usize), usize> = BTreeMap::new();
        for target in &self.adapter.targets {
            let pattern = layer_pattern(&target.name);
            let key = (pattern, target.r, target.in_features, target.out_features);
            let place = *places.entry(key.clone()).or_insert_with(|| {
                groups.push(ModuleGroup {
                    pattern: key.0.clone(),
                    r: target.r,
                    in_features: target.in_features,
                    out_features: target.out_features,
                    count: 0,
                    params: 0,
                });
                groups.len() - 1
            });
            if let Some(group) = groups.get_mut(place) {
                group.count += 1;
                group.params += target.params;
            }
        }
        groups
    }
}

/// Modules that differ in nothing but their layer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ModuleGroup {
    /// Name, with `*` for the layer's number.
    pub pattern: String,
    /// Rank.
    pub r: usize,
    /// Width of the input.
    pub in_features: usize,
    /// Width of the output.
    pub out_features: usize,
    /// Modules.
    pub count: usize,
    /// Trained parameters of all of them.
    pub params: usize,
}

/// A module's name with `*` for numbers.
pub fn layer_pattern(name: &str) -> String {
    let part = |part: &str| match part.parse::<usize>() {
        Ok(_) => "*".to_owned(),
        Err(_) => part.to_owned(),
    };
    name.split('.').map(part).collect::<Vec<_>>().join(".")
}

fn thousands(n: usize) -> String {
    crate::text::thousands(n as u64)
}

impl fmt::Display for PlanReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "model      {}", self.model)?;
        if !self.source.is_empty() {
            writeln!(f, "           {}", self.source)?;
        }
        writeln!(f, "           {}", self.shape)?;
        if !self.computing.is_empty() {
            writeln!(f, "compute    {}", self.computing)?;
        }
        writeln!(f, "adapter    {}", self.method)?;
        let groups = self.groups();
        let width = groups.iter().map(|g| g.pattern.len()).max().unwrap_or(0);
        for g in &groups {
            let shape = format!("{} -> {}", g.in_features, g.out_features);
            writeln!(
                f,
                "           {:width$}  × {:<3}  {shape:<14}  r = {:<3}  {:>13}",
                g.pattern,
                g.count,
                g.r,
                thousands(g.params)
            )?;
        }
        for saved in &self.adapter.saved {
            let (name, params) = (&saved.name, thousands(saved.params));
            writeln!(f, "           {name:width$}  trained whole  {params:>26}")?;
        }
        let line = |f: &mut fmt::Formatter<'_>, what: String, params: usize| {
            writeln!(f, "           {what:width$}  {:>41}", thousands(params))
        };
        let biases = &self.adapter.biases;
        if !biases.is_empty() {
            let params = biases.iter().map(|b| b.len).sum();
            line(f, format!("{} biases of the base", biases.len()), params)?;
        }
        for tokens in &self.adapter.tokens {
            let rows = format!("{} rows of {}", tokens.indices.len(), tokens.name);
            line(f, rows, tokens.indices.len() * tokens.width)?;
        }
        for (key, [rows, columns]) in &self.adapter.shared {
            writeln!(
                f,
                "           {key:width$}  [{rows}, {columns}], shared and not trained"
            )?;
        }
        writeln!(
            f,
            "trainable  {} of {} parameters ({:.4} %)",
            thousands(self.adapter.trainable),
            thousands(self.adapter.total),
            self.adapter.percent()
        )?;
        write!(f, "kept       {}", self.checkpointing)?;
        if let Some(data) = &self.data {
            write!(f, "\n{data}")?;
        }
        match &self.memory {
            Some(memory) => write!(f, "\n{memory}"),
            None => Ok(()),
        }
    }
}

impl fmt::Display for DataPlan {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "data       {} rows to train on: {} tokens, {} of them trained, longest row {}; {} rows to validate on",
            thousands(self.train_rows),
            thousands(self.tokens),
            thousands(self.trained_tokens),
            thousands(self.longest),
            thousands(self.valid_rows)
        )?;
        if self.truncated + self.left_out > 0 {
            write!(
                f,
                "\n           {} rows shortened, {} left out",
                self.truncated, self.left_out
            )?;
        }
        for note in &self.notes {
            write!(f, "\n           note: {note}")?;
        }
        write!(
            f,
            "\nsteps      {} an epoch, {} in all\n           {}",
            thousands(self.steps_per_epoch),
            thousands(self.steps),
            self.rhythm
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn layers_of_one_kind_are_one_pattern() {
        assert_eq!(
            layer_pattern("model.layers.12.mlp.up_proj"),
            "model.layers.*.mlp.up_proj"
        );
        assert_eq!(layer_pattern("lm_head"), "lm_head");
    }
}
