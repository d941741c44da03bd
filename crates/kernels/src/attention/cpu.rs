//! Attention on Flex, in tiles: no score matrix is kept, keys and values are never repeated, and
//! `[batch, tokens, heads, dim]` is read in place. Online softmax after FlashAttention-2 (Dao 2023).

use std::sync::Arc;

use burn::backend::Flex;
use burn::backend::flex::FlexTensor;
use burn::backend::tensor::FloatTensor;
use burn::tensor::Shape;
use rayon::prelude::*;

use super::AttentionSpec;
use super::ops::AttentionOps;
use crate::cpu::exp::exp;
use crate::cpu::heads::{Heads, by_heads};
use crate::cpu::matrix::{Into, MatMut, MatRef, Threads, product};
use crate::cpu::simd::{LANES, Level, dot, fma, level, simd_fn, sum_lanes};
use crate::cpu::storage::{Fresh, dense, tensor, values};

/// Queries and keys of a tile: scores, `q`, `k` and `v` of one fit a core's L2 cache together.
const QUERIES: usize = 64;
const KEYS: usize = 256;
/// Up to so many query rows a key head, dot products beat packed tiles: decoding.
const FEW_ROWS: usize = 16;

/// Sizes of a call and what is visible to whom.
#[derive(Clone, Copy)]
struct Problem<'a> {
    batch: usize,
    tokens: usize,
    keys: usize,
    heads: usize,
    kv_heads: usize,
    dim: usize,
    spec: &'a AttentionSpec,
}

impl<'a> Problem<'a> {
    fn of(q: &FlexTensor, k: &FlexTensor, v: &FlexTensor, spec: &'a AttentionSpec) -> Self {
        let (qs, ks) = (q.layout().shape(), k.layout().shape());
        let [batch, tokens, heads, dim] = [qs[0], qs[1], qs[2], qs[3]];
        let (keys, kv_heads) = (ks[1], ks[2]);
        assert!(
            ks[0] == batch && ks[3] == dim && v.layout().shape() == ks,
            "q, k and v disagree in batch or head_dim"
        );
        assert!(
            kv_heads > 0 && heads % kv_heads == 0,
            "{heads} heads over {kv_heads} key heads"
        );
        if let Some(mask) = &spec.key_mask {
            assert!(
                mask.valid.len() == batch * keys,
                "the key mask is [batch, keys]"
            );
        }
        Self {
            batch,
            tokens,
            keys,
            heads,
            kv_heads,
            dim,
            spec,
        }
    }

    fn group(&self) -> usize {
        self.heads / self.kv_heads
    }

    /// Keys that query `t` may see, the padding mask aside.
    fn visible(&self, t: usize) -> (usize, usize) {
        let p = t + self.spec.offset;
        let end = if self.spec.causal {
            (p + 1).min(self.keys)
        } else {
            self.keys
        };
        let start = self
            .spec
            .sliding_window
            .map_or(0, |w| (p + 1).saturating_sub(w));
        (start.min(end), end)
    }

    /// Keys that any of the queries `from .. to` may see.
    fn visible_to_any(&self, from: usize, to: usize) -> (usize, usize) {
        (self.visible(from).0, self.visible(to - 1).1)
    }

    /// Query `t`'s visible columns of the key block `from .. to`, relative to its start.
    fn columns(&self, t: usize, from: usize, to: usize) -> (usize, usize) {
        let (start, end) = self.visible(t);
        let end = end.clamp(from, to) - from;
        ((start.clamp(from, to) - from).min(end), end)
    }

    /// Which keys of the block are real.
    fn padding(&self, batch: usize, from: usize, to: usize) -> Option<&'a [bool]> {
        let mask = self.spec.key_mask.as_ref()?;
        Some(&mask.valid[batch * self.keys + from..batch * self.keys + to])
    }

    fn blocks(&self, queries: (usize, usize)) -> impl Iterator<Item = (usize, usize)> + use<> {
        let (start, end) = self.visible_to_any(queries.0, queries.1);
        let first = start / KEYS * KEYS;
        (first..end)
            .step_by(KEYS)
            .map(move |k| (k, (k + KEYS).min(end)))
    }
}

