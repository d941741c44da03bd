//! `enamel merge`: adapters folded into their base, tensor by tensor, written as a model of its own and read
//! back.

use std::path::{Path, PathBuf};

use burn::tensor::{Device, Int, Tensor, TensorData};
use enamel_adapter::host::{HostAdapter, HostModule};
use enamel_adapter::infer::kind_of;
use enamel_adapter::{Linear, ModuleKind, ModuleShape, Slot};
use enamel_model::checkpoint::{Checkpoint, CheckpointError, TensorSource};
use enamel_model::save::{self, SaveDtype, SaveOptions};
use enamel_model::source::PullProgress;
use enamel_model::{CausalLm, LlamaConfig, Loading, ModelInput, Quantization};

use crate::error::TrainError;
use crate::loaded::{OpenBase, base_of};

/// What to merge, and where to.
#[derive(Clone, Debug)]
pub struct MergeOptions {
    /// The base; `None` for the one that the first adapter names.
    pub model: Option<String>,
    /// The adapters' directories.
    pub adapters: Vec<PathBuf>,
    /// A weight for each adapter; none for 1 each.
    pub weights: Vec<f64>,
    /// The directory to write; it must not hold a model yet.
    pub output: PathBuf,
    /// Element type of the written weights; `None` for the base's own.
    pub dtype: Option<SaveDtype>,
    /// Whether to compare logits, for which whole models are loaded.
    pub check: bool,
}

/// What merging did to the numbers.
#[derive(Clone, Debug)]
pub struct MergeReport {
    /// The directory written.
    pub output: PathBuf,
    /// Its element type.
    pub dtype: SaveDtype,
    /// Modules that the adapters changed.
    pub modules: usize,
    /// Whether the head has become a matrix of its own.
    pub untied: bool,
    /// How logits compare, if they were to be compared.
    pub check: Option<MergeCheck>,
}

/// Logits of the base with its adapters, of the merged weights, and of what was written.
#[derive(Clone, Debug)]
pub struct MergeCheck {
    /// Positions of the probe at which logits were compared.
    pub positions: usize,
    /// Largest magnitude among the merged model's logits, to judge differences by.
    pub max_abs_logit: f64,
    /// Largest difference of logits between base + adapters and the weights merged in f32; none where
    /// weights other than 1 cannot be given to adapters that run beside their base.
    pub max_abs_logit_diff: Option<f64>,
    /// The same between base + adapters (or the weights merged in f32) and the files as written and read
    /// back: rounding to `dtype` is in it.
    pub max_abs_logit_diff_written: f64,
}

/// Tokens of the text on which logits are compared.
const PROBE_TOKENS: usize = 48;

/// Merges, writes, reads back and compares. One tensor of the base at a time is in memory, unless logits
/// are compared.
///
/// # Errors
/// Adapters that do not fit the base or each other; a merged tensor that is not finite. Then nothing is
/// written.
pub fn merge(
    options: &MergeOptions,
    device: &Device,
    progress: &mut dyn PullProgress,
) -> Result<MergeReport, TrainError> {
    refuse_occupied(&options.output)?;
    let weights = weights(options)?;
    let first = options.adapters.first().ok_or_else(|| {
        TrainError::Mismatch("no adapter is given\n  help: name one with --adapter".to_owned())
    })?;
    let reference = match &options.model {
        Some(reference) => reference.clone(),
        None => base_of(first)?,
    };
    let base = OpenBase::open(&reference, None, progress)?;
    let merging = Merging::open(base, &options.adapters, weights, device)?;
    let dtype = options
        .dtype
        .unwrap_or_else(|| SaveDtype::native(&merging.base.checkpoint));
    save::write_hf(
        &options.output,
        &merging.tensors(),
        &mut |name| merging.values(name).map_err(Into::into),
        &merging.base.checkpoint,
        &SaveOptions::new(dtype),
    )
    .map_err(plainly)?;
    let check = match options.check {
        true => Some(merging.check(&options.output)?),
        false => None,
    };
    Ok(MergeReport {
        output: options.output.clone(),
        dtype,
        modules: merging
            .modules
            .iter()
            .filter(|m| merging.touched(&m.name))
            .count(),
        untied: merging.unties,
        check,
    })
}

