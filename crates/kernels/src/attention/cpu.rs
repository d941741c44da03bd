//! Attention's forward on Flex, in tiles: no score matrix is kept, keys and values are never repeated.
//! Online softmax after FlashAttention-2 (Dao 2023).

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
use super::pack::{self, Lines};
use super::problem::{Columns, Inputs, Problem, QUERIES, VECTOR};
use super::tile::{Left, STRIPE, Stripe, stripe};
use crate::cpu::exp::exp;
use crate::cpu::heads::{Heads, by_heads};
use crate::cpu::simd::{Level, level, simd_fn};
use crate::cpu::storage::Fresh;
use crate::cpu::storage::Shared;

/// Keys of a tile: with as many values and a tile's queries and scores, near a core's first cache.
const KEYS: usize = 128;

/// Up to so many query rows a key head, dot products beat packed tiles: decoding.
const FEW_ROWS: usize = 16;

/// The lanes joined as a tree of fixed shape. One array a level: each is a vector operation.
#[inline(always)]
fn tree(lanes: [f32; VECTOR], join: impl Fn(f32, f32) -> f32 + Copy) -> f32 {
    #[inline(always)]
    fn halved<const N: usize, const H: usize>(
        x: [f32; N],
        join: impl Fn(f32, f32) -> f32,
    ) -> [f32; H] {
        let mut joined = [0.0; H];
        for i in 0..H {
            joined[i] = join(x[i], x[i + H]);
        }
        joined
    }
    let x: [f32; 8] = halved(lanes, join);
    let x: [f32; 4] = halved(x, join);
    let x: [f32; 2] = halved(x, join);
    join(x[0], x[1])
}

/// `exp(x)`, and 0 below the normal numbers: the processor takes its time over the others.
#[inline(always)]
pub(super) fn weight<const L: u8>(x: f32) -> f32 {
    const LEAST: f32 = -87.0;
    let y = exp::<L>(if x < LEAST { LEAST } else { x });
    if x < LEAST { 0.0 } else { y }
}

/// The larger; a NaN is passed over: it is met again where the result is subtracted.
#[inline(always)]
fn larger(a: f32, b: f32) -> f32 {
    if b > a { b } else { a }
}

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
        // Hidden scores take part as −∞, so that the loops run over whole vectors.
        row[..lo].fill(f32::NEG_INFINITY);
        row[hi..].fill(f32::NEG_INFINITY);
        if let Some(padding) = padding {
            for (x, valid) in row[lo..hi].iter_mut().zip(&padding[lo..hi]) {
                *x = if *valid { *x } else { f32::NEG_INFINITY };
            }
        }
        let (vectors, rest) = row.as_chunks_mut::<VECTOR>();
        let mut lanes = [*max; VECTOR];
        for x in &*vectors {
            for i in 0..VECTOR {
                lanes[i] = larger(lanes[i], x[i]);
            }
        }
        let top = rest.iter().fold(tree(lanes, larger), |m, x| larger(m, *x));
        // While nothing has been visible, any finite base gives the right zeros.
        let base = if top == f32::NEG_INFINITY { 0.0 } else { top };
        let mut lanes = [0.0f32; VECTOR];
        for x in vectors {
            for i in 0..VECTOR {
                x[i] = weight::<L>(x[i] - base);
                lanes[i] += x[i];
            }
        }
        for (x, lane) in rest.iter_mut().zip(&mut lanes) {
            *x = weight::<L>(*x - base);
            *lane += *x;
        }
        let correction = weight::<L>(*max - base);
        *sum = *sum * correction + tree(lanes, |a, b| a + b);
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

/// Keys and values of all heads, packed once for the queries and heads that share them: of each block
/// of keys, `kt [dim, stride]` times the scale and `v [stride, padded dim]`.
struct Packed {
    kt: Lines,
    v: Lines,
    /// Keys a block.
    block: usize,
    /// Of a head.
    blocks: usize,
    kt_step: usize,
    v_step: usize,
}

