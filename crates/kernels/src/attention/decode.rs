//! Attention of a few queries to many keys, as in decoding: dot products, each key and value read
//! once for all the heads that share it.

use super::cpu::{log_sum, online_softmax, reciprocal, scaled};
use super::problem::{Inputs, Problem};
use crate::cpu::simd::{Level, dot, fma, simd_fn};
use crate::cpu::storage::Shared;

simd_fn! {
    /// Scores of a few queries over one head's keys, `scores[query][key]`, and no tile packing:
    /// each key is read once for all of them.
    fn few_scores<L>(
        queries: &[&[f32]],
        keys: &[f32],
        stride: usize,
        count: usize,
        scale: f32,
        scores: &mut [f32],
    ) {
        let Some(dim) = queries.first().map(|q| q.len()) else { return };
        for j in 0..count {
            let key = &keys[j * stride..j * stride + dim];
            for (i, query) in queries.iter().enumerate() {
                scores[i * count + j] = scale * dot::<L>(query, key);
            }
        }
    }
}

simd_fn! {
    /// `out[query] = Σ_key weights[query][key] · value[key]`.
    fn few_outputs<L>(
        weights: &[f32],
        values: &[f32],
        stride: usize,
        count: usize,
        dim: usize,
        out: &mut [f32],
    ) {
        for j in 0..count {
            let value = &values[j * stride..j * stride + dim];
            for (i, out) in out.chunks_exact_mut(dim).enumerate() {
                let w = weights[i * count + j];
                for (o, v) in out.iter_mut().zip(value) {
                    *o = fma::<L>(w, *v, *o);
                }
            }
        }
    }
}

/// All queries of one key head when they are few: writes their rows of `out` and of `log_sums`.
pub(super) fn forward_few(
    level: Level,
    p: Problem<'_>,
    Inputs { q, k, v }: Inputs<'_>,
    (batch, kv): (usize, usize),
    out: Shared,
    log_sums: Shared,
) {
    let heads = kv * p.group()..(kv + 1) * p.group();
    let rows: Vec<(usize, usize)> = (0..p.tokens)
        .flat_map(|t| heads.clone().map(move |h| (t, h)))
        .collect();
    let queries: Vec<&[f32]> = rows.iter().map(|(t, h)| q.row(batch, *t, *h)).collect();
    let (start, end) = p.visible_to_any(batch, 0, p.tokens);
    let count = end - start;
    let mut scores = vec![0.0f32; rows.len() * count];
    let mut acc = vec![0.0f32; rows.len() * p.dim];
    let mut totals = Vec::with_capacity(rows.len());
    if count > 0 {
        let scale = p.spec.scale as f32;
        let keys = &k.data[k.at(batch, start, kv)..];
        few_scores(
            level,
            &queries,
            keys,
            k.strides[1],
            count,
            scale,
            &mut scores,
        );
        let padding = p.padding(batch, start, end);
        for (row, (t, _)) in scores.chunks_exact_mut(count).zip(&rows) {
            let (lo, hi) = p.columns(batch, *t, start, end);
            let (mut max, mut sum) = (f32::NEG_INFINITY, 0.0);
            online_softmax(level, row, lo, hi, padding, &mut max, &mut sum);
            totals.push((max, sum));
        }
        let values = &v.data[v.at(batch, start, kv)..];
        few_outputs(level, &scores, values, v.strides[1], count, p.dim, &mut acc);
    } else {
        totals.resize(rows.len(), (f32::NEG_INFINITY, 0.0));
    }
    for (((t, h), acc), (max, sum)) in rows.iter().zip(acc.chunks_exact_mut(p.dim)).zip(totals) {
        scaled(level, acc, reciprocal(sum));
        // SAFETY: the rows of this key head's queries belong to this task alone.
        unsafe {
            let at = out.at(((batch * p.tokens + t) * p.heads + h) * p.dim);
            std::ptr::copy_nonoverlapping(acc.as_ptr(), at, p.dim);
            *log_sums.at((batch * p.heads + h) * p.tokens + t) = log_sum(max, sum);
        }
    }
}