/// An error of ours that came back through the writer, without its wrapping.
fn plainly(error: save::SaveError) -> TrainError {
    match error {
        save::SaveError::Read { name, source } => match source.downcast::<TrainError>() {
            Ok(own) => *own,
            Err(source) => save::SaveError::Read { name, source }.into(),
        },
        other => other.into(),
    }
}

fn weights(options: &MergeOptions) -> Result<Vec<f64>, TrainError> {
    let (given, adapters) = (options.weights.len(), options.adapters.len());
    if given == 0 {
        return Ok(vec![1.0; adapters]);
    }
    let mut problems = Vec::new();
    if given != adapters {
        problems.push(format!(
            "{given} weights are given for {adapters} adapters; give one for each"
        ));
    }
    let bad = options.weights.iter().filter(|w| !w.is_finite());
    problems.extend(bad.map(|w| format!("weight {w} is not a finite number")));
    match problems.is_empty() {
        true => Ok(options.weights.clone()),
        false => Err(TrainError::Mismatch(format!(
            "--weights: {}",
            problems.join("; ")
        ))),
    }
}

/// A base on disk and the adapters that are folded into it, one after the other: `W ← W + w·(fold(W) − W)`.
/// That is the weighted sum of what they add, but for methods that multiply what is there ((IA)³, DoRA); with
/// weights of 1 it is what they compute when they are in use together.
struct Merging<'a> {
    base: OpenBase,
    modules: Vec<ModuleShape>,
    /// The name under which the embedding is stored.
    embedding: &'static str,
    adapters: Vec<(HostAdapter, f64)>,
    /// Whether a head that shared the embedding's weights needs its own from now on.
    unties: bool,
    device: &'a Device,
}

const HEAD: &str = "lm_head";

impl<'a> Merging<'a> {
    fn open(
        base: OpenBase,
        dirs: &[PathBuf],
        weights: Vec<f64>,
        device: &'a Device,
    ) -> Result<Self, TrainError> {
        let (config, embedding) = CausalLm::fit(&base.config, &base.checkpoint)?;
        let modules = config.modules();
        let read = |module: &str| {
            let shape = modules.iter().find(|m| m.name == module)?;
            base.checkpoint.read_f32(&stored(shape, embedding)).ok()
        };
        let mut adapters = Vec::new();
        for (dir, weight) in dirs.iter().zip(weights) {
            adapters.push((HostAdapter::read(dir, &modules, Some(&read))?, weight));
        }
        refuse_conflicts(&base, &modules, dirs, &adapters)?;
        let has_head = modules.iter().any(|m| m.kind == ModuleKind::Head);
        // A head follows single rows that are trained, and nothing else of what is done to the table.
        let parts = |name: &str| {
            adapters.iter().any(|(adapter, _)| {
                let plan = adapter.plan();
                plan.targets.iter().any(|t| t.name == name)
                    || plan.saved.iter().any(|s| s.name == name)
            })
        };
        let mut tables = modules.iter().filter(|m| m.kind == ModuleKind::Embedding);
        let unties = !has_head && tables.any(|m| parts(&m.name));
        Ok(Self {
            base,
            modules,
            embedding,
            adapters,
            unties,
            device,
        })
    }

    fn touched(&self, module: &str) -> bool {
        self.adapters
            .iter()
            .any(|(adapter, _)| adapter.touches(module))
    }

    /// Names and shapes of all tensors to write, in the model's order.
    fn tensors(&self) -> Vec<(String, Vec<usize>)> {
        let mut tensors: Vec<_> = self.modules.iter().flat_map(ModuleShape::tensors).collect();
        if self.unties
            && let Some(table) = self.table()
        {
            tensors.push((format!("{HEAD}.weight"), table.shape.clone()));
        }
        tensors
    }

    fn table(&self) -> Option<&ModuleShape> {
        self.modules
            .iter()
            .find(|m| m.kind == ModuleKind::Embedding)
    }

