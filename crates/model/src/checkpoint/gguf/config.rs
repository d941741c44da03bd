//! `config.json` and `generation_config.json` of a model, from GGUF metadata.

use std::path::Path;

use serde_json::{Map, Value, json};

use super::header::{Header, RawTensor};
use super::keys;
use super::quant::BlockType;
use crate::arch::{ArchConfig, GgufArch, GgufFacts, GgufSettings};
use crate::checkpoint::CheckpointError;
use crate::config::yarn_mscale;
use crate::error::Problems;

/// The tensor into which llama.cpp's converter bakes the rope scaling of Llama 3.1 and later.
pub(crate) const ROPE_FACTORS: &str = "rope_freqs.weight";

/// The architecture of the file.
pub(crate) fn architecture(
    path: &Path,
    header: &Header,
) -> Result<&'static GgufArch, CheckpointError> {
    let arch = header.str("general.architecture");
    let Some(arch) = arch else {
        let problem = "metadata key 'general.architecture' is missing or no text; is this a model?";
        return Err(CheckpointError::malformed(path, problem));
    };
    let found = ArchConfig::gguf_architectures().find(|known| known.name == arch);
    found.ok_or_else(|| {
        let known: Vec<_> = ArchConfig::gguf_architectures()
            .map(|known| format!("'{}'", known.name))
            .collect();
        CheckpointError::unsupported(
            path,
            format!(
                "general.architecture is '{arch}'; {} are read",
                known.join(", ")
            ),
        )
    })
}

/// Reads the numbers of the model, and fails with all that are missing or contradictory.
pub(crate) fn config_json(
    path: &Path,
    header: &Header,
    bytes: &[u8],
    arch: &GgufArch,
) -> Result<Value, CheckpointError> {
    if let Some(experts) = header.u64(&header.key("expert_count")).filter(|&n| n > 0) {
        return Err(CheckpointError::unsupported(
            path,
            format!("a mixture of {experts} experts; only dense models are read"),
        ));
    }
    let mut problems = Problems::default();
    keys::check_model(header, arch, &mut problems);
    let required = |key: String| header.u64(&key).filter(|&n| n > 0).unwrap_or(1);
    let hidden = required(header.key("embedding_length"));
    let intermediate = required(header.key("feed_forward_length"));
    let layers = required(header.key("block_count"));
    let heads = required(header.key("attention.head_count"));
    let context = required(header.key("context_length"));
    let kv_heads = match header.get(&header.key("attention.head_count_kv")) {
        None => heads,
        Some(_) => required(header.key("attention.head_count_kv")),
    };
    let head_dim = header
        .u64(&header.key("attention.key_length"))
        .or_else(|| header.u64(&header.key("rope.dimension_count")))
        .or_else(|| hidden.checked_div(heads))
        .unwrap_or(1);
    let rope_dim = header
        .u64(&header.key("rope.dimension_count"))
        .unwrap_or(head_dim);
    if rope_dim != head_dim && !arch.settings.learns_positions() {
        problems.push(format!(
            "rotary embedding of {rope_dim} of {head_dim} dimensions a head is not supported"
        ));
    }
    let vocab = header
        .tensors
        .iter()
        .find(|t| t.name == "token_embd.weight")
        .and_then(|t| t.shape.first().copied());
    let Some(vocab) = vocab else {
        problems.push("tensor 'token_embd.weight' is missing");
        problems.into_malformed(path)?;
        return Err(CheckpointError::malformed(path, "no embedding"));
    };
    for name in TOKENS {
        let key = token_key(name);
        if let Some(id) = token(header, name).filter(|id| *id >= vocab as u64) {
            problems.push(format!(
                "metadata key '{key}' is {id}, and the embedding has {vocab} rows"
            ));
        }
    }
    let rope_scaling = match rope_scaling(header, bytes, head_dim, context) {
        Ok(scaling) => scaling,
        Err(problem) => {
            problems.push(problem);
            Value::Null
        }
    };
    problems.into_malformed(path)?;

    let has = |name: &str| header.tensors.iter().any(|t| t.name == name);
    let token = |name: &str| token(header, name).map_or(Value::Null, Value::from);
    let dtype = dtype_name(&header.tensors);
    let epsilon = header.f64(&header.key(arch.epsilon));
    let mut config = match arch.settings {
        GgufSettings::LearnedPositions(config) => config(&GgufFacts {
            class: arch.class,
            hidden,
            intermediate,
            layers,
            heads,
            context,
            epsilon,
        }),
        GgufSettings::None | GgufSettings::Biases => json!({
            "architectures": [arch.class],
            "model_type": arch.model_types.first(),
            "hidden_act": "silu",
            "hidden_size": hidden,
            "intermediate_size": intermediate,
            "num_hidden_layers": layers,
            "num_attention_heads": heads,
            "num_key_value_heads": kv_heads,
            "head_dim": head_dim,
            "max_position_embeddings": context,
            "rms_norm_eps": epsilon.unwrap_or(1e-6),
            "rope_theta": header.f64(&header.key("rope.freq_base")).unwrap_or(10_000.0),
            "rope_scaling": rope_scaling,
        }),
    };
    let shared = [
        ("tie_word_embeddings", (!has("output.weight")).into()),
        ("vocab_size", vocab.into()),
        ("bos_token_id", token("bos")),
        ("eos_token_id", token("eos")),
        ("pad_token_id", token("padding")),
        ("torch_dtype", json!(dtype)),
        ("use_cache", true.into()),
    ];
    if let Some(map) = config.as_object_mut() {
        map.extend(shared.map(|(key, value)| (key.to_owned(), value)));
        if let GgufSettings::Biases = arch.settings {
            map.insert("attention_bias".into(), has("blk.0.attn_q.bias").into());
            map.insert("mlp_bias".into(), has("blk.0.ffn_up.bias").into());
        }
    }
    Ok(config)
}

