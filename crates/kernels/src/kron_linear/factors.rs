//! The two factors on Flex: their products with rows, chunk by chunk.

use burn::backend::flex::FlexTensor;
use rayon::prelude::*;

use super::cpu::Wanted;
use super::tile::{Operand, Sizes, Target, inner_products, products};
use crate::cpu::matrix::{Into, dims};
use crate::cpu::simd::{Level, level};
use crate::cpu::storage::values;

/// Numbers in a chunk's rows of x and y together: 64 KiB, so that they and the intermediate results
/// stay in the second-level cache.
const CHUNK: usize = 16 * 1024;
/// Least and most rows of a chunk.
const CHUNK_ROWS: [usize; 2] = [8, 64];
/// Most tasks of a backward: each has sums as large as the factors.
const TASKS: usize = 32;

/// The factors and their sizes; w2 transposed as well, because small products read their right
/// operand by rows.
pub(super) struct Factors<'a> {
    pub(super) w1: &'a [f32],
    pub(super) w2: &'a [f32],
    w2t: Vec<f32>,
    pub(super) l: usize,
    pub(super) m: usize,
    pub(super) k: usize,
    pub(super) n: usize,
    scale: f32,
    level: Level,
}

impl<'a> Factors<'a> {
    /// Both went through [`dense`].
    pub(super) fn new(w1: &'a FlexTensor, w2: &'a FlexTensor, scale: f64) -> Self {
        let ((l, m), (k, n)) = (dims(w1), dims(w2));
        let (w1, w2) = (values(w1), values(w2));
        let w2t = (0..n * k).map(|i| w2[i % k * n + i / k]).collect();
        Self {
            w1,
            w2,
            w2t,
            l,
            m,
            k,
            n,
            scale: scale as f32,
            level: level(),
        }
    }

    pub(super) fn input(&self) -> usize {
        self.m * self.n
    }

    pub(super) fn output(&self) -> usize {
        self.l * self.k
    }

    /// Operations of the adapter's products on a row.
    pub(super) fn flops(&self) -> usize {
        let Self { l, m, k, n, .. } = *self;
        2 * (m * k * (n + l)).min(l * n * (m + k))
    }

    pub(super) fn empty(&self) -> bool {
        self.input() * self.output() == 0
    }

    pub(super) fn chunk_rows(&self) -> usize {
        (CHUNK / (self.input() + self.output())).clamp(CHUNK_ROWS[0], CHUNK_ROWS[1])
    }

    /// `X·w2ᵀ` before the product with w1: its cost is `mk·(n + l)` a row, the other order's
    /// `ln·(m + k)`.
    pub(super) fn second_first(&self) -> bool {
        self.m * self.k * (self.n + self.l) <= self.l * self.n * (self.m + self.k)
    }

    /// Numbers of what lies between the two products of a row.
    pub(super) fn between(&self) -> usize {
        if self.second_first() {
            self.m * self.k
        } else {
            self.l * self.n
        }
    }

    /// `dst = [dst +] scale · w1 · right` for each of `count` rows.
    pub(super) fn left(
        &self,
        count: usize,
        dst: Target<'_>,
        into: Into,
        scale: f32,
        right: Operand<'_>,
    ) {
        let cols = if self.second_first() { self.k } else { self.n };
        let sizes = Sizes {
            count,
            rows: self.l,
            depth: self.m,
            cols,
        };
        let w1 = Operand::rows(self.w1, self.m);
        products(self.level, sizes, dst, into, scale, w1, right);
    }

    /// `dst = [dst +] scale · w1ᵀ · right` for each of `count` rows.
    pub(super) fn left_transposed(
        &self,
        count: usize,
        dst: Target<'_>,
        into: Into,
        scale: f32,
        right: Operand<'_>,
    ) {
        let cols = if self.second_first() { self.k } else { self.n };
        let sizes = Sizes {
            count,
            rows: self.m,
            depth: self.l,
            cols,
        };
        let w1 = Operand::rows(self.w1, self.m).t();
        products(self.level, sizes, dst, into, scale, w1, right);
    }

