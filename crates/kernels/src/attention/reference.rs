//! Attention in plain Burn operations: scores are materialised, K and V repeated.

use burn::tensor::{Bool, Tensor, TensorData, activation::softmax};

use super::AttentionSpec;
use crate::rope::reference::rope;

pub(super) fn attention(
    q: Tensor<4>,
    k: Tensor<4>,
    v: Tensor<4>,
    spec: &AttentionSpec,
) -> Tensor<4> {
    let device = q.device();
    let [batch, tokens, heads, dim] = q.dims();
    let [_, keys, kv_heads, _] = k.dims();
    let group = heads / kv_heads;
    // [b, s, kv, d] -> [b, kv, 1, s, d] -> [b, heads, s, d]
    let repeat = |t: Tensor<4>| {
        let t = t.swap_dims(1, 2);
        if group == 1 {
            return t;
        }
        t.reshape([batch, kv_heads, 1, keys, dim])
            .expand([batch, kv_heads, group, keys, dim])
            .reshape([batch, heads, keys, dim])
    };
    let (k, v) = (repeat(k), repeat(v));
    let mut scores = q
        .swap_dims(1, 2)
        .matmul(k.swap_dims(2, 3))
        .mul_scalar(spec.scale);

    let visible = |b: usize, t: usize, s: usize| {
        let p = t + spec.offset;
        (!spec.causal || s <= p)
            && spec.segments.as_ref().is_none_or(|g| {
                let (start, end) = g.around(b, p);
                (start..end).contains(&s)
            })
            && spec.sliding_window.is_none_or(|w| s + w > p)
            && spec.key_mask.as_ref().is_none_or(|m| m.valid[b * keys + s])
    };
    let rows = if spec.key_mask.is_some() || spec.segments.is_some() {
        batch
    } else {
        1
    };
    let mut hidden = Vec::with_capacity(rows * tokens * keys);
    let mut empty_rows = false;
    for b in 0..rows {
        for t in 0..tokens {
            let start = hidden.len();
            hidden.extend((0..keys).map(|s| !visible(b, t, s)));
            empty_rows |= hidden[start..].iter().all(|h| *h);
        }
    }
    let masked = hidden.iter().any(|h| *h);
    let hidden: Tensor<4, Bool> =
        Tensor::from_data(TensorData::new(hidden, [rows, 1, tokens, keys]), &device);
    let hidden = hidden.expand([batch, heads, tokens, keys]);
    if masked {
        scores = scores.mask_fill(hidden.clone(), -1.0e30);
    }
    let mut probs = softmax(scores, 3);
    if empty_rows {
        probs = probs.mask_fill(hidden, 0.0);
    }
    probs.matmul(v).swap_dims(1, 2)
}

pub(super) fn attention_qkv(
    qkv: Tensor<3>,
    cos: Tensor<2>,
    sin: Tensor<2>,
    heads: usize,
    kv_heads: usize,
    spec: &AttentionSpec,
) -> Tensor<3> {
    let [batch, tokens, width] = qkv.dims();
    let dim = width / (heads + 2 * kv_heads);
    let part = |from: usize, count: usize| {
        let part = qkv.clone().narrow(2, from * dim, count * dim);
        part.reshape([batch, tokens, count, dim])
    };
    let q = rope(part(0, heads), cos.clone(), sin.clone());
    let k = rope(part(heads, kv_heads), cos, sin);
    let v = part(heads + kv_heads, kv_heads);
    attention(q, k, v, spec).reshape([batch, tokens, heads * dim])
}
