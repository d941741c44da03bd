//! Any adapter as a LoRA: the best one for what it adds to each weight.

use std::path::{Path, PathBuf};

use burn::tensor::Device;
use enamel_adapter::combine::{LowRankFit, RankChoice};
use enamel_adapter::linalg::Matrix;
use enamel_adapter::offline::inspect;
use enamel_adapter::offline::inspect::AdapterFacts;
use enamel_adapter::offline::{AdapterOnDisk, Delta, HostModule};
use enamel_adapter::{
    AdapterConfig, AdapterFile, HostTensor, LoraConfig, ModuleKind, ModuleShape, as_markdown_text,
};
use enamel_model::Model;
use enamel_model::StoredNames;
use enamel_model::checkpoint::TensorSource;
use enamel_model::source::PullProgress;
use rayon::prelude::*;
use serde::Serialize;

use super::combine::tensors;
use super::inspect::linalg;
use super::{ByKind, relative};
use crate::base::OpenBase;
use crate::base::provenance;
use crate::commands::outputs::Output;
use crate::error::TrainError;
use crate::recipe::TaskName;
use crate::task::{self, SequenceClassification};

/// What to convert, how closely, and where to.
#[derive(Clone, Debug)]
pub struct ConvertRequest {
    /// The adapter's directory.
    pub adapter: PathBuf,
    /// Its base, for methods that need it.
    pub model: Option<String>,
    /// The rank, or the largest relative error, of each module.
    pub choice: RankChoice,
    /// The directory to write.
    pub output: PathBuf,
}

/// What was made.
#[derive(Clone, Debug, Serialize)]
pub struct Converted {
    /// The directory written.
    pub output: PathBuf,
    /// The method that it was.
    pub from: String,
    /// A line for each kind of module.
    pub kinds: Vec<ConvertedKind>,
    /// Error relative to all that the adapter adds.
    pub error: f64,
    /// Trained parameters before and after.
    pub parameters: [usize; 2],
    /// Tensors that were taken over as they are: copies, biases, rows.
    pub kept: usize,
    /// What is to be known of the adapter's files.
    pub notes: Vec<String>,
}

/// The modules of one kind.
#[derive(Clone, Debug, Serialize)]
pub struct ConvertedKind {
    /// The last part of their names.
    pub kind: String,
    /// How many there are.
    pub modules: usize,
    /// The smallest and the largest rank.
    pub ranks: [usize; 2],
    /// Error relative to all that the adapter adds to them.
    pub error: f64,
}

/// One module's factors and its squares: of the error, of the whole.
struct Made {
    tensors: [HostTensor; 2],
    rank: usize,
    squares: [f64; 2],
}

/// The base's files with the adapter's modules.
struct Base {
    open: OpenBase,
    modules: Vec<ModuleShape>,
    stored: StoredNames,
}

impl Base {
    fn open(
        reference: &str,
        adapter: &Path,
        progress: &mut dyn PullProgress,
    ) -> Result<Self, TrainError> {
        let mut open = OpenBase::open(reference, None, progress)?;
        if task::of_adapter(&enamel_adapter::load_config(adapter)?) == Some(TaskName::SeqCls) {
            SequenceClassification::of_trained(&mut open, Some(adapter))?;
        }
        open.for_adapter_dirs(&[adapter.to_owned()])?;
        let (config, stored) = Model::fit(&open.config, &open.checkpoint)?;
        Ok(Self {
            modules: config.modules(),
            open,
            stored,
        })
    }

    fn weight(&self, module: &ModuleShape) -> Result<Vec<f32>, TrainError> {
        Ok(self.stored.read(&self.open.checkpoint, module)?)
    }
}

