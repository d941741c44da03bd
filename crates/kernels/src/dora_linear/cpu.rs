//! DoRA's linear map on Flex. The lengths need `w·aᵀ`, a product that reads all of w: a's rows go
//! through the base's product below those of x, so that w is read once. With `[x; a]` as its input the
//! LoRA map gives the output and `w·aᵀ + (s/2)·b·(a·aᵀ)` in one, of which a row's product with its b is
//! all that the length is made of.

use std::mem::MaybeUninit;

use burn::backend::autodiff::Autodiff;
use burn::backend::autodiff::checkpoint::{base::Checkpointer, strategy::CheckpointStrategy};
use burn::backend::autodiff::grads::Gradients;
use burn::backend::autodiff::ops::{Backward, Ops, OpsKind};
use burn::backend::flex::FlexTensor;
use burn::backend::tensor::FloatTensor;
use burn::backend::{Backend, Dispatch, Flex, backend_extension};
use burn::tensor::{Shape, Tensor};
use rayon::prelude::*;

use crate::cpu::gemm::{Compute, Packed, Weight, times_t};
use crate::cpu::half::held;
use crate::cpu::matrix::{Into, MatRef, dims, fresh};
use crate::cpu::simd::{fma, level, simd_fn};
use crate::cpu::storage::{CHUNK, Fresh, dense, owned, tensor, values};
use crate::lora_linear::cpu::{LinearOps, LoraState};
use crate::profile;

/// The operation as a backend extension.
#[backend_extension(Flex, Autodiff)]
pub trait DoraOps: LinearOps {
    /// `f ∘ (x · wᵀ + scale · (x · aᵀ) · bᵀ)`, `f = magnitude / ‖w + scale · b·a‖`.
    #[allow(clippy::too_many_arguments)]
    fn enamel_dora(
        x: FloatTensor<Self>,
        w: FloatTensor<Self>,
        a: FloatTensor<Self>,
        b: FloatTensor<Self>,
        magnitude: FloatTensor<Self>,
        base_squares: FloatTensor<Self>,
        scale: f64,
        compute: Compute,
    ) -> FloatTensor<Self>;

    /// [`Self::enamel_dora`], the same before the factor, `x · aᵀ`, and `[2, out]`: the factor and one
    /// over the length.
    #[allow(clippy::type_complexity, clippy::too_many_arguments)]
    fn enamel_dora_with_parts(
        x: FloatTensor<Self>,
        w: FloatTensor<Self>,
        a: FloatTensor<Self>,
        b: FloatTensor<Self>,
        magnitude: FloatTensor<Self>,
        base_squares: FloatTensor<Self>,
        scale: f64,
        compute: Compute,
    ) -> (
        FloatTensor<Self>,
        FloatTensor<Self>,
        FloatTensor<Self>,
        FloatTensor<Self>,
    );

    /// `f ∘ grad`.
    fn enamel_dora_scaled(grad: FloatTensor<Self>, lengths: FloatTensor<Self>)
    -> FloatTensor<Self>;

    /// `f ∘ grad` and the magnitude's gradient: the columns' sums of `grad ∘ plain`, over the length.
    fn enamel_dora_backward(
        grad: FloatTensor<Self>,
        plain: FloatTensor<Self>,
        lengths: FloatTensor<Self>,
    ) -> (FloatTensor<Self>, FloatTensor<Self>);
}

#[allow(clippy::too_many_arguments)]
pub(super) fn dora_linear(
    x: Tensor<2>,
    w: Tensor<2>,
    a: Tensor<2>,
    b: Tensor<2>,
    magnitude: Tensor<1>,
    base_squares: Tensor<1>,
    scale: f64,
    compute: Compute,
) -> Tensor<2> {
    Tensor::from_dispatch(<Dispatch as DoraOps>::enamel_dora(
        x.into_dispatch(),
        w.into_dispatch(),
        a.into_dispatch(),
        b.into_dispatch(),
        magnitude.into_dispatch(),
        base_squares.into_dispatch(),
        scale,
        compute,
    ))
}

/// Columns whose lengths one task computes.
const COLUMNS: usize = 1024;

