//! A causal language model of any supported architecture: loading it and running it.

use std::collections::BTreeMap;
use std::num::NonZeroUsize;

use burn::module::Module;
use burn::tensor::{Device, Int, Tensor};
use enamel_adapter::base::ids::param_id;
use enamel_adapter::methods::xlora;
use enamel_adapter::{Adaptable, Slot, SlotRef, XLora};
use enamel_kernels::quantized::formats::QuantError;
use enamel_kernels::{BaseWeight, Compute, HostValues, KeyMask};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use rayon::prelude::*;

use crate::arch::Llama;
use crate::checkpoint::{CheckpointError, EMBEDDING, HEAD, TensorSource, is_buffer};
use crate::config::{LlamaConfig, bullets};
use crate::generation::kv_cache::KvCache;
use crate::quantization::{Loading, Quantization};

/// How many tensors of a kind an error spells out.
const LISTED: usize = 40;
/// Random values drawn from one stream; an even number, as they come in pairs.
const NORMAL_BLOCK: usize = 1 << 16;

/// Why a model could not be loaded.
#[derive(Debug, thiserror::Error)]
pub enum LoadError {
    /// The checkpoint's tensors are not those that the configuration calls for.
    #[error(
        "the weights do not fit config.json (is it the file they came with?):{}",
        describe(.missing, .unexpected, .misshapen)
    )]
    Mismatch {
        /// Names that the model needs and the checkpoint lacks.
        missing: Vec<String>,
        /// Names that the model has no place for.
        unexpected: Vec<String>,
        /// Tensors of another shape than the configuration says.
        misshapen: Vec<Misshapen>,
    },
    /// A tensor's values could not be read.
    #[error(transparent)]
    Checkpoint(#[from] CheckpointError),
    /// The source broke its word about a tensor's shape.
    #[error("tensor '{name}' has {found} values where its shape calls for {expected}")]
    WrongLength {
        /// The tensor.
        name: String,
        /// Product of the shape.
        expected: usize,
        /// Values that came.
        found: usize,
    },
    /// A weight that the format cannot hold.
    #[error(
        "tensor '{name}' cannot be quantised: {source}\n  \
         help: leave its layer dense with model.quantization.skip_modules (--skip-modules)"
    )]
    Quantise {
        /// The tensor.
        name: String,
        /// Why not.
        source: QuantError,
    },
    /// A weight that is no whole number of blocks.
    #[error(
        "tensor '{name}' of shape {shape:?} is no whole number of blocks of {block} values\n  \
         help: choose a smaller model.quantization.bnb_4bit_blocksize (--bnb-4bit-blocksize), or name its layer in \
         skip_modules (--skip-modules)"
    )]
    Blocks {
        /// The tensor.
        name: String,
        /// Its rows and columns.
        shape: [usize; 2],
        /// Values a block.
        block: usize,
    },
    /// Names in `skip_modules` that no linear layer has, each with the nearest that one has.
    #[error("model.quantization.skip_modules (--skip-modules) names what the model has not:{}", strange(.0))]
    SkipModules(Vec<(String, Option<String>)>),
}

fn strange(names: &[(String, Option<String>)]) -> String {
    let line = |(name, near): &(String, Option<String>)| match near {
        Some(near) => format!("{name} (did you mean {near}?)"),
        None => format!("{name} (no linear layer's name begins or ends so)"),
    };
    bullets(&names.iter().map(line).collect::<Vec<_>>())
}

/// A tensor of the wrong shape.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Misshapen {
    /// The tensor.
    pub name: String,
    /// The shape that the configuration calls for.
    pub expected: Vec<usize>,
    /// The shape in the checkpoint.
    pub found: Vec<usize>,
}

fn describe(missing: &[String], unexpected: &[String], misshapen: &[Misshapen]) -> String {
    let some = |kind: &str, lines: Vec<String>| {
        let mut lines: Vec<_> = lines
            .into_iter()
            .map(|line| format!("{kind} {line}"))
            .collect();
        if lines.len() > LISTED {
            let more = lines.len() - LISTED;
            lines.truncate(LISTED);
            lines.push(format!("and {more} more {kind}"));
        }
        lines
    };
    let mut lines = some("missing", missing.to_vec());
    lines.extend(some("unexpected", unexpected.to_vec()));
    let shapes = misshapen.iter().map(|m| {
        format!(
            "{}: {:?} in the checkpoint, {:?} needed",
            m.name, m.found, m.expected
        )
    });
    lines.extend(some("misshapen", shapes.collect()));
    bullets(&lines)
}