/// Converts and writes.
///
/// # Errors
/// A method that needs its base where none is given; a rank that no module can have; what a LoRA has no
/// place for; an output that is there already.
pub fn convert(
    request: &ConvertRequest,
    progress: &mut dyn PullProgress,
) -> Result<Converted, TrainError> {
    let output = Output::new(&request.output);
    output.as_folder(|_| false)?;
    output.apart_from([&request.adapter])?;
    let base = request
        .model
        .as_ref()
        .map(|r| Base::open(r, &request.adapter, progress))
        .transpose()?;
    output.apart_from(base.iter().map(|base| &base.open.local.path))?;
    let adapter = match &base {
        None => inspect::open(&request.adapter, None, None)?,
        Some(base) => {
            let read = |name: &str| {
                let module = base.modules.iter().find(|m| m.name == name)?;
                base.weight(module).ok()
            };
            inspect::open(&request.adapter, Some(&base.modules), Some(&read))?
        }
    };
    refuse_unfit(request, &adapter, base.is_some())?;
    let modules = match &base {
        Some(base) => base.modules.clone(),
        None => AdapterFacts::read(&request.adapter)?.modules,
    };
    let targets: Vec<&ModuleShape> = adapter
        .plan()
        .targets
        .iter()
        .filter_map(|t| modules.iter().find(|m| m.name == t.name))
        .collect();
    let made: Vec<Made> = targets
        .par_iter()
        .map(|module| make(module, &adapter, base.as_ref(), request.choice))
        .collect::<Result<_, TrainError>>()?;

    let config = config(&adapter, &modules, &targets, &made);
    let mut kinds = ByKind::<(usize, Option<[usize; 2]>, [f64; 2])>::default();
    let mut all = adapter.rest();
    let kept = all.len();
    for (module, made) in targets.iter().zip(made) {
        let (count, ranks, squares) = kinds.of(&module.name);
        *count += 1;
        let [low, high] = ranks.unwrap_or([made.rank; 2]);
        *ranks = Some([low.min(made.rank), high.max(made.rank)]);
        squares
            .iter_mut()
            .zip(made.squares)
            .for_each(|(sum, more)| *sum += more);
        all.extend(made.tensors);
    }
    all.sort_by(|a, b| a.0.cmp(&b.0));
    let total = kinds
        .0
        .values()
        .fold([0.0; 2], |sum, (_, _, s)| [sum[0] + s[0], sum[1] + s[1]]);
    let converted = Converted {
        output: request.output.clone(),
        from: adapter.config().label().to_owned(),
        kinds: kinds
            .0
            .iter()
            .map(|(kind, (count, ranks, squares))| ConvertedKind {
                kind: kind.clone(),
                modules: *count,
                ranks: ranks.unwrap_or_default(),
                error: relative(squares[0], squares[1]),
            })
            .collect(),
        error: relative(total[0], total[1]),
        parameters: [
            adapter.plan().trainable,
            all.iter()
                .map(|(_, shape, _)| shape.iter().product::<usize>())
                .sum(),
        ],
        kept,
        notes: provenance::notes(&request.adapter, base.as_ref().map(|base| &base.open)),
    };
    let file = AdapterFile {
        config: config.into(),
        tensors: all,
        made: enamel_adapter::made(&request.adapter),
    };
    inspect::write_new(
        &file,
        &modules,
        card(&request.adapter, &converted),
        &request.output,
    )?;
    Ok(converted)
}

fn refuse_unfit(
    request: &ConvertRequest,
    adapter: &AdapterOnDisk,
    has_base: bool,
) -> Result<(), TrainError> {
    let refuse = |reason: String, help: &str| {
        Err(TrainError::Run {
            path: request.adapter.clone(),
            reason,
            help: help.to_owned(),
        })
    };
    if adapter.trains_everything() {
        let help = "use it as a model of its own: merge it into its base";
        return refuse(
            "full fine-tuning changes every weight, and is no adapter".to_owned(),
            help,
        );
    }
    if adapter.plan().targets.is_empty() {
        let help = "there is nothing to convert; use it as it is";
        return refuse(
            "the adapter adapts no module, and only trains some whole".to_owned(),
            help,
        );
    }
    if !adapter.own_biases().is_empty() {
        let help = "use the adapter as it is, or merge it";
        return refuse("lora_bias: its biases would be lost".to_owned(), help);
    }
    if adapter.plan().tied {
        let help = "use the adapter as it is, or merge it";
        return refuse(
            "ensure_weight_tying: its output head follows its embedding, which what it is converted to would not \
             say"
                .to_owned(),
            help,
        );
    }
    match adapter.needs_base() {
        Some(reason) if !has_base => refuse(reason.to_owned(), "name the base with --model"),
        _ => Ok(()),
    }
}