    /// Sizes of a sum over rows that gives w1's gradient, with `depth` terms a row.
    pub(super) fn pairs(&self, rows: usize, depth: usize) -> Sizes {
        Sizes {
            count: rows,
            rows: self.l,
            depth,
            cols: self.m,
        }
    }

    /// `y += scale · adapter(x)`, a chunk of rows.
    pub(super) fn forward(&self, x: &[f32], y: &mut [f32], between: &mut [f32]) {
        let Self { l, m, k, n, .. } = *self;
        let (rows, level, s) = (x.len() / self.input(), self.level, self.scale);
        let right = |count| Sizes::one(rows * count, n, k);
        let w2 = Operand::rows(&self.w2t, k);
        if self.second_first() {
            let (dst, x) = (Target::rows(between, k), Operand::rows(x, n));
            products(level, right(m), dst, Into::Set, 1.0, x, w2);
            let t = Operand::rows(between, k).step(m * k);
            self.left(rows, Target::rows(y, k).step(l * k), Into::Add, s, t);
        } else {
            let (dst, x) = (Target::rows(between, n), Operand::rows(x, n));
            self.left(rows, dst.step(l * n), Into::Set, 1.0, x.step(m * n));
            let (dst, v) = (Target::rows(y, k), Operand::rows(between, n));
            products(level, right(l), dst, Into::Add, s, v, w2);
        }
    }
}

/// Where one task of a backward adds its rows' part of each gradient. A gradient that is not wanted is
/// empty.
pub(super) struct Sums<'a> {
    dx: &'a mut [f32],
    dw1: Vec<f32>,
    dw2: Vec<f32>,
}

/// A task's memory for the intermediate results of the backward and of the forward, used by one chunk
/// after the other.
pub(super) struct Scratch {
    backward: Vec<f32>,
    forward: Vec<f32>,
}

