//! `config.json` of the Llama family, as transformers 4 and 5 write it.
//!
//! Version 4 says `rope_theta`, `rope_scaling` and `torch_dtype`; version 5 says `rope_parameters`
//! and `dtype`. Keys that are not understood are kept for writing the file back.

use enamel_adapter::{ModuleKind, ModuleShape};
use serde_json::{Map, Value};

use crate::nn::rope::RopeConfig;

mod reader;
mod vit;

pub(crate) use reader::Reader;
pub use vit::vit_modules;

/// The `model_type`s that can be read.
pub const SUPPORTED_MODEL_TYPES: [&str; 3] = ["llama", "mistral", "qwen2"];

/// Why a `config.json` cannot be used. The caller knows the file and adds its name.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ConfigError {
    /// Not a JSON object.
    #[error("config.json is not a JSON object: check that the file is a model's config.json")]
    NotAnObject,
    /// No `model_type`, so nothing else can be judged.
    #[error("config.json has no `model_type`; supported are {}", SUPPORTED_MODEL_TYPES.join(", "))]
    NoModelType,
    /// An architecture that is not implemented.
    #[error(
        "model_type '{found}' is not supported; supported are {}",
        SUPPORTED_MODEL_TYPES.join(", ")
    )]
    UnsupportedModelType {
        /// What the file says.
        found: String,
    },
    /// Missing, mistyped, contradictory or unsupported settings, all of them.
    #[error("config.json cannot be used:{}", bullets(.problems))]
    Invalid {
        /// One sentence each, naming the key.
        problems: Vec<String>,
    },
}

/// Puts each line on its own, indented, behind a dash.
pub(crate) fn bullets(lines: &[String]) -> String {
    lines.iter().map(|line| format!("\n  - {line}")).collect()
}

/// Which published family the settings follow.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Family {
    /// `model_type: llama`.
    Llama,
    /// `model_type: mistral`: Llama with a sliding window.
    Mistral,
    /// `model_type: qwen2`: Llama with biases on q, k and v.
    Qwen2,
}

impl Family {
    /// The `model_type` in `config.json`.
    pub fn model_type(self) -> &'static str {
        match self {
            Family::Llama => "llama",
            Family::Mistral => "mistral",
            Family::Qwen2 => "qwen2",
        }
    }

    fn from_model_type(name: &str) -> Option<Self> {
        [Family::Llama, Family::Mistral, Family::Qwen2]
            .into_iter()
            .find(|f| f.model_type() == name)
    }
}

/// The settings of a Llama-family model. Read it with [`LlamaConfig::from_json`].
#[derive(Clone, Debug, PartialEq)]
pub struct LlamaConfig {
    /// The family, from `model_type`.
    pub family: Family,
    /// Width of the residual stream.
    pub hidden_size: usize,
    /// Width inside the MLP.
    pub intermediate_size: usize,
    /// Number of blocks.
    pub num_hidden_layers: usize,
    /// Query heads.
    pub num_attention_heads: usize,
    /// Key and value heads; each serves `num_attention_heads / num_key_value_heads` query heads.
    pub num_key_value_heads: usize,
    /// Width of a head; `hidden_size / num_attention_heads` unless the file says otherwise.
    pub head_dim: usize,
    /// Epsilon inside every RMSNorm.
    pub rms_norm_eps: f64,
    /// Rows of the embedding.
    pub vocab_size: usize,
    /// Context length the model was made for, in tokens.
    pub max_position_embeddings: usize,
    /// Whether the head is the embedding.
    pub tie_word_embeddings: bool,
    /// Whether q, k and v have biases.
    pub attention_bias: bool,
    /// Whether the attention's output projection has a bias.
    pub output_bias: bool,
    /// Whether the MLP's three projections have biases.
    pub mlp_bias: bool,
    /// Rotary embedding.
    pub rope: RopeConfig,
    /// Per block: how many positions back it sees, if not all.
    pub sliding_windows: Vec<Option<usize>>,
    /// Ids that end a text.
    pub eos_token_ids: Vec<u32>,
    /// Id that begins a text.
    pub bos_token_id: Option<u32>,
    /// Id used as padding.
    pub pad_token_id: Option<u32>,
    /// Standard deviation of random weights.
    pub initializer_range: f64,
    /// `dtype` or `torch_dtype`, as spelled in the file.
    pub dtype: Option<String>,
    raw: Map<String, Value>,
}

