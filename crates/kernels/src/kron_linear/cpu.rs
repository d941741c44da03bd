//! The linear map with a Kronecker product on Flex. The base is one large product; the adapter goes
//! over it in chunks of rows whose intermediate results stay in a core's cache, in whichever order of
//! association costs less. With a row of x, y, dy as `X: [m, n]`, `Y: [l, k]`, `G: [l, k]`:
//!
//! - w2 first: `T = X·w2ᵀ`, `Y = s·w1·T`; `dT = s·w1ᵀ·G`, `dX = dT·w2`, `dw1 = s·Σ G·Tᵀ`,
//!   `dw2 = Σ dTᵀ·X`
//! - w1 first: `V = w1·X`, `Y = s·V·w2ᵀ`; `U = s·G·w2`, `dX = w1ᵀ·U`, `dw1 = Σ U·Xᵀ`,
//!   `dw2 = s·Σ Gᵀ·V`
//!
//! T and V are made again in the backward: kept, they would be as large as another x for each layer.

use burn::backend::autodiff::Autodiff;
use burn::backend::autodiff::checkpoint::{base::Checkpointer, strategy::CheckpointStrategy};
use burn::backend::autodiff::grads::Gradients;
use burn::backend::autodiff::ops::{Backward, Ops, OpsKind};
use burn::backend::flex::FlexTensor;
use burn::backend::tensor::FloatTensor;
use burn::backend::{Backend, Dispatch, Flex, backend_extension};
use burn::tensor::{Shape, Tensor};
use rayon::prelude::*;

use super::tile::{Operand, Sizes, Target, inner_products, products};
use crate::base_weight::BaseWeight;
use crate::cpu::gemm::{Compute, Packed, Weight, outer, times, times_t};
use crate::cpu::half::{few_times_t, held};
use crate::cpu::matrix::{FEW_ROWS, Into, MatMut, MatRef};
use crate::cpu::simd::{Level, level};
use crate::cpu::storage::{dense, tensor, values};
use crate::lora_linear::cpu::{dims, fresh};
use crate::profile;

/// Numbers in a chunk's rows of x and y together: 64 KiB, so that they and the intermediate results
/// stay in the second-level cache.
const CHUNK: usize = 16 * 1024;
/// Least and most rows of a chunk.
const CHUNK_ROWS: [usize; 2] = [8, 64];
/// Most tasks of a backward: each has sums as large as the factors.
const TASKS: usize = 32;

/// Which gradients to compute.
#[derive(Clone, Copy, Debug)]
pub struct Wanted {
    x: bool,
    w: bool,
    w1: bool,
    w2: bool,
}

/// The operation as a backend extension.
#[backend_extension(Flex, Autodiff)]
pub trait KronOps: Backend {
    /// `x · wᵀ + scale · x · kron(w1, w2)ᵀ`.
    fn enamel_kron(
        x: FloatTensor<Self>,
        w: FloatTensor<Self>,
        w1: FloatTensor<Self>,
        w2: FloatTensor<Self>,
        scale: f64,
        compute: Compute,
    ) -> FloatTensor<Self>;

    /// Gradients of x and w, and of w1 and w2; those not wanted are empty. x is read for those of w,
    /// w1 and w2 only, w for that of x.
    #[allow(clippy::type_complexity, clippy::too_many_arguments)]
    fn enamel_kron_backward(
        x: FloatTensor<Self>,
        w: FloatTensor<Self>,
        w1: FloatTensor<Self>,
        w2: FloatTensor<Self>,
        grad: FloatTensor<Self>,
        scale: f64,
        compute: Compute,
        wanted: Wanted,
    ) -> (
        FloatTensor<Self>,
        FloatTensor<Self>,
        FloatTensor<Self>,
        FloatTensor<Self>,
    );
}

pub(super) fn kron_linear(
    x: Tensor<2>,
    w: BaseWeight,
    w1: Tensor<2>,
    w2: Tensor<2>,
    scale: f64,
) -> Tensor<2> {
    Tensor::from_dispatch(<Dispatch as KronOps>::enamel_kron(
        x.into_dispatch(),
        w.values().into_dispatch(),
        w1.into_dispatch(),
        w2.into_dispatch(),
        scale,
        w.compute(),
    ))
}

/// The factors and their sizes; w2 transposed as well, because small products read their right
/// operand by rows.
struct Factors<'a> {
    w1: &'a [f32],
    w2: &'a [f32],
    w2t: Vec<f32>,
    l: usize,
    m: usize,
    k: usize,
    n: usize,
    scale: f32,
    level: Level,
}