/// What a forward pass reads.
#[derive(Clone, Debug)]
pub struct ModelInput {
    /// Token ids `[batch, tokens]`, each below the vocabulary's size, on the model's device.
    pub input_ids: Tensor<2, Int>,
    /// Which keys are real, over the cached ones and these; `None` if all are.
    pub attention_mask: Option<KeyMask>,
    /// In training: seeds what the blocks draw (dropout), each block by its number, which leaves the
    /// device's generator elsewhere than it was. Without it they draw from that generator as it stands.
    pub seed: Option<u64>,
}

impl ModelInput {
    /// Tokens without padding.
    pub fn new(input_ids: Tensor<2, Int>) -> Self {
        Self {
            input_ids,
            attention_mask: None,
            seed: None,
        }
    }
}

/// A causal language model.
#[derive(Module, Debug)]
pub enum CausalLm {
    /// Llama, Mistral and Qwen2.
    Llama(Llama),
}

impl CausalLm {
    /// Loads a model, one tensor after the other. Names and shapes are compared first, so nothing
    /// large is allocated for a checkpoint that does not fit.
    ///
    /// As in transformers, a checkpoint whose configuration ties the head but which holds a head
    /// that differs from the embedding is loaded untied; the model's `config` says so then. What the file
    /// has quantised is held dense.
    pub fn load(
        config: &LlamaConfig,
        checkpoint: &dyn TensorSource,
        device: &Device,
    ) -> Result<Self, LoadError> {
        let quantization = Quantization::dense();
        let loading = Loading {
            quantization,
            ..Loading::default()
        };
        Self::load_for(config, checkpoint, device, &loading)
    }

    /// [`Self::load`] for products of another kind: for bf16, every parameter is rounded to bf16 as it
    /// comes (to nearest, ties to even: `torch_dtype = bfloat16`), and matrices are held in bf16 where the
    /// device's kernels read that. For f32 nothing is rounded, and matrices that are bf16 in the file stay
    /// so there, which changes no number. Linear layers are packed as [`Quantization`] says, one after the
    /// other, so that no more than one of them is ever dense.
    pub fn load_for(
        config: &LlamaConfig,
        checkpoint: &dyn TensorSource,
        device: &Device,
        loading: &Loading,
    ) -> Result<Self, LoadError> {
        let Loading {
            compute,
            quantization,
        } = loading;
        let (config, embedding) = Self::fit(config, checkpoint)?;
        quantization.check(&config.modules())?;
        let mut pack = |module: &str| quantization.pack(checkpoint, module, *compute, device);
        let mut fetch = |name: &str, shape: &[usize]| {
            let stored = if name == EMBEDDING { embedding } else { name };
            let values = checkpoint.read(stored)?;
            let expected = shape.iter().product();
            if values.len() == expected {
                return Ok(values);
            }
            Err(LoadError::WrongLength {
                name: name.to_owned(),
                expected,
                found: values.len(),
            })
        };
        let model = Llama::build(&config, device, *compute, &mut fetch, &mut pack)?;
        Ok(Self::Llama(model))
    }

    /// Compares a checkpoint's names and shapes with a configuration, without loading it: the
    /// configuration as the files bear it out (untied, as [`Self::load`] has it), and the name under
    /// which the embedding is stored.
    ///
    /// # Errors
    /// Missing, unexpected and misshapen tensors, all at once.
    pub fn fit(
        config: &LlamaConfig,
        checkpoint: &dyn TensorSource,
    ) -> Result<(LlamaConfig, &'static str), LoadError> {
        let embedding = check_tensors(config, checkpoint)?;
        let has = |name| checkpoint.tensors().iter().any(|t| t.name == name);
        let parted = config.tie_word_embeddings
            && has(EMBEDDING)
            && has(HEAD)
            && checkpoint.read_f32(EMBEDDING)? != checkpoint.read_f32(HEAD)?;
        let config = if parted {
            config.untied()
        } else {
            config.clone()
        };
        Ok((config, embedding))
    }