impl LlamaConfig {
    /// Reads the settings. Every problem is in the one error.
    pub fn from_json(json: &Value) -> Result<Self, ConfigError> {
        let raw = json.as_object().ok_or(ConfigError::NotAnObject)?;
        let name = raw
            .get("model_type")
            .and_then(Value::as_str)
            .ok_or(ConfigError::NoModelType)?;
        let family =
            Family::from_model_type(name).ok_or_else(|| ConfigError::UnsupportedModelType {
                found: name.to_owned(),
            })?;
        let mut read = Reader {
            map: raw,
            prefix: "",
            problems: Vec::new(),
        };

        let hidden_size = read.size("hidden_size", None);
        let num_attention_heads = read.size("num_attention_heads", None);
        let num_hidden_layers = read.size("num_hidden_layers", None);
        let config = Self {
            family,
            hidden_size,
            intermediate_size: read.size("intermediate_size", None),
            num_hidden_layers,
            num_attention_heads,
            num_key_value_heads: read.size("num_key_value_heads", Some(num_attention_heads)),
            head_dim: read.size("head_dim", hidden_size.checked_div(num_attention_heads)),
            rms_norm_eps: read.number("rms_norm_eps", Some(1e-6)),
            vocab_size: read.size("vocab_size", None),
            max_position_embeddings: read.size(
                "max_position_embeddings",
                Some(match family {
                    Family::Llama => 2048,
                    Family::Mistral => 131_072,
                    Family::Qwen2 => 32768,
                }),
            ),
            tie_word_embeddings: read.flag("tie_word_embeddings", false),
            attention_bias: match family {
                Family::Llama => read.flag("attention_bias", false),
                Family::Mistral => false,
                Family::Qwen2 => true,
            },
            output_bias: family == Family::Llama && read.flag("attention_bias", false),
            mlp_bias: family == Family::Llama && read.flag("mlp_bias", false),
            rope: RopeConfig::default(),
            sliding_windows: read.sliding_windows(family, num_hidden_layers),
            eos_token_ids: read.ids("eos_token_id"),
            bos_token_id: read.ids("bos_token_id").first().copied(),
            pad_token_id: read.ids("pad_token_id").first().copied(),
            initializer_range: read.number("initializer_range", Some(0.02)),
            dtype: ["dtype", "torch_dtype"]
                .iter()
                .find_map(|key| raw.get(*key).and_then(Value::as_str))
                .map(str::to_owned),
            raw: raw.clone(),
        };
        read.check_shapes(&config);
        let rope = RopeConfig::from_config(raw, config.max_position_embeddings);
        let mut problems = read.problems;
        match rope {
            Ok(rope) if problems.is_empty() => return Ok(Self { rope, ..config }),
            Ok(_) => {}
            Err(more) => problems.extend(more),
        }
        problems.dedup();
        Err(ConfigError::Invalid { problems })
    }

    /// The settings as they were read, unknown keys included.
    pub fn to_json(&self) -> Value {
        Value::Object(self.raw.clone())
    }

    /// The same settings with a head of its own (`tie_word_embeddings: false`).
    pub fn untied(&self) -> Self {
        let mut config = self.clone();
        config.tie_word_embeddings = false;
        config
            .raw
            .insert("tie_word_embeddings".to_owned(), Value::Bool(false));
        config
    }

