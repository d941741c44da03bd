//! Several LoRA adapters as one (PEFT's `add_weighted_adapter`), from directory to directory.

use std::path::PathBuf;

use burn::tensor::Device;
use enamel_adapter::combine::{
    self, CombinationType, CombineOptions, CombinePlan, LoraFactors, SeededMasks, combine_module,
};
use enamel_adapter::offline::inspect;
use enamel_adapter::offline::inspect::{AdapterFacts, joined_targets};
use enamel_adapter::offline::{AdapterOnDisk, Delta};
use enamel_adapter::{
    AdapterConfig, AdapterFile, Bias, HostTensor, InitLora, LoraConfig, ModuleShape,
    as_markdown_text,
};
use rayon::prelude::*;
use serde::Serialize;

use super::inspect::linalg;
use super::{ByKind, relative};
use crate::base::provenance;
use crate::commands::outputs::Output;
use crate::error::TrainError;

/// What to combine, how, and where to.
#[derive(Clone, Debug)]
pub struct CombineRequest {
    /// The adapters' directories.
    pub adapters: Vec<PathBuf>,
    /// How, with a weight for each.
    pub options: CombineOptions,
    /// Seed of random pruning.
    pub seed: u64,
    /// The directory to write.
    pub output: PathBuf,
}

/// What was made.
#[derive(Clone, Debug, Serialize)]
pub struct Combined {
    /// The directory written.
    pub output: PathBuf,
    /// How it was combined: linearly where there was only one.
    pub kind: String,
    /// Rank and alpha of the result.
    pub r: usize,
    /// Modules of the result.
    pub modules: usize,
    /// How far the result is from the weighted sum of the deltas, relative to it, by kind of module.
    pub errors: Vec<(String, f64)>,
    /// The same for all modules together.
    pub error: f64,
    /// Modules that only some of the adapters adapt.
    pub partial: usize,
    /// What is to be known of the adapters' files.
    pub notes: Vec<String>,
}

/// One module of the result, and how far it is from the weighted sum: squares of the difference and of the
/// sum.
struct Made {
    tensors: [HostTensor; 2],
    squares: [f64; 2],
}

/// Combines and writes.
///
/// # Errors
/// Adapters that are no plain LoRA or are for different bases; options that do not go together; an output
/// that is there already.
pub fn combine(request: &CombineRequest) -> Result<Combined, TrainError> {
    let output = Output::new(&request.output);
    output.as_folder(|_| false)?;
    output.apart_from(&request.adapters)?;
    let mut adapters = Vec::new();
    for dir in &request.adapters {
        adapters.push(inspect::open(dir, None, None)?);
    }
    let names: Vec<String> = request
        .adapters
        .iter()
        .map(|dir| dir.display().to_string())
        .collect();
    let configs = plain(&names, &adapters)?;
    let ranks: Vec<(&str, usize)> = names
        .iter()
        .zip(&configs)
        .map(|(name, config)| {
            let patterns = config.rank_pattern.iter().map(|(_, r)| *r);
            (name.as_str(), patterns.fold(config.r, usize::max))
        })
        .collect();
    let plan = request
        .options
        .plan(&ranks)
        .map_err(|problems| refused(&problems))?;
    let cat = CombineOptions::new(CombinationType::Cat, request.options.weights.clone());
    let cat = cat.plan(&ranks).map_err(|problems| refused(&problems))?;

    let modules = union(&names, &request.adapters, &adapters)?;
    let made: Vec<Made> = modules
        .par_iter()
        .map(|module| make(module, &adapters, [&plan, &cat], request.seed))
        .collect::<Result<_, TrainError>>()?;

    let mut config = configs[0].clone();
    let rank = plan.rank();
    (config.r, config.lora_alpha) = (rank, rank as f64);
    (config.rank_pattern, config.alpha_pattern) = (Vec::new(), Vec::new());
    // Scale 1, which the rank-stabilised one would not be.
    config.use_rslora = false;
    config.init_lora_weights = InitLora::Default;
    // What one of them has for its base's loss is in the combination too.
    if let Some(bits) = configs.iter().find_map(|c| c.loftq()?.bits) {
        config.set_loftq(bits);
    }
    let targets: Vec<_> = names
        .iter()
        .zip(&configs)
        .map(|(n, c)| (n.as_str(), c.target_modules.as_ref()))
        .collect();
    config.target_modules = Some(joined_targets(&targets).map_err(|problem| refused(&[problem]))?);
    let meant: Vec<&str> = modules.iter().map(|m| m.name.as_str()).collect();
    inspect::name_targets(&mut config, &modules, &meant);

    let mut kinds = ByKind::<[f64; 2]>::default();
    let mut tensors = Vec::new();
    for (module, made) in modules.iter().zip(made) {
        let squares = kinds.of(&module.name);
        squares
            .iter_mut()
            .zip(made.squares)
            .for_each(|(sum, more)| *sum += more);
        tensors.extend(made.tensors);
    }
    tensors.sort_by(|a, b| a.0.cmp(&b.0));
    let all = kinds
        .0
        .values()
        .fold([0.0; 2], |sum, s| [sum[0] + s[0], sum[1] + s[1]]);
    let touches = |module: &&ModuleShape| adapters.iter().all(|a| a.touches(&module.name));
    let combined = Combined {
        output: request.output.clone(),
        kind: plan.kind().name().to_owned(),
        r: rank,
        modules: modules.len(),
        errors: kinds
            .0
            .iter()
            .map(|(kind, s)| (kind.clone(), relative(s[0], s[1])))
            .collect(),
        error: relative(all[0], all[1]),
        partial: modules.len() - modules.iter().filter(touches).count(),
        notes: provenance::notes_of_all(&request.adapters, None),
    };
    let file = AdapterFile {
        config: config.into(),
        tensors,
        made: provenance::common(&request.adapters),
    };
    inspect::write_new(
        &file,
        &modules,
        card(request, &names, &combined),
        &request.output,
    )?;
    Ok(combined)
}

