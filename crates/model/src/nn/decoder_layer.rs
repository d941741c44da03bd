//! The decoder block of Llama and what came after it: attention and a gated MLP, each behind an RMSNorm and beside
//! a residual.

use burn::module::Module;
use burn::tensor::Tensor;
use enamel_adapter::{Frozen, slots};
use enamel_kernels::{fuses, project, project_add, rms_norm, swiglu_project};

use crate::error::LoadError;
use crate::nn::attention::{Attention, frozen, rows};
use crate::nn::input::Positions;
use crate::nn::kv_cache::KvCache;
use crate::nn::mlp::{Mlp, MlpProjections};
use crate::nn::recompute::Block;
use crate::nn::weights::Weights;

/// One block: attention, then the MLP, each behind a norm and beside a residual.
#[derive(Module, Debug)]
pub struct DecoderLayer {
    /// `self_attn`.
    pub self_attn: Attention,
    /// `mlp`.
    pub mlp: Mlp,
    /// `input_layernorm`.
    pub input_layernorm: Frozen<1>,
    /// `post_attention_layernorm`.
    pub post_attention_layernorm: Frozen<1>,
    #[module(skip)]
    pub(crate) eps: f64,
}

slots!(DecoderLayer {
    self_attn,
    mlp,
    input_layernorm,
    post_attention_layernorm
});

/// The sizes of a block.
#[derive(Clone, Copy, Debug)]
pub(crate) struct DecoderSizes {
    pub hidden: usize,
    pub inner: usize,
    pub heads: usize,
    pub kv_heads: usize,
    pub head_dim: usize,
    /// Whether q, k and v have biases.
    pub attention_bias: bool,
    /// Whether the attention's output projection has a bias.
    pub output_bias: bool,
    /// Whether the MLP's projections have biases.
    pub mlp_bias: bool,
    /// Whether queries and keys are normalised, head by head.
    pub qk_norm: bool,
    /// Epsilon of every norm.
    pub eps: f64,
}

impl DecoderLayer {
    /// The block called `name`.
    pub(crate) fn build(
        weights: &mut Weights<'_, '_>,
        name: &str,
        sizes: &DecoderSizes,
        sliding_window: Option<usize>,
    ) -> Result<Self, LoadError> {
        let s = sizes;
        // Absurd sizes of a damaged file end in a shape that no tensor has.
        let queries = s.heads.saturating_mul(s.head_dim);
        let keys = s.kv_heads.saturating_mul(s.head_dim);
        let (hidden, inner) = (s.hidden, s.inner);
        let at = |rest: &str| format!("{name}.{rest}");
        let mut linear = |rest: &str, shape, bias| weights.linear(&at(rest), shape, bias);
        let q_proj = linear("self_attn.q_proj", [queries, hidden], s.attention_bias)?;
        let k_proj = linear("self_attn.k_proj", [keys, hidden], s.attention_bias)?;
        let v_proj = linear("self_attn.v_proj", [keys, hidden], s.attention_bias)?;
        let o_proj = linear("self_attn.o_proj", [hidden, queries], s.output_bias)?;
        let mut of_heads = |rest: &str| {
            let norm = s.qk_norm.then(|| weights.norm(&at(rest), s.head_dim));
            norm.transpose()
        };
        let (q_norm, k_norm) = (of_heads("self_attn.q_norm")?, of_heads("self_attn.k_norm")?);
        let mut linear = |rest: &str, shape| weights.linear(&at(rest), shape, s.mlp_bias);
        let mlp = Mlp {
            gate_proj: linear("mlp.gate_proj", [inner, hidden])?,
            up_proj: linear("mlp.up_proj", [inner, hidden])?,
            down_proj: linear("mlp.down_proj", [hidden, inner])?,
        };
        Ok(Self {
            self_attn: Attention {
                q_proj,
                k_proj,
                v_proj,
                o_proj,
                q_norm,
                k_norm,
                head_dim: s.head_dim,
                sliding_window,
            },
            mlp,
            input_layernorm: weights.norm(&at("input_layernorm"), hidden)?,
            post_attention_layernorm: weights.norm(&at("post_attention_layernorm"), hidden)?,
            eps: s.eps,
        })
    }
}

impl Block for DecoderLayer {
    fn forward(
        &self,
        x: Tensor<3>,
        positions: &Positions,
        cache: Option<(&mut KvCache, usize)>,
    ) -> Tensor<3> {
        let x = self.attend(x, positions, cache);
        self.feed_forward(x)
    }
}

impl DecoderLayer {
    /// `x + attention(norm(x))`.
    fn attend(
        &self,
        x: Tensor<3>,
        positions: &Positions,
        cache: Option<(&mut KvCache, usize)>,
    ) -> Tensor<3> {
        let (attn, norm) = (&self.self_attn, &self.input_layernorm);
        let y = attn.forward(x.clone(), norm, self.eps, positions, cache);
        match attn.o_proj.fused().filter(|_| fuses(&x)) {
            Some(o_proj) => {
                let dims = x.dims();
                project_add(rows(y), o_proj, rows(x), attn.o_proj.compute()).reshape(dims)
            }
            None => x + attn.o_proj.forward(y),
        }
    }

    /// `x + mlp(norm(x))`.
    fn feed_forward(&self, x: Tensor<3>) -> Tensor<3> {
        let norm = &self.post_attention_layernorm;
        let fused = self.mlp.fused().filter(|_| fuses(&x));
        match fused.zip(frozen(norm, self.eps)) {
            Some((MlpProjections { gate_up, down }, norm)) => {
                let dims = x.dims();
                let compute = self.mlp.down_proj.compute();
                let x = rows(x);
                let gate_up = project(x.clone(), Some(norm), gate_up, compute);
                swiglu_project(gate_up, down, Some(x), compute).reshape(dims)
            }
            None => {
                let normed = rms_norm(x.clone(), norm.val(), self.eps);
                x + self.mlp.forward(normed)
            }
        }
    }
}

#[cfg(test)]
mod tests;