    /// A model with random weights, as transformers initialises one: norms 1, biases 0, the rest
    /// normal with `initializer_range` as its standard deviation. The seed and a parameter's name
    /// decide its values.
    pub fn random(config: &LlamaConfig, seed: u64, device: &Device) -> Result<Self, LoadError> {
        let deviation = config.initializer_range;
        let mut fetch = |name: &str, shape: &[usize]| {
            let count = shape.iter().product();
            if shape.len() == 1 {
                let value = if name.ends_with(".bias") { 0.0 } else { 1.0 };
                return Ok(HostValues::F32(vec![value; count]));
            }
            let values = normal_values(seed ^ param_id(name).val(), count, deviation);
            Ok(HostValues::F32(values))
        };
        let model = Llama::build(config, device, Compute::F32, &mut fetch, &mut |_| Ok(None))?;
        Ok(Self::Llama(model))
    }

    /// The settings that the model was built with.
    pub fn config(&self) -> &LlamaConfig {
        match self {
            Self::Llama(model) => model.config(),
        }
    }

    /// Runs the blocks and the final norm. Positions count from 0, or from the cache's length,
    /// padding included; rotary embedding makes only their differences matter. With a cache, its
    /// batch must be the input's, and it holds the new tokens afterwards. Rows of padding hold
    /// nothing of use.
    ///
    /// With an X-LoRA in use these are two runs, the first without gradients; a cache then holds the
    /// keys and values of both, and must not be carried from one choice of adapters to another.
    ///
    /// # Shapes
    /// - input_ids: `[batch, tokens]`; attention_mask: `batch` rows of `cache + tokens` keys
    /// - result: `[batch, tokens, hidden]`
    pub fn forward_hidden(&self, input: &ModelInput, mut cache: Option<&mut KvCache>) -> Tensor<3> {
        let Some(gate) = xlora::in_use(self) else {
            return self.run(input, cache);
        };
        let hidden = self.first_pass(gate, input, cache.as_deref_mut());
        let mut model = xlora::for_second_pass(self, gate.gates(hidden));
        // A segment that runs again has no way to hand gradients to shares that are made outside it.
        model.set_recompute(None);
        model.run(input, cache)
    }

    /// Each token's shares of an X-LoRA's experts, before any choice among them; `None` where none is
    /// in use.
    ///
    /// # Shapes
    /// - result: `[batch, tokens, layers, experts]`, with one layer unless `layerwise_scalings`
    pub fn xlora_scalings(&self, input: &ModelInput) -> Option<Tensor<4>> {
        let gate = xlora::in_use(self)?;
        Some(gate.scalings(self.first_pass(gate, input, None)))
    }

    fn first_pass(
        &self,
        gate: &XLora,
        input: &ModelInput,
        cache: Option<&mut KvCache>,
    ) -> Tensor<3> {
        let [batch, tokens] = input.input_ids.dims();
        let model = xlora::for_first_pass(self, gate, batch * tokens, &self.device());
        model.run(input, cache.map(KvCache::first_pass)).detach()
    }

    fn run(&self, input: &ModelInput, cache: Option<&mut KvCache>) -> Tensor<3> {
        match self {
            Self::Llama(model) => model.forward_hidden(input, cache),
        }
    }

    /// The matrix that yields logits `[vocabulary, hidden]`: the head's, or the embedding's when
    /// they are tied. An adapter on the head is included, and gradients reach it. A trained copy of a
    /// tied embedding, or low-rank factors beside it, leave the head as it was, as in PEFT; single
    /// trained rows do not.
    pub fn head_weight(&self) -> BaseWeight {
        match self {
            Self::Llama(model) => match &model.lm_head {
                Some(head) => head.in_use().weight,
                None => model.embed_tokens.head_weight(),
            },
        }
    }

    /// [`Self::head_weight`], if [`Self::logits`] is a product with it and nothing else: an adapter on the
    /// head may add a bias, drop inputs in training, or differ between rows.
    pub fn head_as_one_product(&self) -> Option<BaseWeight> {
        match self {
            Self::Llama(model) => match &model.lm_head {
                Some(head) => head.as_one_product(),
                None => Some(model.embed_tokens.head_weight()),
            },
        }
    }

    /// `[rows, hidden]` (rows of [`Self::forward_hidden`]) to `[rows, vocabulary]`.
    pub fn logits(&self, hidden: Tensor<2>) -> Tensor<2> {
        match self {
            Self::Llama(model) => match &model.lm_head {
                Some(head) => head.forward(hidden),
                None => enamel_kernels::linear(hidden, model.embed_tokens.head_weight()),
            },
        }
    }

