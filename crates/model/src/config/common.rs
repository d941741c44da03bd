//! The settings that every architecture has.

use serde_json::{Map, Value};

use super::{LARGEST_LAYERS, Reader};
use crate::heads::{self, HeadConfig};

/// Settings that mean the same in every architecture, under the names that most of them give these.
#[derive(Clone, Debug, PartialEq)]
pub struct Common {
    /// `model_type` in the file.
    pub model_type: String,
    /// Width of the residual stream.
    pub hidden_size: usize,
    /// Number of blocks.
    pub num_hidden_layers: usize,
    /// Rows of the embedding.
    pub vocab_size: usize,
    /// Context length the model was made for, in tokens.
    pub max_position_embeddings: usize,
    /// Whether the head is the embedding.
    pub tie_word_embeddings: bool,
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
    /// What it makes of its last hidden states.
    pub head: HeadConfig,
    raw: Map<String, Value>,
}

/// What an architecture calls the sizes, and what they are where the file does not say.
pub(crate) struct CommonKeys {
    pub hidden_size: (&'static str, Option<usize>),
    pub num_hidden_layers: (&'static str, Option<usize>),
    pub vocab_size: Option<usize>,
    pub max_position_embeddings: (&'static str, usize),
    pub tie_word_embeddings: bool,
}

impl CommonKeys {
    /// The names that most architectures use, and no defaults but these.
    pub(crate) fn usual(positions: usize, tied: bool) -> Self {
        Self {
            hidden_size: ("hidden_size", None),
            num_hidden_layers: ("num_hidden_layers", None),
            vocab_size: None,
            max_position_embeddings: ("max_position_embeddings", positions),
            tie_word_embeddings: tied,
        }
    }
}

impl Common {
    /// Reads them; what is wrong goes to `read.problems`.
    pub(crate) fn read(read: &mut Reader<'_>, model_type: &str, keys: &CommonKeys) -> Self {
        let (layers_key, layers) = keys.num_hidden_layers;
        let common = Self {
            model_type: model_type.to_owned(),
            hidden_size: read.size(keys.hidden_size.0, keys.hidden_size.1),
            num_hidden_layers: read.size(layers_key, layers),
            vocab_size: read.size("vocab_size", keys.vocab_size),
            max_position_embeddings: read.size(
                keys.max_position_embeddings.0,
                Some(keys.max_position_embeddings.1),
            ),
            tie_word_embeddings: read.flag("tie_word_embeddings", keys.tie_word_embeddings),
            eos_token_ids: read.ids("eos_token_id"),
            bos_token_id: read.ids("bos_token_id").first().copied(),
            pad_token_id: read.ids("pad_token_id").first().copied(),
            initializer_range: read.number("initializer_range", Some(0.02)),
            dtype: ["dtype", "torch_dtype"]
                .iter()
                .find_map(|key| read.map.get(*key).and_then(Value::as_str))
                .map(str::to_owned),
            head: HeadConfig::default(),
            raw: read.map.clone(),
        };
        if common.num_hidden_layers as u64 > LARGEST_LAYERS {
            let what = format_args!("is {}; that cannot be right", common.num_hidden_layers);
            read.problem(layers_key, what);
        }
        check_quantization(read);
        common
    }

    /// The settings as they were read, unknown keys included.
    pub fn to_json(&self) -> Value {
        let mut json = self.raw.clone();
        if self.head != HeadConfig::CausalLm {
            self.head.write(&mut json);
            json.insert("pad_token_id".to_owned(), self.pad_token_id.into());
        }
        Value::Object(json)
    }

    /// Gives the head a matrix of its own (`tie_word_embeddings: false`).
    /// The names of the classes that the file gives (`id2label`), in the order of their numbers.
    pub fn labels(&self) -> Option<Vec<String>> {
        heads::labels(&self.raw)
    }

    /// Gives the model another head. A file that names no padding token names `padding` from then on: by it,
    /// transformers finds a text's last token.
    pub(crate) fn set_head(&mut self, head: HeadConfig, padding: Option<u32>) {
        if self.pad_token_id.is_none() && head != HeadConfig::CausalLm {
            self.pad_token_id = padding;
        }
        self.head = head;
    }

    pub(crate) fn untie(&mut self) {
        self.tie_word_embeddings = false;
        self.raw
            .insert("tie_word_embeddings".to_owned(), Value::Bool(false));
    }
}

/// What bitsandbytes wrote is for the checkpoint to read, or to refuse by name; nothing else is read.
fn check_quantization(read: &mut Reader<'_>) {
    let foreign = read.get("quantization_config").is_some_and(|config| {
        let is = |key: &str| config.get(key).and_then(Value::as_bool) == Some(true);
        let method = config.get("quant_method").and_then(Value::as_str);
        let own = method.is_some_and(|method| method.starts_with("bitsandbytes"));
        let old = method.is_none() && (is("load_in_4bit") || is("load_in_8bit"));
        !own && !old && config.as_object().is_none_or(|map| !map.is_empty())
    });
    if foreign {
        read.problem(
            "quantization_config",
            "says that the weights are quantised by another method than bitsandbytes; use the unquantised model or a .gguf",
        );
    }
}
