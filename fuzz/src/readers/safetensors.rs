//! `config.json` and `model.safetensors`, opened, read and loaded as a model.

use anyhow::Result;
use burn::tensor::{Device, Int, Tensor as BurnTensor};
use enamel_model::checkpoint::{Checkpoint, TensorSource};
use enamel_model::{ArchConfig, Loading, Model, ModelInput};
use serde_json::Value;

use super::Reader;
use crate::folder::{Folder, Input, Part};
use crate::formats::llama;
use crate::formats::safetensors::{self, Tensor};
use crate::mutate;
use crate::random::Random;

struct Safetensors {
    seeds: Vec<(Value, Vec<Tensor>)>,
}

/// Makes the seeds: every type, tied and not, with biases and without.
pub fn make(_: &mut Folder) -> Result<Box<dyn Reader>> {
    let seeds = seeds();
    Ok(Box::new(Safetensors { seeds }))
}

/// Configurations and tensors that fit.
pub fn seeds() -> Vec<(Value, Vec<Tensor>)> {
    let seed = |dtype, torch: &str, tied: bool, kind: &str| {
        let mut config = llama::config(8);
        config["torch_dtype"] = torch.into();
        config["tie_word_embeddings"] = tied.into();
        config["model_type"] = kind.into();
        (config, llama::tensors(8, dtype, tied, kind == "qwen2"))
    };
    vec![
        seed("F32", "float32", false, "llama"),
        seed("BF16", "bfloat16", true, "llama"),
        seed("F16", "float16", false, "llama"),
        seed("F32", "float32", true, "mistral"),
        seed("BF16", "bfloat16", false, "qwen2"),
    ]
}

/// `config.json`, mostly as it is.
pub fn config_part(random: &mut Random, config: &Value) -> Part {
    if !random.once_in(4) {
        return Part::new("config.json", config.to_string());
    }
    let mut config = config.clone();
    for _ in 0..random.few() {
        mutate::json(random, &mut config, &llama::WORDS);
    }
    let mut text = config.to_string().into_bytes();
    if random.once_in(6) {
        mutate::bytes(random, &mut text);
    }
    Part::new("config.json", text)
}

/// Opens what lies at the path, reads every tensor, builds the model, and lets it read three tokens.
pub fn open_and_load(path: &std::path::Path, loading: &Loading) -> bool {
    let Ok(checkpoint) = Checkpoint::open(path) else {
        return false;
    };
    load(&checkpoint, loading)
}

/// The same of what is open already.
pub fn load(checkpoint: &Checkpoint, loading: &Loading) -> bool {
    let Ok(config) = ArchConfig::from_json(checkpoint.config_json()) else {
        return false;
    };
    for info in checkpoint.tensors() {
        let _ = checkpoint.read_packed(&info.name);
    }
    let device = Device::flex();
    let Ok(model) = Model::load_for(&config, checkpoint, &device, loading) else {
        return false;
    };
    // Three tokens, where the shape makes that little work.
    if config
        .modules()
        .iter()
        .all(|m| m.shape.iter().all(|n| *n <= 512))
        && config.num_hidden_layers < 4
    {
        let last = config.vocab_size.saturating_sub(1) as i32;
        let ids = BurnTensor::<2, Int>::from_data([[0, last, last / 2]], &device);
        let hidden = model.forward_hidden(&ModelInput::new(ids), None);
        let logits = model.logits(hidden.squeeze_dim(0));
        assert_eq!(logits.dims(), [3, config.vocab_size]);
    }
    true
}

impl Reader for Safetensors {
    fn input(&self, random: &mut Random) -> Input {
        let (config, tensors) = random.pick(&self.seeds);
        let config = config_part(random, config);
        let weights = safetensors::changed(random, tensors, &llama::NAMES);
        Input(vec![config, Part::new("model.safetensors", weights)])
    }

    fn read(&mut self, input: &Input, folder: &mut Folder) -> Result<bool> {
        folder.hold(input)?;
        Ok(open_and_load(folder.path(), &Loading::default()))
    }
}
