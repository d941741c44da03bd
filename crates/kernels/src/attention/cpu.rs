//! Attention on Flex, in tiles: no score matrix is kept, keys and values are never repeated, and
//! `[batch, tokens, heads, dim]` is read in place. Online softmax after FlashAttention-2 (Dao 2023).

use std::sync::Arc;

use burn::backend::Flex;
use burn::backend::flex::FlexTensor;
use burn::backend::tensor::FloatTensor;
use burn::tensor::Shape;
use rayon::prelude::*;

use super::AttentionSpec;
use super::backward::backward;
use super::decode::forward_few;
use super::ops::AttentionOps;
use super::problem::{KEYS, Problem, QUERIES, Shared};
use crate::cpu::exp::exp;
use crate::cpu::heads::{Heads, by_heads};
use crate::cpu::matrix::{Into, MatMut, MatRef, Threads, product};
use crate::cpu::simd::{self, LANES, Level, level, simd_fn, sum_lanes};
use crate::cpu::storage::Fresh;

/// Up to so many query rows a key head, dot products beat packed tiles: decoding.
const FEW_ROWS: usize = 16;

simd_fn! {
    /// One row of a score tile, columns `lo .. hi` visible: updates the running maximum and sum,
    /// turns scores into `exp(score − max)` (0 where hidden) and returns the factor on what was
    /// accumulated before.
    pub(super) fn online_softmax<L>(
        row: &mut [f32],
        lo: usize,
        hi: usize,
        padding: Option<&[bool]>,
        max: &mut f32,
        sum: &mut f32,
    ) -> f32 {
        let (before, rest) = row.split_at_mut(lo);
        let (seen, after) = rest.split_at_mut(hi - lo);
        before.fill(0.0);
        after.fill(0.0);
        if let Some(padding) = padding {
            for (x, valid) in seen.iter_mut().zip(&padding[lo..hi]) {
                *x = if *valid { *x } else { f32::NEG_INFINITY };
            }
        }
        let top = simd::max(seen, *max);
        // While nothing has been visible, any finite base gives the right zeros.
        let base = if top == f32::NEG_INFINITY { 0.0 } else { top };
        let mut lanes = [0.0f32; LANES];
        let mut chunks = seen.chunks_exact_mut(LANES);
        for x in &mut chunks {
            for i in 0..LANES {
                x[i] = exp::<L>(x[i] - base);
                lanes[i] += x[i];
            }
        }
        for (x, lane) in chunks.into_remainder().iter_mut().zip(&mut lanes) {
            *x = exp::<L>(*x - base);
            *lane += *x;
        }
        let correction = exp::<L>(*max - base);
        *sum = *sum * correction + sum_lanes(lanes);
        *max = top;
        correction
    }
}

simd_fn! {
    pub(super) fn scaled<L>(row: &mut [f32], factor: f32) {
        for x in row {
            *x *= factor;
        }
    }
}

/// `log Σ exp` of a finished row; +∞ for a row that saw nothing, so that its probabilities
/// are 0 when the backward takes them up again.
pub(super) fn log_sum(max: f32, sum: f32) -> f32 {
    if sum == 0.0 {
        f32::INFINITY
    } else {
        max + sum.ln()
    }
}

pub(super) fn reciprocal(sum: f32) -> f32 {
    if sum == 0.0 { 0.0 } else { sum.recip() }
}

