//! GPT-2 (Radford et al., 2019), parameter by parameter as in transformers' `modeling_gpt2.py`: learned positions,
//! LayerNorms with biases before attention and MLP, queries, keys and values from one product, and weights that lie
//! in checkpoints as `[in, out]` (`Conv1D`).

use std::num::NonZeroUsize;

use burn::module::Module;
use burn::tensor::{Device, Int, Tensor, TensorData};
use enamel_adapter::{Embedding, Frozen, Linear, slots};
use enamel_kernels::{AttentionSpec, GeluKind, KeyMask, attention, gelu, layer_norm};
use serde_json::{Value, json};

use super::gguf::{GgufArch, GgufFacts, GgufSettings};
use super::{Architecture, Backbone, BlockShape};
use crate::config::{Common, CommonKeys, DecoderConfig, LARGEST_LAYERS, Reader, RopeConfig};
use crate::error::LoadError;
use crate::nn::input::{ModelInput, Positions};
use crate::nn::kv_cache::KvCache;
use crate::nn::recompute::{Block, run_blocks};
use crate::nn::weights::Weights;

/// The settings of a GPT-2.
#[derive(Clone, Debug, PartialEq)]
pub struct Gpt2Config {
    sizes: DecoderConfig,
    activation: GeluKind,
    notes: Vec<String>,
}

/// The decoder.
#[derive(Module, Debug)]
pub struct Gpt2 {
    /// `transformer.wte` `[vocabulary, hidden]`.
    pub wte: Embedding,
    /// `transformer.wpe` `[positions, hidden]`.
    pub wpe: Embedding,
    /// `transformer.h.N`.
    pub h: Vec<Gpt2Block>,
    /// `transformer.ln_f`.
    pub ln_f: Frozen<1>,
    #[module(skip)]
    eps: f64,
    #[module(skip)]
    head_dim: usize,
    #[module(skip)]
    recompute: Option<NonZeroUsize>,
}

/// One block.
#[derive(Module, Debug)]
pub struct Gpt2Block {
    /// `ln_1`.
    pub ln_1: Frozen<1>,
    /// `attn`.
    pub attn: Gpt2Attention,
    /// `ln_2`.
    pub ln_2: Frozen<1>,
    /// `mlp`.
    pub mlp: Gpt2Mlp,
    #[module(skip)]
    eps: f64,
}

/// Self-attention.
#[derive(Module, Debug)]
pub struct Gpt2Attention {
    /// `c_attn` `[3 · hidden, hidden]`: queries, keys and values one below the other.
    pub c_attn: Linear,
    /// `c_proj` `[hidden, hidden]`.
    pub c_proj: Linear,
    #[module(skip)]
    heads: usize,
}

/// `c_proj(gelu(c_fc(x)))`.
#[derive(Module, Debug)]
pub struct Gpt2Mlp {
    /// `c_fc` `[inner, hidden]`.
    pub c_fc: Linear,
    /// `c_proj` `[hidden, inner]`.
    pub c_proj: Linear,
    #[module(skip)]
    activation: GeluKind,
}

slots!(model Gpt2 {
    wte: "transformer.wte",
    wpe: "transformer.wpe",
    h: "transformer.h",
    ln_f: "transformer.ln_f",
});
slots!(Gpt2Block {
    ln_1,
    attn,
    ln_2,
    mlp
});
slots!(Gpt2Attention { c_attn, c_proj });
slots!(Gpt2Mlp { c_fc, c_proj });

