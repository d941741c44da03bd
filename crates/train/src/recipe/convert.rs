//! From settings to what the other crates take.

use std::path::PathBuf;

use enamel_adapter::{
    AdaLoraConfig, AdapterConfig, FullConfig, Ia3Config, InitLokr, InitLora, InitMiss, LohaConfig,
    LokrConfig, LoraConfig, MissConfig, Targets, VeraConfig, XLoraConfig,
};
use enamel_data::DataSpec;
use enamel_model::{Format, Quantization};
use serde_json::json;

use super::adapter::{AdapterSettings, InitWeights, Modules};
use super::quantization::QuantizationSettings;
use super::settings::DataSettings;

const TASK: &str = "CAUSAL_LM";

impl AdapterSettings {
    /// PEFT's configuration of a new adapter. `total_steps` are the optimizer steps of the run, which
    /// AdaLoRA spreads its budget over.
    pub fn config(&self, total_steps: usize) -> AdapterConfig {
        let target_modules = self.target_modules.as_ref().map(targets);
        let exclude_modules = self.exclude_modules.as_ref().map(targets);
        let modules_to_save = filled(&self.modules_to_save);
        let layers_to_transform = filled(&self.layers_to_transform);
        let layers_pattern = self.layers_pattern.clone().map(|pattern| vec![pattern]);
        let rank_pattern = self.rank_pattern.0.clone();
        let alpha_pattern = self.alpha_pattern.0.clone();
        let task_type = Some(TASK.to_owned());
        let r = self.rank();
        match self.method.as_str() {
            "loha" => LohaConfig {
                r,
                alpha: self.lora_alpha,
                rank_dropout: self.rank_dropout,
                module_dropout: self.module_dropout,
                target_modules,
                exclude_modules,
                init_weights: self.init_weights == InitWeights::Flag(true),
                layers_to_transform,
                layers_pattern,
                rank_pattern,
                alpha_pattern,
                modules_to_save,
                task_type,
                ..LohaConfig::default()
            }
            .into(),
            "lokr" => LokrConfig {
                r,
                alpha: self.lora_alpha,
                rank_dropout: self.rank_dropout,
                module_dropout: self.module_dropout,
                decompose_both: self.decompose_both,
                decompose_factor: self.decompose_factor,
                rank_dropout_scale: self.rank_dropout_scale,
                target_modules,
                exclude_modules,
                init_weights: match &self.init_weights {
                    InitWeights::Flag(true) => InitLokr::Default,
                    InitWeights::Flag(false) => InitLokr::Random,
                    InitWeights::Named(_) => InitLokr::Lycoris,
                },
                layers_to_transform,
                layers_pattern,
                rank_pattern,
                alpha_pattern,
                modules_to_save,
                task_type,
                ..LokrConfig::default()
            }
            .into(),
            "adalora" => AdaLoraConfig {
                target_r: self.target_r,
                init_r: self.init_r,
                tinit: self.tinit,
                tfinal: self.tfinal,
                delta_t: self.deltaT,
                beta1: self.beta1,
                beta2: self.beta2,
                orth_reg_weight: self.orth_reg_weight,
                total_step: Some(total_steps),
                lora_alpha: self.lora_alpha,
                lora_dropout: self.lora_dropout,
                target_modules,
                exclude_modules,
                modules_to_save,
                layers_to_transform,
                layers_pattern,
                task_type,
                ..AdaLoraConfig::default()
            }
            .into(),
            "vera" => VeraConfig {
                r,
                target_modules,
                modules_to_save,
                layers_to_transform,
                layers_pattern,
                projection_prng_key: self.projection_prng_key,
                save_projection: self.save_projection,
                vera_dropout: self.vera_dropout,
                d_initial: self.d_initial,
                init_weights: self.init_weights == InitWeights::Flag(true),
                task_type,
                ..VeraConfig::default()
            }
            .into(),
            "ia3" => Ia3Config {
                target_modules,
                exclude_modules,
                feedforward_modules: self.feedforward_modules.as_ref().map(targets),
                modules_to_save,
                init_ia3_weights: self.init_ia3_weights,
                task_type,
                ..Ia3Config::default()
            }
            .into(),
            "miss" => MissConfig {
                r,
                miss_dropout: self.miss_dropout,
                mini_r: self.mini_r,
                target_modules,
                exclude_modules,
                init_weights: match &self.init_weights {
                    InitWeights::Flag(true) => InitMiss::Default,
                    InitWeights::Flag(false) => InitMiss::Random,
                    InitWeights::Named(name) if name == "bat" => InitMiss::Bat,
                    InitWeights::Named(_) => InitMiss::Mini,
                },
                layers_to_transform,
                layers_pattern,
                modules_to_save,
                task_type,
                ..MissConfig::default()
            }
            .into(),
            "xlora" => XLoraConfig {
                adapters: self
                    .adapters
                    .0
                    .iter()
                    .map(|(name, dir)| (name.clone(), dir.display().to_string()))
                    .collect(),
                xlora_depth: self.xlora_depth,
                xlora_size: self.xlora_size,
                xlora_dropout_p: self.xlora_dropout_p,
                layerwise_scalings: self.layerwise_scalings,
                enable_softmax: self.enable_softmax,
                enable_softmax_topk: self.enable_softmax_topk,
                softmax_temperature: self.softmax_temperature,
                top_k_lora: self.top_k_lora,
                scaling_pass_value: self.scaling_pass_value,
                global_scaling_weight: self.global_scaling_weight,
                use_trainable_adapters: self.use_trainable_adapters,
                task_type,
                ..XLoraConfig::default()
            }
            .into(),
            "full" => FullConfig {
                task_type,
                ..FullConfig::default()
            }
            .into(),
            "head" => LoraConfig {
                target_modules: Some(Targets::Nothing),
                modules_to_save,
                ensure_weight_tying: self.ensure_weight_tying,
                task_type,
                ..LoraConfig::default()
            }
            .into(),
            method => {
                let mut config = LoraConfig {
                    r,
                    lora_alpha: self.lora_alpha,
                    lora_dropout: self.lora_dropout,
                    target_modules,
                    exclude_modules,
                    modules_to_save,
                    layers_to_transform,
                    layers_pattern,
                    use_rslora: self.use_rslora,
                    use_dora: self.use_dora || method == "dora",
                    init_lora_weights: init_lora(&self.init_lora_weights),
                    rank_pattern,
                    alpha_pattern,
                    bias: self.bias,
                    lora_bias: self.lora_bias,
                    trainable_token_indices: self.trainable_token_indices.clone(),
                    ensure_weight_tying: self.ensure_weight_tying,
                    task_type,
                    ..LoraConfig::default()
                };
                if config.init_lora_weights == InitLora::Eva {
                    let eva = json!({ "rho": self.eva_rho });
                    config.other.insert("eva_config".to_owned(), eva);
                }
                if let Some(bits) = self.loftq_config.and_then(|loftq| loftq.loftq_bits) {
                    config.set_loftq(bits);
                }
                config.into()
            }
        }
    }