    /// The values of one of [`Self::tensors`].
    fn values(&self, tensor: &str) -> Result<Vec<f32>, TrainError> {
        let (module, is_bias) = match (tensor.strip_suffix(".weight"), tensor.strip_suffix(".bias"))
        {
            (Some(module), _) => (module, false),
            (None, Some(module)) => (module, true),
            (None, None) => (tensor, false),
        };
        let shape = self.modules.iter().find(|m| m.name == module);
        let Some(shape) = shape else {
            return self.head();
        };
        if !self.touched(module) {
            let name = if is_bias {
                tensor.to_owned()
            } else {
                stored(shape, self.embedding)
            };
            return Ok(self.base.checkpoint.read_f32(&name)?);
        }
        let merged = self.folded(shape)?;
        let values = if is_bias {
            merged.bias
        } else {
            Some(merged.weight)
        };
        values.ok_or_else(|| TrainError::Framework(format!("{tensor} is not in the merged module")))
    }

    fn read(&self, shape: &ModuleShape) -> Result<HostModule, CheckpointError> {
        let files = &self.base.checkpoint;
        let bias = || files.read_f32(&format!("{}.bias", shape.name));
        Ok(HostModule {
            weight: files.read_f32(&stored(shape, self.embedding))?,
            bias: shape.bias.then(bias).transpose()?,
        })
    }

    /// A module with all adapters in it.
    fn folded(&self, shape: &ModuleShape) -> Result<HostModule, TrainError> {
        let base = self.read(shape)?;
        let mut touching: Vec<_> = self
            .adapters
            .iter()
            .filter(|(adapter, _)| adapter.touches(&shape.name))
            .collect();
        // A copy trained whole stands for the base, whatever adapters are beside it.
        let whole =
            |adapter: &HostAdapter| adapter.plan().saved.iter().any(|s| s.name == shape.name);
        touching.sort_by_key(|(adapter, _)| !whole(adapter));
        let mut merged: Option<HostModule> = None;
        for (adapter, weight) in touching {
            let onto = merged.as_ref().unwrap_or(&base);
            let mut next = adapter.folded(shape, &base, onto, self.device)?;
            towards(&mut next.weight, &onto.weight, *weight);
            if let (Some(next), Some(onto)) = (&mut next.bias, &onto.bias) {
                towards(next, onto, *weight);
            }
            merged = Some(next);
        }
        let merged = merged.unwrap_or(base);
        finite(&format!("{}.weight", shape.name), &merged.weight)?;
        if let Some(bias) = &merged.bias {
            finite(&format!("{}.bias", shape.name), bias)?;
        }
        Ok(merged)
    }

    /// The head that used to share the embedding's weights.
    fn head(&self) -> Result<Vec<f32>, TrainError> {
        let Some(table) = self.table() else {
            return Err(TrainError::Framework(
                "the model has no embedding".to_owned(),
            ));
        };
        let base = self.read(table)?;
        let mut head = base.clone();
        for (adapter, weight) in self.adapters.iter().filter(|(a, _)| a.touches(&table.name)) {
            let mut next = adapter.folded_head(table, &base, &head, self.device)?;
            towards(&mut next, &head.weight, *weight);
            head.weight = next;
        }
        finite(&format!("{HEAD}.weight"), &head.weight)?;
        Ok(head.weight)
    }

    /// Compares logits: with the adapters beside the base, merged in f32, and as written.
    fn check(&self, output: &Path) -> Result<MergeCheck, TrainError> {
        let dense = Loading {
            quantization: Quantization::dense(),
            ..Loading::default()
        };
        let mut model = self.base.weights(self.device, &dense)?;
        let adapted = self.adapted(&mut model)?;
        self.put_into(&mut model)?;
        let merged = probe_logits(&model)?;
        let device = self.device;
        // Two models at once would double the memory.
        drop(model);
        let checkpoint = Checkpoint::open(output)?;
        let config = LlamaConfig::from_json(checkpoint.config_json())?;
        let written = probe_logits(&CausalLm::load(&config, &checkpoint, device)?)?;
        let reference = adapted.as_ref().unwrap_or(&merged);
        Ok(MergeCheck {
            positions: PROBE_TOKENS,
            max_abs_logit: reference
                .iter()
                .fold(0.0, |max, x| f64::from(x.abs()).max(max)),
            max_abs_logit_diff: adapted
                .as_ref()
                .map(|adapted| max_difference(adapted, &merged)),
            max_abs_logit_diff_written: max_difference(reference, &written),
        })
    }

