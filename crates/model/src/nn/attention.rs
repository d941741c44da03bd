//! Self-attention with rotary positions.

use burn::module::Module;
use burn::tensor::Tensor;
use enamel_adapter::{Frozen, Linear, slots};
use enamel_kernels::{
    AttentionSpec, Norm, attention, attention_qkv, fuses, project, rms_norm, rope,
};

use crate::nn::input::Positions;
use crate::nn::kv_cache::KvCache;

/// Grouped-query self-attention.
#[derive(Module, Debug)]
pub struct Attention {
    /// `q_proj` `[heads · head_dim, hidden]`.
    pub q_proj: Linear,
    /// `k_proj` `[kv_heads · head_dim, hidden]`.
    pub k_proj: Linear,
    /// `v_proj` `[kv_heads · head_dim, hidden]`.
    pub v_proj: Linear,
    /// `o_proj` `[hidden, heads · head_dim]`.
    pub o_proj: Linear,
    /// `q_norm`, over each head of the queries, where the architecture has it (Qwen3).
    pub q_norm: Option<Frozen<1>>,
    /// `k_norm`, over each head of the keys.
    pub k_norm: Option<Frozen<1>>,
    #[module(skip)]
    pub(crate) head_dim: usize,
    #[module(skip)]
    pub(crate) sliding_window: Option<usize>,
}

slots!(Attention {
    q_proj,
    k_proj,
    v_proj,
    o_proj,
    q_norm,
    k_norm
});

/// `[batch, tokens, width]` as one row a token: a batched product would read its weight for every batch row.
pub(crate) fn rows(x: Tensor<3>) -> Tensor<2> {
    x.flatten(0, 1)
}

/// A norm that is not trained, as the fused operations take it.
pub(crate) fn frozen(norm: &Frozen<1>, eps: f64) -> Option<Norm> {
    let weight = norm.val();
    (!weight.is_tracked()).then_some(Norm { weight, eps })
}

impl Attention {
    /// The norm and all but the output's projection, `[batch, tokens, hidden]` to
    /// `[batch, tokens, heads · head_dim]`.
    pub(crate) fn forward(
        &self,
        x: Tensor<3>,
        norm: &Frozen<1>,
        eps: f64,
        positions: &Positions,
        cache: Option<(&mut KvCache, usize)>,
    ) -> Tensor<3> {
        let [batch, tokens, _] = x.dims();
        let spec = AttentionSpec {
            causal: true,
            scale: (self.head_dim as f64).sqrt().recip(),
            offset: positions.offset,
            sliding_window: self.sliding_window,
            key_mask: positions.key_mask.clone(),
            segments: None,
        };
        let (cos, sin) = (positions.cos.clone(), positions.sin.clone());
        if cache.is_none()
            && self.q_norm.is_none()
            && let Some(qkv) = self.side_by_side(&x, norm, eps)
        {
            let [heads, kv_heads] = self.counts();
            return attention_qkv(qkv, cos, sin, heads, kv_heads, &spec);
        }
        let (q, k, v) = self.heads(x, norm, eps);
        let of_heads = |norm: &Option<Frozen<1>>, x: Tensor<4>| match norm {
            Some(norm) => rms_norm(x, norm.val(), eps),
            None => x,
        };
        let (q, k) = (of_heads(&self.q_norm, q), of_heads(&self.k_norm, k));
        let q = rope(q, cos.clone(), sin.clone());
        let k = rope(k, cos, sin);
        let (k, v) = match cache {
            Some((cache, layer)) => cache.append(layer, k, v),
            None => (k, v),
        };
        let [_, _, count, _] = q.dims();
        attention(q, k, v, &spec).reshape([batch, tokens, count * self.head_dim])
    }

    /// Queries, keys and values `[batch, tokens, heads, head_dim]` of the normalised x.
    fn heads(&self, x: Tensor<3>, norm: &Frozen<1>, eps: f64) -> (Tensor<4>, Tensor<4>, Tensor<4>) {
        let [batch, tokens, _] = x.dims();
        // In a graph, cutting one result into three would cost a gradient of its whole width for each.
        let whole = match x.device().is_autodiff() {
            true => None,
            false => self.side_by_side(&x, norm, eps),
        };
        if let Some(whole) = whole {
            let [heads, kv_heads] = self.counts();
            let whole = whole.reshape([batch, tokens, heads + 2 * kv_heads, self.head_dim]);
            let part = |from, count| whole.clone().narrow(2, from, count);
            return (
                part(0, heads),
                part(heads, kv_heads),
                part(heads + kv_heads, kv_heads),
            );
        }
        let x = rms_norm(x, norm.val(), eps);
        let heads = |y: Tensor<3>| {
            let count = y.dims()[2] / self.head_dim;
            y.reshape([batch, tokens, count, self.head_dim])
        };
        (
            heads(self.q_proj.forward(x.clone())),
            heads(self.k_proj.forward(x.clone())),
            heads(self.v_proj.forward(x)),
        )
    }

    /// Queries, keys and values of the normalised x in one tensor,
    /// `[batch, tokens, (heads + 2 · kv_heads) · head_dim]`, where their layers and the norm fuse.
    fn side_by_side(&self, x: &Tensor<3>, norm: &Frozen<1>, eps: f64) -> Option<Tensor<3>> {
        if !fuses(x) {
            return None;
        }
        let norm = frozen(norm, eps)?;
        let all = [&self.q_proj, &self.k_proj, &self.v_proj];
        let all = all
            .into_iter()
            .map(Linear::fused)
            .collect::<Option<Vec<_>>>()?;
        let [batch, tokens, _] = x.dims();
        let y = project(rows(x.clone()), Some(norm), all, self.q_proj.compute());
        let width = y.dims()[1];
        Some(y.reshape([batch, tokens, width]))
    }

    /// Heads of the queries, and of keys and values each.
    fn counts(&self) -> [usize; 2] {
        [&self.q_proj, &self.k_proj].map(|layer| layer.weight.dims()[0] / self.head_dim)
    }
}
