//! Grouped-query scaled-dot-product attention.

mod backward;
mod cpu;
mod decode;
mod ops;
mod pack;
mod problem;
mod qkv;
mod reference;
mod segments;
#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests;
mod tile;
#[cfg(target_arch = "x86_64")]
mod x86;

use std::sync::Arc;

use burn::tensor::Tensor;

use crate::cpu::storage::{OnFlex, note_fallback};
pub use segments::{Segments, SegmentsError};

/// Which keys of each batch row are real (not padding).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct KeyMask {
    /// Row-major `[batch, keys]`; `true` where the key may be attended to.
    pub valid: Arc<Vec<bool>>,
    /// Batch rows.
    pub batch: usize,
    /// Keys a row.
    pub keys: usize,
}

/// What an attention call masks and how it scales. A key is seen where all of the conditions allow it.
#[derive(Clone, Debug, PartialEq)]
pub struct AttentionSpec {
    /// Query `t` sees keys `0 ..= offset + t` only.
    pub causal: bool,
    /// Factor on `q·k`, usually `1 / sqrt(head_dim)`.
    pub scale: f64,
    /// Position of the first query among the keys (the cache's length when decoding, else 0).
    pub offset: usize,
    /// With `Some(w)`, query at position `p` sees keys `p - w < k <= p` only.
    pub sliding_window: Option<usize>,
    /// Padding, when there is any.
    pub key_mask: Option<KeyMask>,
    /// Sequences packed into one row, when there are several: the query at position `p` sees the keys
    /// of the sequence that `p` lies in. Rotary positions are the caller's.
    pub segments: Option<Segments>,
}

/// `softmax(scale · q·kᵀ + mask) · v`, each group of `heads / kv_heads` query heads sharing one
/// key/value head. A query that may see no key at all yields zeros. A NaN in a query, or in a key or
/// value that the query sees, makes its result NaN; one in a hidden key does not; one in a hidden value
/// may (zero times NaN), as in plain tensor operations.
///
/// # Shapes
/// - q, result: `[batch, tokens, heads, head_dim]`
/// - k, v: `[batch, keys, kv_heads, head_dim]`
pub fn attention(q: Tensor<4>, k: Tensor<4>, v: Tensor<4>, spec: &AttentionSpec) -> Tensor<4> {
    if q.on_flex() && k.on_flex() && v.on_flex() {
        ops::attention(q, k, v, spec)
    } else {
        note_fallback("attention", &[&q, &k, &v]);
        reference::attention(q, k, v, spec)
    }
}

/// [`attention`] on what the projections of q, k and v wrote side by side, with q and k rotated first
/// ([`rope`](crate::rope())). The gradient is one tensor, side by side too. Where qkv has no other use
/// it is rotated in place; only it, the output and the log-sums are kept for the backward.
///
/// # Shapes
/// - qkv: `[batch, tokens, (heads + 2·kv_heads)·head_dim]`: the heads of q, then of k, then of v
/// - cos, sin: `[tokens, head_dim / 2]`, or `[batch·tokens, head_dim / 2]` where rows have positions of
///   their own
/// - result: `[batch, tokens, heads·head_dim]`
pub fn attention_qkv(
    qkv: Tensor<3>,
    cos: Tensor<2>,
    sin: Tensor<2>,
    heads: usize,
    kv_heads: usize,
    spec: &AttentionSpec,
) -> Tensor<3> {
    if qkv.on_flex() && cos.on_flex() && sin.on_flex() {
        qkv::attention_qkv(qkv, cos, sin, heads, kv_heads, spec)
    } else {
        note_fallback("attention", &[&qkv, &cos, &sin]);
        reference::attention_qkv(qkv, cos, sin, heads, kv_heads, spec)
    }
}