impl Packed {
    fn new(level: Level, p: Problem<'_>, k: &Heads<'_>, v: &Heads<'_>) -> Self {
        let block = KEYS.min(p.keys.next_multiple_of(VECTOR));
        let blocks = p.keys.div_ceil(block);
        let (kt_step, v_step) = (p.dim * block, block * p.padded());
        let count = p.batch * p.kv_heads * blocks;
        let (mut kt, mut vs) = (Lines::new(count * kt_step), Lines::new(count * v_step));
        kt.slots()
            .par_chunks_exact_mut(kt_step)
            .zip(vs.slots().par_chunks_exact_mut(v_step))
            .enumerate()
            .for_each(|(i, (kt, values))| {
                let (head, start) = (i / blocks, i % blocks * block);
                let at = (head / p.kv_heads, start, head % p.kv_heads);
                let rows = block.min(p.keys - start);
                pack::columns(level, k, at, rows, p.spec.scale as f32, kt, block);
                pack::rows(v, at, rows, values, p.padded());
            });
        Self {
            kt,
            v: vs,
            block,
            blocks,
            kt_step,
            v_step,
        }
    }
}

/// What a task works in.
struct Scratch {
    queries: Lines,
    scores: Lines,
    acc: Lines,
}

impl Scratch {
    fn new(p: Problem<'_>, block: usize) -> Self {
        let rows = QUERIES.min(p.tokens);
        Self {
            queries: Lines::new(rows * p.padded()),
            scores: Lines::zeros(rows * block),
            acc: Lines::zeros(rows * p.padded()),
        }
    }
}