simd_fn! {
    /// Factor and one over the length of the rows of w from `from` on; `across` has `out` columns and
    /// a row for each of a's. `factor` holds the magnitudes and `inverse` the base's squares.
    fn lengths<L>(
        across: &[f32],
        out: usize,
        b: &[f32],
        from: usize,
        twice: f32,
        factor: &mut [f32],
        inverse: &mut [f32],
    ) {
        let n = factor.len();
        let mut sums = [0.0f32; COLUMNS];
        let r = b.len() / n;
        for j in 0..r {
            let across = &across[j * out + from..j * out + from + n];
            for ((sum, across), b) in sums.iter_mut().zip(across).zip(b.chunks_exact(r)) {
                *sum = fma::<L>(*across, b[j], *sum);
            }
        }
        for ((sum, factor), inverse) in sums.iter().zip(factor).zip(inverse) {
            let square = fma::<L>(twice, *sum, *inverse);
            // Rounding may leave a row of zeros slightly below zero. A NaN stays one.
            let length = if square < 0.0 { 0.0 } else { square }.sqrt();
            *factor /= length;
            *inverse = 1.0 / length;
        }
    }
}

simd_fn! {
    /// `out = x · factor` for rows as long as the factor.
    fn scaled<L>(x: &[f32], factor: &[f32], out: &mut [MaybeUninit<f32>]) {
        let n = factor.len();
        for (x, out) in x.chunks_exact(n).zip(out.chunks_exact_mut(n)) {
            for ((x, f), out) in x.iter().zip(factor).zip(out) {
                out.write(x * f);
            }
        }
    }
}

simd_fn! {
    /// `x = x · factor` for rows as long as the factor.
    fn scale_in_place<L>(x: &mut [f32], factor: &[f32]) {
        for x in x.chunks_exact_mut(factor.len()) {
            for (x, f) in x.iter_mut().zip(factor) {
                *x *= f;
            }
        }
    }
}

simd_fn! {
    /// [`scale_in_place`] of the gradient, after `sums += grad · plain` by columns.
    fn backward<L>(grad: &mut [f32], plain: &[f32], factor: &[f32], sums: &mut [f32]) {
        let n = factor.len();
        for (g, plain) in grad.chunks_exact_mut(n).zip(plain.chunks_exact(n)) {
            for (((g, plain), f), sum) in g.iter_mut().zip(plain).zip(factor).zip(&mut *sums) {
                *sum = fma::<L>(*g, *plain, *sum);
                *g *= f;
            }
        }
    }
}

/// Elements of whole rows for one task.
fn piece(out: usize) -> usize {
    (CHUNK / out.max(1)).max(1) * out.max(1)
}

