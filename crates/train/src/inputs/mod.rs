//! Everything a run reads, opened and checked against each other before anything large is made.

pub mod eva;
pub mod loftq;

use std::path::{Path, PathBuf};

use burn::tensor::Device;
use enamel_adapter::plan::target::DEFAULT_TARGETS;
use enamel_adapter::{AdapterConfig, AdapterPlan, ModuleKind};
use enamel_adapter::{MethodConfig, Targets};
use enamel_data::{Example, Rows};
use enamel_kernels::Compute;
use enamel_model::digest::{hex, sha256_file};
use enamel_model::source::PullProgress;
use enamel_model::{ArchConfig, HeadConfig, Loading, Model, Quantization};
use sha2::{Digest, Sha256};

use crate::device;
use crate::error::TrainError;

use crate::base::{OpenBase, provenance};

use crate::recipe::{AdapterSettings, FileHash, Length, LockInfo, Recipe};
use crate::task::{CausalLm, MetricSpec, Opened, Source, Task, task_type};

/// The inputs of a run.
pub struct Inputs<T: Task> {
    /// What is trained for.
    pub task: T,
    /// Where to compute (no autodiff).
    pub device: Device,
    /// Its name.
    pub device_name: String,
    /// What products with the base multiply.
    pub compute: Compute,
    /// What becomes of the base's linear layers.
    pub quantization: Quantization,
    /// The base model.
    pub base: OpenBase,
    /// Training rows.
    pub train: Rows<T::Row>,
    /// Validation rows.
    pub valid: Vec<T::Row>,
    /// What is worth saying of the task.
    pub task_notes: Vec<String>,
    /// The adapter's configuration: the recipe's, or that of the adapter training starts from.
    pub adapter: AdapterConfig,
    /// What it matches.
    pub plan: AdapterPlan,
    /// Why a base that its files have quantised is held dense though the recipe does not say so.
    pub dense_for: Vec<String>,
    /// Hashes and versions.
    pub lock: LockInfo,
    /// Seed of the run.
    pub seed: u64,
}

