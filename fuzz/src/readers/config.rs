//! `config.json`: what `plan --model` reads, and the tables that a model builds from it.

use anyhow::Result;
use burn::tensor::Device;
use enamel_model::arch::described_modules;
use enamel_model::{ArchConfig, Model};
use serde_json::{Value, json};

use super::Reader;
use crate::folder::{Folder, Input, Part};
use crate::formats::llama;
use crate::mutate;
use crate::random::Random;

struct Config {
    seeds: Vec<Value>,
}

pub fn make(_: &mut Folder) -> Result<Box<dyn Reader>> {
    let with = |more: Value| {
        let mut config = llama::config(8);
        if let (Some(config), Value::Object(more)) = (config.as_object_mut(), more) {
            config.extend(more);
        }
        config
    };
    let seeds = vec![
        with(json!({})),
        with(
            json!({"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 5000.0}}),
        ),
        with(json!({"rope_scaling": {"type": "dynamic", "factor": 2.0}})),
        with(
            json!({"rope_scaling": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0,
            "high_freq_factor": 4.0, "original_max_position_embeddings": 8}}),
        ),
        with(
            json!({"rope_scaling": {"rope_type": "yarn", "factor": 4.0, "beta_fast": 32, "beta_slow": 1,
            "mscale": 1.0, "mscale_all_dim": 0.5, "original_max_position_embeddings": 8}}),
        ),
        with(json!({"model_type": "mistral", "sliding_window": 4, "attention_bias": true})),
        with(
            json!({"model_type": "qwen2", "sliding_window": 4, "use_sliding_window": true,
            "max_window_layers": 0, "layer_types": ["sliding_attention"]}),
        ),
        with(
            json!({"attention_bias": true, "mlp_bias": true, "eos_token_id": [2, 3], "tie_word_embeddings": true}),
        ),
        with(json!({"model_type": "qwen3", "head_dim": 4, "attention_bias": true})),
        json!({"model_type": "gpt2", "n_embd": 8, "n_layer": 2, "n_head": 2, "n_inner": null, "n_positions": 16,
            "vocab_size": 24, "layer_norm_epsilon": 1e-5, "activation_function": "gelu_new"}),
        json!({"model_type": "vit", "hidden_size": 8, "num_hidden_layers": 2, "intermediate_size": 16,
            "image_size": 32, "patch_size": 16, "num_channels": 3, "qkv_bias": true,
            "id2label": {"0": "a", "1": "b"}}),
    ];
    Ok(Box::new(Config { seeds }))
}

impl Reader for Config {
    fn input(&self, random: &mut Random) -> Input {
        let mut config = random.pick(&self.seeds).clone();
        for _ in 0..random.few() {
            mutate::json(random, &mut config, &llama::WORDS);
        }
        let mut text = config.to_string().into_bytes();
        if random.once_in(6) {
            mutate::text(random, &mut text, &llama::WORDS);
        }
        Input(vec![Part::new("@config.json", text)])
    }

    fn read(&mut self, input: &Input, _: &mut Folder) -> Result<bool> {
        let Ok(json) = serde_json::from_slice::<Value>(input.part("@config.json")) else {
            return Ok(false);
        };
        if let Some(modules) = described_modules(&json) {
            return Ok(modules.is_ok_and(|modules| !modules.is_empty()));
        }
        let Ok(config) = ArchConfig::from_json(&json) else {
            return Ok(false);
        };
        let _ = config.to_json();
        // What is large is planned from shapes and never allocated; what is small is built.
        let sizes = [
            config.vocab_size,
            config.hidden_size,
            config.decoder().intermediate_size,
            config.num_hidden_layers,
            config.decoder().num_attention_heads * config.decoder().head_dim,
        ];
        if config.num_hidden_layers <= 256 {
            let modules = config.modules();
            assert!(!modules.is_empty());
        }
        if sizes.iter().all(|size| *size <= 64) && config.max_position_embeddings <= 1 << 12 {
            let _ = Model::random(&config, 1, &Device::flex());
        }
        Ok(true)
    }
}