impl Factors<'_> {
    /// Backward of a chunk with `X·w2ᵀ` first.
    pub(super) fn backward_second_first(
        &self,
        x: &[f32],
        g: &[f32],
        dx: &mut [f32],
        sums: (&mut [f32], &mut [f32]),
        scratch: &mut Scratch,
    ) {
        let Self { l, m, k, n, .. } = *self;
        let (rows, level, s) = (g.len() / self.output(), self.level, self.scale);
        let (dw1, dw2) = sums;
        if !dx.is_empty() || !dw2.is_empty() {
            let dt = &mut scratch.backward[..rows * m * k];
            let (dst, g) = (Target::rows(dt, k), Operand::rows(g, k));
            self.left_transposed(rows, dst.step(m * k), Into::Set, s, g.step(l * k));
            let dt = Operand::rows(dt, k);
            if !dx.is_empty() {
                let sizes = Sizes::one(rows * m, k, n);
                let (dst, w2) = (Target::rows(dx, n), Operand::rows(self.w2, n));
                products(level, sizes, dst, Into::Add, 1.0, dt, w2);
            }
            if !dw2.is_empty() {
                let sizes = Sizes::one(k, rows * m, n);
                let (dst, x) = (Target::rows(dw2, n), Operand::rows(x, n));
                products(level, sizes, dst, Into::Add, 1.0, dt.t(), x);
            }
        }
        if !dw1.is_empty() {
            let t = &mut scratch.forward[..rows * m * k];
            let sizes = Sizes::one(rows * m, n, k);
            let (dst, x) = (Target::rows(t, k), Operand::rows(x, n));
            let w2 = Operand::rows(&self.w2t, k);
            products(level, sizes, dst, Into::Set, 1.0, x, w2);
            let (g, t) = (
                Operand::rows(g, k).step(l * k),
                Operand::rows(t, k).step(m * k),
            );
            inner_products(level, self.pairs(rows, k), dw1, s, g, t);
        }
    }

    /// Backward of a chunk with `w1·X` first.
    pub(super) fn backward_first_first(
        &self,
        x: &[f32],
        g: &[f32],
        dx: &mut [f32],
        sums: (&mut [f32], &mut [f32]),
        scratch: &mut Scratch,
    ) {
        let Self { l, m, k, n, .. } = *self;
        let (rows, level, s) = (g.len() / self.output(), self.level, self.scale);
        let (dw1, dw2) = sums;
        if !dx.is_empty() || !dw1.is_empty() {
            let u = &mut scratch.backward[..rows * l * n];
            let sizes = Sizes::one(rows * l, k, n);
            let (dst, g) = (Target::rows(u, n), Operand::rows(g, k));
            let w2 = Operand::rows(self.w2, n);
            products(level, sizes, dst, Into::Set, s, g, w2);
            let u = Operand::rows(u, n).step(l * n);
            if !dx.is_empty() {
                let dst = Target::rows(dx, n).step(m * n);
                self.left_transposed(rows, dst, Into::Add, 1.0, u);
            }
            if !dw1.is_empty() {
                let x = Operand::rows(x, n).step(m * n);
                inner_products(level, self.pairs(rows, n), dw1, 1.0, u, x);
            }
        }
        if !dw2.is_empty() {
            let v = &mut scratch.forward[..rows * l * n];
            let (dst, x) = (Target::rows(v, n), Operand::rows(x, n));
            self.left(rows, dst.step(l * n), Into::Set, 1.0, x.step(m * n));
            let sizes = Sizes::one(k, rows * l, n);
            let (dst, g) = (Target::rows(dw2, n), Operand::rows(g, k));
            products(level, sizes, dst, Into::Add, s, g.t(), Operand::rows(v, n));
        }
    }

    /// Adds the adapter's part to `dx` (empty if not wanted) and returns the factors' gradients.
    pub(super) fn backward(
        &self,
        x: &[f32],
        g: &[f32],
        dx: &mut [f32],
        wanted: Wanted,
    ) -> (Vec<f32>, Vec<f32>) {
        let (input, output, chunk) = (self.input(), self.output(), self.chunk_rows());
        let rows = g.len() / output;
        // As many tasks as the shapes say, so that sums do not depend on the number of threads.
        let task = rows.div_ceil(chunk).div_ceil(TASKS).max(1) * chunk;
        let sums = |wanted: bool, n: usize| vec![0.0f32; if wanted { n } else { 0 }];
        let mut pieces = dx.chunks_mut(task * input);
        let tasks: Vec<Sums<'_>> = (0..rows.div_ceil(task))
            .map(|_| Sums {
                dx: pieces.next().unwrap_or_default(),
                dw1: sums(wanted.w1, self.w1.len()),
                dw2: sums(wanted.w2, self.w2.len()),
            })
            .collect();
        let scratch = || {
            let zeros = || vec![0.0f32; chunk.min(rows) * self.between()];
            Scratch {
                backward: zeros(),
                forward: zeros(),
            }
        };
        let partial: Vec<Sums<'_>> = tasks
            .into_par_iter()
            .enumerate()
            .map_init(scratch, |scratch, (i, mut sums)| {
                let end = rows.min((i + 1) * task);
                for from in (i * task..end).step_by(chunk) {
                    let to = end.min(from + chunk);
                    let g = &g[from * output..to * output];
                    // x is absent where only its own gradient is wanted.
                    let x = x.get(from * input..to * input).unwrap_or_default();
                    let dx = if sums.dx.is_empty() {
                        &mut []
                    } else {
                        let (from, to) = (from - i * task, to - i * task);
                        &mut sums.dx[from * input..to * input]
                    };
                    let factors = (&mut sums.dw1[..], &mut sums.dw2[..]);
                    if self.second_first() {
                        self.backward_second_first(x, g, dx, factors, scratch);
                    } else {
                        self.backward_first_first(x, g, dx, factors, scratch);
                    }
                }
                sums
            })
            .collect();
        let (mut dw1, mut dw2) = (
            sums(wanted.w1, self.w1.len()),
            sums(wanted.w2, self.w2.len()),
        );
        for part in partial {
            dw1.iter_mut().zip(part.dw1).for_each(|(d, p)| *d += p);
            dw2.iter_mut().zip(part.dw2).for_each(|(d, p)| *d += p);
        }
        (dw1, dw2)
    }
}
