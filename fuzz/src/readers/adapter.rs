//! `adapter_config.json` and its weights: facts, inspect, a plan without a model, loading, merging.

use anyhow::{Context, Result};
use burn::tensor::Device;
use enamel_adapter::config::Purpose;
use enamel_adapter::offline::AdapterOnDisk;
use enamel_adapter::offline::inspect::AdapterFacts;
use enamel_adapter::{
    AdapterConfig, AdapterFile, MethodConfig, SaveMeta, attach, load_pretrained, merge,
    save_pretrained, shapes, unmerge,
};
use enamel_model::{ArchConfig, Model};
use serde_json::{Value, json};

use super::Reader;
use crate::folder::{Folder, Input, Part};
use crate::formats::llama;
use crate::formats::safetensors::{Tensor, changed, parse, write};
use crate::mutate;
use crate::random::Random;

const WORDS: [&str; 81] = [
    "peft_type",
    "LORA",
    "LOHA",
    "LOKR",
    "ADALORA",
    "VERA",
    "IA3",
    "MISS",
    "XLORA",
    "FULL",
    "r",
    "lora_alpha",
    "alpha",
    "lora_dropout",
    "target_modules",
    "exclude_modules",
    "all-linear",
    "q_proj",
    "v_proj",
    "down_proj",
    "lm_head",
    "embed_tokens",
    ".*proj",
    "(a+)+$",
    "(",
    "modules_to_save",
    "layers_to_transform",
    "layers_pattern",
    "layers",
    "rank_pattern",
    "alpha_pattern",
    "bias",
    "all",
    "lora_only",
    "none",
    "use_rslora",
    "use_dora",
    "lora_bias",
    "init_lora_weights",
    "gaussian",
    "orthogonal",
    "pissa",
    "pissa_niter_4",
    "olora",
    "eva",
    "loftq",
    "loftq_config",
    "loftq_bits",
    "trainable_token_indices",
    "fan_in_fan_out",
    "base_model_name_or_path",
    "revision",
    "task_type",
    "CAUSAL_LM",
    "inference_mode",
    "init_r",
    "target_r",
    "tinit",
    "tfinal",
    "deltaT",
    "total_step",
    "beta1",
    "orth_reg_weight",
    "decompose_both",
    "decompose_factor",
    "rank_dropout",
    "module_dropout",
    "d_initial",
    "save_projection",
    "projection_prng_key",
    "vera_dropout",
    "feedforward_modules",
    "init_ia3_weights",
    "use_mora",
    "megatron_config",
    "layer_replication",
    "adapters",
    "xlora_depth",
    "top_k_lora",
    "ensure_weight_tying",
    "peft_version",
];

const NAMES: [&str; 16] = [
    "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight",
    "base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight",
    "base_model.model.model.layers.0.self_attn.q_proj.lora_A.default.weight",
    "base_model.model.model.layers.0.self_attn.q_proj.lora_magnitude_vector",
    "base_model.model.model.layers.0.mlp.down_proj.lora_B.bias",
    "base_model.model.model.embed_tokens.lora_embedding_A",
    "base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta",
    "base_model.model.model.layers.0.self_attn.q_proj.hada_w1_a",
    "base_model.model.model.layers.0.self_attn.q_proj.lokr_w1",
    "base_model.model.model.layers.0.self_attn.q_proj.lora_E",
    "base_model.vera_A",
    "base_model.model.model.layers.0.self_attn.q_proj.ia3_l",
    "base_model.model.lm_head.weight",
    "base_model.model.model.layers.0.self_attn.q_proj.base_layer.bias",
    "base_model.model.",
    "layers.0.self_attn.q_proj.lora_a",
];

const CONFIG: &str = "adapter_config.json";
const WEIGHTS: &str = "adapter_model.safetensors";

struct Adapters {
    model: Model,
    seeds: Vec<(Value, Vec<Tensor>)>,
}