/// A fresh `[rows, cols]` matrix that is the sum of products with weights.
fn product(rows: usize, cols: usize, terms: &[(&Packed, Weight<'_>)]) -> Vec<f32> {
    let out = fresh(rows, cols, |dst| times_t(dst, Into::Set, terms));
    // SAFETY: the product has set all of it.
    unsafe { out.into_vec() }
}

/// The map before the factor, and what goes with it.
struct Parts {
    /// `[rows, out]`
    plain: Vec<f32>,
    /// `[rows, r]`
    low: Vec<f32>,
    /// The factor, then one over the length.
    lengths: Vec<f32>,
}

#[allow(clippy::too_many_arguments)]
fn parts(
    x: &FlexTensor,
    w: &FlexTensor,
    a: &FlexTensor,
    b: &FlexTensor,
    magnitude: &FlexTensor,
    base_squares: &FlexTensor,
    scale: f64,
    compute: Compute,
) -> Parts {
    let ((rows, input), (out, _), (r, _)) = (dims(x), dims(w), dims(a));
    let _timer = profile::op(
        "dora_linear",
        2 * (rows + r) * (input * (out + r) + r * out),
        4 * ((rows + r) * (input + out) + input * out),
    );
    // The rows of x, then those of a.
    let (xs, adapter) = (values(x), values(a));
    let all = Packed::new(rows + r, input, compute, |i, row| {
        let (from, i) = if i < rows {
            (xs, i)
        } else {
            (adapter, i - rows)
        };
        row.copy_from_slice(&from[i * input..(i + 1) * input]);
    });
    let mut low = product(rows + r, r, &[(&all, Weight::of(a))]);
    low[rows * r..].iter_mut().for_each(|x| *x *= 0.5);
    let scaled = Packed::of(MatRef::rows_of(&low, rows + r, r), scale as f32, compute);
    let terms = [(&all, Weight::of(w)), (&scaled, Weight::of(b))];
    let mut plain = product(rows + r, out, &terms);
    drop((all, scaled));
    let mut both = [values(magnitude), values(base_squares)].concat();
    let (factor, inverse) = both.split_at_mut(out);
    let (across, b, level) = (&plain[rows * out..], values(b), level());
    let twice = (2.0 * scale) as f32;
    factor
        .par_chunks_mut(COLUMNS)
        .zip(inverse.par_chunks_mut(COLUMNS))
        .enumerate()
        .for_each(|(i, (factor, inverse))| {
            let from = i * COLUMNS;
            let b = &b[from * r..(from + factor.len()) * r];
            lengths(level, across, out, b, from, twice, factor, inverse);
        });
    plain.truncate(rows * out);
    low.truncate(rows * r);
    Parts {
        plain,
        low,
        lengths: both,
    }
}

fn scale_rows(x: &mut [f32], factor: &[f32]) {
    let level = level();
    x.par_chunks_mut(piece(factor.len()))
        .for_each(|x| scale_in_place(level, x, factor));
}

impl DoraOps for Flex {
    fn enamel_dora(
        x: FloatTensor<Self>,
        w: FloatTensor<Self>,
        a: FloatTensor<Self>,
        b: FloatTensor<Self>,
        magnitude: FloatTensor<Self>,
        base_squares: FloatTensor<Self>,
        scale: f64,
        compute: Compute,
    ) -> FloatTensor<Self> {
        let (x, w, a, b) = (dense(x), held(w), dense(a), dense(b));
        let (magnitude, base_squares) = (dense(magnitude), dense(base_squares));
        let ((rows, _), (out, _)) = (dims(&x), dims(&w));
        let mut parts = parts(&x, &w, &a, &b, &magnitude, &base_squares, scale, compute);
        scale_rows(&mut parts.plain, &parts.lengths[..out]);
        tensor(parts.plain, Shape::from(vec![rows, out]))
    }

    fn enamel_dora_with_parts(
        x: FloatTensor<Self>,
        w: FloatTensor<Self>,
        a: FloatTensor<Self>,
        b: FloatTensor<Self>,
        magnitude: FloatTensor<Self>,
        base_squares: FloatTensor<Self>,
        scale: f64,
        compute: Compute,
    ) -> (
        FloatTensor<Self>,
        FloatTensor<Self>,
        FloatTensor<Self>,
        FloatTensor<Self>,
    ) {
        let (x, w, a, b) = (dense(x), held(w), dense(a), dense(b));
        let (magnitude, base_squares) = (dense(magnitude), dense(base_squares));
        let ((rows, _), (out, _), (r, _)) = (dims(&x), dims(&w), dims(&a));
        let parts = parts(&x, &w, &a, &b, &magnitude, &base_squares, scale, compute);
        let (factor, level) = (&parts.lengths[..out], level());
        let mut y = Fresh::new(rows * out);
        y.slots()
            .par_chunks_mut(piece(out))
            .zip(parts.plain.par_chunks(piece(out)))
            .for_each(|(y, plain)| scaled(level, plain, factor, y));
        let of = |values, shape: [usize; 2]| tensor(values, Shape::from(shape.to_vec()));
        (
            // SAFETY: the pieces cover the output.
            unsafe { y.into_tensor(Shape::from(vec![rows, out])) },
            of(parts.plain, [rows, out]),
            of(parts.low, [rows, r]),
            of(parts.lengths, [2, out]),
        )
    }

    fn enamel_dora_scaled(
        grad: FloatTensor<Self>,
        lengths: FloatTensor<Self>,
    ) -> FloatTensor<Self> {
        let (mut grad, out) = (owned(grad), dims(&lengths).1);
        let g = grad.storage_mut::<f32>();
        let _timer = profile::op("dora_linear backward", g.len(), 8 * g.len());
        scale_rows(g, &values(&lengths)[..out]);
        grad
    }

    fn enamel_dora_backward(
        grad: FloatTensor<Self>,
        plain: FloatTensor<Self>,
        lengths: FloatTensor<Self>,
    ) -> (FloatTensor<Self>, FloatTensor<Self>) {
        // In a training step this is the last handle of the gradient: no allocation.
        let (mut grad, plain, out) = (owned(grad), dense(plain), dims(&lengths).1);
        let (factor, inverse) = values(&lengths).split_at(out);
        let (g, plain, level) = (grad.storage_mut::<f32>(), values(&plain), level());
        let _timer = profile::op("dora_linear backward", 3 * g.len(), 12 * g.len());
        assert_eq!(
            g.len(),
            plain.len(),
            "gradient and output have the same shape"
        );
        // As many sums as the shape says, so that they do not depend on the number of threads.
        let partial: Vec<Vec<f32>> = g
            .par_chunks_mut(piece(out))
            .zip(plain.par_chunks(piece(out)))
            .map(|(g, plain)| {
                let mut sums = vec![0.0f32; out];
                backward(level, g, plain, factor, &mut sums);
                sums
            })
            .collect();
        let mut sums = vec![0.0f32; out];
        for part in partial {
            sums.iter_mut().zip(part).for_each(|(s, p)| *s += p);
        }
        sums.iter_mut().zip(inverse).for_each(|(s, i)| *s *= i);
        (grad, tensor(sums, Shape::from(vec![out])))
    }
}

/// What the backward needs, each only if some tracked parent's gradient uses it.
#[derive(Clone, Debug)]
struct DoraState<B: Backend> {
    lora: LoraState<B>,
    /// The output before the factor, for the gradient of the magnitude.
    plain: Option<FloatTensor<B>>,
    /// The factor and one over the length.
    lengths: FloatTensor<B>,
}

#[derive(Debug)]
struct DoraStep;

impl<B: DoraOps> Backward<B, 5> for DoraStep {
    type State = DoraState<B>;

    fn backward(self, ops: Ops<Self::State, 5>, grads: &mut Gradients, _: &mut Checkpointer) {
        let grad = grads.consume::<B>(&ops.node);
        let [x_node, w_node, a_node, b_node, m_node] = ops.parents;
        let DoraState {
            lora,
            plain,
            lengths,
        } = ops.state;
        let grad = match (m_node, plain) {
            (Some(node), Some(plain)) => {
                let (grad, magnitude) = B::enamel_dora_backward(grad, plain, lengths);
                grads.register::<B>(node.id, magnitude);
                grad
            }
            _ => B::enamel_dora_scaled(grad, lengths),
        };
        let nodes = [x_node, w_node, a_node, b_node].map(|node| node.map(|n| n.id));
        lora.backward(grad, nodes, grads);
    }
}

impl<B: DoraOps, C: CheckpointStrategy> DoraOps for Autodiff<B, C> {
    fn enamel_dora(
        x: FloatTensor<Self>,
        w: FloatTensor<Self>,
        a: FloatTensor<Self>,
        b: FloatTensor<Self>,
        magnitude: FloatTensor<Self>,
        base_squares: FloatTensor<Self>,
        scale: f64,
        compute: Compute,
    ) -> FloatTensor<Self> {
        let [dx, dw, da, db, dm] = [&x, &w, &a, &b, &magnitude].map(|t| t.is_tracked());
        let (x, x_node) = x.into_parts();
        let (w, w_node) = w.into_parts();
        let (a, a_node) = a.into_parts();
        let (b, b_node) = b.into_parts();
        let (magnitude, m_node) = magnitude.into_parts();
        let (squares, _) = base_squares.into_parts();
        let nodes = [x_node, w_node, a_node, b_node, m_node];
        match DoraStep.prepare::<C>(nodes).compute_bound().stateful() {
            OpsKind::Tracked(prep) => {
                let mut lora = LoraState {
                    x: (da || dw).then(|| x.clone()),
                    w: dx.then(|| w.clone()),
                    a: dx.then(|| a.clone()),
                    b: (da || dx).then(|| b.clone()),
                    low: None,
                    scale,
                    compute,
                };
                let (y, plain, low, lengths) =
                    B::enamel_dora_with_parts(x, w, a, b, magnitude, squares, scale, compute);
                lora.low = db.then_some(low);
                let state = DoraState {
                    lora,
                    plain: dm.then_some(plain),
                    lengths,
                };
                prep.finish(state, y)
            }
            OpsKind::UnTracked(prep) => prep.finish(B::enamel_dora(
                x, w, a, b, magnitude, squares, scale, compute,
            )),
        }
    }

    fn enamel_dora_with_parts(
        _: FloatTensor<Self>,
        _: FloatTensor<Self>,
        _: FloatTensor<Self>,
        _: FloatTensor<Self>,
        _: FloatTensor<Self>,
        _: FloatTensor<Self>,
        _: f64,
        _: Compute,
    ) -> (
        FloatTensor<Self>,
        FloatTensor<Self>,
        FloatTensor<Self>,
        FloatTensor<Self>,
    ) {
        unimplemented!("second-order gradients of dora_linear")
    }

    fn enamel_dora_scaled(_: FloatTensor<Self>, _: FloatTensor<Self>) -> FloatTensor<Self> {
        unimplemented!("second-order gradients of dora_linear")
    }

    fn enamel_dora_backward(
        _: FloatTensor<Self>,
        _: FloatTensor<Self>,
        _: FloatTensor<Self>,
    ) -> (FloatTensor<Self>, FloatTensor<Self>) {
        unimplemented!("second-order gradients of dora_linear")
    }
}