    /// Every module with parameters, in the order in which a loaded model lists them. Needs no
    /// weights. A tied head is not listed: it has no parameters of its own.
    pub fn modules(&self) -> Vec<ModuleShape> {
        let hidden = self.hidden_size;
        let queries = self.num_attention_heads.saturating_mul(self.head_dim);
        let keys = self.num_key_value_heads.saturating_mul(self.head_dim);
        let inner = self.intermediate_size;
        let module = |name: String, kind, shape: &[usize], bias| ModuleShape {
            name,
            kind,
            shape: shape.to_vec(),
            bias,
        };
        let embedding = "model.embed_tokens".to_owned();
        let mut all = vec![module(
            embedding,
            ModuleKind::Embedding,
            &[self.vocab_size, hidden],
            false,
        )];
        for i in 0..self.num_hidden_layers {
            let linear = |name: &str, shape: [usize; 2], bias| {
                module(
                    format!("model.layers.{i}.{name}"),
                    ModuleKind::Linear,
                    &shape,
                    bias,
                )
            };
            let norm = |name: &str| {
                module(
                    format!("model.layers.{i}.{name}"),
                    ModuleKind::Norm,
                    &[hidden],
                    false,
                )
            };
            all.extend([
                linear("self_attn.q_proj", [queries, hidden], self.attention_bias),
                linear("self_attn.k_proj", [keys, hidden], self.attention_bias),
                linear("self_attn.v_proj", [keys, hidden], self.attention_bias),
                linear("self_attn.o_proj", [hidden, queries], self.output_bias),
                linear("mlp.gate_proj", [inner, hidden], self.mlp_bias),
                linear("mlp.up_proj", [inner, hidden], self.mlp_bias),
                linear("mlp.down_proj", [hidden, inner], self.mlp_bias),
                norm("input_layernorm"),
                norm("post_attention_layernorm"),
            ]);
        }
        all.push(module(
            "model.norm".to_owned(),
            ModuleKind::Norm,
            &[hidden],
            false,
        ));
        if !self.tie_word_embeddings {
            let shape = [self.vocab_size, hidden];
            all.push(module(
                "lm_head".to_owned(),
                ModuleKind::Head,
                &shape,
                false,
            ));
        }
        all
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use crate::nn::rope::RopeScaling;
    use serde_json::json;

    fn version_5() -> Value {
        json!({
            "model_type": "llama", "hidden_size": 64, "intermediate_size": 96, "vocab_size": 256,
            "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
            "rms_norm_eps": 1e-5, "max_position_embeddings": 128, "dtype": "bfloat16",
            "rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 5000.0},
            "eos_token_id": [2, 7], "bos_token_id": 1, "pad_token_id": null,
            "something_new": {"kept": [1, 2]}
        })
    }

    fn edited(edit: impl FnOnce(&mut Map<String, Value>)) -> Result<LlamaConfig, ConfigError> {
        let mut json = version_5();
        edit(json.as_object_mut().unwrap());
        LlamaConfig::from_json(&json)
    }

    #[test]
    fn both_generations_mean_the_same() {
        let five = LlamaConfig::from_json(&version_5()).unwrap();
        let four = edited(|map| {
            map.remove("rope_parameters");
            map.remove("dtype");
            map.insert("rope_theta".into(), json!(5000.0));
            map.insert(
                "rope_scaling".into(),
                json!({"type": "linear", "factor": 4.0}),
            );
            map.insert("torch_dtype".into(), json!("bfloat16"));
        })
        .unwrap();
        assert_eq!(five.rope, four.rope);
        assert_eq!(five.rope.theta, 5000.0);
        assert_eq!(five.rope.scaling, RopeScaling::Linear { factor: 4.0 });
        assert_eq!(five.dtype, four.dtype);
        assert_eq!(five.modules(), four.modules());
    }

    #[test]
    fn defaults_ids_and_unknown_keys() {
        let config = LlamaConfig::from_json(&version_5()).unwrap();
        assert_eq!(config.head_dim, 16);
        assert_eq!(config.eos_token_ids, [2, 7]);
        assert_eq!(config.bos_token_id, Some(1));
        assert_eq!(config.pad_token_id, None);
        assert_eq!(config.to_json(), version_5());
        let explicit = edited(|map| {
            map.insert("head_dim".into(), json!(32));
            map.remove("num_key_value_heads");
        })
        .unwrap();
        assert_eq!((explicit.head_dim, explicit.num_key_value_heads), (32, 4));
    }

    #[test]
    fn every_problem_is_in_the_one_error() {
        let error = edited(|map| {
            map.remove("vocab_size");
            map.insert("hidden_size".into(), json!("big"));
            map.insert("num_key_value_heads".into(), json!(3));
            map.insert("hidden_act".into(), json!("gelu"));
            map.insert("rope_parameters".into(), json!({"rope_type": "spiral"}));
            map.insert("quantization_config".into(), json!({"bits": 4}));
        })
        .unwrap_err()
        .to_string();
        for part in [
            "`vocab_size` is missing",
            "`hidden_size` must be a positive integer, not \"big\"",
            "not a multiple of num_key_value_heads (3)",
            "`hidden_act` is \"gelu\"",
            "spiral",
            "`quantization_config`",
        ] {
            assert!(error.contains(part), "no {part:?} in {error}");
        }
    }

    #[test]
    fn other_architectures_are_refused_by_name() {
        let error = edited(|map| {
            map.insert("model_type".into(), json!("gpt2"));
        })
        .unwrap_err()
        .to_string();
        assert_eq!(
            error,
            "model_type 'gpt2' is not supported; supported are llama, mistral, qwen2"
        );
        assert_eq!(
            LlamaConfig::from_json(&json!([])),
            Err(ConfigError::NotAnObject)
        );
        assert_eq!(
            LlamaConfig::from_json(&json!({})),
            Err(ConfigError::NoModelType)
        );
    }

    #[test]
    fn absurd_sizes_are_errors_not_allocations() {
        for (key, value) in [
            ("num_hidden_layers", json!(1u64 << 30)),
            ("vocab_size", json!(u64::MAX)),
            ("hidden_size", json!(0)),
            ("num_attention_heads", json!(-4)),
        ] {
            let error = edited(|map| {
                map.insert(key.into(), value);
            })
            .unwrap_err();
            assert!(error.to_string().contains(key), "{error}");
        }
    }

    #[test]
    fn module_list_of_llama_3_8b() {
        let config = LlamaConfig::from_json(&json!({
            "model_type": "llama", "hidden_size": 4096, "intermediate_size": 14336,
            "vocab_size": 128256, "num_hidden_layers": 32, "num_attention_heads": 32,
            "num_key_value_heads": 8, "rope_theta": 500000.0, "tie_word_embeddings": false
        }))
        .unwrap();
        let parameters: usize = config
            .modules()
            .iter()
            .map(|m| m.shape.iter().product::<usize>())
            .sum();
        assert_eq!(
            parameters, 8_030_261_248,
            "the published size of Llama-3-8B"
        );
    }

    #[test]
    fn windows_follow_the_family() {
        let with = |pairs: Value| {
            edited(|map| map.extend(pairs.as_object().unwrap().clone()))
                .unwrap()
                .sliding_windows
        };
        assert_eq!(with(json!({})), [None, None]);
        assert_eq!(with(json!({"model_type": "mistral"})), [Some(4096); 2]);
        assert_eq!(
            with(json!({"model_type": "mistral", "sliding_window": null})),
            [None, None]
        );
        let qwen = json!({"model_type": "qwen2", "sliding_window": 8, "max_window_layers": 1,
            "use_sliding_window": true});
        assert_eq!(with(qwen), [None, Some(8)]);
        assert_eq!(
            with(json!({"model_type": "qwen2", "sliding_window": 8})),
            [None, None]
        );
    }
}