    /// Rank of the update, by the method's default if it was left out.
    pub fn rank(&self) -> usize {
        self.r.unwrap_or(match self.method.as_str() {
            "vera" => 256,
            "miss" => 64,
            _ => 8,
        })
    }
}

fn init_lora(init: &InitWeights) -> InitLora {
    let value = match init {
        InitWeights::Flag(flag) => json!(flag),
        InitWeights::Named(name) => json!(name),
    };
    // The setting's check has let through only what this reads.
    serde_json::from_value(value).unwrap_or_default()
}

impl From<&QuantizationSettings> for Quantization {
    fn from(set: &QuantizationSettings) -> Self {
        let format = match (set.load_in_4bit, set.load_in_8bit) {
            (true, _) => Some(Format::FourBit {
                kind: set.bnb_4bit_quant_type.into(),
                block: set.bnb_4bit_blocksize,
                double: set.bnb_4bit_use_double_quant,
                compute: set.bnb_4bit_compute_dtype.into(),
            }),
            (_, true) => Some(Format::Int8 {
                threshold: set.llm_int8_threshold as f32,
            }),
            _ => None,
        };
        Self {
            format,
            skip_modules: set.skip_modules.clone(),
            dequantize: set.dequantize,
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
            template_arguments: self.chat_template_kwargs.0.clone(),
            ignore_columns: self.ignore_columns.clone(),
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
