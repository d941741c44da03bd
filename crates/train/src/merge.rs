//! `enamel merge`: an adapter folded into its base, written as a model of its own and read back.

use std::path::{Path, PathBuf};

use burn::tensor::{Device, Int, Tensor, TensorData};
use enamel_adapter::{Adaptable, Linear, SlotRef};
use enamel_model::checkpoint::{Checkpoint, SourceDtype, TensorSource};
use enamel_model::save::{self, SaveDtype, SaveOptions};
use enamel_model::source::PullProgress;
use enamel_model::{CausalLm, LlamaConfig, ModelInput};

use crate::error::TrainError;
use crate::loaded::{OpenBase, base_of};

/// What to merge, and where to.
#[derive(Clone, Debug)]
pub struct MergeOptions {
    /// The base; `None` for the one that the adapter names.
    pub model: Option<String>,
    /// The adapter's directory.
    pub adapter: PathBuf,
    /// The directory to write; it must not hold a model yet.
    pub output: PathBuf,
    /// Element type of the written weights; `None` for the base's own.
    pub dtype: Option<SaveDtype>,
}

/// What merging did to the numbers.
#[derive(Clone, Debug)]
pub struct MergeReport {
    /// The directory written.
    pub output: PathBuf,
    /// Its element type.
    pub dtype: SaveDtype,
    /// Modules that the adapter changed.
    pub modules: usize,
    /// Positions of the probe at which logits were compared.
    pub positions: usize,
    /// Largest magnitude among the adapted model's logits, to judge differences by.
    pub max_abs_logit: f64,
    /// Largest difference of logits between base + adapter and the weights merged in f32.
    pub max_abs_logit_diff: f64,
    /// The same between base + adapter and the files as written and read back: rounding to
    /// `dtype` is in it.
    pub max_abs_logit_diff_written: f64,
}

/// Tokens of the text on which logits are compared.
const PROBE_TOKENS: usize = 48;

/// Merges, writes, reads back and compares.
pub fn merge(
    options: &MergeOptions,
    device: &Device,
    progress: &mut dyn PullProgress,
) -> Result<MergeReport, TrainError> {
    let reference = match &options.model {
        Some(reference) => reference.clone(),
        None => base_of(&options.adapter)?,
    };
    refuse_occupied(&options.output)?;
    let base = OpenBase::open(&reference, None, progress)?;
    let dtype = options
        .dtype
        .unwrap_or_else(|| native_dtype(&base.checkpoint));
    let mut base = base.load(device)?;
    let loaded = enamel_adapter::load_pretrained(&mut base.model, &options.adapter, false)?;
    let adapted = probe_logits(&base.model)?;
    untie(&mut base.model);
    enamel_adapter::merge(&mut base.model)?;
    let merged = probe_logits(&base.model)?;
    save::write_hf(
        &options.output,
        &tensors(&base.model),
        &mut |name| values(&base.model, name),
        &base.open.checkpoint,
        &SaveOptions::new(dtype),
    )?;
    // The merged model has served its purpose; two at once would double the memory.
    drop(base);

    let checkpoint = Checkpoint::open(&options.output)?;
    let config = LlamaConfig::from_json(checkpoint.config_json())?;
    let written = probe_logits(&CausalLm::load(&config, &checkpoint, device)?)?;
    Ok(MergeReport {
        output: options.output.clone(),
        dtype,
        modules: loaded.plan.targets.len() + loaded.plan.saved.len(),
        positions: PROBE_TOKENS,
        max_abs_logit: adapted
            .iter()
            .fold(0.0, |max, x| f64::from(x.abs()).max(max)),
        max_abs_logit_diff: max_difference(&adapted, &merged),
        max_abs_logit_diff_written: max_difference(&adapted, &written),
    })
}

/// The element type that most of the base has; f32, which loses nothing, for a quantised one.
fn native_dtype(checkpoint: &Checkpoint) -> SaveDtype {
    let count = |dtype| {
        let same = checkpoint.tensors().iter().filter(|t| t.dtype == dtype);
        same.map(|t| t.shape.iter().product::<usize>())
            .sum::<usize>()
    };
    let kinds = [
        (SourceDtype::F32, SaveDtype::F32),
        (SourceDtype::F16, SaveDtype::F16),
        (SourceDtype::BF16, SaveDtype::BF16),
        (SourceDtype::Quantised, SaveDtype::F32),
    ];
    let most = kinds.into_iter().max_by_key(|(dtype, _)| count(*dtype));
    most.map_or(SaveDtype::F32, |(_, dtype)| dtype)
}

/// A trained copy of a tied embedding leaves the head as it was, so the two part here.
fn untie(model: &mut CausalLm) {
    match model {
        CausalLm::Llama(llama) => {
            // Rows trained by themselves are the head's too, and what else an adapter does to the table
            // is not.
            let part = llama.embed_tokens.part(enamel_adapter::DEFAULT);
            let differs = part.is_some_and(|part| part.saved.is_some() || part.lora.is_some());
            if llama.lm_head.is_none() && differs {
                let head = llama.embed_tokens.weight.val();
                llama.lm_head = Some(Linear::new("lm_head", head, None));
            }
        }
    }
}

/// Names and shapes of all weights, in the model's order.
fn tensors(model: &CausalLm) -> Vec<(String, Vec<usize>)> {
    let mut tensors = Vec::new();
    for module in enamel_adapter::shapes(model) {
        if module.bias {
            tensors.push((format!("{}.bias", module.name), module.shape[..1].to_vec()));
        }
        tensors.push((format!("{}.weight", module.name), module.shape));
    }
    tensors
}

/// The values of one of [`tensors`].
fn values(
    model: &CausalLm,
    tensor: &str,
) -> Result<Vec<f32>, Box<dyn std::error::Error + Send + Sync>> {
    let mut data = None;
    model.for_each_slot_ref(&mut |name, slot| {
        let parameter = tensor
            .strip_prefix(name)
            .and_then(|rest| rest.strip_prefix('.'));
        match (parameter, slot) {
            (Some("weight"), SlotRef::Linear(linear)) => {
                data = Some(linear.weight.val().into_data())
            }
            (Some("bias"), SlotRef::Linear(linear)) => {
                data = linear.bias.as_ref().map(|bias| bias.val().into_data());
            }
            (Some("weight"), SlotRef::Embedding(table)) => {
                data = Some(table.weight.val().into_data())
            }
            (Some("weight"), SlotRef::Norm(norm)) => data = Some(norm.weight.val().into_data()),
            _ => {}
        }
    });
    let data = data.ok_or("the model has no such tensor")?;
    Ok(data.iter::<f32>().collect())
}

/// Found before the work, not after it.
fn refuse_occupied(output: &Path) -> Result<(), TrainError> {
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