/// One tile of queries of one head: writes its rows of `out` and of `log_sums`.
fn forward_tile(
    level: Level,
    p: Problem<'_>,
    (q, k, v): (&Heads<'_>, &Heads<'_>, &Heads<'_>),
    (batch, head, from, to): (usize, usize, usize, usize),
    out: Shared,
    log_sums: Shared,
) {
    let rows = to - from;
    let kv = head / p.group();
    let stride = p.heads * p.dim;
    let first = ((batch * p.tokens + from) * p.heads + head) * p.dim;
    let queries = q.tile(batch, from, head, rows);
    let mut scores = vec![0.0f32; rows * KEYS.min(p.keys)];
    let (mut max, mut sum) = ([f32::NEG_INFINITY; QUERIES], [0.0f32; QUERIES]);
    let mut into = Into::Set;
    for (start, end) in p.blocks((from, to)) {
        let width = end - start;
        let scores = &mut scores[..rows * width];
        let keys = k.tile(batch, start, kv, width);
        let mut dst = MatMut::rows_of(scores, rows, width);
        product(
            &mut dst,
            Into::Set,
            p.spec.scale as f32,
            queries,
            keys.t(),
            Threads::One,
        );
        let padding = p.padding(batch, start, end);
        for (i, row) in scores.chunks_exact_mut(width).enumerate() {
            let (lo, hi) = p.columns(from + i, start, end);
            let factor = online_softmax(level, row, lo, hi, padding, &mut max[i], &mut sum[i]);
            if into == Into::Add && factor != 1.0 {
                // SAFETY: this task's own row, set by the first block's product.
                let row =
                    unsafe { std::slice::from_raw_parts_mut(out.at(first + i * stride), p.dim) };
                scaled(level, row, factor);
            }
        }
        // SAFETY: these rows of this head belong to this task alone.
        let mut dst = unsafe { MatMut::raw(out.at(first), rows, p.dim, stride) };
        let weights = MatRef::rows_of(scores, rows, width);
        let values = v.tile(batch, start, kv, width);
        product(&mut dst, into, 1.0, weights, values, Threads::One);
        into = Into::Add;
    }
    for i in 0..rows {
        let at = out.at(first + i * stride);
        // SAFETY: this task's own row and log-sum; the row is set below if no block has set it.
        unsafe {
            if into == Into::Set {
                std::ptr::write_bytes(at, 0, p.dim);
            }
            scaled(
                level,
                std::slice::from_raw_parts_mut(at, p.dim),
                reciprocal(sum[i]),
            );
            *log_sums.at((batch * p.heads + head) * p.tokens + from + i) = log_sum(max[i], sum[i]);
        }
    }
}

fn forward(
    q: FlexTensor,
    k: FlexTensor,
    v: FlexTensor,
    spec: &AttentionSpec,
) -> (FlexTensor, FlexTensor) {
    let (q, k, v) = (by_heads(q), by_heads(k), by_heads(v));
    let p = Problem::of(&q, &k, &v, spec);
    let mut out = Fresh::new(p.batch * p.tokens * p.heads * p.dim);
    let mut log_sums = Fresh::new(p.batch * p.heads * p.tokens);
    let (dst, sums) = (Shared(out.as_mut_ptr()), Shared(log_sums.as_mut_ptr()));
    let (qh, kh, vh) = (Heads::of(&q), Heads::of(&k), Heads::of(&v));
    let level = level();
    let inputs = (&qh, &kh, &vh);
    if p.dim > 0 && p.tokens * p.group() <= FEW_ROWS {
        let task = |i: usize| {
            forward_few(
                level,
                p,
                inputs,
                (i / p.kv_heads, i % p.kv_heads),
                dst,
                sums,
            );
        };
        run(p.batch * p.kv_heads, p.keys * p.dim * FEW_ROWS, task);
    } else if p.dim > 0 {
        let tiles = p.tokens.div_ceil(QUERIES);
        let task = |i: usize| {
            let (bh, tile) = (i / tiles, i % tiles);
            let (from, to) = (tile * QUERIES, ((tile + 1) * QUERIES).min(p.tokens));
            forward_tile(
                level,
                p,
                inputs,
                (bh / p.heads, bh % p.heads, from, to),
                dst,
                sums,
            );
        };
        run(p.batch * p.heads * tiles, usize::MAX, task);
    }
    let shape = q.layout().shape().clone();
    let sums_shape = Shape::from(vec![p.batch, p.heads, p.tokens]);
    // SAFETY: the tasks cover every query of every head, and each writes its rows and log-sums.
    unsafe { (out.into_tensor(shape), log_sums.into_tensor(sums_shape)) }
}

/// The tasks, on the pool unless they are too small to be worth waking it.
fn run(tasks: usize, work: usize, task: impl Fn(usize) + Sync + Send) {
    if tasks <= 1 || work < 1 << 16 {
        (0..tasks).for_each(task);
    } else {
        (0..tasks).into_par_iter().for_each(task);
    }
}

impl AttentionOps for Flex {
    fn enamel_attention(
        q: FloatTensor<Self>,
        k: FloatTensor<Self>,
        v: FloatTensor<Self>,
        spec: Arc<AttentionSpec>,
    ) -> FloatTensor<Self> {
        forward(q, k, v, &spec).0
    }

    fn enamel_attention_with_sums(
        q: FloatTensor<Self>,
        k: FloatTensor<Self>,
        v: FloatTensor<Self>,
        spec: Arc<AttentionSpec>,
    ) -> (FloatTensor<Self>, FloatTensor<Self>) {
        forward(q, k, v, &spec)
    }

    fn enamel_attention_backward(
        q: FloatTensor<Self>,
        k: FloatTensor<Self>,
        v: FloatTensor<Self>,
        out: FloatTensor<Self>,
        log_sums: FloatTensor<Self>,
        grad: FloatTensor<Self>,
        spec: Arc<AttentionSpec>,
    ) -> (FloatTensor<Self>, FloatTensor<Self>, FloatTensor<Self>) {
        backward((q, k, v), (out, log_sums, grad), &spec)
    }
}