/// The tokens that metadata has numbers of.
const TOKENS: [&str; 6] = ["bos", "eos", "eot", "eom", "unknown", "padding"];

fn token_key(name: &str) -> String {
    format!("tokenizer.ggml.{name}_token_id")
}

/// The number of a special token; writers say by -1, of 32 bits with or without a sign, that there is none.
pub(super) fn token(header: &Header, name: &str) -> Option<u64> {
    header
        .u64(&token_key(name))
        .filter(|id| *id != u64::from(u32::MAX))
}

/// `generation_config.json`: where generation stops.
pub(crate) fn generation_config(header: &Header) -> Value {
    let mut config = Map::new();
    let token = |name: &str| token(header, name);
    if let Some(bos) = token("bos") {
        config.insert("bos_token_id".into(), bos.into());
    }
    // End of text, of a turn and of a message: generation stops at any of them.
    let mut ends: Vec<u64> = Vec::new();
    for end in ["eos", "eot", "eom"].into_iter().filter_map(token) {
        if !ends.contains(&end) {
            ends.push(end);
        }
    }
    match ends.as_slice() {
        [] => {}
        [only] => {
            config.insert("eos_token_id".into(), (*only).into());
        }
        _ => {
            config.insert("eos_token_id".into(), json!(ends));
        }
    }
    if let Some(pad) = token("padding") {
        config.insert("pad_token_id".into(), pad.into());
    }
    Value::Object(config)
}

/// The dtype to save such a model in: that of most of its elements. Dequantised values fit no
/// sixteen-bit type exactly, so quantised files give f32.
fn dtype_name(tensors: &[RawTensor]) -> &'static str {
    let count = |wanted: BlockType| -> usize {
        tensors
            .iter()
            .filter(|t| t.block == wanted)
            .filter_map(|t| t.range.len().checked_div(wanted.bytes()))
            .sum()
    };
    let all: usize = tensors
        .iter()
        .filter_map(|t| {
            let blocks = t.range.len().checked_div(t.block.bytes())?;
            blocks.checked_mul(t.block.elements())
        })
        .sum();
    if count(BlockType::F16) > all / 2 {
        "float16"
    } else if count(BlockType::BF16) > all / 2 {
        "bfloat16"
    } else {
        "float32"
    }
}

