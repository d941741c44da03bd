//! `enamel export`: a model with its adapter folded in, or the adapter alone, as a GGUF file for llama.cpp.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use burn::tensor::Device;
use enamel_adapter::AdapterConfig;
use enamel_adapter::offline::{AdapterOnDisk, Delta};
use enamel_model::save::{
    GgufLora, GgufOptions, GgufTokens, OutType, SaveDtype, SavedGguf, write_gguf, write_gguf_lora,
};
use enamel_model::source::{PullProgress, expand_home};
use enamel_model::{ArchConfig, Model};

use crate::base::provenance;
use crate::base::{OpenBase, base_of};
use crate::commands::merge::{MergeBase, Merging, for_export, plainly, trained_quantised};
use crate::commands::outputs::Output;
use crate::error::TrainError;
use crate::inputs::loftq;
use crate::recipe::TaskName;
use crate::task;

/// What to export, and where to.
#[derive(Clone, Debug)]
pub struct ExportOptions {
    /// A run's directory, an adapter's, or a model as everywhere else (a directory, a GGUF file, a name).
    pub source: String,
    /// The base; `None` for the one that the adapter names.
    pub model: Option<String>,
    /// The type of the matrices; `None` for f16, and for f32 in an adapter's file.
    pub outtype: Option<OutType>,
    /// The file to write; `None` for `NAME-OUTTYPE.gguf` in the working directory.
    pub output: Option<PathBuf>,
    /// Whether to write the adapter alone, as a GGUF LoRA.
    pub adapter_only: bool,
    /// Whether a file that is there is replaced.
    pub overwrite: bool,
}

/// What was written.
#[derive(Clone, Debug)]
pub struct ExportReport {
    /// The file.
    pub output: PathBuf,
    /// The type of its matrices.
    pub outtype: OutType,
    /// What it holds.
    pub exported: Exported,
    /// Size, types, tokenizer, and what is to be known.
    pub file: SavedGguf,
}

/// What a file holds.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Exported {
    /// A model as it was.
    Model,
    /// A base with an adapter folded in.
    Merged {
        /// Modules that the adapter changed.
        modules: usize,
        /// Whether the head has become a matrix of its own.
        untied: bool,
    },
    /// An adapter alone.
    Lora {
        /// Modules that it is on.
        modules: usize,
        /// `adapter.lora.alpha`
        alpha: f64,
        /// Modules whose B was scaled, since their scale is not `alpha` over their rank.
        folded: usize,
    },
}

/// What the words of the command line stand for.
enum Source {
    Adapter(PathBuf),
    Model(String),
}

/// A directory with an adapter, a run with one, or with a model trained whole; all else is a model.
fn find(source: &str) -> Source {
    // What a `~` does not stand for is said where the model is looked for.
    let dir = &expand_home(Path::new(source)).unwrap_or_else(|_| source.into());
    let adapter = |dir: &Path| dir.join("adapter_config.json").is_file();
    let run = [dir.to_owned(), dir.join("adapter")];
    if let Some(found) = run.into_iter().find(|dir| adapter(dir)) {
        return Source::Adapter(found);
    }
    let trained = dir.join("model");
    let is_model = dir.join("config.json").is_file();
    match !is_model && trained.join("config.json").is_file() {
        true => Source::Model(trained.display().to_string()),
        false => Source::Model(source.to_owned()),
    }
}

