//! The backward of attention on Flex: scores are computed again, tile by tile.

use burn::backend::flex::FlexTensor;
use burn::tensor::Shape;
use rayon::prelude::*;

use super::AttentionSpec;
use super::problem::{KEYS, Problem, QUERIES, Shared};
use crate::cpu::exp::exp;
use crate::cpu::heads::{Heads, by_heads};
use crate::cpu::matrix::{Into, MatMut, MatRef, Threads, product};
use crate::cpu::simd::{Level, dot, level, simd_fn};
use crate::cpu::storage::{Fresh, dense, tensor, values};

simd_fn! {
    /// One row of the backward tiles: `p` arrives as scores and leaves as probabilities, `dp`
    /// arrives as their gradient and leaves as the scores' gradient `p · (dp − delta)`.
    fn softmax_backward<L>(
        p: &mut [f32],
        dp: &mut [f32],
        lo: usize,
        hi: usize,
        padding: Option<&[bool]>,
        log_sum: f32,
        delta: f32,
    ) {
        p[..lo].fill(0.0);
        p[hi..].fill(0.0);
        dp[..lo].fill(0.0);
        dp[hi..].fill(0.0);
        let (p, dp) = (&mut p[lo..hi], &mut dp[lo..hi]);
        if let Some(padding) = padding {
            for (x, valid) in p.iter_mut().zip(&padding[lo..hi]) {
                *x = if *valid { *x } else { f32::NEG_INFINITY };
            }
        }
        for (p, d) in p.iter_mut().zip(dp) {
            *p = exp::<L>(*p - log_sum);
            *d = *p * (*d - delta);
        }
    }
}

simd_fn! {
    fn inner<L>(a: &[f32], b: &[f32]) -> f32 {
        dot::<L>(a, b)
    }
}

