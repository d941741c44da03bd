//! Llama (Touvron et al., 2023) and its siblings Mistral and Qwen2, parameter by parameter as in
//! transformers' `modeling_llama.py`.

use std::num::NonZeroUsize;

use burn::module::Module;
use burn::tensor::{Device, Int, Tensor};
use enamel_adapter::{Embedding, Frozen, slots};
use enamel_kernels::{KeyMask, rms_norm};

use super::gguf::{DECODER_BLOCK, DECODER_TOP, GgufArch, GgufSettings};
use super::{Architecture, Backbone};
use crate::config::{Common, DecoderConfig, DecoderDefaults, Reader};
use crate::error::LoadError;
use crate::nn::decoder_layer::{DecoderLayer, DecoderSizes};
use crate::nn::input::{ModelInput, Positions};
use crate::nn::kv_cache::KvCache;
use crate::nn::recompute::run_blocks;
use crate::nn::weights::Weights;

/// The settings of a model of the Llama family.
#[derive(Clone, Debug, PartialEq)]
pub struct LlamaConfig {
    decoder: DecoderConfig,
}

/// A decoder of Llama's shape.
#[derive(Module, Debug)]
pub struct Llama {
    /// `model.embed_tokens` `[vocabulary, hidden]`.
    pub embed_tokens: Embedding,
    /// `model.layers.N`.
    pub layers: Vec<DecoderLayer>,
    /// `model.norm`.
    pub norm: Frozen<1>,
    #[module(skip)]
    config: DecoderConfig,
    /// Blocks a segment that training runs again in the backward pass.
    #[module(skip)]
    recompute: Option<NonZeroUsize>,
}

slots!(model Llama {
    embed_tokens: "model.embed_tokens",
    layers: "model.layers",
    norm: "model.norm",
});

impl Architecture for LlamaConfig {
    const MODEL_TYPES: &'static [&'static str] = &["llama", "mistral", "qwen2"];
    const EMBEDDING: &'static str = "model.embed_tokens";
    type Backbone = Llama;

    fn read(read: &mut Reader<'_>, model_type: &str) -> Self {
        let positions = match model_type {
            "mistral" => 131_072,
            "qwen2" => 32768,
            _ => 2048,
        };
        let defaults = DecoderDefaults {
            max_position_embeddings: positions,
            tie_word_embeddings: false,
            head_dim: None,
            rope_theta: 10_000.0,
        };
        let mut decoder = DecoderConfig::read(read, model_type, &defaults);
        let layers = decoder.sliding_windows.len();
        match model_type {
            "mistral" => decoder.sliding_windows = vec![window_of_mistral(read); layers],
            "qwen2" => {
                decoder.attention_bias = true;
                decoder.sliding_windows = DecoderConfig::windows_on_request(read, layers);
            }
            _ => {
                decoder.attention_bias = read.flag("attention_bias", false);
                decoder.output_bias = decoder.attention_bias;
                decoder.mlp_bias = read.flag("mlp_bias", false);
            }
        }
        Self { decoder }
    }

    fn common(&self) -> &Common {
        &self.decoder.common
    }

    fn common_mut(&mut self) -> &mut Common {
        &mut self.decoder.common
    }

    fn decoder(&self) -> &DecoderConfig {
        &self.decoder
    }

    fn build(&self, weights: &mut Weights<'_, '_>) -> Result<Llama, LoadError> {
        Llama::build(&self.decoder, weights)
    }

    fn gguf() -> &'static [GgufArch] {
        &[
            GgufArch {
                name: "llama",
                model_types: &["llama", "mistral"],
                class: "LlamaForCausalLM",
                top: &DECODER_TOP,
                block: &DECODER_BLOCK,
                blocks: "model.layers",
                biases: false,
                transposed: &[],
                epsilon: "attention.layer_norm_rms_epsilon",
                permuted: true,
                settings: GgufSettings::Biases,
            },
            GgufArch {
                name: "qwen2",
                model_types: &["qwen2"],
                class: "Qwen2ForCausalLM",
                top: &DECODER_TOP,
                block: &DECODER_BLOCK,
                blocks: "model.layers",
                biases: false,
                transposed: &[],
                epsilon: "attention.layer_norm_rms_epsilon",
                permuted: false,
                settings: GgufSettings::None,
            },
        ]
    }
}

/// As transformers' Mistral decides: null means none; an absent key means the default.
fn window_of_mistral(read: &mut Reader<'_>) -> Option<usize> {
    let default = (!read.map.contains_key("sliding_window")).then_some(4096);
    match read.get("sliding_window") {
        Some(_) => Some(read.size("sliding_window", None)),
        None => default,
    }
}

impl Llama {
    /// Decoder blocks between an embedding and a norm, under Llama's names.
    pub(super) fn build(
        config: &DecoderConfig,
        weights: &mut Weights<'_, '_>,
    ) -> Result<Self, LoadError> {
        let common = &config.common;
        let sizes = DecoderSizes {
            hidden: common.hidden_size,
            inner: config.intermediate_size,
            heads: config.num_attention_heads,
            kv_heads: config.num_key_value_heads,
            head_dim: config.head_dim,
            attention_bias: config.attention_bias,
            output_bias: config.output_bias,
            mlp_bias: config.mlp_bias,
            qk_norm: config.qk_norm,
            eps: config.rms_norm_eps,
        };
        let table = [common.vocab_size, common.hidden_size];
        let embed_tokens = weights.embedding(LlamaConfig::EMBEDDING, table)?;
        let mut layers = Vec::with_capacity(config.sliding_windows.len());
        for (i, window) in config.sliding_windows.iter().enumerate() {
            let name = format!("model.layers.{i}");
            layers.push(DecoderLayer::build(weights, &name, &sizes, *window)?);
        }
        Ok(Self {
            embed_tokens,
            layers,
            norm: weights.norm("model.norm", common.hidden_size)?,
            config: config.clone(),
            recompute: None,
        })
    }

    /// Token ids `[batch, tokens]` to the residual stream `[batch, tokens, hidden]`.
    pub fn embed(&self, input_ids: Tensor<2, Int>) -> Tensor<3> {
        self.embed_tokens.forward(input_ids)
    }

    /// The rotary tables and the mask for `tokens` tokens after `offset` cached ones.
    pub fn positions(
        &self,
        offset: usize,
        tokens: usize,
        key_mask: Option<&KeyMask>,
        device: &Device,
    ) -> Positions {
        let (rope, width) = (&self.config.rope, self.config.head_dim);
        Positions::new(rope, width, (offset, tokens), key_mask, device)
    }

    /// The norm after the last block.
    pub fn final_norm(&self, x: Tensor<3>) -> Tensor<3> {
        rms_norm(x, self.norm.val(), self.config.rms_norm_eps)
    }
}

impl Backbone for Llama {
    fn hidden(&self, input: &ModelInput, cache: Option<&mut KvCache>) -> Tensor<3> {
        let [_, tokens] = input.input_ids.dims();
        let x = self.embed(input.input_ids.clone());
        let offset = cache.as_ref().map_or(0, |cache| cache.len());
        let mask = input.attention_mask.as_ref();
        let positions = self.positions(offset, tokens, mask, &x.device());
        let x = run_blocks(&self.layers, x, &positions, (input, self.recompute), cache);
        self.final_norm(x)
    }

    fn embedding(&self) -> &Embedding {
        &self.embed_tokens
    }

    fn set_recompute(&mut self, blocks: Option<NonZeroUsize>) {
        self.recompute = blocks;
    }
}