simd_fn! {
    /// One row of a score tile, columns `lo .. hi` visible: updates the running maximum and sum,
    /// turns scores into `exp(score − max)` (0 where hidden) and returns the factor on what was
    /// accumulated before.
    fn online_softmax<FMA>(
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
        let mut lanes = [f32::NEG_INFINITY; LANES];
        let chunks = seen.chunks_exact(LANES);
        let mut top = *max;
        for x in chunks.remainder() {
            top = if *x > top { *x } else { top };
        }
        for x in chunks {
            for i in 0..LANES {
                lanes[i] = if x[i] > lanes[i] { x[i] } else { lanes[i] };
            }
        }
        for x in lanes {
            top = if x > top { x } else { top };
        }
        // While nothing has been visible, any finite base gives the right zeros.
        let base = if top == f32::NEG_INFINITY { 0.0 } else { top };
        let mut lanes = [0.0f32; LANES];
        let mut chunks = seen.chunks_exact_mut(LANES);
        for x in &mut chunks {
            for i in 0..LANES {
                x[i] = exp::<FMA>(x[i] - base);
                lanes[i] += x[i];
            }
        }
        for (x, lane) in chunks.into_remainder().iter_mut().zip(&mut lanes) {
            *x = exp::<FMA>(*x - base);
            *lane += *x;
        }
        let correction = exp::<FMA>(*max - base);
        *sum = *sum * correction + sum_lanes(lanes);
        *max = top;
        correction
    }
}

simd_fn! {
    /// One row of the backward tiles: `p` arrives as scores and leaves as probabilities, `dp`
    /// arrives as their gradient and leaves as the scores' gradient `p · (dp − delta)`.
    fn softmax_backward<FMA>(
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
            *p = exp::<FMA>(*p - log_sum);
            *d = *p * (*d - delta);
        }
    }
}

simd_fn! {
    fn scaled<FMA>(row: &mut [f32], factor: f32) {
        for x in row {
            *x *= factor;
        }
    }
}

simd_fn! {
    fn inner<FMA>(a: &[f32], b: &[f32]) -> f32 {
        dot::<FMA>(a, b)
    }
}

simd_fn! {
    /// Scores of a few queries over one head's keys, `scores[query][key]`, and no tile packing:
    /// each key is read once for all of them.
    fn few_scores<FMA>(
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
                scores[i * count + j] = scale * dot::<FMA>(query, key);
            }
        }
    }
}

simd_fn! {
    /// `out[query] = Σ_key weights[query][key] · value[key]`.
    fn few_outputs<FMA>(
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
                    *o = fma::<FMA>(w, *v, *o);
                }
            }
        }
    }
}

/// A pointer that parallel tasks share, each writing its own part.
#[derive(Clone, Copy)]
struct Shared(*mut f32);

// SAFETY: the tasks below write disjoint elements, each says which.
unsafe impl Send for Shared {}
// SAFETY: as above.
unsafe impl Sync for Shared {}

impl Shared {
    fn at(self, offset: usize) -> *mut f32 {
        self.0.wrapping_add(offset)
    }
}

/// `log Σ exp` of a finished row; +∞ for a row that saw nothing, so that its probabilities
/// are 0 when the backward takes them up again.
fn log_sum(max: f32, sum: f32) -> f32 {
    if sum == 0.0 {
        f32::INFINITY
    } else {
        max + sum.ln()
    }
}

fn reciprocal(sum: f32) -> f32 {
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

/// All queries of one key head when they are few: writes their rows of `out` and of `log_sums`.
fn forward_few(
    level: Level,
    p: Problem<'_>,
    (q, k, v): (&Heads<'_>, &Heads<'_>, &Heads<'_>),
    (batch, kv): (usize, usize),
    out: Shared,
    log_sums: Shared,
) {
    let heads = kv * p.group()..(kv + 1) * p.group();
    let rows: Vec<(usize, usize)> = (0..p.tokens)
        .flat_map(|t| heads.clone().map(move |h| (t, h)))
        .collect();
    let queries: Vec<&[f32]> = rows.iter().map(|(t, h)| q.row(batch, *t, *h)).collect();
    let (start, end) = p.visible_to_any(0, p.tokens);
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
            let (lo, hi) = p.columns(*t, start, end);
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

pub(super) fn forward(
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

fn backward(
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
