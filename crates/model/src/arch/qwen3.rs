//! Qwen3 (Qwen Team, 2025), parameter by parameter as in transformers' `modeling_qwen3.py`: Llama's blocks with
//! queries and keys normalised head by head before they are turned.

use super::Architecture;
use super::gguf::{DECODER_BLOCK, DECODER_TOP, GgufArch, GgufSettings};
use super::llama::Llama;
use crate::config::{Common, DecoderConfig, DecoderDefaults, Reader};
use crate::error::LoadError;
use crate::nn::weights::Weights;

/// The settings of a Qwen3.
#[derive(Clone, Debug, PartialEq)]
pub struct Qwen3Config {
    decoder: DecoderConfig,
}

/// The blocks are Llama's, with norms on queries and keys.
pub type Qwen3 = Llama;

impl Architecture for Qwen3Config {
    const MODEL_TYPES: &'static [&'static str] = &["qwen3"];
    const EMBEDDING: &'static str = "model.embed_tokens";
    type Backbone = Qwen3;

    fn read(read: &mut Reader<'_>, model_type: &str) -> Self {
        let defaults = DecoderDefaults {
            max_position_embeddings: 32768,
            tie_word_embeddings: false,
            head_dim: Some(128),
            rope_theta: 10_000.0,
        };
        let mut decoder = DecoderConfig::read(read, model_type, &defaults);
        decoder.attention_bias = read.flag("attention_bias", false);
        decoder.output_bias = decoder.attention_bias;
        decoder.qk_norm = true;
        let layers = decoder.sliding_windows.len();
        decoder.sliding_windows = DecoderConfig::windows_on_request(read, layers);
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

    fn build(&self, weights: &mut Weights<'_, '_>) -> Result<Qwen3, LoadError> {
        Llama::build(&self.decoder, weights)
    }

    fn gguf() -> &'static [GgufArch] {
        const BLOCK: [(&str, &str); 11] = {
            let [a, b, c, d, e, f, g, h, i] = DECODER_BLOCK;
            let q = ("attn_q_norm", "self_attn.q_norm");
            let k = ("attn_k_norm", "self_attn.k_norm");
            [a, b, c, d, e, f, g, h, i, q, k]
        };
        &[GgufArch {
            name: "qwen3",
            model_types: &["qwen3"],
            class: "Qwen3ForCausalLM",
            top: &DECODER_TOP,
            block: &BLOCK,
            blocks: "model.layers",
            biases: false,
            transposed: &[],
            epsilon: "attention.layer_norm_rms_epsilon",
            permuted: false,
            settings: GgufSettings::None,
        }]
    }
}
