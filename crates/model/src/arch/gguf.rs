//! What llama.cpp calls an architecture and its parts.

use serde_json::Value;

/// An architecture of llama.cpp's, as its converter writes it.
#[derive(Debug)]
pub struct GgufArch {
    /// `general.architecture`, and what the keys of its settings begin with.
    pub name: &'static str,
    /// The `model_type`s that are written as it; the first is what such a file is read as.
    pub model_types: &'static [&'static str],
    /// transformers' class.
    pub class: &'static str,
    /// llama.cpp's and Hugging Face's names of what stands outside the blocks; each has a weight alone.
    pub top: &'static [(&'static str, &'static str)],
    /// The same within a block.
    pub block: &'static [(&'static str, &'static str)],
    /// What stands before a block's number in Hugging Face's names.
    pub blocks: &'static str,
    /// Whether what stands outside the blocks may have a bias.
    pub biases: bool,
    /// Ends of the modules whose weights Hugging Face has the other way round.
    pub transposed: &'static [&'static str],
    /// The key of the norms' epsilon.
    pub epsilon: &'static str,
    /// Whether the rows of queries and keys are in another order in the file.
    pub permuted: bool,
    /// What `config.json` is made of, besides what most decoders have.
    pub settings: GgufSettings,
}

/// What `config.json` is made of, besides what most decoders have.
#[derive(Clone, Copy, Debug)]
pub enum GgufSettings {
    /// Nothing.
    None,
    /// `attention_bias` and `mlp_bias`, as the tensors tell.
    Biases,
    /// Other names instead, of a model whose positions are learned: it has no rotation to describe.
    LearnedPositions(fn(&GgufFacts<'_>) -> Value),
}

impl GgufSettings {
    /// Whether positions are a table of the model's, and there is no rotary embedding.
    pub fn learns_positions(self) -> bool {
        matches!(self, Self::LearnedPositions(_))
    }
}

/// What a file says of a model with learned positions.
#[derive(Debug)]
pub struct GgufFacts<'a> {
    /// transformers' class.
    pub class: &'a str,
    /// Width of the hidden states.
    pub hidden: u64,
    /// Width within the MLP.
    pub intermediate: u64,
    /// Number of blocks.
    pub layers: u64,
    /// Attention heads.
    pub heads: u64,
    /// Most positions.
    pub context: u64,
    /// The norms' epsilon, if the file has it.
    pub epsilon: Option<f64>,
}

/// Outside the blocks of most decoders.
pub const DECODER_TOP: [(&str, &str); 3] = [
    ("token_embd", "model.embed_tokens"),
    ("output_norm", "model.norm"),
    ("output", "lm_head"),
];

/// Within them.
pub const DECODER_BLOCK: [(&str, &str); 9] = [
    ("attn_norm", "input_layernorm"),
    ("attn_q", "self_attn.q_proj"),
    ("attn_k", "self_attn.k_proj"),
    ("attn_v", "self_attn.v_proj"),
    ("attn_output", "self_attn.o_proj"),
    ("ffn_norm", "post_attention_layernorm"),
    ("ffn_gate", "mlp.gate_proj"),
    ("ffn_up", "mlp.up_proj"),
    ("ffn_down", "mlp.down_proj"),
];

/// Which of llama.cpp's row orders a projection has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Permuted {
    /// Rows are ordered for the query heads.
    Query,
    /// Rows are ordered for the key heads.
    Key,
}

impl GgufArch {
    /// The Hugging Face name of a GGUF tensor.
    pub(crate) fn hugging_face(&self, name: &str) -> Option<String> {
        let (part, kind) = name.rsplit_once('.')?;
        if let Some((_, top)) = self.top.iter().find(|(gguf, _)| *gguf == part) {
            return self.outside(top, kind);
        }
        let (number, part) = part.strip_prefix("blk.")?.split_once('.')?;
        let (number, kind) = (layer(number)?, weight_or_bias(kind)?);
        let (_, module) = self.block.iter().find(|(gguf, _)| *gguf == part)?;
        Some(format!("{}.{number}.{module}.{kind}", self.blocks))
    }

    /// The GGUF name of a tensor that Hugging Face calls `name`: the way back from [`Self::hugging_face`].
    pub(crate) fn llama_cpp(&self, name: &str) -> Option<String> {
        let (part, kind) = name.rsplit_once('.')?;
        if let Some((top, _)) = self.top.iter().find(|(_, hf)| *hf == part) {
            return self.outside(top, kind);
        }
        let part = part.strip_prefix(self.blocks)?.strip_prefix('.')?;
        let (number, part) = part.split_once('.')?;
        let (number, kind) = (layer(number)?, weight_or_bias(kind)?);
        let (module, _) = self.block.iter().find(|(_, hf)| *hf == part)?;
        Some(format!("blk.{number}.{module}.{kind}"))
    }

    fn outside(&self, module: &str, kind: &str) -> Option<String> {
        let known = kind == "weight" || (self.biases && kind == "bias");
        known.then(|| format!("{module}.{kind}"))
    }

    /// Whether Hugging Face has a tensor (by its name there) the other way round.
    pub(crate) fn is_transposed(&self, name: &str) -> bool {
        let module = name.strip_suffix(".weight");
        module.is_some_and(|module| self.transposed.iter().any(|end| module.ends_with(end)))
    }

    /// Whether a tensor (by its Hugging Face name) has its rows permuted in the file.
    pub(crate) fn permutation(&self, name: &str) -> Option<Permuted> {
        if !self.permuted {
            None
        } else if name.contains(".self_attn.q_proj.") {
            Some(Permuted::Query)
        } else if name.contains(".self_attn.k_proj.") {
            Some(Permuted::Key)
        } else {
            None
        }
    }
}

/// Only the plain decimal spelling, so that no two names can mean the same tensor.
fn layer(text: &str) -> Option<u32> {
    let number: u32 = text.parse().ok()?;
    (number.to_string() == text).then_some(number)
}

fn weight_or_bias(kind: &str) -> Option<&str> {
    matches!(kind, "weight" | "bias").then_some(kind)
}

#[cfg(test)]
mod tests {
    use crate::arch::ArchConfig;

    #[test]
    fn names_map_one_to_one() {
        let cases = [
            ("token_embd.weight", Some("model.embed_tokens.weight")),
            (
                "blk.12.attn_q.weight",
                Some("model.layers.12.self_attn.q_proj.weight"),
            ),
            (
                "blk.0.ffn_down.bias",
                Some("model.layers.0.mlp.down_proj.bias"),
            ),
            ("blk.00.ffn_down.bias", None),
            ("blk.0.ffn_gate_exps.weight", None),
            ("blk.x.attn_q.weight", None),
            ("blk.0.attn_q", None),
        ];
        for arch in ArchConfig::gguf_architectures().filter(|arch| arch.blocks == "model.layers") {
            for (gguf, hf) in cases {
                assert_eq!(arch.hugging_face(gguf).as_deref(), hf, "{gguf}");
                if let Some(hf) = hf {
                    assert_eq!(arch.llama_cpp(hf).as_deref(), Some(gguf), "{hf}");
                }
            }
            for hf in [
                "model.layers.0.mlp.gate.weight",
                "model.norm.bias",
                "model.layers.01.mlp.up_proj.weight",
                "model.layers.1.mlp.up_proj.lora_A",
            ] {
                assert_eq!(arch.llama_cpp(hf), None, "{hf}");
            }
        }
    }
}
