//! A model of any supported architecture: loading it and running it.

use std::collections::BTreeMap;
use std::num::NonZeroUsize;

use burn::module::Module;
use burn::tensor::{Device, Tensor};
use enamel_adapter::base::ids::param_id;
use enamel_adapter::methods::xlora;
use enamel_adapter::{Adaptable, ModelPart, ModuleShape, Slot, SlotRef, Slots, XLora};
use enamel_kernels::{BaseWeight, Compute, HostValues};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use rayon::prelude::*;

use crate::arch::{AnyBackbone, ArchConfig, Backbone};
use crate::cache::Cache;
use crate::checkpoint::{CheckpointError, TensorSource, is_buffer};
use crate::error::{LoadError, Misshapen};
use crate::heads::{HEAD, Head, HeadConfig, is_head};
use crate::nn::input::ModelInput;
use crate::nn::kv_cache::KvCache;
use crate::nn::weights::{Pack, Weights};
use crate::quantization::{Loading, Quantization};

/// Random values drawn from one stream; an even number, as they come in pairs.
const NORMAL_BLOCK: usize = 1 << 16;

/// A model: blocks of any architecture, and a head.
#[derive(Module, Debug)]
pub struct Model {
    /// Everything up to the last norm.
    pub backbone: AnyBackbone,
    /// What the last hidden states go through.
    pub head: Head,
    /// The classifier of an X-LoRA, where the model carries one.
    pub mixture: Option<XLora>,
    #[module(skip)]
    config: ArchConfig,
}

/// Under which names a checkpoint has a model's weights.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct StoredNames {
    embedding: &'static str,
    as_head: bool,
}

impl StoredNames {
    /// The name of a module's weight. A tied embedding may lie there as the head.
    pub fn weight(&self, module: &str) -> String {
        match self.as_head && module == self.embedding {
            true => format!("{HEAD}.weight"),
            false => format!("{module}.weight"),
        }
    }

    /// A module's weight `[out, in]` from its checkpoint.
    ///
    /// # Errors
    /// What the checkpoint says.
    pub fn read(
        &self,
        source: &dyn TensorSource,
        module: &ModuleShape,
    ) -> Result<Vec<f32>, CheckpointError> {
        let values = source.read_f32(&self.weight(&module.name))?;
        Ok(module.from_stored(values))
    }

    /// Whether a module is the embedding that a tied head shares.
    pub fn is_tied_table(&self, module: &str) -> bool {
        module == self.embedding
    }
}

