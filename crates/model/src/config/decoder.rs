//! The settings of decoders with rotary positions and a gated MLP: Llama and what came after it.

use serde_json::Value;

use super::common::CommonKeys;
use super::{Common, LARGEST_LAYERS, Reader, RopeConfig};

/// Settings of a decoder whose blocks are [`DecoderLayer`](crate::nn::decoder_layer::DecoderLayer)s.
#[derive(Clone, Debug, PartialEq)]
pub struct DecoderConfig {
    /// What every architecture has.
    pub common: Common,
    /// Width inside the MLP.
    pub intermediate_size: usize,
    /// Query heads.
    pub num_attention_heads: usize,
    /// Key and value heads; each serves `num_attention_heads / num_key_value_heads` query heads.
    pub num_key_value_heads: usize,
    /// Width of a head; `hidden_size / num_attention_heads` unless the file or the architecture says otherwise.
    pub head_dim: usize,
    /// Epsilon inside every RMSNorm.
    pub rms_norm_eps: f64,
    /// Whether q, k and v have biases.
    pub attention_bias: bool,
    /// Whether the attention's output projection has a bias.
    pub output_bias: bool,
    /// Whether the MLP's three projections have biases.
    pub mlp_bias: bool,
    /// Whether queries and keys are normalised, head by head.
    pub qk_norm: bool,
    /// Rotary embedding.
    pub rope: RopeConfig,
    /// Per block: how many positions back it sees, if not all.
    pub sliding_windows: Vec<Option<usize>>,
}

/// What an architecture assumes where the file does not say.
#[derive(Clone, Copy, Debug)]
pub(crate) struct DecoderDefaults {
    pub max_position_embeddings: usize,
    pub tie_word_embeddings: bool,
    /// `hidden_size / num_attention_heads` if there is none.
    pub head_dim: Option<usize>,
    pub rope_theta: f64,
}

impl DecoderConfig {
    /// Reads them, without biases and windows, which each architecture decides for itself.
    pub(crate) fn read(
        read: &mut Reader<'_>,
        model_type: &str,
        defaults: &DecoderDefaults,
    ) -> Self {
        let positions = defaults.max_position_embeddings;
        let keys = CommonKeys::usual(positions, defaults.tie_word_embeddings);
        let common = Common::read(read, model_type, &keys);
        let heads = read.size("num_attention_heads", None);
        let head_dim = defaults
            .head_dim
            .or_else(|| common.hidden_size.checked_div(heads));
        let mut config = Self {
            intermediate_size: read.size("intermediate_size", None),
            num_attention_heads: heads,
            num_key_value_heads: read.size("num_key_value_heads", Some(heads)),
            head_dim: read.size("head_dim", head_dim),
            rms_norm_eps: read.number("rms_norm_eps", Some(1e-6)),
            attention_bias: false,
            output_bias: false,
            mlp_bias: false,
            qk_norm: false,
            rope: RopeConfig::default(),
            sliding_windows: vec![None; common.num_hidden_layers.min(LARGEST_LAYERS as usize)],
            common,
        };
        config.check_shapes(read, defaults.head_dim.is_some());
        let positions = config.common.max_position_embeddings;
        match RopeConfig::from_config(read.map, positions, defaults.rope_theta) {
            Ok(rope) => config.rope = rope,
            Err(more) => read.problems.extend(more),
        }
        config
    }

    fn check_shapes(&self, read: &mut Reader<'_>, has_head_dim: bool) {
        let (heads, groups) = (self.num_attention_heads, self.num_key_value_heads);
        if !heads.is_multiple_of(groups) {
            let what =
                format_args!("({heads}) is not a multiple of num_key_value_heads ({groups})");
            read.problem("num_attention_heads", what);
        }
        let hidden = self.common.hidden_size;
        let divided = !has_head_dim && read.get("head_dim").is_none();
        if divided && !hidden.is_multiple_of(heads) {
            let what = format_args!(
                "({hidden}) is not a multiple of num_attention_heads ({heads}) and no head_dim is given"
            );
            read.problem("hidden_size", what);
        } else if !self.head_dim.is_multiple_of(2) {
            let what = format_args!("is {}; rotary embedding needs an even width", self.head_dim);
            read.problem("head_dim", what);
        }
        match read.get("hidden_act").map(|act| (act, act.as_str())) {
            None | Some((_, Some("silu" | "swish"))) => {}
            Some((act, _)) => {
                read.problem(
                    "hidden_act",
                    format_args!("is {act}; only \"silu\" is supported"),
                );
            }
        }
    }

    /// Which blocks see a window only, where `use_sliding_window` turns it on and `max_window_layers` and
    /// `layer_types` say where (transformers' Qwen2 and Qwen3).
    pub(crate) fn windows_on_request(read: &mut Reader<'_>, layers: usize) -> Vec<Option<usize>> {
        let layers = layers.min(LARGEST_LAYERS as usize);
        if !read.flag("use_sliding_window", false) {
            return vec![None; layers];
        }
        let absent = !read.map.contains_key("sliding_window");
        let window = (absent || read.get("sliding_window").is_some())
            .then(|| read.size("sliding_window", Some(4096)));
        let from = match read.get("max_window_layers").map(Value::as_u64) {
            None => 28,
            Some(Some(n)) => n as usize,
            Some(None) => {
                read.problem("max_window_layers", "must be a non-negative integer");
                28
            }
        };
        let mut windows: Vec<_> = (0..layers).map(|i| window.filter(|_| i >= from)).collect();
        if let Some(types) = read.get("layer_types") {
            let types = types.as_array().map(Vec::as_slice).unwrap_or_default();
            if types.len() != layers {
                let what = format_args!("lists {} of {layers} layers", types.len());
                read.problem("layer_types", what);
            }
            for (slot, kind) in windows.iter_mut().zip(types) {
                *slot = match kind.as_str() {
                    Some("full_attention") => None,
                    Some("sliding_attention") => window,
                    _ => {
                        read.problem("layer_types", format_args!("has unknown {kind}"));
                        None
                    }
                };
            }
        }
        windows
    }
}