impl<T: Task> Inputs<T> {
    /// Opens and checks everything. `template_time` is the time that a chat template with a date in it
    /// shall show, when an earlier run has to be repeated.
    ///
    /// # Errors
    /// The first kind of input with problems, with all problems of that kind.
    pub fn open(
        recipe: &Recipe,
        template_time: Option<i64>,
        progress: &mut dyn PullProgress,
    ) -> Result<Self, TrainError> {
        let (device, choice) = device::open(recipe.device.parse()?)?;
        recipe
            .train
            .gradient_checkpointing
            .check(&device, &choice)?;
        let template = recipe.model.chat_template_text()?;
        let mut base = OpenBase::open(&recipe.model.base, template.as_deref(), progress)?;
        if let Some(time) = template_time {
            base.tokenizer.set_template_time(time)?;
        }
        base.tokenizer
            .set_template_arguments(recipe.data.chat_template_kwargs.0.clone());
        check_metric::<T>(recipe)?;
        // Names are right from the start; how many outputs there are is known once the data are.
        base.set_head(T::provisional_head());
        let adapter = match &recipe.adapter.init_from {
            Some(dir) => for_start::<T>(dir)?,
            // How many steps there are is known once the data are; no other setting depends on it.
            None => for_base(recipe, usize::MAX, &base.config),
        };
        base.for_adapters(std::slice::from_ref(&adapter))?;
        // An adapter from elsewhere may name modules that this model lacks; PEFT loads it all the same.
        let planned = |base: &OpenBase, adapter: &AdapterConfig| match &recipe.adapter.init_from {
            Some(_) => enamel_adapter::plan_for_load(&base.config.modules(), adapter),
            None => enamel_adapter::plan(&base.config.modules(), adapter),
        };
        let plan = planned(&base, &adapter)?;
        let asked = Quantization::from(&recipe.model.quantization);
        let (quantization, dense_for) = quantization(asked, &base, &adapter, &plan)?;
        // Hashing a model takes about as long as reading it, and shares nothing with the rows.
        let (opened, model_hashes) = rayon::join(
            || T::open(recipe, &base, Source::Both),
            || base.checkpoint.hashes(),
        );
        let Opened {
            task,
            mut train,
            valid,
            notes: task_notes,
        } = opened?;
        let mut data_files = hashes_of(&train);
        data_files.extend(hashes_of(&valid));
        for note in valid.notes {
            // The same files may be both.
            if !train.notes.contains(&note) {
                train.notes.push(note);
            }
        }
        base.set_head(task.head());
        let (_, steps) = step_counts(recipe, train.rows.len());
        let adapter = match &recipe.adapter.init_from {
            Some(_) => adapter,
            None => for_base(recipe, steps, &base.config),
        };
        let plan = planned(&base, &adapter)?;
        let lock = LockInfo {
            enamel: env!("CARGO_PKG_VERSION").to_string(),
            burn: "0.22.1".to_string(),
            device: choice.to_string(),
            cpu: choice.cpu_path().map(str::to_owned),
            platform: format!("{}-{}", std::env::consts::OS, std::env::consts::ARCH),
            threads: rayon::current_num_threads(),
            model_source: base.local.source_note.clone(),
            template_time: base
                .tokenizer
                .chat_template()
                .filter(|t| t.uses_clock())
                .map(enamel_data::ChatTemplate::now),
            model_files: model_hashes?
                .into_iter()
                .map(|(path, sha256)| FileHash { path, sha256 })
                .collect(),
            tokenizer_files: vec![FileHash {
                path: PathBuf::from("tokenizer.json and chat template"),
                sha256: tokenizer_hash(&base),
            }],
            data_files,
            init_files: init_files(&recipe.adapter)?,
        };
        let device_name = choice.to_string();
        Ok(Self {
            device,
            device_name,
            compute: recipe.model.compute_dtype.into(),
            quantization,
            base,
            task,
            train,
            valid: valid.rows,
            task_notes,
            adapter,
            plan,
            dense_for,
            lock,
            seed: recipe.seed,
        })
    }

    /// The compute dtype with what it comes to here: `bf16: bf16 weights, f32 products: ..`.
    pub fn computing(&self) -> String {
        let words = self.base.computing(self.compute, &self.device);
        let base = match self.quantization.format {
            Some(format) => format!("; base: {format}"),
            None if self.dense_for.is_empty() => String::new(),
            None => {
                let mut why: Vec<_> = self.dense_for.iter().take(2).cloned().collect();
                let more = self.dense_for.len() - why.len();
                if more > 0 {
                    why.push(format!("and {more} more"));
                }
                let why = why.join("; ");
                format!("; base: dense, though its files have it quantised ({why})")
            }
        };
        format!("{}: {words}{base}", self.compute.name())
    }

    /// How the base is to be held.
    pub fn loading(&self) -> Loading {
        Loading {
            compute: self.compute,
            quantization: self.quantization.clone(),
            seed: self.seed,
        }
    }

    /// The base with the adapter attached, on the plain device: from `checkpoint` when resuming, else
    /// from `adapter.init_from`, else with its first values; and the adapter's configuration, which the
    /// first values may have a say in.
    ///
    /// # Errors
    /// Anything wrong with the weights or the adapter's files.
    pub fn model(
        &self,
        recipe: &Recipe,
        checkpoint: Option<&Path>,
        say: &dyn Fn(&str),
    ) -> Result<(Model, AdapterConfig), TrainError> {
        let mut model = self.base.weights(&self.device, &self.loading())?;
        let config = match checkpoint.or(recipe.adapter.init_from.as_deref()) {
            Some(dir) => {
                let config = enamel_adapter::load_pretrained(&mut model, dir, true)?.config;
                if checkpoint.is_none() {
                    for note in provenance::notes(dir, Some(&self.base)) {
                        say(&format!("note     {note}"));
                    }
                }
                if let Some(note) = loftq::beside_dense(&config, &model) {
                    say(&format!("note     {note}"));
                }
                config
            }
            None => {
                if let Some(note) = provenance::head_note(&self.adapter, &self.base) {
                    say(&format!("note     {note}"));
                }
                self.first(&mut model, recipe, say)?
            }
        };
        Ok((model, config))
    }