fn make(
    module: &ModuleShape,
    adapter: &AdapterOnDisk,
    base: Option<&Base>,
    choice: RankChoice,
) -> Result<Made, TrainError> {
    let name = &module.name;
    let device = Device::flex();
    let delta = match (adapter.needs_base(), base) {
        (Some(_), Some(base)) => Delta::Dense(against_base(module, adapter, base, &device)?),
        _ => adapter.delta(name, &device)?,
    };
    let fit = match &delta {
        Delta::Factors(factors) => LowRankFit::of_factors(factors),
        Delta::Dense(dense) => LowRankFit::new(dense),
    };
    let fit = fit.map_err(|e| linalg(name, &e))?;
    // A module may be smaller than the rank asked for; its full rank is all there is.
    let full = fit.errors().len().saturating_sub(1).max(1);
    let choice = match choice {
        RankChoice::Fixed(rank) => RankChoice::Fixed(rank.min(full)),
        other => other,
    };
    let low = fit.fit(choice).map_err(|e| linalg(name, &e))?;
    let norm = delta.norm().map_err(|e| linalg(name, &e))?;
    Ok(Made {
        tensors: tensors(module, low.factors),
        rank: low.rank,
        squares: [low.relative_error * norm, norm].map(|n| n * n),
    })
}

/// What the adapter adds to a weight of this base.
fn against_base(
    module: &ModuleShape,
    adapter: &AdapterOnDisk,
    base: &Base,
    device: &Device,
) -> Result<Matrix, TrainError> {
    let name = &module.name;
    let bias = format!("{name}.bias");
    let before = HostModule {
        weight: base.weight(module)?,
        bias: module
            .bias
            .then(|| base.open.checkpoint.read_f32(&bias))
            .transpose()?,
    };
    let after = adapter.folded(module, &before, &before, device)?;
    let trained = adapter.plan().biases.iter().any(|b| b.name == *name);
    if after.bias != before.bias && !trained {
        return Err(TrainError::Mismatch(format!(
            "{bias}: the adapter changes it, and a LoRA has no place for that\n  help: use the adapter as it is, or \
             merge it"
        )));
    }
    let delta = after
        .weight
        .iter()
        .zip(&before.weight)
        .map(|(after, before)| after - before)
        .collect();
    let matrix = Matrix::new(module.shape[0], module.shape[1], delta);
    let matrix = matrix.map_err(|e| linalg(name, &e))?;
    Ok(match module.kind {
        ModuleKind::Embedding => matrix.transpose(),
        _ => matrix,
    })
}

/// The LoRA configuration of the result: scale 1 everywhere.
fn config(
    adapter: &AdapterOnDisk,
    modules: &[ModuleShape],
    targets: &[&ModuleShape],
    made: &[Made],
) -> LoraConfig {
    let old = adapter.config();
    let ranks: Vec<(&str, usize)> = targets
        .iter()
        .zip(made)
        .map(|(m, made)| (m.name.as_str(), made.rank))
        .collect();
    let (r, rank_pattern) = inspect::patterned(&ranks).unwrap_or((1, Vec::new()));
    let alpha_pattern = rank_pattern
        .iter()
        .map(|(name, r)| (name.clone(), *r as f64))
        .collect();
    let json = old.to_json();
    let text = |key: &str| json[key].as_str().map(str::to_owned);
    let mut config = LoraConfig {
        r,
        lora_alpha: r as f64,
        rank_pattern,
        alpha_pattern,
        target_modules: serde_json::from_value(json["target_modules"].clone()).ok(),
        exclude_modules: serde_json::from_value(json["exclude_modules"].clone()).ok(),
        layers_to_transform: serde_json::from_value(json["layers_to_transform"].clone()).ok(),
        layers_pattern: serde_json::from_value(json["layers_pattern"].clone()).ok(),
        modules_to_save: serde_json::from_value(json["modules_to_save"].clone()).ok(),
        task_type: text("task_type"),
        base_model_name_or_path: text("base_model_name_or_path"),
        revision: text("revision"),
        ..LoraConfig::default()
    };
    if let AdapterConfig::Lora(old) = old {
        config.bias = old.bias;
        config.trainable_token_indices = old.trainable_token_indices.clone();
    }
    let meant: Vec<&str> = targets.iter().map(|m| m.name.as_str()).collect();
    inspect::name_targets(&mut config, modules, &meant);
    config
}

fn card(from: &Path, converted: &Converted) -> String {
    let mut text = format!(
        "## Origin\n\nConverted by `enamel adapter convert` from {}, which was {}. What is lost, relative to what it \
         added (Frobenius norm): {:.3e} in total.\n\n| modules | ranks | relative error |\n|---|---|---|\n",
        as_markdown_text(&from.display().to_string()),
        converted.from,
        converted.error
    );
    for kind in &converted.kinds {
        let [low, high] = kind.ranks;
        text.push_str(&format!(
            "| {} × {} | {low} to {high} | {:.3e} |\n",
            kind.modules,
            as_markdown_text(&kind.kind),
            kind.error
        ));
    }
    text
}