fn refused(problems: &[String]) -> TrainError {
    TrainError::Mismatch(format!(
        "the adapters cannot be combined so: {}",
        problems.join("; ")
    ))
}

/// The configurations, if all are LoRA of the same base and nothing else is trained.
fn plain<'a>(
    names: &[String],
    adapters: &'a [AdapterOnDisk],
) -> Result<Vec<&'a LoraConfig>, TrainError> {
    let mut problems = Vec::new();
    let mut configs: Vec<&LoraConfig> = Vec::new();
    for (name, adapter) in names.iter().zip(adapters) {
        let AdapterConfig::Lora(config) = adapter.config() else {
            problems.push(format!(
                "{name} is {}; make it a LoRA with `enamel adapter convert` first",
                adapter.config().label()
            ));
            continue;
        };
        let mut refuse = |what: &str| problems.push(format!("{name}: {what}"));
        if config.use_dora {
            refuse(
                "use_dora: lengths of weights do not add up; make it a LoRA with `enamel adapter convert` first",
            );
        }
        if config.lora_bias {
            refuse(
                "lora_bias: PEFT does not combine biases of adapters; train without it, or merge instead",
            );
        }
        if config.bias != Bias::None {
            refuse(
                "bias: trained biases of the base are not combined; train with bias = \"none\", or merge instead",
            );
        }
        if !adapter.plan().saved.is_empty() {
            refuse("modules_to_save: modules trained whole are not combined; merge instead");
        }
        if adapter.plan().tied {
            refuse(
                "ensure_weight_tying: an adapter whose output head follows its embedding is not combined; merge \
                 instead",
            );
        }
        if !adapter.plan().tokens.is_empty() {
            refuse("trainable_token_indices: trained rows are not combined; merge instead");
        }
        if config.init_lora_weights.subtracts_initial() {
            refuse(
                "init_lora_weights: it began with a part of the base's weights; make it a plain LoRA with `enamel \
                 adapter convert` first",
            );
        }
        configs.push(config);
    }
    same_base(names, adapters, &mut problems);
    match problems.is_empty() {
        true => Ok(configs),
        false => Err(refused(&problems)),
    }
}

fn same_base(names: &[String], adapters: &[AdapterOnDisk], problems: &mut Vec<String>) {
    let base = |adapter: &AdapterOnDisk| {
        let base = adapter
            .config()
            .base_model_name_or_path()?
            .trim_end_matches('/')
            .to_owned();
        (!base.is_empty()).then_some(base)
    };
    let mut known = names
        .iter()
        .zip(adapters)
        .filter_map(|(name, a)| Some((name, a, base(a)?)));
    let Some((first, one, its)) = known.next() else {
        return;
    };
    for (name, adapter, base) in known {
        let revisions = (one.config().revision(), adapter.config().revision());
        let other = matches!(revisions, (Some(a), Some(b)) if a != b);
        if base != its || other {
            let at = |revision: Option<&str>| revision.map_or(String::new(), |r| format!("@{r}"));
            problems.push(format!(
                "{first} is for {its}{}, {name} for {base}{}; where both are the same model, write the same \
                 base_model_name_or_path and revision into both adapter_config.json",
                at(revisions.0),
                at(revisions.1)
            ));
        }
    }
}