    /// Attaches the adapter with its first values.
    fn first(
        &self,
        model: &mut Model,
        recipe: &Recipe,
        say: &dyn Fn(&str),
    ) -> Result<AdapterConfig, TrainError> {
        if let Some(config) = eva::config(&self.adapter) {
            return eva::attach(model, config.clone(), self, recipe, say);
        }
        if let Some(config) = loftq::config(&self.adapter) {
            let files = &self.base.checkpoint;
            let how = (self.quantization.format, recipe.seed);
            return loftq::attach(model, config.clone(), files, how, say);
        }
        enamel_adapter::attach(model, &self.adapter, recipe.seed)?;
        Ok(self.adapter.clone())
    }
}

/// The recipe's quantisation, checked against the model and the adapter. An adapter that changes the base, or
/// trains a linear layer of it, has a base dense that only the file quantises: then also why.
///
/// # Errors
/// Names in `skip_modules` that are not there; an adapter that cannot have what the recipe asks for, with all
/// that speaks against it.
pub(crate) fn quantization(
    mut quantization: Quantization,
    base: &OpenBase,
    adapter: &AdapterConfig,
    plan: &AdapterPlan,
) -> Result<(Quantization, Vec<String>), TrainError> {
    let modules = base.config.modules();
    quantization.check(&modules)?;
    let packed = base.checkpoint.packed();
    let linear = |name: &str| {
        let module = modules.iter().find(|module| module.name == name);
        module.is_some_and(|module| module.kind == ModuleKind::Linear)
    };
    if let Some(config) = loftq::config(adapter) {
        let targets = plan.targets.iter().map(|target| target.name.as_str());
        let quantised = |name: &&str| linear(name) && !quantization.skips(name);
        let stored = |module: &str| {
            let stored = packed.get(&format!("{module}.weight"));
            stored.is_some_and(|stored| stored.bitsandbytes)
        };
        let targets: Vec<&str> = targets.filter(quantised).collect();
        loftq::check(config, quantization.format, &targets, &stored)?;
    }
    let mut against = Vec::new();
    if adapter.trains_everything() {
        against.push(format!("{} trains them", adapter.label()));
    }
    if adapter.subtracts_initial() {
        against.push("init_lora_weights takes a part out of them".to_owned());
    }
    for saved in &plan.saved {
        if linear(&saved.name) && !quantization.skips(&saved.name) {
            against.push(format!("modules_to_save trains {}", saved.name));
        }
    }
    match quantization.format {
        Some(format) if !against.is_empty() => Err(TrainError::Mismatch(format!(
            "the base's weights are to be {}, and such weights cannot be changed: {}\n  \
             help: name the layers in model.quantization.skip_modules, choose another adapter, or remove \
             [model.quantization]",
            format.name(),
            against.join("; ")
        ))),
        _ => {
            if quantization.dequantize || packed.is_empty() {
                against.clear();
            }
            quantization.dequantize |= !against.is_empty();
            Ok((quantization, against))
        }
    }
}

/// The validation rows of a recipe for a language model and nothing else of a run.
///
/// # Errors
/// As for loading them for the run.
pub(crate) fn validation_rows(
    recipe: &Recipe,
    base: &OpenBase,
) -> Result<Vec<Example>, TrainError> {
    Ok(CausalLm::open(recipe, base, Source::Validation)?.valid.rows)
}

fn hashes_of<R>(rows: &Rows<R>) -> Vec<FileHash> {
    let files = rows.files.iter();
    files
        .map(|f| FileHash {
            path: f.path.clone(),
            sha256: f.sha256.clone(),
        })
        .collect()
}

fn tokenizer_hash(base: &OpenBase) -> String {
    let mut hash = Sha256::new();
    hash.update(base.tokenizer.sha256().as_bytes());
    if let Some(template) = base.tokenizer.chat_template() {
        hash.update(template.source().as_bytes());
    }
    hex(&hash.finalize())
}