/// One head's gradients: its rows of `dq`, and its own `dk` and `dv` (`[keys, dim]` each).
fn backward_head(
    level: Level,
    p: Problem<'_>,
    (q, k, v): (&Heads<'_>, &Heads<'_>, &Heads<'_>),
    (out, grad, log_sums): (&Heads<'_>, &Heads<'_>, &[f32]),
    (batch, head): (usize, usize),
    dq: Shared,
    (dk, dv): (&mut [f32], &mut [f32]),
) {
    let kv = head / p.group();
    let scale = p.spec.scale as f32;
    let stride = p.heads * p.dim;
    let log_sums = &log_sums[(batch * p.heads + head) * p.tokens..][..p.tokens];
    let delta: Vec<f32> = (0..p.tokens)
        .map(|t| inner(level, out.row(batch, t, head), grad.row(batch, t, head)))
        .collect();
    let area = QUERIES.min(p.tokens) * KEYS.min(p.keys);
    let (mut probs, mut d_scores) = (vec![0.0f32; area], vec![0.0f32; area]);
    for from in (0..p.tokens).step_by(QUERIES) {
        let to = (from + QUERIES).min(p.tokens);
        let rows = to - from;
        let first = ((batch * p.tokens + from) * p.heads + head) * p.dim;
        let queries = q.tile(batch, from, head, rows);
        let grads = grad.tile(batch, from, head, rows);
        let mut into = Into::Set;
        for (start, end) in p.blocks((from, to)) {
            let width = end - start;
            let (probs, d_scores) = (&mut probs[..rows * width], &mut d_scores[..rows * width]);
            let keys = k.tile(batch, start, kv, width);
            let values = v.tile(batch, start, kv, width);
            let one = Threads::One;
            let mut dst = MatMut::rows_of(probs, rows, width);
            product(&mut dst, Into::Set, scale, queries, keys.t(), one);
            let mut dst = MatMut::rows_of(d_scores, rows, width);
            product(&mut dst, Into::Set, 1.0, grads, values.t(), one);
            let padding = p.padding(batch, start, end);
            let tiles = probs
                .chunks_exact_mut(width)
                .zip(d_scores.chunks_exact_mut(width));
            for (i, (probs, d_scores)) in tiles.enumerate() {
                let (t, (lo, hi)) = (from + i, p.columns(from + i, start, end));
                let (log_sum, delta) = (log_sums[t], delta[t]);
                softmax_backward(level, probs, d_scores, lo, hi, padding, log_sum, delta);
            }
            let probs = MatRef::rows_of(probs, rows, width);
            let d_scores = MatRef::rows_of(d_scores, rows, width);
            let block = start * p.dim..end * p.dim;
            let mut dst = MatMut::rows_of(&mut dv[block.clone()], width, p.dim);
            product(&mut dst, Into::Add, 1.0, probs.t(), grads, one);
            let mut dst = MatMut::rows_of(&mut dk[block], width, p.dim);
            product(&mut dst, Into::Add, scale, d_scores.t(), queries, one);
            // SAFETY: this head's rows of dq belong to this task alone.
            let mut dst = unsafe { MatMut::raw(dq.at(first), rows, p.dim, stride) };
            product(&mut dst, into, scale, d_scores, keys, one);
            into = Into::Add;
        }
        if into == Into::Set {
            for i in 0..rows {
                // SAFETY: as above; nothing was visible to these queries.
                unsafe { std::ptr::write_bytes(dq.at(first + i * stride), 0, p.dim) };
            }
        }
    }
}

pub(super) fn backward(
    (q, k, v): (FlexTensor, FlexTensor, FlexTensor),
    (out, log_sums, grad): (FlexTensor, FlexTensor, FlexTensor),
    spec: &AttentionSpec,
) -> (FlexTensor, FlexTensor, FlexTensor) {
    let (q, k, v) = (by_heads(q), by_heads(k), by_heads(v));
    let (out, grad, log_sums) = (by_heads(out), by_heads(grad), dense(log_sums));
    let p = Problem::of(&q, &k, &v, spec);
    let level = level();
    let (qh, kh, vh) = (Heads::of(&q), Heads::of(&k), Heads::of(&v));
    let (oh, gh, sums) = (Heads::of(&out), Heads::of(&grad), values(&log_sums));
    let mut dq = Fresh::new(p.batch * p.tokens * p.heads * p.dim);
    let dq_at = Shared(dq.as_mut_ptr());
    // Per query head, since heads of a group run in parallel; summed in head order below.
    let area = p.keys * p.dim;
    let mut dk = vec![0.0f32; p.batch * p.heads * area];
    let mut dv = vec![0.0f32; p.batch * p.heads * area];
    if area > 0 {
        dk.par_chunks_mut(area)
            .zip(dv.par_chunks_mut(area))
            .enumerate()
            .for_each(|(i, d)| {
                let at = (i / p.heads, i % p.heads);
                backward_head(
                    level,
                    p,
                    (&qh, &kh, &vh),
                    (&oh, &gh, sums),
                    at,
                    dq_at,
                    (d.0, d.1),
                );
            });
    } else {
        dq.slots().iter_mut().for_each(|x| {
            x.write(0.0);
        });
    }
    let shape = k.layout().shape().clone();
    let (dk, dv) = (gathered(p, &dk, &shape), gathered(p, &dv, &shape));
    // SAFETY: the tasks cover every head, and each writes all of its rows.
    let dq = unsafe { dq.into_tensor(q.layout().shape().clone()) };
    (dq, dk, dv)
}

/// `[batch, heads, keys, dim]` summed over each group of heads, as `[batch, keys, kv_heads, dim]`.
fn gathered(p: Problem<'_>, per_head: &[f32], shape: &Shape) -> FlexTensor {
    let row = p.kv_heads * p.dim;
    let mut out = vec![0.0f32; p.batch * p.keys * row];
    if !out.is_empty() {
        out.par_chunks_mut(row).enumerate().for_each(|(i, out)| {
            let (batch, key) = (i / p.keys, i % p.keys);
            for (kv, out) in out.chunks_exact_mut(p.dim).enumerate() {
                for g in 0..p.group() {
                    let head = batch * p.heads + kv * p.group() + g;
                    let from = &per_head[(head * p.keys + key) * p.dim..][..p.dim];
                    out.iter_mut().zip(from).for_each(|(o, x)| *o += x);
                }
            }
        });
    }
    tensor(out, shape.clone())
}