/// One tile of queries of one head: writes its rows of `out` and of `log_sums`.
fn forward_tile(
    level: Level,
    p: Problem<'_>,
    (q, packed): (&Heads<'_>, &Packed),
    (batch, head, from, to): (usize, usize, usize, usize),
    scratch: &mut Scratch,
    out: Shared,
    log_sums: Shared,
) {
    let (rows, dim, block) = (to - from, p.padded(), packed.block);
    let kv = batch * p.kv_heads + head / p.group();
    let queries = scratch.queries.slots();
    pack::rows(q, (batch, from, head), rows, queries, dim);
    let queries = Left::rows(queries.as_ptr().cast(), dim);
    let (scores, acc) = (
        scratch.scores.values(),
        &mut scratch.acc.values()[..rows * dim],
    );
    acc.fill(0.0);
    let (mut max, mut sum) = ([f32::NEG_INFINITY; QUERIES], [0.0f32; QUERIES]);
    let (first, end) = p.visible_to_any(batch, from, to);
    for number in first / block..end.div_ceil(block) {
        let start = number * block;
        let width = block.min(p.keys - start);
        let columns = Columns::new(p, batch, (from, to), (start, start + width));
        let padding = p.padding(batch, start, start + width);
        let kt = packed
            .kt
            .as_ptr()
            .wrapping_add((kv * packed.blocks + number) * packed.kt_step);
        let values = packed
            .v
            .as_ptr()
            .wrapping_add((kv * packed.blocks + number) * packed.v_step);
        for row in (0..rows).step_by(STRIPE) {
            let last = (row + STRIPE).min(rows);
            let (lo, hi) = columns.of(row, last);
            if lo == hi {
                continue;
            }
            let (lo, hi) = (lo / VECTOR * VECTOR, hi.next_multiple_of(VECTOR));
            let product = Stripe {
                left: queries.from(row, 0),
                right: kt.wrapping_add(lo),
                right_stride: block,
                c: scores[row * block + lo..].as_mut_ptr(),
                c_stride: block,
                rows: last - row,
                cols: hi - lo,
                depth: p.dim,
                add: false,
            };
            // SAFETY: rows of this tile and columns of this block, whole vectors of which are packed.
            unsafe { stripe(level, product) };
            let padding = padding.map(|x| &x[lo..]);
            for i in row..last {
                let (from, to) = columns.rows[i];
                let (from, to) = (from.clamp(lo, hi) - lo, to.clamp(lo, hi) - lo);
                let row = &mut scores[i * block + lo..i * block + hi];
                let factor =
                    online_softmax(level, row, from, to, padding, &mut max[i], &mut sum[i]);
                if factor != 1.0 {
                    scaled(level, &mut acc[i * dim..(i + 1) * dim], factor);
                }
            }
        }
        for row in (0..rows).step_by(STRIPE) {
            let last = (row + STRIPE).min(rows);
            let (lo, hi) = columns.of(row, last);
            let product = Stripe {
                left: Left::rows(scores.as_ptr(), block).from(row, lo),
                right: values.wrapping_add(lo * dim),
                right_stride: dim,
                c: acc[row * dim..].as_mut_ptr(),
                c_stride: dim,
                rows: last - row,
                cols: dim,
                depth: hi - lo,
                add: true,
            };
            // SAFETY: as above; only keys that there are take part.
            unsafe { stripe(level, product) };
        }
    }
    for (i, acc) in acc.chunks_exact_mut(dim).enumerate() {
        scaled(level, acc, reciprocal(sum[i]));
        let t = from + i;
        // SAFETY: this task's own row and log-sum.
        unsafe {
            let at = out.at(((batch * p.tokens + t) * p.heads + head) * p.dim);
            std::ptr::copy_nonoverlapping(acc.as_ptr(), at, p.dim);
            *log_sums.at((batch * p.heads + head) * p.tokens + t) = log_sum(max[i], sum[i]);
        }
    }
}

/// The output `[batch, tokens, heads, dim]` in order, and each query's log-sum
/// `[batch, heads, tokens]`.
pub(super) fn forward(p: Problem<'_>, inputs: Inputs<'_>) -> (Fresh, Fresh) {
    let _timer = crate::profile::op("attention", p.flops(2), p.bytes());
    let mut out = Fresh::new(p.batch * p.tokens * p.heads * p.dim);
    let mut log_sums = Fresh::new(p.batch * p.heads * p.tokens);
    let (dst, sums) = (Shared(out.as_mut_ptr()), Shared(log_sums.as_mut_ptr()));
    let level = level();
    if p.tokens == 0 || p.dim == 0 || p.keys == 0 {
        out.slots().fill(std::mem::MaybeUninit::new(0.0));
        log_sums
            .slots()
            .fill(std::mem::MaybeUninit::new(f32::INFINITY));
    } else if p.tokens * p.group() <= FEW_ROWS {
        let task = |i: usize| {
            let at = (i / p.kv_heads, i % p.kv_heads);
            forward_few(level, p, inputs, at, dst, sums);
        };
        let tasks = p.batch * p.kv_heads;
        if tasks <= 1 || p.keys * p.dim * FEW_ROWS < 1 << 16 {
            (0..tasks).for_each(task);
        } else {
            (0..tasks).into_par_iter().for_each(task);
        }
    } else {
        let packed = Packed::new(level, p, &inputs.k, &inputs.v);
        let tiles = p.tokens.div_ceil(QUERIES);
        let tasks = (0..p.batch * p.heads * tiles).into_par_iter();
        tasks.for_each_init(
            || Scratch::new(p, packed.block),
            |scratch, i| {
                let (bh, tile) = (i / tiles, i % tiles);
                let (from, to) = (tile * QUERIES, ((tile + 1) * QUERIES).min(p.tokens));
                let at = (bh / p.heads, bh % p.heads, from, to);
                forward_tile(level, p, (&inputs.q, &packed), at, scratch, dst, sums);
            },
        );
    }
    (out, log_sums)
}

fn four(t: &FlexTensor) -> [usize; 4] {
    [0, 1, 2, 3].map(|i| t.layout().shape()[i])
}

/// The sizes and views of tensors that went through [`by_heads`].
pub(super) fn problem<'a>(
    [q, k, v]: [&'a FlexTensor; 3],
    spec: &'a AttentionSpec,
) -> (Problem<'a>, Inputs<'a>) {
    let inputs = Inputs {
        q: Heads::of(q),
        k: Heads::of(k),
        v: Heads::of(v),
    };
    (Problem::new(four(q), four(k), four(v), spec), inputs)
}

fn output(
    q: FlexTensor,
    k: FlexTensor,
    v: FlexTensor,
    spec: &AttentionSpec,
) -> (FlexTensor, FlexTensor) {
    let (q, k, v) = (by_heads(q), by_heads(k), by_heads(v));
    let (p, inputs) = problem([&q, &k, &v], spec);
    let (out, log_sums) = forward(p, inputs);
    let shape = q.layout().shape().clone();
    let sums_shape = Shape::from(vec![p.batch, p.heads, p.tokens]);
    // SAFETY: every query of every head has its row and its log-sum.
    unsafe { (out.into_tensor(shape), log_sums.into_tensor(sums_shape)) }
}

impl AttentionOps for Flex {
    fn enamel_attention(
        q: FloatTensor<Self>,
        k: FloatTensor<Self>,
        v: FloatTensor<Self>,
        spec: Arc<AttentionSpec>,
    ) -> FloatTensor<Self> {
        output(q, k, v, &spec).0
    }

    fn enamel_attention_with_sums(
        q: FloatTensor<Self>,
        k: FloatTensor<Self>,
        v: FloatTensor<Self>,
        spec: Arc<AttentionSpec>,
    ) -> (FloatTensor<Self>, FloatTensor<Self>) {
        output(q, k, v, &spec)
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