impl Architecture for Gpt2Config {
    const MODEL_TYPES: &'static [&'static str] = &["gpt2"];
    const EMBEDDING: &'static str = "transformer.wte";
    const INNER: (&'static str, &'static [&'static str]) =
        ("transformer", &["wte", "wpe", "h", "ln_f"]);
    const DEFAULT_TARGETS: &'static [&'static str] = &["c_attn"];
    type Backbone = Gpt2;

    fn read(read: &mut Reader<'_>, model_type: &str) -> Self {
        let keys = CommonKeys {
            hidden_size: ("n_embd", Some(768)),
            num_hidden_layers: ("n_layer", Some(12)),
            vocab_size: Some(50257),
            max_position_embeddings: ("n_positions", 1024),
            tie_word_embeddings: true,
        };
        let common = Common::read(read, model_type, &keys);
        let (hidden, positions) = (common.hidden_size, common.max_position_embeddings);
        let heads = read.size("n_head", Some(12));
        if !hidden.is_multiple_of(heads) {
            let what = format_args!("({hidden}) is not a multiple of n_head ({heads})");
            read.problem("n_embd", what);
        }
        let activation = match read.get("activation_function").map(|v| (v, v.as_str())) {
            None | Some((_, Some("gelu_new" | "gelu_pytorch_tanh"))) => GeluKind::GeluPytorchTanh,
            Some((_, Some("gelu"))) => GeluKind::Gelu,
            Some((other, _)) => {
                let what = format_args!("is {other}; \"gelu_new\" and \"gelu\" are supported");
                read.problem("activation_function", what);
                GeluKind::Gelu
            }
        };
        for (key, usual) in [
            ("scale_attn_weights", true),
            ("scale_attn_by_inverse_layer_idx", false),
            ("add_cross_attention", false),
        ] {
            if read.flag(key, usual) != usual {
                read.problem(key, format_args!("other than {usual} is not supported"));
            }
        }
        let mut notes = Vec::new();
        let drops = ["embd_pdrop", "attn_pdrop", "resid_pdrop"];
        let drops = drops.map(|key| read.get(key).and_then(serde_json::Value::as_f64));
        if drops.iter().any(|p| p.unwrap_or(0.1) != 0.0) {
            notes.push(
                "the base's own dropout (embd_pdrop, attn_pdrop, resid_pdrop) is not applied in training".to_owned(),
            );
        }
        let sizes = DecoderConfig {
            intermediate_size: read.size("n_inner", Some(hidden.saturating_mul(4))),
            num_attention_heads: heads,
            num_key_value_heads: heads,
            head_dim: hidden.checked_div(heads).unwrap_or(1),
            rms_norm_eps: read.number("layer_norm_epsilon", Some(1e-5)),
            attention_bias: true,
            output_bias: true,
            mlp_bias: true,
            qk_norm: false,
            rope: RopeConfig {
                max_positions: positions,
                ..RopeConfig::default()
            },
            sliding_windows: vec![None; common.num_hidden_layers.min(LARGEST_LAYERS as usize)],
            common,
        };
        Self {
            sizes,
            activation,
            notes,
        }
    }

    fn common(&self) -> &Common {
        &self.sizes.common
    }

    fn common_mut(&mut self) -> &mut Common {
        &mut self.sizes.common
    }

    fn decoder(&self) -> &DecoderConfig {
        &self.sizes
    }

    fn notes(&self) -> &[String] {
        &self.notes
    }

    fn block(&self) -> BlockShape {
        BlockShape {
            prefix: "transformer.h",
            parts: [
                Some("attn.c_attn"),
                None,
                None,
                Some("attn.c_proj"),
                None,
                Some("mlp.c_fc"),
                Some("mlp.c_proj"),
            ],
            fuses: false,
        }
    }

    fn build(&self, weights: &mut Weights<'_, '_>) -> Result<Gpt2, LoadError> {
        let sizes = &self.sizes;
        let common = &sizes.common;
        let (hidden, inner, eps) = (
            common.hidden_size,
            sizes.intermediate_size,
            sizes.rms_norm_eps,
        );
        let wte = weights.embedding("transformer.wte", [common.vocab_size, hidden])?;
        let positions = common.max_position_embeddings;
        let wpe = weights.embedding("transformer.wpe", [positions, hidden])?;
        let mut h = Vec::with_capacity(sizes.sliding_windows.len());
        for i in 0..sizes.sliding_windows.len() {
            let at = |rest: &str| format!("transformer.h.{i}.{rest}");
            h.push(Gpt2Block {
                ln_1: weights.layer_norm(&at("ln_1"), hidden)?,
                attn: Gpt2Attention {
                    c_attn: weights
                        .conv1d(&at("attn.c_attn"), [hidden.saturating_mul(3), hidden])?,
                    c_proj: weights.conv1d(&at("attn.c_proj"), [hidden, hidden])?,
                    heads: sizes.num_attention_heads,
                },
                ln_2: weights.layer_norm(&at("ln_2"), hidden)?,
                mlp: Gpt2Mlp {
                    c_fc: weights.conv1d(&at("mlp.c_fc"), [inner, hidden])?,
                    c_proj: weights.conv1d(&at("mlp.c_proj"), [hidden, inner])?,
                    activation: self.activation,
                },
                eps,
            });
        }
        Ok(Gpt2 {
            wte,
            wpe,
            h,
            ln_f: weights.layer_norm("transformer.ln_f", hidden)?,
            eps,
            head_dim: sizes.head_dim,
            recompute: None,
        })
    }

    fn gguf() -> &'static [GgufArch] {
        &[GgufArch {
            name: "gpt2",
            model_types: &["gpt2"],
            class: "GPT2LMHeadModel",
            top: &[
                ("token_embd", "transformer.wte"),
                ("position_embd", "transformer.wpe"),
                ("output_norm", "transformer.ln_f"),
                ("output", "lm_head"),
            ],
            block: &[
                ("attn_norm", "ln_1"),
                ("attn_qkv", "attn.c_attn"),
                ("attn_output", "attn.c_proj"),
                ("ffn_norm", "ln_2"),
                ("ffn_up", "mlp.c_fc"),
                ("ffn_down", "mlp.c_proj"),
            ],
            blocks: "transformer.h",
            biases: true,
            transposed: &["attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"],
            epsilon: "attention.layer_norm_epsilon",
            permuted: false,
            settings: GgufSettings::LearnedPositions(config_json),
        }]
    }
}

