//! The backward of attention on Flex: scores are computed again, tile by tile, the keys' blocks outside
//! and the queries' tiles inside, so that a block's gradients stay near until they are finished.

use burn::backend::flex::FlexTensor;
use rayon::prelude::*;

use super::AttentionSpec;
use super::cpu::{problem, weight};
use super::pack::{self, Lines};
use super::problem::{Columns, Inputs, Problem, QUERIES, VECTOR};
use super::tile::{Left, STRIPE, Stripe, stripe};
use crate::cpu::heads::{Heads, by_heads};
use crate::cpu::simd::{Level, dot, level, simd_fn};
use crate::cpu::storage::Shared;
use crate::cpu::storage::{Fresh, dense, tensor, values};
use crate::rope::cpu::Turn;

/// Keys of a block.
const KEYS: usize = 64;

/// With so many key heads in all, each is a task of its own, and nothing is left to be summed.
const ENOUGH_TASKS: usize = 12;

/// Into so many tasks fewer query heads are cut, each with key gradients of its own.
const WANTED_TASKS: usize = 16;

simd_fn! {
    /// One row of the backward tiles, whole vectors of it, `lo .. hi` visible: `p` arrives as scores and
    /// leaves as probabilities, `dp` arrives as their gradient and leaves as `scale` times the scores'
    /// gradient `p · (dp − delta)`. Hidden ones leave as zeros, even of a row of NaN.
    fn softmax_backward<L>(
        p: &mut [f32],
        dp: &mut [f32],
        lo: usize,
        hi: usize,
        padding: Option<&[bool]>,
        log_sum: f32,
        delta: f32,
        scale: f32,
    ) {
        let (ps, _) = p.as_chunks_mut::<VECTOR>();
        let (ds, _) = dp.as_chunks_mut::<VECTOR>();
        for (p, d) in ps.iter_mut().zip(ds) {
            for i in 0..VECTOR {
                p[i] = weight::<L>(p[i] - log_sum);
                d[i] = p[i] * (d[i] - delta) * scale;
            }
        }
        for x in [p, dp] {
            x[..lo].fill(0.0);
            x[hi..].fill(0.0);
            if let Some(padding) = padding {
                for (x, valid) in x[lo..hi].iter_mut().zip(&padding[lo..hi]) {
                    *x = if *valid { *x } else { 0.0 };
                }
            }
        }
    }
}

simd_fn! {
    fn inner<L>(a: &[f32], b: &[f32]) -> f32 {
        dot::<L>(a, b)
    }
}

simd_fn! {
    fn add<L>(a: &mut [f32], b: &[f32]) {
        for (a, b) in a.iter_mut().zip(b) {
            *a += b;
        }
    }
}

/// What the forward left, and the gradient of its output.
#[derive(Clone, Copy)]
pub(super) struct Saved<'a> {
    pub(super) out: Heads<'a>,
    pub(super) grad: Heads<'a>,
    /// `[batch, heads, tokens]`.
    pub(super) log_sums: &'a [f32],
}

/// Where a gradient `[batch, tokens, heads, dim]` goes; the last axis lies in order.
#[derive(Clone, Copy)]
pub(super) struct Gradient {
    pub(super) at: Shared,
    /// Of batch, token and head.
    pub(super) strides: [usize; 3],
}

impl Gradient {
    fn in_order([_, tokens, heads, dim]: [usize; 4], at: &mut Fresh) -> Self {
        Self {
            at: Shared(at.as_mut_ptr()),
            strides: [tokens * heads * dim, heads * dim, dim],
        }
    }