/// The methods, each with what makes its file another one.
fn configs() -> Vec<Value> {
    let targets = json!(["q_proj", "down_proj"]);
    let lora = |more: Value| {
        let mut config = json!({"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj", "down_proj"]});
        if let (Some(config), Value::Object(more)) = (config.as_object_mut(), more) {
            config.extend(more);
        }
        config
    };
    vec![
        lora(json!({})),
        lora(
            json!({"use_rslora": true, "rank_pattern": {"down_proj": 1}, "alpha_pattern": {"q_proj": 8}}),
        ),
        lora(json!({"use_dora": true})),
        lora(json!({"lora_bias": true})),
        lora(json!({"target_modules": ["q_proj", "embed_tokens"]})),
        lora(json!({"trainable_token_indices": {"embed_tokens": [1, 3]}})),
        lora(json!({"modules_to_save": ["lm_head"]})),
        lora(json!({"target_modules": "all-linear"})),
        lora(json!({"target_modules": ".*q_proj"})),
        json!({"peft_type": "LOHA", "r": 2, "alpha": 4, "target_modules": targets}),
        json!({"peft_type": "LOKR", "r": 2, "alpha": 4, "target_modules": targets, "decompose_factor": 2}),
        json!({"peft_type": "LOKR", "r": 1, "alpha": 4, "target_modules": targets, "decompose_both": true}),
        json!({"peft_type": "ADALORA", "init_r": 2, "target_r": 1, "target_modules": targets, "total_step": 10,
            "tinit": 1, "tfinal": 2}),
        json!({"peft_type": "VERA", "r": 2, "target_modules": ["q_proj", "o_proj"]}),
        json!({"peft_type": "VERA", "r": 2, "target_modules": ["q_proj", "o_proj"], "save_projection": false}),
        json!({"peft_type": "IA3", "target_modules": ["k_proj", "down_proj"], "feedforward_modules": ["down_proj"]}),
        json!({"peft_type": "MISS", "r": 3, "target_modules": targets}),
        json!({"peft_type": "MISS", "r": 3, "mini_r": 2, "init_weights": "mini", "target_modules": targets}),
        json!({"peft_type": "MISS", "r": 2, "init_weights": "bat", "target_modules": targets}),
    ]
}

pub fn make(_: &mut Folder) -> Result<Box<dyn Reader>> {
    let config = ArchConfig::from_json(&llama::config(8))?;
    let model = Model::random(&config, 1, &Device::flex())?;
    let mut seeds = Vec::new();
    for config in configs() {
        let dir = tempfile::tempdir()?;
        let mut model = model.clone();
        let read = AdapterConfig::from_json(&config, "a seed")?;
        attach(&mut model, &read, 1).with_context(|| format!("attaching {config}"))?;
        save_pretrained(&model, &read, &SaveMeta::default(), dir.path())?;
        let config = serde_json::from_slice(&std::fs::read(dir.path().join(CONFIG))?)?;
        seeds.push((config, parse(&std::fs::read(dir.path().join(WEIGHTS))?)?));
    }
    Ok(Box::new(Adapters { model, seeds }))
}

impl Reader for Adapters {
    fn input(&self, random: &mut Random) -> Input {
        let (config, tensors) = random.pick(&self.seeds);
        let mut config = config.clone();
        if !random.once_in(3) {
            for _ in 0..random.few() {
                mutate::json(random, &mut config, &WORDS);
            }
        }
        let mut text = config.to_string().into_bytes();
        if random.once_in(8) {
            mutate::text(random, &mut text, &WORDS);
        }
        let weights = match random.once_in(3) {
            true => write(tensors, &Default::default()),
            false => changed(random, tensors, &NAMES),
        };
        Input(vec![Part::new(CONFIG, text), Part::new(WEIGHTS, weights)])
    }

    fn read(&mut self, input: &Input, folder: &mut Folder) -> Result<bool> {
        folder.hold(input)?;
        let dir = folder.path();
        if let Ok(facts) = AdapterFacts::read(dir) {
            let _ = facts.settings();
            let _ = facts.config.problems(Purpose::Load);
            let _ = enamel_train::commands::adapters::inspect(dir);
        }
        let _ = AdapterFile::read(dir);
        let modules = shapes(&self.model);
        if let Ok(adapter) = AdapterOnDisk::read(dir, &modules, None) {
            for module in &modules {
                let _ = adapter.delta(&module.name, &Device::flex());
            }
        }
        let mut model = self.model.clone();
        if load_pretrained(&mut model, dir, false).is_err() {
            return Ok(false);
        }
        if merge(&mut model).is_ok() {
            unmerge(&mut model);
        }
        Ok(true)
    }
}
