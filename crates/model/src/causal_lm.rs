//! A causal language model of any supported architecture: loading it and running it.

use std::collections::BTreeMap;

use burn::module::Module;
use burn::tensor::{Device, Int, Tensor};
use enamel_adapter::frozen::param_id;
use enamel_adapter::{Adaptable, Slot, SlotRef};
use enamel_kernels::KeyMask;
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use rayon::prelude::*;

use crate::arch::Llama;
use crate::checkpoint::{CheckpointError, TensorSource};
use crate::config::{LlamaConfig, bullets};
use crate::kv_cache::KvCache;

const HEAD: &str = "lm_head.weight";
const EMBEDDING: &str = "model.embed_tokens.weight";
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
}

impl ModelInput {
    /// Tokens without padding.
    pub fn new(input_ids: Tensor<2, Int>) -> Self {
        Self {
            input_ids,
            attention_mask: None,
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
    /// that differs from the embedding is loaded untied; the model's `config` says so then.
    pub fn load(
        config: &LlamaConfig,
        checkpoint: &dyn TensorSource,
        device: &Device,
    ) -> Result<Self, LoadError> {
        let embedding = check_tensors(config, checkpoint)?;
        let has = |name| checkpoint.tensors().iter().any(|t| t.name == name);
        let untied;
        let config = if config.tie_word_embeddings
            && has(EMBEDDING)
            && has(HEAD)
            && checkpoint.read_f32(EMBEDDING)? != checkpoint.read_f32(HEAD)?
        {
            untied = config.untied();
            &untied
        } else {
            config
        };
        let model = Llama::build(config, device, &mut |name, shape| {
            let stored = if name == EMBEDDING { embedding } else { name };
            let values = checkpoint.read_f32(stored)?;
            let expected = shape.iter().product();
            if values.len() == expected {
                return Ok(values);
            }
            Err(LoadError::WrongLength {
                name: name.to_owned(),
                expected,
                found: values.len(),
            })
        })?;
        Ok(Self::Llama(model))
    }

    /// A model with random weights, as transformers initialises one: norms 1, biases 0, the rest
    /// normal with `initializer_range` as its standard deviation. The seed and a parameter's name
    /// decide its values.
    pub fn random(config: &LlamaConfig, seed: u64, device: &Device) -> Result<Self, LoadError> {
        let deviation = config.initializer_range;
        let model = Llama::build(config, device, &mut |name, shape| {
            let count = shape.iter().product();
            if shape.len() == 1 {
                let value = if name.ends_with(".bias") { 0.0 } else { 1.0 };
                return Ok(vec![value; count]);
            }
            Ok(normal_values(seed ^ param_id(name).val(), count, deviation))
        })?;
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
    /// # Shapes
    /// - input_ids: `[batch, tokens]`; attention_mask: `batch` rows of `cache + tokens` keys
    /// - result: `[batch, tokens, hidden]`
    pub fn forward_hidden(&self, input: &ModelInput, cache: Option<&mut KvCache>) -> Tensor<3> {
        match self {
            Self::Llama(model) => model.forward_hidden(input, cache),
        }
    }

    /// The matrix that yields logits `[vocabulary, hidden]`: the head's, or the embedding's when
    /// they are tied. An adapter on the head is included, and gradients reach it. A trained copy of a
    /// tied embedding, or low-rank factors beside it, leave the head as it was, as in PEFT; single
    /// trained rows do not.
    pub fn head_weight(&self) -> Tensor<2> {
        match self {
            Self::Llama(model) => match &model.lm_head {
                Some(head) => head.weight_in_use(),
                None => model.embed_tokens.head_weight(),
            },
        }
    }

    /// Whether [`Self::logits`] is a product with [`Self::head_weight`] and nothing else: an adapter
    /// on the head may add a bias, drop inputs in training, or differ between rows.
    pub fn head_is_one_product(&self) -> bool {
        match self {
            Self::Llama(model) => {
                let head = model.lm_head.as_ref();
                head.is_none_or(enamel_adapter::Linear::is_one_product)
            }
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
        if module.bias {
            expected.insert(format!("{}.bias", module.name), module.shape[..1].to_vec());
        }
        expected.insert(format!("{}.weight", module.name), module.shape);
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
        .filter(|name| !expected.contains_key(**name) && !is_derived(name))
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

/// Buffers that old checkpoints hold though they follow from the configuration.
fn is_derived(name: &str) -> bool {
    name.ends_with(".rotary_emb.inv_freq")
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
#[allow(clippy::unwrap_used)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::testing::{MemorySource, devices, distance, ids, tiny_config, values};
    use burn::module::Param;
    use serde_json::json;

    fn random(changes: serde_json::Value) -> CausalLm {
        CausalLm::random(&tiny_config(changes), 7, &Device::flex()).unwrap()
    }

    fn run(model: &CausalLm, rows: &[&[i64]], mask: Option<&[&[bool]]>) -> Vec<f32> {
        let attention_mask = mask.map(|rows| KeyMask {
            valid: Arc::new(rows.concat()),
            batch: rows.len(),
            keys: rows[0].len(),
        });
        let input = ModelInput {
            input_ids: ids(rows, &model.device()),
            attention_mask,
        };
        values(model.forward_hidden(&input, None))
    }

    #[test]
    fn slots_are_the_modules_that_the_configuration_lists() {
        for changes in [
            json!({}),
            json!({"tie_word_embeddings": true, "attention_bias": true, "mlp_bias": true}),
            json!({"model_type": "qwen2", "head_dim": 6}),
        ] {
            let mut model = random(changes);
            let mut shapes = Vec::new();
            model.for_each_slot_ref(&mut |name, slot| {
                let (shape, bias) = match slot {
                    SlotRef::Linear(l) => (l.weight.dims().to_vec(), l.bias.is_some()),
                    SlotRef::Embedding(e) => (e.weight.dims().to_vec(), false),
                    SlotRef::Norm(n) => (n.weight.dims().to_vec(), false),
                };
                shapes.push((name.to_owned(), shape, bias));
            });
            let listed: Vec<_> = model
                .config()
                .modules()
                .into_iter()
                .map(|module| (module.name, module.shape, module.bias))
                .collect();
            assert_eq!(shapes, listed);
            let mut names = Vec::new();
            model.for_each_slot(&mut |name, _| names.push(name.to_owned()));
            assert!(names.iter().eq(listed.iter().map(|(name, ..)| name)));
        }
    }

    #[test]
    fn a_loaded_model_computes_the_same() {
        let model = random(json!({"attention_bias": true, "mlp_bias": true}));
        let source = MemorySource::of(&model);
        for device in devices() {
            let loaded = CausalLm::load(model.config(), &source, &device).unwrap();
            let rows: &[&[i64]] = &[&[1, 5, 9, 3], &[2, 2, 39, 0]];
            let (a, b) = (run(&model, rows, None), run(&loaded, rows, None));
            // Two backends order their sums differently: a few units in the last place.
            assert!(distance(&a, &b) < 1e-5, "{device:?}");
        }
    }

    #[test]
    fn all_mismatches_are_in_one_error_and_no_value_is_read() {
        let model = random(json!({}));
        let mut source = MemorySource::of(&model);
        source.remove("model.norm.weight");
        source.remove("model.layers.1.mlp.up_proj.weight");
        source.put("score.weight", &[2, 16], Vec::new());
        source.put(
            "model.layers.0.self_attn.k_proj.weight",
            &[16, 16],
            Vec::new(),
        );
        source.put(
            "model.layers.0.self_attn.rotary_emb.inv_freq",
            &[2],
            Vec::new(),
        );
        let source = source.without_values();
        let error = CausalLm::load(model.config(), &source, &Device::flex()).unwrap_err();
        let LoadError::Mismatch {
            missing,
            unexpected,
            misshapen,
        } = &error
        else {
            panic!("{error}");
        };
        assert_eq!(
            *missing,
            ["model.layers.1.mlp.up_proj.weight", "model.norm.weight"]
        );
        assert_eq!(*unexpected, ["score.weight"]);
        let name = "model.layers.0.self_attn.k_proj.weight".to_owned();
        let expected = Misshapen {
            name,
            expected: vec![8, 16],
            found: vec![16, 16],
        };
        assert_eq!(*misshapen, [expected]);
        let text = error.to_string();
        assert!(
            text.contains("[16, 16] in the checkpoint, [8, 16] needed"),
            "{text}"
        );
    }

    #[test]
    fn a_source_that_lies_about_a_shape_is_an_error() {
        let model = random(json!({}));
        let source = MemorySource::of(&model).without_values();
        let error = CausalLm::load(model.config(), &source, &Device::flex()).unwrap_err();
        assert!(matches!(error, LoadError::WrongLength { .. }), "{error}");
    }

    #[test]
    fn a_tied_head_follows_the_file() {
        let model = random(json!({"tie_word_embeddings": true}));
        let config = model.config();
        let load = |source: &MemorySource| CausalLm::load(config, source, &Device::flex()).unwrap();
        let is_tied = |model: &CausalLm| {
            let mut tied = true;
            model.for_each_slot_ref(&mut |name, _| tied &= name != "lm_head");
            assert_eq!(model.config().tie_word_embeddings, tied);
            tied
        };
        let mut source = MemorySource::of(&model);
        assert!(is_tied(&load(&source)));
        let embedding = values(model.head_weight());
        source.put(HEAD, &[40, 16], embedding.clone());
        assert!(
            is_tied(&load(&source)),
            "an identical head is the embedding"
        );
        source.remove(EMBEDDING);
        let swapped = load(&source);
        assert!(
            is_tied(&swapped),
            "the head's name will do for the embedding"
        );
        assert_eq!(values(swapped.head_weight()), embedding);
        source.put(HEAD, &[40, 16], vec![0.5; 640]);
        source.put(EMBEDDING, &[40, 16], embedding);
        let untied = load(&source);
        assert!(!is_tied(&untied), "a differing head stays its own");
        assert_eq!(values(untied.head_weight()), [0.5; 640]);
        assert_eq!(
            untied.config().to_json()["tie_word_embeddings"],
            json!(false)
        );
    }

    #[test]
    fn random_weights_depend_on_seed_and_name_only() {
        let weights = |seed, changes| {
            let model = CausalLm::random(&tiny_config(changes), seed, &Device::flex()).unwrap();
            let CausalLm::Llama(model) = model;
            values(model.layers[0].mlp.up_proj.weight.val())
        };
        assert_eq!(
            weights(1, json!({})),
            weights(1, json!({"num_hidden_layers": 5}))
        );
        assert_ne!(weights(1, json!({})), weights(2, json!({})));
        let all = weights(3, json!({"intermediate_size": 4000}));
        let deviation = (all.iter().map(|x| x * x).sum::<f32>() / all.len() as f32).sqrt();
        // 64,000 samples: the estimate's own deviation is 0.3 / sqrt(128,000), about 0.0008.
        assert!((deviation - 0.3).abs() < 0.005, "{deviation}");
    }

    #[test]
    fn padding_changes_nothing_for_the_real_tokens() {
        for changes in [
            json!({}),
            json!({"model_type": "mistral", "sliding_window": 3}),
            json!({"rope_scaling": {"type": "linear", "factor": 2.0}}),
        ] {
            let model = random(changes);
            let alone = run(&model, &[&[4, 8, 15, 16]], None);
            let full = [true; 6];
            let right = [true, true, true, true, false, false];
            let left = [false, false, true, true, true, true];
            let both = run(
                &model,
                &[
                    &[4, 8, 15, 16, 0, 0],
                    &[0, 0, 4, 8, 15, 16],
                    &[9, 9, 9, 9, 9, 9],
                ],
                Some(&[&right, &left, &full]),
            );
            // Left padding turns queries and keys by larger angles, which cancel up to rounding.
            assert!(distance(&alone, &both[..64]) < 1e-5);
            assert!(distance(&alone, &both[96 + 32..192]) < 1e-5);
        }
    }

    #[test]
    fn logits_are_the_head_product() {
        for tied in [true, false] {
            let model = random(json!({"tie_word_embeddings": tied}));
            let hidden = Tensor::<2>::ones([3, 16], &Device::flex());
            let product = hidden.clone().matmul(model.head_weight().transpose());
            assert!(distance(&values(model.logits(hidden)), &values(product)) < 1e-6);
        }
    }

    #[test]
    fn gradients_reach_what_is_trained_and_nothing_else() {
        for device in devices() {
            let device = device.autodiff();
            let config = tiny_config(json!({"tie_word_embeddings": true}));
            let CausalLm::Llama(mut llama) = CausalLm::random(&config, 3, &device).unwrap();
            let norm = &mut llama.layers[0].input_layernorm;
            norm.saved = Some(Param::from_tensor(norm.weight.val().detach()));
            let model = CausalLm::Llama(llama);
            let input = ModelInput::new(ids(&[&[1, 2, 3]], &device));
            let hidden = model.forward_hidden(&input, None).reshape([3, 16]);
            let gradients = model.logits(hidden).powf_scalar(2.0).sum().backward();
            let CausalLm::Llama(llama) = &model;
            let norm = &llama.layers[0].input_layernorm;
            let trained = norm.saved.as_ref().unwrap().val().grad(&gradients).unwrap();
            let largest = values(trained)
                .into_iter()
                .fold(0.0, |a: f32, b| a.max(b.abs()));
            assert!(largest.is_finite() && largest > 1e-6, "{largest}");
            assert!(norm.weight.val().grad(&gradients).is_none());
            assert!(llama.embed_tokens.weight.val().grad(&gradients).is_none());
            let evaluated = model.valid();
            assert!(!evaluated.device().is_autodiff());
            let rows: &[&[i64]] = &[&[1, 2, 3]];
            assert!(distance(&run(&evaluated, rows, None), &run(&model, rows, None)) < 1e-6);
        }
    }
}
