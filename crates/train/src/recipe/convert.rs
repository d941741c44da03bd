//! From settings to what the other crates take.

use std::path::PathBuf;

use enamel_adapter::{AdapterConfig, InitLora, LoraConfig, Targets};
use enamel_data::DataSpec;

use super::settings::{AdapterSettings, DataSettings, InitWeights, Modules, NamedInit};

impl AdapterSettings {
    /// PEFT's configuration of a new adapter.
    pub fn config(&self) -> AdapterConfig {
        self.lora_config().into()
    }

    fn lora_config(&self) -> LoraConfig {
        LoraConfig {
            r: self.r,
            lora_alpha: self.lora_alpha,
            lora_dropout: self.lora_dropout,
            target_modules: Some(targets(&self.target_modules)),
            exclude_modules: self.exclude_modules.as_ref().map(targets),
            modules_to_save: filled(&self.modules_to_save),
            layers_to_transform: filled(&self.layers_to_transform),
            layers_pattern: self.layers_pattern.clone().map(|pattern| vec![pattern]),
            use_rslora: self.use_rslora,
            init_lora_weights: match self.init_lora_weights {
                InitWeights::Default(true) => InitLora::Default,
                InitWeights::Default(false) => InitLora::Random,
                InitWeights::Named(NamedInit::Gaussian) => InitLora::Gaussian,
            },
            rank_pattern: self.rank_pattern.clone().into_iter().collect(),
            alpha_pattern: self.alpha_pattern.clone().into_iter().collect(),
            task_type: Some("CAUSAL_LM".to_owned()),
            ..LoraConfig::default()
        }
    }
}

impl DataSettings {
    /// What to read for training; with `valid_fraction`, for validation too.
    pub fn train_spec(&self) -> DataSpec {
        self.spec(&self.train.0)
    }

    /// What to read for validation, if there are files for it.
    pub fn valid_spec(&self) -> Option<DataSpec> {
        (!self.valid.0.is_empty()).then(|| self.spec(&self.valid.0))
    }

    fn spec(&self, paths: &[PathBuf]) -> DataSpec {
        DataSpec {
            paths: paths.to_vec(),
            format: self.format,
            max_length: Some(self.max_length),
            truncation: self.truncation,
            on_bad_row: self.on_bad_row,
            train_on: self.train_on,
            ..DataSpec::default()
        }
    }
}

fn targets(modules: &Modules) -> Targets {
    match modules {
        Modules::Pattern(name) if name == "all-linear" => Targets::AllLinear,
        Modules::Pattern(pattern) => Targets::Regex(pattern.clone()),
        Modules::List(names) => Targets::List(names.clone()),
    }
}

fn filled<T: Clone>(list: &[T]) -> Option<Vec<T>> {
    (!list.is_empty()).then(|| list.to_vec())
}