/// The settings of a GGUF file under GPT-2's own names.
fn config_json(facts: &GgufFacts<'_>) -> Value {
    json!({
        "architectures": [facts.class],
        "model_type": "gpt2",
        "activation_function": "gelu_new",
        "n_embd": facts.hidden,
        "n_inner": facts.intermediate,
        "n_layer": facts.layers,
        "n_head": facts.heads,
        "n_positions": facts.context,
        "layer_norm_epsilon": facts.epsilon.unwrap_or(1e-5),
    })
}

impl Backbone for Gpt2 {
    fn hidden(&self, input: &ModelInput, cache: Option<&mut KvCache>) -> Tensor<3> {
        let [batch, tokens] = input.input_ids.dims();
        let device = input.input_ids.device();
        let offset = cache.as_ref().map_or(0, |cache| cache.len());
        let mask = input.attention_mask.as_ref();
        let ids = position_ids(mask, (batch, tokens), offset, &device);
        let x = self.wte.forward(input.input_ids.clone()) + self.wpe.forward(ids);
        // There is nothing to turn: the tables are those of any rotation, and are not read.
        let rope = RopeConfig::default();
        let positions = Positions::new(&rope, self.head_dim, (offset, tokens), mask, &device);
        let x = run_blocks(&self.h, x, &positions, (input, self.recompute), cache);
        normed(&self.ln_f, x, self.eps)
    }

    fn embedding(&self) -> &Embedding {
        &self.wte
    }

    fn set_recompute(&mut self, blocks: Option<NonZeroUsize>) {
        self.recompute = blocks;
    }
}

/// The position of each token, counted over the real ones of its row: transformers' `position_ids` from a mask.
/// Padding is at position 0, or behind what came before it.
fn position_ids(
    mask: Option<&KeyMask>,
    (batch, tokens): (usize, usize),
    offset: usize,
    device: &Device,
) -> Tensor<2, Int> {
    let ids: Vec<i64> = match mask {
        None => (0..batch)
            .flat_map(|_| offset as i64..(offset + tokens) as i64)
            .collect(),
        Some(mask) => mask
            .valid
            .chunks(mask.keys)
            .flat_map(|row| {
                let mut count = -1;
                let counted = row.iter().map(move |valid| {
                    count += i64::from(*valid);
                    count.max(0)
                });
                counted.skip(offset).take(tokens)
            })
            .collect(),
    };
    Tensor::from_data(TensorData::new(ids, [batch, tokens]), device)
}

/// A LayerNorm over the last axis.
fn normed(norm: &Frozen<1>, x: Tensor<3>, eps: f64) -> Tensor<3> {
    layer_norm(x, norm.val(), norm.bias_val(), eps)
}

impl Block for Gpt2Block {
    fn forward(
        &self,
        x: Tensor<3>,
        positions: &Positions,
        cache: Option<(&mut KvCache, usize)>,
    ) -> Tensor<3> {
        let normed_x = normed(&self.ln_1, x.clone(), self.eps);
        let x = x + self.attn.forward(normed_x, positions, cache);
        let mlp = &self.mlp;
        let inner = mlp.c_fc.forward(normed(&self.ln_2, x.clone(), self.eps));
        x + mlp.c_proj.forward(gelu(inner, mlp.activation))
    }
}

impl Gpt2Attention {
    fn forward(
        &self,
        x: Tensor<3>,
        positions: &Positions,
        cache: Option<(&mut KvCache, usize)>,
    ) -> Tensor<3> {
        let [batch, tokens, hidden] = x.dims();
        let head_dim = hidden / self.heads;
        let spec = AttentionSpec {
            causal: true,
            scale: (head_dim as f64).sqrt().recip(),
            offset: positions.offset,
            sliding_window: None,
            key_mask: positions.key_mask.clone(),
            segments: None,
        };
        let qkv = self.c_attn.forward(x);
        let part = |i: usize| {
            let part = qkv.clone().narrow(2, i * hidden, hidden);
            part.reshape([batch, tokens, self.heads, head_dim])
        };
        let (q, k, v) = (part(0), part(1), part(2));
        let (k, v) = match cache {
            Some((cache, layer)) => cache.append(layer, k, v),
            None => (k, v),
        };
        let y = attention(q, k, v, &spec).reshape([batch, tokens, hidden]);
        self.c_proj.forward(y)
    }
}