/// `rope_scaling` from the metadata keys, or from the factors that stand for Llama 3's scaling.
fn rope_scaling(
    header: &Header,
    bytes: &[u8],
    head_dim: u64,
    context: u64,
) -> Result<Value, String> {
    let original = header.u64(&header.key("rope.scaling.original_context_length"));
    if let Some(tensor) = header.tensors.iter().find(|t| t.name == ROPE_FACTORS) {
        let factors = tensor
            .block
            .dequantise(bytes.get(tensor.range.clone()).unwrap_or_default());
        let theta = header
            .f64(&header.key("rope.freq_base"))
            .unwrap_or(10_000.0);
        return llama3_scaling(&factors, theta, head_dim, original);
    }
    // Files from before 2024 have only a linear factor, under another key.
    let factor = header
        .f64(&header.key("rope.scaling.factor"))
        .or_else(|| header.f64(&header.key("rope.scale_linear")));
    let kind = header.str(&header.key("rope.scaling.type"));
    match (kind, factor) {
        (Some("none"), _) | (None, None) => Ok(Value::Null),
        (_, Some(1.0)) => Ok(Value::Null),
        (Some("linear") | None, Some(factor)) => {
            Ok(json!({"rope_type": "linear", "factor": factor}))
        }
        (Some("yarn"), Some(factor)) => {
            let original = original.unwrap_or((context as f64 / factor).round() as u64);
            let mut scaling = Map::new();
            scaling.insert("rope_type".into(), "yarn".into());
            scaling.insert("factor".into(), factor.into());
            scaling.insert("original_max_position_embeddings".into(), original.into());
            // llama.cpp multiplies it with YaRN's own magnitude.
            if let Some(on_top) = header.f64(&header.key("rope.scaling.attn_factor")) {
                let all = on_top * yarn_mscale(factor, 1.0);
                scaling.insert("attention_factor".into(), all.into());
            }
            let optional = [
                ("beta_fast", &header.key("rope.scaling.yarn_beta_fast")),
                ("beta_slow", &header.key("rope.scaling.yarn_beta_slow")),
            ];
            for (name, key) in optional {
                if let Some(value) = header.f64(key) {
                    scaling.insert(name.into(), value.into());
                }
            }
            Ok(Value::Object(scaling))
        }
        (Some(kind), _) => Err(format!(
            "{} is '{kind}' (factor {factor:?}); none, linear and yarn with \
             a factor are read",
            header.key("rope.scaling.type")
        )),
    }
}

/// Finds the parameters of Llama 3's scaling that give `factors`.
///
/// llama.cpp stores, for each pair of dimensions, the divisor of its frequency: 1 for wavelengths
/// under `L/high`, `factor` over `L/low`, and `1/((1−s)/factor + s)` between, with
/// `s = (L/λ − low)/(high − low)`. `low = 1` and `high = 4` in every published model; `L` and
/// `factor` vary. What is found is checked against all factors.
fn llama3_scaling(
    factors: &[f32],
    theta: f64,
    head_dim: u64,
    original: Option<u64>,
) -> Result<Value, String> {
    let (low, high) = (1.0, 4.0);
    let factor = f64::from(factors.iter().copied().fold(1.0f32, f32::max));
    if factors.iter().all(|&f| f == 1.0) {
        return Ok(Value::Null);
    }
    let expected = |length: f64, i: usize| {
        let wavelength = std::f64::consts::TAU * theta.powf(2.0 * i as f64 / head_dim as f64);
        if wavelength < length / high {
            1.0
        } else if wavelength > length / low {
            factor
        } else {
            let smooth = (length / wavelength - low) / (high - low);
            1.0 / ((1.0 - smooth) / factor + smooth)
        }
    };
    let lengths = original
        .into_iter()
        .chain((9..=20).map(|power| 1u64 << power));
    for length in lengths {
        // 1e-3 is far above f32 rounding and far below the step between two candidate lengths.
        let fits = Some(factors.len() as u64) == head_dim.checked_div(2)
            && head_dim.is_multiple_of(2)
            && factors.iter().enumerate().all(|(i, &found)| {
                (expected(length as f64, i) - f64::from(found)).abs() <= 1e-3 * factor
            });
        if fits {
            return Ok(json!({
                "rope_type": "llama3",
                "factor": factor,
                "low_freq_factor": low,
                "high_freq_factor": high,
                "original_max_position_embeddings": length,
            }));
        }
    }
    Err(format!(
        "the factors in '{ROPE_FACTORS}' are not those of Llama 3's rope scaling"
    ))
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    /// Factors written down with the converter's formula for Llama 3.1 (θ 500000, D 128, factor 8,
    /// L 8192): spot values by hand for the first (λ = 2π), last and a middle pair.
    #[test]
    fn llama_3_scaling_is_recognised_from_its_factors() {
        let factors: Vec<f32> = (0..64)
            .map(|i| {
                let wavelength = std::f64::consts::TAU * 500_000f64.powf(f64::from(i) / 64.0);
                if wavelength < 2048.0 {
                    1.0
                } else if wavelength > 8192.0 {
                    8.0
                } else {
                    let smooth = (8192.0 / wavelength - 1.0) / 3.0;
                    (1.0 / ((1.0 - smooth) / 8.0 + smooth)) as f32
                }
            })
            .collect();
        let scaling = llama3_scaling(&factors, 500_000.0, 128, None).unwrap();
        assert_eq!(scaling["original_max_position_embeddings"], 8192);
        assert_eq!(scaling["factor"], 8.0);

        let mut odd = factors;
        odd[40] += 1.0;
        assert!(llama3_scaling(&odd, 500_000.0, 128, None).is_err());
    }
}