    /// In training: keeps only the input of so many blocks at a time, and runs them again in the backward
    /// pass (activation or gradient checkpointing); `None` keeps all. Gradients are the same bits either
    /// way, with dropout too where the input has a [seed](ModelInput::seed). Blocks under an X-LoRA's
    /// mixture are kept in any case.
    pub fn set_recompute(&mut self, blocks: Option<NonZeroUsize>) {
        match self {
            Self::Llama(model) => model.recompute = blocks,
        }
    }

    /// The device that the parameters are on.
    pub fn device(&self) -> Device {
        match self {
            Self::Llama(model) => model.norm.weight.val().device(),
        }
    }
}

impl Adaptable for CausalLm {
    fn for_each_slot(&mut self, f: &mut dyn FnMut(&str, Slot<'_>)) {
        match self {
            Self::Llama(model) => model.for_each_slot(f),
        }
    }

    fn for_each_slot_ref(&self, f: &mut dyn FnMut(&str, SlotRef<'_>)) {
        match self {
            Self::Llama(model) => model.for_each_slot_ref(f),
        }
    }

    fn gate(&self) -> Option<&XLora> {
        match self {
            Self::Llama(model) => model.gate(),
        }
    }

    fn gate_place(&mut self) -> Option<&mut Option<XLora>> {
        match self {
            Self::Llama(model) => model.gate_place(),
        }
    }
}

/// Compares all names and shapes; returns the name under which the embedding is stored.
fn check_tensors(
    config: &LlamaConfig,
    checkpoint: &dyn TensorSource,
) -> Result<&'static str, LoadError> {
    let found: BTreeMap<&str, &[usize]> = checkpoint
        .tensors()
        .iter()
        .map(|t| (t.name.as_str(), t.shape.as_slice()))
        .collect();
    let mut expected: BTreeMap<String, Vec<usize>> = BTreeMap::new();
    for module in config.modules() {
        expected.extend(module.tensors());
    }
    let mut embedding = EMBEDDING;
    if config.tie_word_embeddings && found.contains_key(HEAD) {
        // Either name will do for the one matrix.
        let shape = vec![config.vocab_size, config.hidden_size];
        if !found.contains_key(EMBEDDING) {
            embedding = HEAD;
            expected.remove(EMBEDDING);
        }
        expected.insert(HEAD.to_owned(), shape);
    }
    let missing: Vec<_> = expected
        .keys()
        .filter(|name| !found.contains_key(name.as_str()))
        .cloned()
        .collect();
    let unexpected: Vec<_> = found
        .keys()
        .filter(|name| !expected.contains_key(**name) && !is_buffer(name))
        .map(|name| (*name).to_owned())
        .collect();
    let misshapen: Vec<_> = expected
        .into_iter()
        .filter_map(|(name, shape)| match found.get(name.as_str()) {
            Some(other) if *other != shape => Some(Misshapen {
                found: other.to_vec(),
                name,
                expected: shape,
            }),
            _ => None,
        })
        .collect();
    if missing.is_empty() && unexpected.is_empty() && misshapen.is_empty() {
        Ok(embedding)
    } else {
        Err(LoadError::Mismatch {
            missing,
            unexpected,
            misshapen,
        })
    }
}

/// Normal values by Box and Muller's method, the same for any number of threads.
fn normal_values(seed: u64, count: usize, deviation: f64) -> Vec<f32> {
    let mut values = vec![0.0; count];
    values
        .par_chunks_mut(NORMAL_BLOCK)
        .enumerate()
        .for_each(|(block, values)| {
            let mut rng = ChaCha8Rng::seed_from_u64(seed);
            rng.set_stream(block as u64);
            for pair in values.chunks_mut(2) {
                // 1 − u lies in (0, 1]: its logarithm is finite.
                let radius = deviation * (-2.0 * (1.0 - rng.random::<f64>()).ln()).sqrt();
                let (sin, cos) = (std::f64::consts::TAU * rng.random::<f64>()).sin_cos();
                pair[0] = (radius * cos) as f32;
                if let Some(second) = pair.get_mut(1) {
                    *second = (radius * sin) as f32;
                }
            }
        });
    values
}

#[cfg(test)]
mod tests;