    /// Writes one row, turned.
    ///
    /// # Safety
    /// The row is the caller's alone.
    unsafe fn write(
        self,
        level: Level,
        p: Problem<'_>,
        (batch, token, head): (usize, usize, usize),
        row: &[f32],
        turn: Option<Turn<'_>>,
    ) {
        let [b, t, h] = self.strides;
        let at = self.at.at(batch * b + token * t + head * h);
        // SAFETY: the row lies inside the gradient, and the caller owns it.
        unsafe {
            std::ptr::copy_nonoverlapping(row.as_ptr(), at, p.dim);
            if let Some(turn) = turn {
                let row = std::slice::from_raw_parts_mut(at, p.dim);
                turn.heads(level, batch * p.tokens + token, row);
            }
        }
    }
}

/// How the work of one key head is cut, by shape alone.
#[derive(Clone, Copy)]
struct Cut {
    /// Tasks that share its query heads out.
    heads: usize,
    /// Tasks that share each query head's tiles out, every so many-th tile to one.
    tiles: usize,
}

impl Cut {
    fn of(p: Problem<'_>) -> Self {
        if p.batch * p.kv_heads >= ENOUGH_TASKS {
            return Self { heads: 1, tiles: 1 };
        }
        let tiles = WANTED_TASKS.div_ceil(p.batch * p.heads);
        Self {
            heads: p.group(),
            tiles: tiles.min(p.tokens.div_ceil(QUERIES)),
        }
    }

    fn tasks(self) -> usize {
        self.heads * self.tiles
    }
}

/// One tile of queries of one head.
struct Panel {
    head: usize,
    from: usize,
    rows: usize,
}

/// What a task works in.
struct Scratch {
    /// Of all its tiles: queries, output gradients and query gradients.
    q: Lines,
    grad: Lines,
    dq: Lines,
    delta: Vec<f32>,
    /// Of a block of keys.
    kt: Lines,
    vt: Lines,
    k: Lines,
    dk: Lines,
    dv: Lines,
    /// Of a tile over a block.
    probs: Lines,
    d_scores: Lines,
}

impl Scratch {
    fn new(p: Problem<'_>, cut: Cut) -> Self {
        let panels = p.group() / cut.heads * p.tokens.div_ceil(QUERIES).div_ceil(cut.tiles);
        let (queries, block) = (panels * QUERIES * p.padded(), KEYS * p.padded());
        Self {
            q: Lines::new(queries),
            grad: Lines::new(queries),
            dq: Lines::zeros(queries),
            delta: vec![0.0; panels * QUERIES],
            kt: Lines::new(block),
            vt: Lines::new(block),
            k: Lines::new(block),
            dk: Lines::zeros(block),
            dv: Lines::zeros(block),
            probs: Lines::zeros(QUERIES * KEYS),
            d_scores: Lines::zeros(QUERIES * KEYS),
        }
    }
}

/// A task: some tiles of some query heads of one key head.
struct Unit<'a> {
    level: Level,
    p: Problem<'a>,
    inputs: Inputs<'a>,
    saved: Saved<'a>,
    batch: usize,
    kv: usize,
    panels: Vec<Panel>,
}

