//! Grouped-query scaled-dot-product attention.

mod backward;
mod cpu;
mod decode;
mod ops;
mod problem;
mod reference;
#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests;

use std::sync::Arc;

use burn::tensor::Tensor;

use crate::cpu::storage::OnFlex;

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

/// What an attention call masks and how it scales.
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
}

/// `softmax(scale · q·kᵀ + mask) · v`, each group of `heads / kv_heads` query heads sharing one
/// key/value head. A query that may see no key at all yields zeros.
///
/// # Shapes
/// - q, result: `[batch, tokens, heads, head_dim]`
/// - k, v: `[batch, keys, kv_heads, head_dim]`
pub fn attention(q: Tensor<4>, k: Tensor<4>, v: Tensor<4>, spec: &AttentionSpec) -> Tensor<4> {
    if q.on_flex() && k.on_flex() && v.on_flex() {
        ops::attention(q, k, v, spec)
    } else {
        reference::attention(q, k, v, spec)
    }
}
