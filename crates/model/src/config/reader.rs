//! Reading one JSON object key by key, with every problem noted.

use serde_json::{Map, Value};

use super::{Family, LlamaConfig};

/// Sizes above this are taken for a damaged file; no published model comes near.
pub(super) const LARGEST_SIZE: u64 = 1 << 24;
/// Likewise for layers, of which a list is made before any weight is seen.
pub(super) const LARGEST_LAYERS: u64 = 1 << 12;

/// Reads keys of one JSON object, noting what is wrong instead of stopping at it. A value that
/// could not be read is replaced by one that later arithmetic can bear.
pub(crate) struct Reader<'a> {
    pub map: &'a Map<String, Value>,
    /// What stands before the key in messages (`rope_parameters.`).
    pub prefix: &'static str,
    pub problems: Vec<String>,
}

impl<'a> Reader<'a> {
    /// A value that is there and not null.
    pub fn get(&self, key: &str) -> Option<&'a Value> {
        self.map.get(key).filter(|value| !value.is_null())
    }

    pub fn problem(&mut self, key: &str, what: impl std::fmt::Display) {
        self.problems.push(format!("`{}{key}` {what}", self.prefix));
    }

    pub fn size(&mut self, key: &str, default: Option<usize>) -> usize {
        match (self.get(key), default) {
            (Some(value), _) => match value.as_u64() {
                Some(n) if (1..=LARGEST_SIZE).contains(&n) => n as usize,
                _ => {
                    self.problem(key, format_args!("must be a positive integer, not {value}"));
                    1
                }
            },
            (None, Some(default)) => default,
            (None, None) => {
                self.problem(key, "is missing");
                1
            }
        }
    }

    pub fn number(&mut self, key: &str, default: Option<f64>) -> f64 {
        match (self.get(key), default) {
            (Some(value), _) => match value.as_f64() {
                Some(n) if n.is_finite() && n > 0.0 => n,
                _ => {
                    self.problem(key, format_args!("must be a positive number, not {value}"));
                    1.0
                }
            },
            (None, Some(default)) => default,
            (None, None) => {
                self.problem(key, "is missing");
                1.0
            }
        }
    }

    pub fn flag(&mut self, key: &str, default: bool) -> bool {
        match self.get(key) {
            None => default,
            Some(Value::Bool(flag)) => *flag,
            Some(value) => {
                self.problem(key, format_args!("must be true or false, not {value}"));
                default
            }
        }
    }

    /// One token id, a list of them, or none.
    pub fn ids(&mut self, key: &str) -> Vec<u32> {
        let id = |value: &Value| value.as_u64().and_then(|id| u32::try_from(id).ok());
        match self.get(key) {
            None => Vec::new(),
            // Some published files say -1 for "none".
            Some(value) if value.as_i64().is_some_and(|id| id < 0) => Vec::new(),
            Some(value) => {
                let ids = match value {
                    Value::Array(list) => list.iter().map(id).collect(),
                    single => id(single).map(|id| vec![id]),
                };
                ids.unwrap_or_else(|| {
                    let what = format_args!("must be a token id or a list of them, not {value}");
                    self.problem(key, what);
                    Vec::new()
                })
            }
        }
    }

    /// Which blocks see a window only, as transformers' Mistral and Qwen2 configurations decide.
    pub fn sliding_windows(&mut self, family: Family, layers: usize) -> Vec<Option<usize>> {
        let layers = layers.min(LARGEST_LAYERS as usize);
        match family {
            Family::Llama => vec![None; layers],
            Family::Mistral => {
                // Null means none; an absent key means the family's default.
                let default = (!self.map.contains_key("sliding_window")).then_some(4096);
                let window = match self.get("sliding_window") {
                    Some(_) => Some(self.size("sliding_window", None)),
                    None => default,
                };
                vec![window; layers]
            }
            Family::Qwen2 => {
                if !self.flag("use_sliding_window", false) {
                    return vec![None; layers];
                }
                let absent = !self.map.contains_key("sliding_window");
                let window = (absent || self.get("sliding_window").is_some())
                    .then(|| self.size("sliding_window", Some(4096)));
                let from = match self.get("max_window_layers").map(Value::as_u64) {
                    None => 28,
                    Some(Some(n)) => n as usize,
                    Some(None) => {
                        self.problem("max_window_layers", "must be a non-negative integer");
                        28
                    }
                };
                let mut windows: Vec<_> =
                    (0..layers).map(|i| window.filter(|_| i >= from)).collect();
                if let Some(types) = self.get("layer_types") {
                    let types = types.as_array().map(Vec::as_slice).unwrap_or_default();
                    if types.len() != layers {
                        let what = format_args!("lists {} of {layers} layers", types.len());
                        self.problem("layer_types", what);
                    }
                    for (slot, kind) in windows.iter_mut().zip(types) {
                        *slot = match kind.as_str() {
                            Some("full_attention") => None,
                            Some("sliding_attention") => window,
                            _ => {
                                self.problem("layer_types", format_args!("has unknown {kind}"));
                                None
                            }
                        };
                    }
                }
                windows
            }
        }
    }

    pub fn check_shapes(&mut self, config: &LlamaConfig) {
        if config.num_hidden_layers as u64 > LARGEST_LAYERS {
            let what = format_args!("is {}; that cannot be right", config.num_hidden_layers);
            self.problem("num_hidden_layers", what);
        }
        let (heads, groups) = (config.num_attention_heads, config.num_key_value_heads);
        if !heads.is_multiple_of(groups) {
            let what =
                format_args!("({heads}) is not a multiple of num_key_value_heads ({groups})");
            self.problem("num_attention_heads", what);
        }
        if self.get("head_dim").is_none() && !config.hidden_size.is_multiple_of(heads) {
            let what = format_args!(
                "({}) is not a multiple of num_attention_heads ({heads}) and no head_dim is given",
                config.hidden_size
            );
            self.problem("hidden_size", what);
        } else if !config.head_dim.is_multiple_of(2) {
            let what = format_args!(
                "is {}; rotary embedding needs an even width",
                config.head_dim
            );
            self.problem("head_dim", what);
        }
        match self.get("hidden_act").map(|act| (act, act.as_str())) {
            None | Some((_, Some("silu" | "swish"))) => {}
            Some((act, _)) => {
                self.problem(
                    "hidden_act",
                    format_args!("is {act}; only \"silu\" is supported"),
                );
            }
        }
        // What bitsandbytes wrote is for the checkpoint to read, or to refuse by name.
        let foreign = self.get("quantization_config").is_some_and(|config| {
            let is = |key: &str| config.get(key).and_then(Value::as_bool) == Some(true);
            let method = config.get("quant_method").and_then(Value::as_str);
            let own = method.is_some_and(|method| method.starts_with("bitsandbytes"));
            let old = method.is_none() && (is("load_in_4bit") || is("load_in_8bit"));
            !own && !old && config.as_object().is_none_or(|map| !map.is_empty())
        });
        if foreign {
            self.problem(
                "quantization_config",
                "says that the weights are quantised by another method than bitsandbytes; use the unquantised model or a .gguf",
            );
        }
    }
}