    /// Logits of the base with all adapters in use, and the base alone again.
    fn adapted(&self, model: &mut CausalLm) -> Result<Option<Vec<f32>>, TrainError> {
        let mut names = Vec::new();
        let whole = |adapter: &HostAdapter| adapter.trains_everything();
        if self.adapters.len() > 1 && self.adapters.iter().any(|(adapter, _)| whole(adapter)) {
            return Ok(None);
        }
        for (i, (adapter, weight)) in self.adapters.iter().enumerate() {
            let mut adapter = adapter.clone();
            if !adapter.weigh(*weight) {
                enamel_adapter::detach(model);
                return Ok(None);
            }
            let name = match self.adapters.len() {
                1 => enamel_adapter::DEFAULT.to_owned(),
                _ => format!("merged{i}"),
            };
            adapter.attach(model, &name)?;
            names.push(name);
        }
        let names: Vec<&str> = names.iter().map(String::as_str).collect();
        if self.adapters.len() > 1 {
            enamel_adapter::set_active(model, &names)?;
        }
        let logits = probe_logits(model)?;
        enamel_adapter::detach(model);
        Ok(Some(logits))
    }

    /// Replaces the base's weights by the merged ones.
    fn put_into(&self, model: &mut CausalLm) -> Result<(), TrainError> {
        let mut failed = None;
        enamel_adapter::Adaptable::for_each_slot(model, &mut |name, slot| {
            let shape = self.modules.iter().find(|m| m.name == name);
            let (Some(shape), None) = (shape.filter(|m| self.touched(&m.name)), &failed) else {
                return;
            };
            match self.folded(shape) {
                Ok(merged) => put(slot, shape, merged, self.device),
                Err(error) => failed = Some(error),
            }
        });
        if let Some(error) = failed {
            return Err(error);
        }
        if self.unties
            && let Some(table) = self.table()
        {
            let data = TensorData::new(self.head()?, [table.shape[0], table.shape[1]]);
            match model {
                CausalLm::Llama(llama) => {
                    let head = Tensor::from_data(data, self.device);
                    llama.lm_head = Some(Linear::new(HEAD, head, None));
                }
            }
        }
        Ok(())
    }
}

fn put(slot: Slot<'_>, shape: &ModuleShape, merged: HostModule, device: &Device) {
    let name = &shape.name;
    let matrix = |values| {
        let data = TensorData::new(values, [shape.shape[0], shape.shape[1]]);
        Tensor::<2>::from_data(data, device)
    };
    let vector = |values: Vec<f32>| {
        let count = values.len();
        Tensor::<1>::from_data(TensorData::new(values, [count]), device)
    };
    match slot {
        Slot::Linear(linear) => {
            *linear = Linear::new(name, matrix(merged.weight), merged.bias.map(vector));
        }
        Slot::Embedding(table) => {
            *table =
                enamel_adapter::Embedding::new(&format!("{name}.weight"), matrix(merged.weight));
        }
        Slot::Norm(norm) => {
            *norm = enamel_adapter::Frozen::new(&format!("{name}.weight"), vector(merged.weight));
        }
    }
}