impl Unit<'_> {
    /// Writes the rows of dq and hands each block's rows of dk and dv (`[keys, padded dim]`), with
    /// the number of the first, to `keys_done`.
    fn run(
        &self,
        s: &mut Scratch,
        dq: Gradient,
        turn: Option<Turn<'_>>,
        mut keys_done: impl FnMut(usize, &[f32], &[f32]),
    ) {
        let (level, p) = (self.level, self.p);
        let dim = p.padded();
        let size = QUERIES * dim;
        for (i, panel) in self.panels.iter().enumerate() {
            let at = (self.batch, panel.from, panel.head);
            let slots = i * size..(i + 1) * size;
            pack::rows(
                &self.inputs.q,
                at,
                panel.rows,
                &mut s.q.slots()[slots.clone()],
                dim,
            );
            pack::rows(
                &self.saved.grad,
                at,
                panel.rows,
                &mut s.grad.slots()[slots],
                dim,
            );
            for row in 0..panel.rows {
                let t = panel.from + row;
                let out = self.saved.out.row(self.batch, t, panel.head);
                let grad = self.saved.grad.row(self.batch, t, panel.head);
                s.delta[i * QUERIES + row] = inner(level, out, grad);
            }
        }
        s.dq.values()[..self.panels.len() * size].fill(0.0);
        for start in (0..p.keys).step_by(KEYS) {
            let width = KEYS.min(p.keys - start);
            s.dk.values().fill(0.0);
            s.dv.values().fill(0.0);
            let mut packed = false;
            for (i, panel) in self.panels.iter().enumerate() {
                let (first, end) =
                    p.visible_to_any(self.batch, panel.from, panel.from + panel.rows);
                if first == end || first >= start + width || end <= start {
                    continue;
                }
                if !packed {
                    let at = (self.batch, start, self.kv);
                    let Inputs { k, v, .. } = &self.inputs;
                    let scale = p.spec.scale as f32;
                    pack::columns(level, k, at, width, scale, s.kt.slots(), KEYS);
                    pack::columns(level, v, at, width, 1.0, s.vt.slots(), KEYS);
                    pack::rows(k, at, width, s.k.slots(), dim);
                    packed = true;
                }
                self.tile(s, i, (start, width));
            }
            keys_done(
                start,
                &s.dk.values()[..width * dim],
                &s.dv.values()[..width * dim],
            );
        }
        for (panel, rows) in self.panels.iter().zip(s.dq.values().chunks_exact(size)) {
            for (i, row) in rows.chunks_exact(dim).take(panel.rows).enumerate() {
                // SAFETY: this task's own rows.
                unsafe {
                    dq.write(
                        level,
                        p,
                        (self.batch, panel.from + i, panel.head),
                        row,
                        turn,
                    );
                }
            }
        }
    }

    /// One tile of queries over one block of keys.
    fn tile(&self, s: &mut Scratch, number: usize, (start, width): (usize, usize)) {
        let (level, p) = (self.level, self.p);
        let Panel { head, from, rows } = self.panels[number];
        let dim = p.padded();
        let columns = Columns::new(p, self.batch, (from, from + rows), (start, start + width));
        let padding = p.padding(self.batch, start, start + width);
        let log_sums = &self.saved.log_sums[(self.batch * p.heads + head) * p.tokens + from..];
        let delta = &s.delta[number * QUERIES..];
        let offset = number * QUERIES * dim;
        let (probs, d_scores) = (s.probs.values(), s.d_scores.values());
        let (dk, dv, dq) = (s.dk.values(), s.dv.values(), &mut s.dq.values()[offset..]);
        let q = Left::rows(s.q.as_ptr().wrapping_add(offset), dim);
        let grad = Left::rows(s.grad.as_ptr().wrapping_add(offset), dim);
        let stripes = || {
            (0..rows)
                .step_by(STRIPE)
                .map(|row| (row, (row + STRIPE).min(rows)))
        };
        for (row, last) in stripes() {
            let (lo, hi) = columns.of(row, last);
            let tile_rows = row * KEYS..last * KEYS;
            if lo == hi {
                probs[tile_rows.clone()].fill(0.0);
                d_scores[tile_rows].fill(0.0);
                continue;
            }
            let (lo, hi) = (lo / VECTOR * VECTOR, hi.next_multiple_of(VECTOR));
            let product = |left: Left, right: *const f32, c: &mut [f32]| Stripe {
                left: left.from(row, 0),
                right: right.wrapping_add(lo),
                right_stride: KEYS,
                c: c[row * KEYS + lo..].as_mut_ptr(),
                c_stride: KEYS,
                rows: last - row,
                cols: hi - lo,
                depth: p.dim,
                add: false,
            };
            // SAFETY: rows of this tile and columns of this block, whole vectors of which are packed.
            unsafe {
                stripe(level, product(q, s.kt.as_ptr(), probs));
                stripe(level, product(grad, s.vt.as_ptr(), d_scores));
            }
            for i in row..last {
                let (first, end) = columns.rows[i];
                let (first, end) = (first.clamp(lo, hi) - lo, end.clamp(lo, hi) - lo);
                let (probs, d_scores) = (
                    &mut probs[i * KEYS..(i + 1) * KEYS],
                    &mut d_scores[i * KEYS..(i + 1) * KEYS],
                );
                if hi - lo < KEYS {
                    for x in [&mut *probs, &mut *d_scores] {
                        x[..lo].fill(0.0);
                        x[hi..].fill(0.0);
                    }
                }
                softmax_backward(
                    level,
                    &mut probs[lo..hi],
                    &mut d_scores[lo..hi],
                    first,
                    end,
                    padding.map(|x| &x[lo..]),
                    log_sums[i],
                    delta[i],
                    p.spec.scale as f32,
                );
            }
        }
        for key in (0..width).step_by(STRIPE) {
            let last = (key + STRIPE).min(width);
            let (first, end) = columns.seeing(rows, key, last);
            let product = |left: &[f32], right: Left, c: &mut [f32]| Stripe {
                left: Left::rows(left.as_ptr(), KEYS).t().from(key, first),
                right: right.from(first, 0).at,
                right_stride: dim,
                c: c[key * dim..].as_mut_ptr(),
                c_stride: dim,
                rows: last - key,
                cols: dim,
                depth: end - first,
                add: true,
            };
            // SAFETY: rows of this tile and keys of this block.
            unsafe {
                stripe(level, product(probs, grad, dv));
                stripe(level, product(d_scores, q, dk));
            }
        }
        for (row, last) in stripes() {
            let (lo, hi) = columns.of(row, last);
            let product = Stripe {
                left: Left::rows(d_scores.as_ptr(), KEYS).from(row, lo),
                right: s.k.as_ptr().wrapping_add(lo * dim),
                right_stride: dim,
                c: dq[row * dim..].as_mut_ptr(),
                c_stride: dim,
                rows: last - row,
                cols: dim,
                depth: hi - lo,
                add: true,
            };
            // SAFETY: as above.
            unsafe { stripe(level, product) };
        }
    }
}