impl Model {
    /// Loads a model, one tensor after the other. Names and shapes are compared first, so nothing
    /// large is allocated for a checkpoint that does not fit.
    ///
    /// As in transformers, a checkpoint whose configuration ties the head but which holds a head
    /// that differs from the embedding is loaded untied; the model's `config` says so then. What the file
    /// has quantised is held dense.
    pub fn load(
        config: &ArchConfig,
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
    /// so there, which changes no number. A head that the files do not have is drawn from [`Loading::seed`]. Linear layers are packed as [`Quantization`] says, one after the
    /// other, so that no more than one of them is ever dense.
    pub fn load_for(
        config: &ArchConfig,
        checkpoint: &dyn TensorSource,
        device: &Device,
        loading: &Loading,
    ) -> Result<Self, LoadError> {
        let Loading {
            compute,
            quantization,
            seed,
        } = loading;
        let (config, stored) = Self::fit(config, checkpoint)?;
        quantization.check(&config.modules())?;
        let mut pack = |module: &str, transposed: bool| {
            quantization.pack(checkpoint, (module, transposed), *compute, device)
        };
        let (deviation, new_head) = (config.initializer_range, config.head.is_new());
        let mut fetch = |name: &str, shape: &[usize]| {
            let expected = shape.iter().product();
            let values = match name.strip_suffix(".weight") {
                Some(module) if new_head && module == config.head_module() => {
                    let seed = seed ^ param_id(name).val();
                    HostValues::F32(normal_values(seed, expected, deviation))
                }
                Some(module) => checkpoint.read(&stored.weight(module))?,
                None => checkpoint.read(name)?,
            };
            if values.len() == expected {
                return Ok(values);
            }
            Err(LoadError::WrongLength {
                name: name.to_owned(),
                expected,
                found: values.len(),
            })
        };
        let mut weights = Weights::new(device, *compute, &mut fetch, &mut pack);
        Self::build(config.clone(), &mut weights)
    }

    /// Compares a checkpoint's names and shapes with a configuration, without loading it: the
    /// configuration as the files bear it out (untied, as [`Self::load`] has it), and the names under
    /// which its weights are stored.
    ///
    /// # Errors
    /// Missing, unexpected and misshapen tensors, all at once.
    pub fn fit(
        config: &ArchConfig,
        checkpoint: &dyn TensorSource,
    ) -> Result<(ArchConfig, StoredNames), LoadError> {
        let stored = check_tensors(config, checkpoint)?;
        let has = |name: &str| checkpoint.tensors().iter().any(|t| t.name == name);
        let table = format!("{}.weight", config.embedding());
        let head = format!("{HEAD}.weight");
        let parted = config.ties_head()
            && has(&table)
            && has(&head)
            && checkpoint.read_f32(&table)? != checkpoint.read_f32(&head)?;
        let config = if parted {
            config.untied()
        } else {
            config.clone()
        };
        Ok((config, stored))
    }

    fn build(config: ArchConfig, weights: &mut Weights<'_, '_>) -> Result<Self, LoadError> {
        Ok(Self {
            backbone: config.build(weights)?,
            head: config.build_head(weights)?,
            mixture: None,
            config,
        })
    }

    /// A model with random weights, as transformers initialises one: norms 1, biases 0, the rest
    /// normal with `initializer_range` as its standard deviation. The seed and a parameter's name
    /// decide its values.
    pub fn random(config: &ArchConfig, seed: u64, device: &Device) -> Result<Self, LoadError> {
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
        let pack: &mut Pack<'_> = &mut |_, _| Ok(None);
        let mut weights = Weights::new(device, Compute::F32, &mut fetch, pack);
        Self::build(config.clone(), &mut weights)
    }

    /// The settings that the model was built with.
    pub fn config(&self) -> &ArchConfig {
        &self.config
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
    pub fn forward_hidden(&self, input: &ModelInput, cache: Option<&mut Cache>) -> Tensor<3> {
        let (keys, first_pass) = cache.map(Cache::passes).unzip();
        let Some(mixture) = xlora::in_use(self) else {
            return self.run(input, keys);
        };
        let hidden = self.first_pass(mixture, input, first_pass);
        let mut model = xlora::for_second_pass(self, mixture.gates(hidden));
        // A segment that runs again has no way to hand gradients to shares that are made outside it.
        model.set_recompute(None);
        model.run(input, keys)
    }

    /// Each token's shares of an X-LoRA's experts, before any choice among them; `None` where none is
    /// in use.
    ///
    /// # Shapes
    /// - result: `[batch, tokens, layers, experts]`, with one layer unless `layerwise_scalings`
    pub fn xlora_scalings(&self, input: &ModelInput) -> Option<Tensor<4>> {
        let mixture = xlora::in_use(self)?;
        Some(mixture.scalings(self.first_pass(mixture, input, None)))
    }

    fn first_pass(
        &self,
        mixture: &XLora,
        input: &ModelInput,
        cache: Option<&mut KvCache>,
    ) -> Tensor<3> {
        let [batch, tokens] = input.input_ids.dims();
        let model = xlora::for_first_pass(self, mixture, batch * tokens, &self.device());
        model.run(input, cache).detach()
    }

    fn run(&self, input: &ModelInput, cache: Option<&mut KvCache>) -> Tensor<3> {
        self.backbone.hidden(input, cache)
    }

    /// The matrix that yields logits `[vocabulary, hidden]`: the head's, or the embedding's when
    /// they are tied. An adapter on the head is included, and gradients reach it. A trained copy of a
    /// tied embedding, or low-rank factors beside it, leave the head as it was, as in PEFT; single
    /// trained rows do not.
    pub fn head_weight(&self) -> BaseWeight {
        match self.head.linear() {
            Some(head) => head.in_use().weight,
            None => self.backbone.embedding().head_weight(),
        }
    }

    /// [`Self::head_weight`], if [`Self::logits`] is a product with it and nothing else: an adapter on the
    /// head may add a bias, drop inputs in training, or differ between rows.
    pub fn head_as_one_product(&self) -> Option<BaseWeight> {
        match self.head.linear() {
            Some(head) => head.as_one_product(),
            None => Some(self.backbone.embedding().head_weight()),
        }
    }

    /// `[rows, hidden]` (rows of [`Self::forward_hidden`]) to `[rows, vocabulary]`.
    pub fn logits(&self, hidden: Tensor<2>) -> Tensor<2> {
        match self.head.linear() {
            Some(head) => head.forward(hidden),
            None => enamel_kernels::linear(hidden, self.backbone.embedding().head_weight()),
        }
    }

    /// In training: keeps only the input of so many blocks at a time, and runs them again in the backward
    /// pass (activation or gradient checkpointing); `None` keeps all. Gradients are the same bits either
    /// way, with dropout too where the input has a [seed](ModelInput::seed). Blocks under an X-LoRA's
    /// mixture are kept in any case.
    pub fn set_recompute(&mut self, blocks: Option<NonZeroUsize>) {
        self.backbone.set_recompute(blocks);
    }

    /// The device that the parameters are on.
    pub fn device(&self) -> Device {
        self.backbone.embedding().weight.device()
    }
}

impl Adaptable for Model {
    fn for_each_slot(&mut self, f: &mut dyn FnMut(&str, Slot<'_>)) {
        self.backbone.slots("", f);
        self.head.slots("", f);
    }

    fn for_each_slot_ref(&self, f: &mut dyn FnMut(&str, SlotRef<'_>)) {
        self.backbone.slots_ref("", f);
        self.head.slots_ref("", f);
    }

    fn model_part(&self) -> Option<&dyn ModelPart> {
        Some(&self.mixture)
    }

    fn model_part_mut(&mut self) -> Option<&mut dyn ModelPart> {
        Some(&mut self.mixture)
    }
}

/// Compares all names and shapes; returns the names under which weights are stored.
fn check_tensors(
    config: &ArchConfig,
    checkpoint: &dyn TensorSource,
) -> Result<StoredNames, LoadError> {
    let found: BTreeMap<&str, &[usize]> = checkpoint
        .tensors()
        .iter()
        .map(|t| (t.name.as_str(), t.shape.as_slice()))
        .collect();
    let mut expected: BTreeMap<String, Vec<usize>> = BTreeMap::new();
    for module in config.modules() {
        expected.extend(module.tensors());
    }
    let mut stored = StoredNames {
        embedding: config.embedding(),
        as_head: false,
    };
    let (table, head) = (
        format!("{}.weight", stored.embedding),
        format!("{HEAD}.weight"),
    );
    if config.tie_word_embeddings && found.contains_key(head.as_str()) {
        // Either name will do for the one matrix.
        let shape = vec![config.vocab_size, config.hidden_size];
        if !found.contains_key(table.as_str()) {
            stored.as_head = true;
            expected.remove(&table);
        }
        expected.insert(head, shape);
    }
    let new_head = config.head.is_new();
    if new_head {
        expected.remove(&format!("{}.weight", config.head_module()));
    }
    // Another head, in place of which this one is.
    let replaced = |name: &str| {
        let module = name.strip_suffix(".weight").unwrap_or(name);
        config.head != HeadConfig::CausalLm
            && is_head(module)
            && (new_head || module != config.head_module())
    };
    let missing: Vec<_> = expected
        .keys()
        .filter(|name| !found.contains_key(name.as_str()))
        .cloned()
        .collect();
    let unexpected: Vec<_> = found
        .keys()
        .filter(|name| !expected.contains_key(**name) && !is_buffer(name) && !replaced(name))
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
        Ok(stored)
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
