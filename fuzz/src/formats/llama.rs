//! Tiny models of the Llama family: configurations, and tensors that fit them.

use serde_json::{Value, json};

use super::safetensors::Tensor;

/// The keys that a configuration is read by, and values of theirs.
pub const WORDS: [&str; 64] = [
    "model_type",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "rms_norm_eps",
    "vocab_size",
    "max_position_embeddings",
    "tie_word_embeddings",
    "attention_bias",
    "mlp_bias",
    "rope_theta",
    "rope_scaling",
    "rope_parameters",
    "rope_type",
    "factor",
    "low_freq_factor",
    "high_freq_factor",
    "original_max_position_embeddings",
    "attention_factor",
    "beta_fast",
    "beta_slow",
    "mscale",
    "mscale_all_dim",
    "truncate",
    "sliding_window",
    "use_sliding_window",
    "max_window_layers",
    "layer_types",
    "full_attention",
    "sliding_attention",
    "eos_token_id",
    "bos_token_id",
    "pad_token_id",
    "initializer_range",
    "dtype",
    "torch_dtype",
    "hidden_act",
    "silu",
    "gelu",
    "quantization_config",
    "quant_method",
    "bitsandbytes",
    "load_in_4bit",
    "load_in_8bit",
    "llm_int8_threshold",
    "bnb_4bit_quant_type",
    "bnb_4bit_compute_dtype",
    "partial_rotary_factor",
    "llama",
    "mistral",
    "qwen2",
    "gpt2",
    "default",
    "linear",
    "dynamic",
    "yarn",
    "llama3",
    "longrope",
    "bfloat16",
    "float16",
    "pretraining_tp",
];

/// Names that tensors of these models have, and some that come near.
pub const NAMES: [&str; 18] = [
    "model.embed_tokens.weight",
    "embed_tokens.weight",
    "lm_head.weight",
    "model.norm.weight",
    "model.layers.0.self_attn.q_proj.weight",
    "model.layers.0.self_attn.q_proj.bias",
    "model.layers.0.self_attn.o_proj.bias",
    "model.layers.0.mlp.gate_proj.bias",
    "model.layers.0.mlp.down_proj.weight",
    "model.layers.0.input_layernorm.weight",
    "model.layers.1.input_layernorm.weight",
    "model.layers.99999999999999999999.mlp.up_proj.weight",
    "model.layers.0.self_attn.rotary_emb.inv_freq",
    "_orig_mod.model.norm.weight",
    "model.layers.0.mlp.down_proj.weight.absmax",
    "model.layers.0.mlp.down_proj.SCB",
    "model.layers.0.mlp.down_proj.weight.quant_state.bitsandbytes__nf4",
    "model.layers.-1.mlp.down_proj.weight",
];

/// A configuration of one layer.
pub fn config(width: u64) -> Value {
    json!({
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu",
        "hidden_size": width, "intermediate_size": width, "num_hidden_layers": 1,
        "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": width / 2,
        "vocab_size": 8, "max_position_embeddings": 16, "rms_norm_eps": 1e-5, "rope_theta": 10000.0,
        "tie_word_embeddings": false, "eos_token_id": 2, "bos_token_id": 1, "torch_dtype": "float32",
    })
}

/// The tensors that [`config`] asks for; matrices are of `dtype`.
pub fn tensors(width: u64, dtype: &'static str, tied: bool, biases: bool) -> Vec<Tensor> {
    let half = width / 2;
    let mut all = vec![Tensor::new("model.embed_tokens.weight", dtype, &[8, width])];
    let linear = [
        ("self_attn.q_proj", width, width),
        ("self_attn.k_proj", half, width),
        ("self_attn.v_proj", half, width),
        ("self_attn.o_proj", width, width),
        ("mlp.gate_proj", width, width),
        ("mlp.up_proj", width, width),
        ("mlp.down_proj", width, width),
    ];
    for (name, rows, columns) in linear {
        let name = format!("model.layers.0.{name}");
        all.push(Tensor::new(
            &format!("{name}.weight"),
            dtype,
            &[rows, columns],
        ));
        if biases
            && ["q_proj", "k_proj", "v_proj"]
                .iter()
                .any(|end| name.ends_with(end))
        {
            all.push(Tensor::new(&format!("{name}.bias"), dtype, &[rows]));
        }
    }
    for name in [
        "layers.0.input_layernorm",
        "layers.0.post_attention_layernorm",
        "norm",
    ] {
        all.push(Tensor::new(
            &format!("model.{name}.weight"),
            dtype,
            &[width],
        ));
    }
    if !tied {
        all.push(Tensor::new("lm_head.weight", dtype, &[8, width]));
    }
    all
}