/// The files of the adapter that training starts from, or of the experts that it mixes.
fn init_files(adapter: &AdapterSettings) -> Result<Vec<FileHash>, TrainError> {
    let names = ["adapter_config.json", "adapter_model.safetensors"];
    let experts = adapter.adapters.0.iter().map(|(_, dir)| dir);
    let dirs = adapter.init_from.iter().chain(experts);
    dirs.flat_map(|dir| names.map(|name| dir.join(name)))
        .map(|path| {
            let sha256 = sha256_file(&path).map_err(TrainError::io(&path, "reading"))?;
            Ok(FileHash { path, sha256 })
        })
        .collect()
}

/// The recipe's adapter for a base: one that names no modules gets those that PEFT takes by default for the base's
/// type, and one for a task that brings a head of its own has the head trained and saved along.
pub(crate) fn for_base(recipe: &Recipe, total_steps: usize, base: &ArchConfig) -> AdapterConfig {
    let mut adapter = recipe.adapter.config(total_steps);
    let selection = adapter.selection();
    let usual = selection.default == DEFAULT_TARGETS;
    if selection.target.is_none() && usual && base.default_targets() != DEFAULT_TARGETS {
        let names = base.default_targets().iter().map(|name| (*name).to_owned());
        adapter.set_targets(Targets::List(names.collect()));
    }
    if base.head != HeadConfig::CausalLm {
        adapter.set_task(task_type(recipe.task), base.head_module());
    }
    adapter
}

/// The adapter that training starts from, which has to be for the same task.
fn for_start<T: Task>(dir: &Path) -> Result<AdapterConfig, TrainError> {
    let config = enamel_adapter::load_config(dir)?;
    match config.task_type() {
        Some(other) if other != T::TASK_TYPE => Err(TrainError::Mismatch(format!(
            "adapter.init_from: {} is for task_type = {other}, and the recipe trains {}\n  \
             help: choose the task that it was trained for",
            dir.display(),
            T::TASK_TYPE
        ))),
        _ => Ok(config),
    }
}

/// Refuses a metric to choose the best model by that the task does not have.
fn check_metric<T: Task>(recipe: &Recipe) -> Result<(), TrainError> {
    let name = recipe.train.metric_for_best_model.as_str();
    match metric_for_best_model::<T>(recipe) {
        Some(_) => Ok(()),
        None => {
            let keys: Vec<&str> = T::METRICS.iter().map(|metric| metric.key).collect();
            Err(TrainError::Mismatch(format!(
                "train.metric_for_best_model = \"{name}\" is no metric of task = \"{}\"\n  help: choose {}",
                recipe.task.name(),
                keys.join(" or ")
            )))
        }
    }
}

/// The metric that the best model is chosen by; `eval_loss` is transformers' name of `loss`.
pub(crate) fn metric_for_best_model<T: Task>(
    recipe: &Recipe,
) -> Option<&'static MetricSpec<T::Tally>> {
    let name = recipe.train.metric_for_best_model.as_str();
    let name = name.strip_prefix("eval_").unwrap_or(name);
    T::METRICS.iter().find(|metric| metric.key == name)
}

/// Optimizer steps an epoch and in all, for `rows` training rows.
pub fn step_counts(recipe: &Recipe, rows: usize) -> (usize, usize) {
    let train = &recipe.train;
    let per_epoch = steps_per_epoch(rows, train.batch_size, train.gradient_accumulation_steps);
    let total = match train.length() {
        Length::Steps(steps) => steps,
        Length::Epochs(epochs) => ((epochs * per_epoch as f64).ceil() as usize).max(1),
    };
    (per_epoch, total)
}

/// Optimizer steps an epoch of `rows` rows; the last batch and the last step may be smaller.
pub fn steps_per_epoch(rows: usize, batch_size: usize, accumulation: usize) -> usize {
    rows.div_ceil(batch_size).div_ceil(accumulation)
}