/// Writes all rows of dq, dk and dv; those of q and k turned.
pub(super) fn backward_into(
    p: Problem<'_>,
    inputs: Inputs<'_>,
    saved: Saved<'_>,
    [dq, dk, dv]: [Gradient; 3],
    turn: Option<Turn<'_>>,
) {
    let _timer = crate::profile::op("attention backward", p.flops(5), 2 * p.bytes());
    if p.batch == 0 || p.tokens == 0 || p.keys == 0 || p.dim == 0 {
        return;
    }
    let (level, cut, dim) = (level(), Cut::of(p), p.padded());
    let heads = p.group() / cut.heads;
    let unit = |i: usize| {
        let (task, kv) = (i % cut.tasks(), i / cut.tasks());
        let (part, first) = (task % cut.tiles, task / cut.tiles * heads);
        let (batch, kv) = (kv / p.kv_heads, kv % p.kv_heads);
        let first = kv * p.group() + first;
        let tiles = (part * QUERIES..p.tokens).step_by(cut.tiles * QUERIES);
        let panels = (first..first + heads).flat_map(|head| {
            tiles.clone().map(move |from| Panel {
                head,
                from,
                rows: QUERIES.min(p.tokens - from),
            })
        });
        Unit {
            level,
            p,
            inputs,
            saved,
            batch,
            kv,
            panels: panels.collect(),
        }
    };
    let tasks = (0..p.batch * p.kv_heads * cut.tasks()).into_par_iter();
    let scratch = || Scratch::new(p, cut);
    if cut.tasks() == 1 {
        tasks.for_each_init(scratch, |s, i| {
            let unit = unit(i);
            unit.run(s, dq, turn, |start, block_dk, block_dv| {
                let rows = block_dk.chunks_exact(dim).zip(block_dv.chunks_exact(dim));
                for (j, (row_dk, row_dv)) in rows.enumerate() {
                    let at = (unit.batch, start + j, unit.kv);
                    // SAFETY: the rows of this key head are this task's alone.
                    unsafe {
                        dk.write(level, p, at, row_dk, turn);
                        dv.write(level, p, at, row_dv, None);
                    }
                }
            });
        });
        return;
    }
    let area = p.keys * dim;
    let mut parts = Fresh::new(p.batch * p.kv_heads * cut.tasks() * 2 * area);
    let of_tasks = parts.slots().par_chunks_exact_mut(2 * area).zip(tasks);
    of_tasks.for_each_init(scratch, |s, (part, i)| {
        let (part_dk, part_dv) = part.split_at_mut(area);
        unit(i).run(s, dq, turn, |start, block_dk, block_dv| {
            let rows = start * dim..start * dim + block_dk.len();
            part_dk[rows.clone()].write_copy_of_slice(block_dk);
            part_dv[rows].write_copy_of_slice(block_dv);
        });
    });
    // SAFETY: each task has written its gradients of all keys.
    let parts = unsafe { parts.into_vec() };
    // In task order, whatever order they finished in.
    let blocks = p.keys.div_ceil(KEYS);
    (0..p.batch * p.kv_heads * blocks)
        .into_par_iter()
        .for_each(|i| {
            let (head, start) = (i / blocks, i % blocks * KEYS);
            let parts = &parts[head * cut.tasks() * 2 * area..][..cut.tasks() * 2 * area];
            let mut sum = vec![0.0f32; dim];
            for key in start..(start + KEYS).min(p.keys) {
                let at = (head / p.kv_heads, key, head % p.kv_heads);
                for (half, gradient, turn) in [(0, dk, turn), (area, dv, None)] {
                    sum.fill(0.0);
                    for part in parts.chunks_exact(2 * area) {
                        add(level, &mut sum, &part[half + key * dim..][..dim]);
                    }
                    // SAFETY: this task's own row.
                    unsafe { gradient.write(level, p, at, &sum, turn) };
                }
            }
        });
}