impl<'a> Factors<'a> {
    /// Both went through [`dense`].
    fn new(w1: &'a FlexTensor, w2: &'a FlexTensor, scale: f64) -> Self {
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

    fn input(&self) -> usize {
        self.m * self.n
    }

    fn output(&self) -> usize {
        self.l * self.k
    }

    /// Operations of the adapter's products on a row.
    fn flops(&self) -> usize {
        let Self { l, m, k, n, .. } = *self;
        2 * (m * k * (n + l)).min(l * n * (m + k))
    }

    fn empty(&self) -> bool {
        self.input() * self.output() == 0
    }

    fn chunk_rows(&self) -> usize {
        (CHUNK / (self.input() + self.output())).clamp(CHUNK_ROWS[0], CHUNK_ROWS[1])
    }

    /// `X·w2ᵀ` before the product with w1: its cost is `mk·(n + l)` a row, the other order's
    /// `ln·(m + k)`.
    fn second_first(&self) -> bool {
        self.m * self.k * (self.n + self.l) <= self.l * self.n * (self.m + self.k)
    }

    /// Numbers of what lies between the two products of a row.
    fn between(&self) -> usize {
        if self.second_first() {
            self.m * self.k
        } else {
            self.l * self.n
        }
    }

    /// `dst = [dst +] scale · w1 · right` for each of `count` rows.
    fn left(&self, count: usize, dst: Target<'_>, into: Into, scale: f32, right: Operand<'_>) {
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
    fn left_transposed(
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
    fn pairs(&self, rows: usize, depth: usize) -> Sizes {
        Sizes {
            count: rows,
            rows: self.l,
            depth,
            cols: self.m,
        }
    }

    /// `y += scale · adapter(x)`, a chunk of rows.
    fn forward(&self, x: &[f32], y: &mut [f32], between: &mut [f32]) {
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
struct Sums<'a> {
    dx: &'a mut [f32],
    dw1: Vec<f32>,
    dw2: Vec<f32>,
}

/// A task's memory for the intermediate results of the backward and of the forward, used by one chunk
/// after the other.
struct Scratch {
    backward: Vec<f32>,
    forward: Vec<f32>,
}

impl Factors<'_> {
    /// Backward of a chunk with `X·w2ᵀ` first.
    fn backward_second_first(
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
    fn backward_first_first(
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
    fn backward(
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

/// The elements of a `[rows, cols]` matrix that `fill` sets.
fn matrix(rows: usize, cols: usize, fill: impl FnOnce(&mut MatMut<'_>)) -> Vec<f32> {
    let out = fresh(rows, cols, fill);
    // SAFETY: the callers' products set all of it.
    unsafe { out.into_vec() }
}

/// The elements of `x · wᵀ`.
fn base(x: MatRef<'_>, w: Weight<'_>, compute: Compute) -> Vec<f32> {
    matrix(x.rows(), w.out(), |y| {
        if x.rows() <= FEW_ROWS {
            return few_times_t(y, Into::Set, 1.0, x, w);
        }
        let x = Packed::of(x, 1.0, compute);
        times_t(y, Into::Set, &[(&x, w)]);
    })
}

impl KronOps for Flex {
    fn enamel_kron(
        x: FloatTensor<Self>,
        w: FloatTensor<Self>,
        w1: FloatTensor<Self>,
        w2: FloatTensor<Self>,
        scale: f64,
        compute: Compute,
    ) -> FloatTensor<Self> {
        let (x, w, w1, w2) = (dense(x), held(w), dense(w1), dense(w2));
        let (rows, out) = (dims(&x).0, dims(&w).0);
        let f = Factors::new(&w1, &w2, scale);
        let _timer = profile::op(
            "kron_linear",
            rows * (2 * f.input() * out + f.flops()),
            4 * (rows * (f.input() + out) + f.input() * out),
        );
        let mut y = base(MatRef::of(&x), Weight::of(&w), compute);
        let xs = values(&x);
        if rows > 0 && !f.empty() {
            assert!(
                xs.len() == rows * f.input() && out == f.output(),
                "the factors fit x and w"
            );
            let chunk = f.chunk_rows();
            let memory = || vec![0.0f32; chunk.min(rows) * f.between()];
            y.par_chunks_mut(chunk * out)
                .zip(xs.par_chunks(chunk * f.input()))
                .for_each_init(memory, |between, (y, x)| f.forward(x, y, between));
        }
        tensor(y, Shape::from(vec![rows, out]))
    }

    fn enamel_kron_backward(
        x: FloatTensor<Self>,
        w: FloatTensor<Self>,
        w1: FloatTensor<Self>,
        w2: FloatTensor<Self>,
        grad: FloatTensor<Self>,
        scale: f64,
        compute: Compute,
        wanted: Wanted,
    ) -> (
        FloatTensor<Self>,
        FloatTensor<Self>,
        FloatTensor<Self>,
        FloatTensor<Self>,
    ) {
        let (x, w, grad) = (dense(x), held(w), dense(grad));
        let (w1, w2) = (dense(w1), dense(w2));
        let f = Factors::new(&w1, &w2, scale);
        let (rows, out) = dims(&grad);
        let input = f.input();
        let large = usize::from(wanted.x) + usize::from(wanted.w);
        let small = usize::from(wanted.x) + usize::from(wanted.w1) + usize::from(wanted.w2);
        let _timer = profile::op(
            "kron_linear backward",
            rows * (2 * input * out * large + f.flops() * small),
            4 * (1 + large) * rows * (input + out),
        );
        let of = |wanted: bool, values: Vec<f32>, shape: [usize; 2]| {
            let shape = if wanted { shape } else { [0, 0] };
            tensor(values, Shape::from(shape.to_vec()))
        };
        let g = MatRef::of(&grad);
        let mut dx = match wanted.x {
            true => matrix(rows, input, |dx| {
                times(dx, Into::Set, &[(g, Weight::of(&w))], compute);
            }),
            false => Vec::new(),
        };
        let dw = match wanted.w {
            true => matrix(out, input, |dw| {
                outer(dw, Into::Set, 1.0, g, MatRef::of(&x));
            }),
            false => Vec::new(),
        };
        let (dw1, dw2) = if rows > 0 && !f.empty() && (wanted.x || wanted.w1 || wanted.w2) {
            f.backward(values(&x), values(&grad), &mut dx, wanted)
        } else {
            let zeros = |wanted: bool, n: usize| vec![0.0; if wanted { n } else { 0 }];
            (zeros(wanted.w1, f.w1.len()), zeros(wanted.w2, f.w2.len()))
        };
        (
            of(wanted.x, dx, [rows, input]),
            of(wanted.w, dw, [out, input]),
            of(wanted.w1, dw1, [f.l, f.m]),
            of(wanted.w2, dw2, [f.k, f.n]),
        )
    }
}

/// What the backward needs. The factors are small and their sizes always needed.
#[derive(Clone, Debug)]
struct KronState<B: Backend> {
    /// For the gradients of w, w1 and w2.
    x: Option<FloatTensor<B>>,
    /// For the gradient of x.
    w: Option<FloatTensor<B>>,
    w1: FloatTensor<B>,
    w2: FloatTensor<B>,
    scale: f64,
    compute: Compute,
}

#[derive(Debug)]
struct KronStep;

impl<B: KronOps> Backward<B, 4> for KronStep {
    type State = KronState<B>;

    fn backward(self, ops: Ops<Self::State, 4>, grads: &mut Gradients, _: &mut Checkpointer) {
        let grad = grads.consume::<B>(&ops.node);
        let [x_node, w_node, w1_node, w2_node] = ops.parents;
        let KronState {
            x,
            w,
            w1,
            w2,
            scale,
            compute,
        } = ops.state;
        let wanted = Wanted {
            x: x_node.is_some(),
            w: w_node.is_some(),
            w1: w1_node.is_some(),
            w2: w2_node.is_some(),
        };
        // What was not kept is not read: any tensor does in its place.
        let (x, w) = (
            x.unwrap_or_else(|| w1.clone()),
            w.unwrap_or_else(|| w1.clone()),
        );
        let (dx, dw, dw1, dw2) =
            B::enamel_kron_backward(x, w, w1, w2, grad, scale, compute, wanted);
        let pairs = [(x_node, dx), (w_node, dw), (w1_node, dw1), (w2_node, dw2)];
        for (node, gradient) in pairs {
            if let Some(node) = node {
                grads.register::<B>(node.id, gradient);
            }
        }
    }
}

impl<B: KronOps, C: CheckpointStrategy> KronOps for Autodiff<B, C> {
    fn enamel_kron(
        x: FloatTensor<Self>,
        w: FloatTensor<Self>,
        w1: FloatTensor<Self>,
        w2: FloatTensor<Self>,
        scale: f64,
        compute: Compute,
    ) -> FloatTensor<Self> {
        let [dx, dw, d1, d2] = [&x, &w, &w1, &w2].map(|t| t.is_tracked());
        let (x, x_node) = x.into_parts();
        let (w, w_node) = w.into_parts();
        let (w1, w1_node) = w1.into_parts();
        let (w2, w2_node) = w2.into_parts();
        let nodes = [x_node, w_node, w1_node, w2_node];
        match KronStep.prepare::<C>(nodes).compute_bound().stateful() {
            OpsKind::Tracked(prep) => {
                let state = KronState {
                    x: (dw || d1 || d2).then(|| x.clone()),
                    w: dx.then(|| w.clone()),
                    w1: w1.clone(),
                    w2: w2.clone(),
                    scale,
                    compute,
                };
                prep.finish(state, B::enamel_kron(x, w, w1, w2, scale, compute))
            }
            OpsKind::UnTracked(prep) => prep.finish(B::enamel_kron(x, w, w1, w2, scale, compute)),
        }
    }

    fn enamel_kron_backward(
        _: FloatTensor<Self>,
        _: FloatTensor<Self>,
        _: FloatTensor<Self>,
        _: FloatTensor<Self>,
        _: FloatTensor<Self>,
        _: f64,
        _: Compute,
        _: Wanted,
    ) -> (
        FloatTensor<Self>,
        FloatTensor<Self>,
        FloatTensor<Self>,
        FloatTensor<Self>,
    ) {
        unimplemented!("second-order gradients of kron_linear")
    }
}