/// All modules that any adapter adapts, by name.
fn union(
    names: &[String],
    dirs: &[PathBuf],
    adapters: &[AdapterOnDisk],
) -> Result<Vec<ModuleShape>, TrainError> {
    let mut modules: Vec<(ModuleShape, &str)> = Vec::new();
    let mut problems = Vec::new();
    for ((name, dir), adapter) in names.iter().zip(dirs).zip(adapters) {
        for module in AdapterFacts::read(dir)?.modules {
            match modules.iter().find(|(m, _)| m.name == module.name) {
                Some((known, first)) if known.shape != module.shape => problems.push(format!(
                    "{} is {:?} in {first} and {:?} in {name}; they are for different bases",
                    module.name, known.shape, module.shape
                )),
                Some(_) => {}
                None if adapter.touches(&module.name) => modules.push((module, name)),
                None => {}
            }
        }
    }
    if !problems.is_empty() {
        problems.truncate(4);
        return Err(refused(&problems));
    }
    let mut modules: Vec<ModuleShape> = modules.into_iter().map(|(module, _)| module).collect();
    modules.sort_by(|a, b| a.name.cmp(&b.name));
    Ok(modules)
}

/// One module of the result.
fn make(
    module: &ModuleShape,
    adapters: &[AdapterOnDisk],
    [plan, cat]: [&CombinePlan; 2],
    seed: u64,
) -> Result<Made, TrainError> {
    let name = &module.name;
    let device = Device::flex();
    let mut factors: Vec<Option<LoraFactors>> = Vec::new();
    for adapter in adapters {
        factors.push(
            match adapter
                .touches(name)
                .then(|| adapter.delta(name, &device))
                .transpose()?
            {
                Some(Delta::Factors(factors)) => Some(factors),
                _ => None,
            },
        );
    }
    let inputs: Vec<Option<&LoraFactors>> = factors.iter().map(Option::as_ref).collect();
    let failed = |e: combine::CombineError| TrainError::Mismatch(e.to_string());
    let result = combine_module(plan, name, &inputs, &mut SeededMasks(seed)).map_err(failed)?;
    let sum = combine_module(cat, name, &inputs, &mut SeededMasks(seed)).map_err(failed)?;
    let diff = combine::diff(&sum, &result).map_err(|e| linalg(name, &e))?;
    Ok(Made {
        tensors: tensors(module, result),
        squares: [diff.norm_difference, diff.norm_first].map(|n| n * n),
    })
}

/// A module's two tensors under PEFT's keys.
pub(super) fn tensors(module: &ModuleShape, factors: LoraFactors) -> [HostTensor; 2] {
    let [a, b] = match module.kind {
        enamel_adapter::ModuleKind::Embedding => ["lora_embedding_A", "lora_embedding_B"],
        _ => ["lora_A.weight", "lora_B.weight"],
    };
    let tensor = |own: &str, matrix: enamel_adapter::linalg::Matrix| {
        let shape = vec![matrix.rows(), matrix.cols()];
        (
            format!("base_model.model.{}.{own}", module.name),
            shape,
            matrix.into_data(),
        )
    };
    [tensor(a, factors.a), tensor(b, factors.b)]
}

fn card(request: &CombineRequest, names: &[String], combined: &Combined) -> String {
    let mut text = format!(
        "## Origin\n\nCombined by `enamel adapter combine --type {}` from\n\n",
        combined.kind
    );
    for (name, weight) in names.iter().zip(&request.options.weights) {
        let name = as_markdown_text(name);
        text.push_str(&format!("- {name}, weight {weight}\n"));
    }
    if let Some(density) = request.options.density {
        text.push_str(&format!("\ndensity {density}, seed {}\n", request.seed));
    }
    text.push_str(&format!(
        "\nRelative difference from the weighted sum of what they add: {:.3e}.\n",
        combined.error
    ));
    text
}
