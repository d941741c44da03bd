//! A base model: found, opened, cross-checked, and only then loaded.

use std::path::Path;

use burn::tensor::Device;
use enamel_data::Tokenizer;
use enamel_model::checkpoint::Checkpoint;
use enamel_model::source::{self, LocalModel, ModelRef, PullOptions, PullProgress};
use enamel_model::{CausalLm, LlamaConfig};
use serde_json::Value;

use crate::error::TrainError;

/// A base model whose files are open and agree with each other. None of its weights are in memory.
pub struct OpenBase {
    /// Where it lies and where it came from.
    pub local: LocalModel,
    /// Its files.
    pub checkpoint: Checkpoint,
    /// Its shape.
    pub config: LlamaConfig,
    /// Its tokenizer and chat template.
    pub tokenizer: Tokenizer,
}

/// The same with its weights on a device.
pub struct LoadedBase {
    /// Where it lies and where it came from.
    pub local: LocalModel,
    /// Its files.
    pub checkpoint: Checkpoint,
    /// Its shape.
    pub config: LlamaConfig,
    /// Its tokenizer and chat template.
    pub tokenizer: Tokenizer,
    /// The model, frozen, without an adapter.
    pub model: CausalLm,
}

impl OpenBase {
    /// Finds the model that `reference` names, fetching it if it is not there, and opens its files.
    /// `chat_template` replaces the model's own.
    pub fn open(
        reference: &str,
        chat_template: Option<&str>,
        progress: &mut dyn PullProgress,
    ) -> Result<Self, TrainError> {
        let local = source::pull(
            &ModelRef::parse(reference)?,
            &PullOptions::from_env()?,
            progress,
        )?;
        let checkpoint = Checkpoint::open(&local.path)?;
        let config = LlamaConfig::from_json(checkpoint.config_json())?;
        let own_template = checkpoint.chat_template();
        let tokenizer = Tokenizer::from_parts(
            &checkpoint.tokenizer_json()?,
            checkpoint.tokenizer_config().as_ref(),
            chat_template.or(own_template.as_deref()),
        )?;
        check_vocabulary(&local.path, &tokenizer, &config)?;
        Ok(Self {
            local,
            checkpoint,
            config,
            tokenizer,
        })
    }

    /// What an adapter's `base_model_name_or_path` should say: the hub's name where the model came
    /// from there or has one, else where it lies.
    pub fn name_for_peft(&self) -> String {
        self.local.path.display().to_string()
    }

    /// Loads the weights, one tensor after the other.
    pub fn load(self, device: &Device) -> Result<LoadedBase, TrainError> {
        let model = CausalLm::load(&self.config, &self.checkpoint, device)?;
        let Self {
            local,
            checkpoint,
            config,
            tokenizer,
        } = self;
        Ok(LoadedBase {
            local,
            checkpoint,
            config,
            tokenizer,
            model,
        })
    }
}

impl LoadedBase {
    /// The tokens at which an answer ends: the tokenizer's and those of `generation_config.json`.
    pub fn stop_ids(&self) -> Vec<u32> {
        stop_ids(
            &self.tokenizer,
            self.checkpoint.generation_config().as_ref(),
        )
    }
}

/// The embedding may have spare rows, as many models do; a token without a row is an error.
fn check_vocabulary(
    path: &Path,
    tokenizer: &Tokenizer,
    config: &LlamaConfig,
) -> Result<(), TrainError> {
    if tokenizer.vocab_size() <= config.vocab_size {
        return Ok(());
    }
    Err(TrainError::Mismatch(format!(
        "{}: the tokenizer has {} tokens, the embedding {} rows\n  \
         help: use the tokenizer that came with this model",
        path.display(),
        tokenizer.vocab_size(),
        config.vocab_size
    )))
}

fn stop_ids(tokenizer: &Tokenizer, generation_config: Option<&Value>) -> Vec<u32> {
    let mut ids = tokenizer.end_of_turn_ids().to_vec();
    let more: Vec<&Value> = match generation_config.and_then(|c| c.get("eos_token_id")) {
        Some(Value::Array(ids)) => ids.iter().collect(),
        Some(id) => vec![id],
        None => Vec::new(),
    };
    for id in more
        .into_iter()
        .filter_map(Value::as_u64)
        .filter_map(|id| u32::try_from(id).ok())
    {
        if !ids.contains(&id) {
            ids.push(id);
        }
    }
    ids
}