/// Writes the file. One tensor of the base at a time is in memory.
///
/// # Errors
/// A file that is there; no base; an adapter that does not fit it, or is none that a GGUF LoRA can hold; a model
/// that llama.cpp cannot represent. Then nothing is written.
pub fn export(
    options: &ExportOptions,
    device: &Device,
    progress: &mut dyn PullProgress,
) -> Result<ExportReport, TrainError> {
    let default = match options.adapter_only {
        true => OutType::F32,
        false => OutType::F16,
    };
    let outtype = options.outtype.unwrap_or(default);
    if options.adapter_only && outtype == OutType::Q4_0 {
        return Err(TrainError::Mismatch(
            "--outtype q4_0: an adapter is written in f32, f16, bf16 or q8_0\n  help: the matrices of an adapter are \
             small; f16 halves them, and q4_0 is for --outtype of a model"
                .to_owned(),
        ));
    }
    let name = name_of(&options.source);
    let kind = if options.adapter_only { "lora-" } else { "" };
    let output = options
        .output
        .clone()
        .unwrap_or_else(|| PathBuf::from(format!("{name}-{kind}{}.gguf", outtype.name())));
    let place = Output::replacing(&output, options.overwrite);
    place.as_file()?;
    let (reference, adapter) = match find(&options.source) {
        Source::Adapter(dir) => match &options.model {
            Some(reference) => (reference.clone(), Some(dir)),
            None => (base_of(&dir)?, Some(dir)),
        },
        Source::Model(model) => {
            refuse_words_about_adapters(options, &model)?;
            (model, None)
        }
    };
    place.apart_from(&adapter)?;
    if let Some(dir) = &adapter
        && task::of_adapter(&enamel_adapter::load_config(dir)?) == Some(TaskName::SeqCls)
    {
        return Err(TrainError::Run {
            path: dir.clone(),
            reason: "it is for task_type = SEQ_CLS, and llama.cpp has no head for the classes of a decoder".to_owned(),
            help: "write a model for transformers with `enamel merge`".to_owned(),
        });
    }
    let mut base = OpenBase::open(&reference, None, progress)?;
    place.apart_from([&base.local.path])?;
    base.for_adapter_dirs(adapter.as_slice())?;
    let notes = match &adapter {
        Some(dir) => provenance::notes(dir, Some(&base)),
        None => Vec::new(),
    };
    let to = GgufOptions {
        outtype,
        overwrite: options.overwrite,
        name: Some(name),
        tokens: (base.has_tokenizer && !base.checkpoint.is_gguf()).then(|| GgufTokens {
            added: base.tokenizer.added_tokens(),
            named: base.tokenizer.special_tokens().to_vec(),
        }),
    };
    let (exported, mut file) = match (&adapter, options.adapter_only) {
        (Some(dir), true) => write_lora(&base, dir, &output, &to, device)?,
        _ => write_model(base, adapter, &output, &to, device)?,
    };
    file.notes.extend(notes);
    Ok(ExportReport {
        output,
        outtype,
        exported,
        file,
    })
}

/// What to call the model: the last part of where it came from. A run's adapter is called after the run.
fn name_of(source: &str) -> String {
    let path = Path::new(source);
    let plain = ["adapter", "model"];
    let named = path
        .ancestors()
        .filter_map(|part| Some(part.file_name()?.to_string_lossy().into_owned()))
        .find(|part| !plain.contains(&part.as_str()));
    let named = named.unwrap_or_else(|| "model".to_owned());
    let end = named.rsplit(':').next().unwrap_or_default();
    end.strip_suffix(".gguf").unwrap_or(end).to_owned()
}

/// Options for adapters where there is none.
fn refuse_words_about_adapters(options: &ExportOptions, model: &str) -> Result<(), TrainError> {
    let mut given = Vec::new();
    if options.adapter_only {
        given.push("--adapter-only");
    }
    if options.model.is_some() {
        given.push("--model");
    }
    if given.is_empty() {
        return Ok(());
    }
    Err(TrainError::Run {
        path: model.into(),
        reason: format!(
            "{} is for an adapter, and neither adapter_config.json nor adapter/adapter_config.json is there",
            given.join(" and ")
        ),
        help: "name the directory of an adapter or of a run, or leave the option out".to_owned(),
    })
}

fn write_model(
    base: OpenBase,
    adapter: Option<PathBuf>,
    output: &Path,
    to: &GgufOptions,
    device: &Device,
) -> Result<(Exported, SavedGguf), TrainError> {
    let adapters: Vec<PathBuf> = adapter.into_iter().collect();
    let weights = vec![1.0; adapters.len()];
    let mut merging = Merging::open(base, &adapters, weights, SaveDtype::F32, device)?;
    // The weights in the base's files, whatever training had made of them, unless that is what the adapter is for.
    let choice = for_export(&mut merging, &adapters)?;
    let mut file = write_gguf(
        output,
        &merging.tensors(),
        &mut |name| merging.values(name, choice).map_err(Into::into),
        &merging.base.checkpoint,
        to,
    )
    .map_err(plainly)?;
    if choice.base == MergeBase::Dequantized {
        file.notes.push(
            "the adapter began as LoftQ and is merged into the base as it was quantised in training, for which it \
             makes up"
                .to_owned(),
        );
    } else if adapters.iter().any(|dir| trained_quantised(dir)) {
        file.notes.push(
            "the adapter was trained on a quantised base and is merged into the one in the files; `enamel merge \
             --into dequantized` writes the other, which exports in turn"
                .to_owned(),
        );
    }
    let exported = match adapters.is_empty() {
        true => Exported::Model,
        false => Exported::Merged {
            modules: merging.changed(),
            untied: merging.unties(),
        },
    };
    Ok((exported, file))
}

