//! GGUF metadata of a Llama model's shape, from its configuration: the inverse of `config`.

use super::write::Metadata;
use crate::config::{Family, LlamaConfig};
use crate::nn::rope::{RopeConfig, RopeScaling, yarn_mscale};

/// Refuses what is not of llama.cpp's architecture "llama", whose row order and names are written.
pub(crate) fn architecture(config: &LlamaConfig, problems: &mut Vec<String>) {
    if !matches!(config.family, Family::Llama | Family::Mistral) {
        problems.push(format!(
            "model_type is '{}'; llama and mistral models are written (architecture 'llama')",
            config.family.model_type()
        ));
    }
}

/// Appends `llama.*`; what llama.cpp's "llama" architecture cannot have goes to `problems`.
pub(crate) fn describe(config: &LlamaConfig, to: &mut Metadata, problems: &mut Vec<String>) {
    architecture(config, problems);
    let context = config.max_position_embeddings;
    if let Some(window) = config.sliding_windows.iter().flatten().min()
        && *window < context
    {
        problems.push(format!(
            "attention within a window of {window} tokens; architecture 'llama' attends to all \
             {context} (set sliding_window to null in config.json to export it so)"
        ));
    }
    let mut count = |key: &str, value: usize| match u32::try_from(value) {
        Ok(value) => to.u32(&format!("llama.{key}"), value),
        Err(_) => problems.push(format!("llama.{key} would be {value}, above 32 bits")),
    };
    count("vocab_size", config.vocab_size);
    count("context_length", context);
    count("embedding_length", config.hidden_size);
    count("block_count", config.num_hidden_layers);
    count("feed_forward_length", config.intermediate_size);
    count("attention.head_count", config.num_attention_heads);
    count("attention.head_count_kv", config.num_key_value_heads);
    count("attention.key_length", config.head_dim);
    count("attention.value_length", config.head_dim);
    count("rope.dimension_count", config.head_dim);
    let original = match config.rope.scaling {
        RopeScaling::Llama3 { original, .. } | RopeScaling::Yarn { original, .. } => Some(original),
        _ => None,
    };
    if let Some(original) = original {
        count("rope.scaling.original_context_length", original);
    }
    to.f32(
        "llama.attention.layer_norm_rms_epsilon",
        config.rms_norm_eps,
    );
    to.f32("llama.rope.freq_base", config.rope.theta);
    match config.rope.scaling {
        RopeScaling::Default | RopeScaling::Llama3 { .. } => {}
        RopeScaling::Linear { factor } => {
            to.string("llama.rope.scaling.type", "linear");
            to.f32("llama.rope.scaling.factor", factor);
        }
        RopeScaling::Dynamic { .. } => problems.push(
            "rope_type 'dynamic'; llama.cpp scales by none, linear, yarn and llama3".to_owned(),
        ),
        RopeScaling::Yarn {
            factor,
            attention_factor,
            beta_fast,
            beta_slow,
            truncate,
            ..
        } => {
            if !truncate {
                problems.push(
                    "YaRN with truncate = false; llama.cpp rounds the blend to whole dimensions"
                        .to_owned(),
                );
            }
            to.string("llama.rope.scaling.type", "yarn");
            to.f32("llama.rope.scaling.factor", factor);
            // ggml multiplies with YaRN's own magnitude; the metadata's factor comes on top.
            let on_top = attention_factor / yarn_mscale(factor, 1.0);
            // Within rounding of transformers' own default there is nothing to say.
            if (on_top - 1.0).abs() > 1e-6 {
                to.f32("llama.rope.scaling.attn_factor", on_top);
            }
            to.f32("llama.rope.scaling.yarn_beta_fast", beta_fast);
            to.f32("llama.rope.scaling.yarn_beta_slow", beta_slow);
        }
    }
}

/// The divisors of the frequencies that stand for Llama 3's scaling, `[head_dim / 2]`; the formula is beside
/// their reader, `config::llama3_scaling`.
pub(crate) fn rope_factors(rope: &RopeConfig, head_dim: usize) -> Option<Vec<f32>> {
    let RopeScaling::Llama3 {
        factor,
        low_freq_factor: low,
        high_freq_factor: high,
        original,
    } = rope.scaling
    else {
        return None;
    };
    let divisor = |i: usize| {
        let wavelength = std::f64::consts::TAU * rope.theta.powf(2.0 * i as f64 / head_dim as f64);
        let turns = original as f64 / wavelength;
        if turns > high {
            1.0
        } else if turns < low {
            factor
        } else {
            let smooth = (turns - low) / (high - low);
            1.0 / ((1.0 - smooth) / factor + smooth)
        }
    };
    Some((0..head_dim / 2).map(|i| divisor(i) as f32).collect())
}