/// Gradients of q, k and v as tensors of their own.
pub(super) fn backward(
    (q, k, v): (FlexTensor, FlexTensor, FlexTensor),
    (out, log_sums, grad): (FlexTensor, FlexTensor, FlexTensor),
    spec: &AttentionSpec,
) -> (FlexTensor, FlexTensor, FlexTensor) {
    let (q, k, v) = (by_heads(q), by_heads(k), by_heads(v));
    let (out, grad, log_sums) = (by_heads(out), by_heads(grad), dense(log_sums));
    let (p, inputs) = problem([&q, &k, &v], spec);
    let (q_shape, k_shape) = (q.layout().shape().clone(), k.layout().shape().clone());
    let queries = p.batch * p.tokens * p.heads * p.dim;
    let keys = p.batch * p.keys * p.kv_heads * p.dim;
    if queries == 0 || keys == 0 {
        let zeros = |n, shape| tensor(vec![0.0; n], shape);
        let dk = zeros(keys, k_shape.clone());
        return (zeros(queries, q_shape), dk, zeros(keys, k_shape));
    }
    let (mut dq, mut dk, mut dv) = (Fresh::new(queries), Fresh::new(keys), Fresh::new(keys));
    let kv = [p.batch, p.keys, p.kv_heads, p.dim];
    let gradients = [
        Gradient::in_order([p.batch, p.tokens, p.heads, p.dim], &mut dq),
        Gradient::in_order(kv, &mut dk),
        Gradient::in_order(kv, &mut dv),
    ];
    let saved = Saved {
        out: Heads::of(&out),
        grad: Heads::of(&grad),
        log_sums: values(&log_sums),
    };
    backward_into(p, inputs, saved, gradients, None);
    // SAFETY: the tasks cover every query head and every key, and each writes all of its rows.
    unsafe {
        (
            dq.into_tensor(q_shape),
            dk.into_tensor(k_shape.clone()),
            dv.into_tensor(k_shape),
        )
    }
}