fn write_lora(
    base: &OpenBase,
    dir: &Path,
    output: &Path,
    to: &GgufOptions,
    device: &Device,
) -> Result<(Exported, SavedGguf), TrainError> {
    // The method first: others have no factors to look at, and their files need more of the base.
    let method = enamel_adapter::load_config(dir)?;
    let mut problems = Vec::new();
    if !matches!(method, AdapterConfig::Lora(_)) {
        let kind = method.peft_type();
        problems.push(format!(
            "its method is {kind}, and a GGUF LoRA holds the two factors of a LoRA"
        ));
        return Err(no_lora(dir, &problems));
    }
    let (config, stored) = Model::fit(&base.config, &base.checkpoint)?;
    let shapes = config.modules();
    let read = |module: &str| {
        let shape = shapes.iter().find(|m| m.name == module)?;
        stored.read(&base.checkpoint, shape).ok()
    };
    let adapter = AdapterOnDisk::read(dir, &shapes, Some(&read))?;
    problems.extend(unfit(&adapter, &config));
    if base.tied.is_some() {
        problems.push(
            "it is on lm_head, for which a model whose head is its embedding has no tensor in llama.cpp".to_owned(),
        );
    }
    if !problems.is_empty() {
        return Err(no_lora(dir, &problems));
    }
    let mut modules = Vec::new();
    let mut alphas = Vec::new();
    for target in &adapter.plan().targets {
        let Delta::Factors(factors) = adapter.delta(&target.name, device)? else {
            return Err(no_lora(dir, &[format!("{} has no factors", target.name)]));
        };
        let r = factors.a.rows();
        alphas.push(factors.scale * r as f64);
        modules.push(GgufLora {
            module: target.name.clone(),
            embedding: target.embedding,
            r,
            a: factors.a.into_data(),
            b: factors.b.into_data(),
        });
    }
    let (alpha, folded) = one_alpha(&mut modules, &alphas);
    let mut file = write_gguf_lora(output, &modules, alpha, &config, to).map_err(plainly)?;
    if loftq::began_so(&method) {
        file.notes.push(
            "the adapter began as LoftQ: its base is the model as it was quantised in training (`enamel quantize` \
             writes that, and it exports in turn), not the dense one"
                .to_owned(),
        );
    }
    let exported = Exported::Lora {
        modules: modules.len(),
        alpha,
        folded,
    };
    Ok((exported, file))
}

/// llama.cpp scales every module by one alpha over the module's rank. The most usual alpha is taken, and what
/// others differ by is multiplied into their B. Gives alpha, and how many others there are.
fn one_alpha(modules: &mut [GgufLora], alphas: &[f64]) -> (f64, usize) {
    // As the file has it, in f32.
    let key = |alpha: &f64| (*alpha as f32).to_bits();
    let mut counts: BTreeMap<u32, usize> = BTreeMap::new();
    for alpha in alphas.iter().filter(|alpha| **alpha != 0.0) {
        *counts.entry(key(alpha)).or_default() += 1;
    }
    let most = counts.values().max().copied().unwrap_or(0);
    let usual = alphas.iter().find(|a| counts.get(&key(a)) == Some(&most));
    // Zero would mean to llama.cpp that there is no alpha.
    let alpha = usual.map_or(1.0, |alpha| f64::from(*alpha as f32));
    let mut folded = 0;
    for (module, own) in modules.iter_mut().zip(alphas) {
        if key(own) == key(&alpha) {
            continue;
        }
        folded += 1;
        let factor = own / alpha;
        for value in &mut module.b {
            *value = (f64::from(*value) * factor) as f32;
        }
    }
    (alpha, folded)
}

/// What of an adapter has no place in a GGUF LoRA.
fn unfit(adapter: &AdapterOnDisk, config: &ArchConfig) -> Vec<String> {
    let plan = adapter.plan();
    let mut problems = Vec::new();
    let mut some = |count: usize, what: &str| {
        if count > 0 {
            problems.push(format!("{what} ({count})"));
        }
    };
    some(plan.saved.len(), "it holds whole modules (modules_to_save)");
    some(plan.biases.len(), "it trains biases of the base (bias)");
    some(
        plan.tokens.len(),
        "it trains single rows (trainable_token_indices)",
    );
    some(
        adapter.own_biases().len(),
        "it has biases of its own (lora_bias)",
    );
    problems.extend(adapter.needs_base().map(str::to_owned));
    let embedding = plan.targets.iter().any(|target| target.embedding);
    if embedding && config.ties_head() {
        problems.push(
            "it is on the embedding, which is the output head as well, and llama.cpp would put it on both"
                .to_owned(),
        );
    }
    problems
}

fn no_lora(dir: &Path, problems: &[String]) -> TrainError {
    TrainError::Run {
        path: dir.to_owned(),
        reason: format!("this adapter cannot be a GGUF LoRA: {}", problems.join("; ")),
        help: "leave --adapter-only out to export the model with the adapter folded in, or make a LoRA of it first \
               with `enamel adapter convert`"
            .to_owned(),
    }
}