/// What cannot be merged, all of it, before anything is written.
fn refuse_conflicts(
    base: &OpenBase,
    modules: &[ModuleShape],
    dirs: &[PathBuf],
    adapters: &[(HostAdapter, f64)],
) -> Result<(), TrainError> {
    for (dir, (adapter, _)) in dirs.iter().zip(adapters) {
        let has_bias = |name: &str| modules.iter().any(|m| m.name == name && m.bias);
        let mut without: Vec<&str> = adapter
            .own_biases()
            .into_iter()
            .filter(|name| !has_bias(name))
            .map(kind_of)
            .collect();
        without.sort_unstable();
        without.dedup();
        if !without.is_empty() {
            return Err(TrainError::Run {
                path: dir.clone(),
                reason: format!(
                    "the adapter has biases of its own (lora_bias) for {}, and config.json of {} has no place for a \
                     bias there, so a merged model would lose them",
                    without.join(", "),
                    base.local.path.display()
                ),
                help: "use the adapter beside its base, or train it without lora_bias".to_owned(),
            });
        }
    }
    let mut problems = Vec::new();
    for module in modules {
        let whole = |adapter: &HostAdapter| {
            adapter.trains_everything()
                || adapter.plan().saved.iter().any(|s| s.name == module.name)
        };
        let twice: Vec<String> = dirs
            .iter()
            .zip(adapters)
            .filter(|(_, (adapter, _))| whole(adapter))
            .map(|(dir, _)| dir.display().to_string())
            .collect();
        if twice.len() > 1 {
            problems.push(format!(
                "{} is trained whole by {}",
                module.name,
                twice.join(" and by ")
            ));
        }
    }
    if problems.is_empty() {
        return Ok(());
    }
    problems.truncate(8);
    Err(TrainError::Mismatch(format!(
        "these adapters cannot be added up: {}\n  help: merge one of them alone, or leave one out",
        problems.join("; ")
    )))
}

/// The name of a module's weight in the files.
fn stored(module: &ModuleShape, embedding: &str) -> String {
    match module.kind {
        ModuleKind::Embedding => embedding.to_owned(),
        _ => format!("{}.weight", module.name),
    }
}

/// `values` become `from + weight·(values − from)`.
fn towards(values: &mut [f32], from: &[f32], weight: f64) {
    if weight == 1.0 {
        return;
    }
    for (value, from) in values.iter_mut().zip(from) {
        let from = f64::from(*from);
        *value = (from + weight * (f64::from(*value) - from)) as f32;
    }
}

fn finite(tensor: &str, values: &[f32]) -> Result<(), TrainError> {
    if values.iter().all(|v| v.is_finite()) {
        return Ok(());
    }
    Err(TrainError::Mismatch(format!(
        "{tensor}, merged, holds a value that is not finite; nothing was written\n  help: look at the adapters \
         with `enamel adapter inspect`, or choose smaller --weights"
    )))
}

/// Found before the work, not after it.
pub(crate) fn refuse_occupied(output: &Path) -> Result<(), TrainError> {
    let occupied = output.is_file()
        || std::fs::read_dir(output).is_ok_and(|mut entries| entries.next().is_some());
    if occupied {
        return Err(TrainError::Run {
            path: output.to_owned(),
            reason: "there is something already".to_owned(),
            help: "choose another --output, or remove it".to_owned(),
        });
    }
    Ok(())
}

/// Logits `[PROBE_TOKENS, vocabulary]`, row-major, of a fixed sequence that wanders through the
/// whole vocabulary.
fn probe_logits(model: &CausalLm) -> Result<Vec<f32>, TrainError> {
    let vocabulary = model.config().vocab_size;
    // Steps of a golden section of the vocabulary spread the tokens evenly over it.
    let ids: Vec<i64> = (1..=PROBE_TOKENS)
        .map(|i| ((i as f64 * 0.618_033_988_749_895).fract() * vocabulary as f64) as i64)
        .collect();
    let device = model.device();
    let ids = Tensor::<2, Int>::from_data(TensorData::new(ids, [1, PROBE_TOKENS]), &device);
    let hidden = model.forward_hidden(&ModelInput::new(ids), None);
    let [_, tokens, width] = hidden.dims();
    model
        .logits(hidden.reshape([tokens, width]))
        .try_into_vec_as::<f32>()
        .map_err(|error| TrainError::Framework(format!("reading logits: {error}")))
}

fn max_difference(a: &[f32], b: &[f32]) -> f64 {
    if a.len() != b.len() {
        return f64::INFINITY;
    }
    a.iter().zip(b).fold(0.0, |max, (a, b)| {
        let difference = f64::from((a - b).abs());
        // `max` would swallow a NaN.
        if difference.is_nan() {
            f64::NAN
        } else {
            difference.max(max)
        }
    })
}
