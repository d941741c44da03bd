//! GGUF metadata of a model's shape, from its configuration: the inverse of `config`.

use super::write::Metadata;
use crate::arch::{ArchConfig, GgufArch};
use crate::config::{DecoderConfig, RopeConfig, RopeScaling, yarn_mscale};

/// llama.cpp's architecture for a configuration; where it has none, `problems` says so.
pub(crate) fn architecture(
    config: &ArchConfig,
    problems: &mut Vec<String>,
) -> Option<&'static GgufArch> {
    let name = config.model_type.as_str();
    let found = ArchConfig::gguf_architectures().find(|arch| arch.model_types.contains(&name));
    if found.is_none() {
        let known: Vec<_> = ArchConfig::gguf_architectures()
            .flat_map(|arch| arch.model_types.iter().copied())
            .collect();
        problems.push(format!(
            "model_type is '{name}'; {} are written",
            known.join(", ")
        ));
    }
    found
}

/// Appends the settings of the architecture; what llama.cpp's cannot have goes to `problems`.
pub(crate) fn describe(
    arch: &GgufArch,
    config: &DecoderConfig,
    to: &mut Metadata,
    problems: &mut Vec<String>,
) {
    let key = |name: &str| format!("{}.{name}", arch.name);
    let common = &config.common;
    let context = common.max_position_embeddings;
    if let Some(window) = config.sliding_windows.iter().flatten().min()
        && *window < context
    {
        problems.push(format!(
            "attention within a window of {window} tokens; architecture '{}' attends to all \
             {context} (set sliding_window to null in config.json to export it so)",
            arch.name
        ));
    }
    let mut count = |name: &str, value: usize| match u32::try_from(value) {
        Ok(value) => to.u32(&key(name), value),
        Err(_) => problems.push(format!("{} would be {value}, above 32 bits", key(name))),
    };
    if !arch.settings.learns_positions() {
        count("vocab_size", common.vocab_size);
    }
    count("context_length", context);
    count("embedding_length", common.hidden_size);
    count("block_count", common.num_hidden_layers);
    count("feed_forward_length", config.intermediate_size);
    count("attention.head_count", config.num_attention_heads);
    if arch.settings.learns_positions() {
        to.f32(&key(arch.epsilon), config.rms_norm_eps);
        return;
    }
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
    to.f32(&key(arch.epsilon), config.rms_norm_eps);
    to.f32(&key("rope.freq_base"), config.rope.theta);
    match config.rope.scaling {
        RopeScaling::Default | RopeScaling::Llama3 { .. } => {}
        RopeScaling::Linear { factor } => {
            to.string(&key("rope.scaling.type"), "linear");
            to.f32(&key("rope.scaling.factor"), factor);
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
            to.string(&key("rope.scaling.type"), "yarn");
            to.f32(&key("rope.scaling.factor"), factor);
            // ggml multiplies with YaRN's own magnitude; the metadata's factor comes on top.
            let on_top = attention_factor / yarn_mscale(factor, 1.0);
            // Within rounding of transformers' own default there is nothing to say.
            if (on_top - 1.0).abs() > 1e-6 {
                to.f32(&key("rope.scaling.attn_factor"), on_top);
            }
            to.f32(&key("rope.scaling.yarn_beta_fast"), beta_fast);
            to.f32(&key("rope.scaling.yarn_beta_slow"), beta_slow);
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
