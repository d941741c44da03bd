//! Layer normalisation on Flex: one pass forward and one backward; x and two numbers a row are all that
//! is kept.

use std::mem::MaybeUninit;

use burn::backend::autodiff::Autodiff;
use burn::backend::autodiff::checkpoint::{base::Checkpointer, strategy::CheckpointStrategy};
use burn::backend::autodiff::grads::Gradients;
use burn::backend::autodiff::ops::{Backward, Ops, OpsKind};
use burn::backend::tensor::FloatTensor;
use burn::backend::{Backend, Dispatch, Flex, backend_extension};
use burn::tensor::{Shape, Tensor, TensorData};
use rayon::prelude::*;

use crate::cpu::simd::{LANES, fma, level, simd_fn, sum_lanes};
use crate::cpu::storage::{CHUNK, Fresh, dense, owned, tensor, values};
use crate::profile;

/// The operation as a backend extension. A bias of length 0 is none.
#[backend_extension(Flex, Autodiff)]
pub trait LayerNormOps: Backend {
    /// The normalised x.
    fn enamel_layer_norm(
        x: FloatTensor<Self>,
        weight: FloatTensor<Self>,
        bias: FloatTensor<Self>,
        eps: f64,
    ) -> FloatTensor<Self>;

    /// The normalised x, and of each row the mean and one over the deviation, `[rows, 2]`.
    fn enamel_layer_norm_with_rows(
        x: FloatTensor<Self>,
        weight: FloatTensor<Self>,
        bias: FloatTensor<Self>,
        eps: f64,
    ) -> (FloatTensor<Self>, FloatTensor<Self>);

    /// Gradients of x, weight and bias; the latter two are `[0]` unless wanted.
    fn enamel_layer_norm_backward(
        x: FloatTensor<Self>,
        weight: FloatTensor<Self>,
        rows: FloatTensor<Self>,
        grad: FloatTensor<Self>,
        want_weight: bool,
        want_bias: bool,
    ) -> (FloatTensor<Self>, FloatTensor<Self>, FloatTensor<Self>);
}

pub(super) fn layer_norm<const D: usize>(
    x: Tensor<D>,
    weight: Tensor<1>,
    bias: Option<Tensor<1>>,
    eps: f64,
) -> Tensor<D> {
    let bias = bias.unwrap_or_else(|| {
        Tensor::from_data(TensorData::new(Vec::<f32>::new(), [0]), &weight.device())
    });
    Tensor::from_dispatch(<Dispatch as LayerNormOps>::enamel_layer_norm(
        x.into_dispatch(),
        weight.into_dispatch(),
        bias.into_dispatch(),
        eps,
    ))
}

/// `Σ term(i)` for `i` below `n`, in lanes.
#[inline(always)]
fn sum(n: usize, term: impl Fn(usize) -> f32) -> f32 {
    let mut lanes = [0.0f32; LANES];
    let whole = n / LANES * LANES;
    for from in (0..whole).step_by(LANES) {
        for (i, lane) in lanes.iter_mut().enumerate() {
            *lane += term(from + i);
        }
    }
    for i in whole..n {
        lanes[i - whole] += term(i);
    }
    sum_lanes(lanes)
}

simd_fn! {
    /// Several rows: `y = (x − mean)·inverse·weight + bias`.
    fn forward<L>(
        x: &[f32],
        weight: &[f32],
        bias: &[f32],
        eps: f32,
        y: &mut [MaybeUninit<f32>],
        rows: &mut [MaybeUninit<f32>],
    ) {
        let n = weight.len();
        let each = x.chunks_exact(n).zip(y.chunks_exact_mut(n)).zip(rows.chunks_exact_mut(2));
        for ((x, y), row) in each {
            let mean = sum(n, |i| x[i]) / n as f32;
            let variance = sum(n, |i| (x[i] - mean) * (x[i] - mean)) / n as f32;
            let inverse = (variance + eps).sqrt().recip();
            row[0].write(mean);
            row[1].write(inverse);
            if bias.is_empty() {
                for ((y, x), w) in y.iter_mut().zip(x).zip(weight) {
                    y.write((x - mean) * inverse * w);
                }
            } else {
                for (((y, x), w), b) in y.iter_mut().zip(x).zip(weight).zip(bias) {
                    y.write(fma::<L>((x - mean) * inverse, *w, *b));
                }
            }
        }
    }
}

simd_fn! {
    /// Several rows: with `h = g·weight` and `n = (x − mean)·inverse`,
    /// `dx = inverse·(h − mean(h) − n·mean(h·n))` replaces g. `g·n` is added to `d_weight` and g to
    /// `d_bias` unless those are empty.
    fn backward<L>(
        x: &[f32],
        weight: &[f32],
        rows: &[f32],
        grad: &mut [f32],
        d_weight: &mut [f32],
        d_bias: &mut [f32],
    ) {
        let n = weight.len();
        let each = x.chunks_exact(n).zip(grad.chunks_exact_mut(n)).zip(rows.chunks_exact(2));
        for ((x, g), row) in each {
            let (mean, inverse) = (row[0], row[1]);
            for ((d, g), x) in d_weight.iter_mut().zip(&*g).zip(x) {
                *d = fma::<L>(*g, (x - mean) * inverse, *d);
            }
            for (d, g) in d_bias.iter_mut().zip(&*g) {
                *d += g;
            }
            for (g, w) in g.iter_mut().zip(weight) {
                *g *= w;
            }
            let (h, count) = (&*g, n as f32);
            let first = sum(n, |i| h[i]) / count;
            let second = sum(n, |i| h[i] * ((x[i] - mean) * inverse)) / count;
            for (g, x) in g.iter_mut().zip(x) {
                *g = inverse * fma::<L>((x - mean) * inverse, -second, *g - first);
            }
        }
    }
}

impl LayerNormOps for Flex {
    fn enamel_layer_norm(
        x: FloatTensor<Self>,
        weight: FloatTensor<Self>,
        bias: FloatTensor<Self>,
        eps: f64,
    ) -> FloatTensor<Self> {
        Self::enamel_layer_norm_with_rows(x, weight, bias, eps).0
    }

    fn enamel_layer_norm_with_rows(
        x: FloatTensor<Self>,
        weight: FloatTensor<Self>,
        bias: FloatTensor<Self>,
        eps: f64,
    ) -> (FloatTensor<Self>, FloatTensor<Self>) {
        let (x, weight, bias) = (dense(x), dense(weight), dense(bias));
        let (xs, ws, bs, level) = (values(&x), values(&weight), values(&bias), level());
        let _timer = profile::op("layer_norm", 8 * xs.len(), 8 * xs.len());
        let width = ws.len().max(1);
        let rows = xs.len() / width;
        let (mut y, mut kept) = (Fresh::new(xs.len()), Fresh::new(2 * rows));
        let task = (CHUNK / width).max(1);
        y.slots()
            .par_chunks_mut(task * width)
            .zip(kept.slots().par_chunks_mut(2 * task))
            .zip(xs.par_chunks(task * width))
            .for_each(|((y, kept), x)| forward(level, x, ws, bs, eps as f32, y, kept));
        // SAFETY: the chunks cover every row of both outputs.
        unsafe {
            (
                y.into_tensor(x.layout().shape().clone()),
                kept.into_tensor(Shape::from(vec![rows, 2])),
            )
        }
    }

    fn enamel_layer_norm_backward(
        x: FloatTensor<Self>,
        weight: FloatTensor<Self>,
        rows: FloatTensor<Self>,
        grad: FloatTensor<Self>,
        want_weight: bool,
        want_bias: bool,
    ) -> (FloatTensor<Self>, FloatTensor<Self>, FloatTensor<Self>) {
        let (x, weight, rows, mut grad) = (dense(x), dense(weight), dense(rows), owned(grad));
        let (xs, ws, kept, level) = (values(&x), values(&weight), values(&rows), level());
        let gs = grad.storage_mut::<f32>();
        let _timer = profile::op("layer_norm backward", 14 * xs.len(), 12 * xs.len());
        assert_eq!(xs.len(), gs.len(), "the gradient has x's shape");
        let width = ws.len().max(1);
        let task = (CHUNK / width).max(1);
        let length = |wanted: bool| if wanted { ws.len() } else { 0 };
        let sums = || {
            [
                vec![0.0f32; length(want_weight)],
                vec![0.0f32; length(want_bias)],
            ]
        };
        // One pair of partial sums a task, so that the order of summation does not depend on the threads.
        let partials: Vec<[Vec<f32>; 2]> = gs
            .par_chunks_mut(task * width)
            .zip(xs.par_chunks(task * width))
            .zip(kept.par_chunks(2 * task))
            .map(|((g, x), kept)| {
                let [mut d_weight, mut d_bias] = sums();
                backward(level, x, ws, kept, g, &mut d_weight, &mut d_bias);
                [d_weight, d_bias]
            })
            .collect();
        let mut totals = sums();
        for part in partials {
            for (total, part) in totals.iter_mut().zip(part) {
                total.iter_mut().zip(part).for_each(|(t, p)| *t += p);
            }
        }
        let [d_weight, d_bias] = totals.map(|total| {
            let shape = Shape::from(vec![total.len()]);
            tensor(total, shape)
        });
        (grad, d_weight, d_bias)
    }
}

#[derive(Debug)]
struct LayerNormStep;

impl<B: LayerNormOps> Backward<B, 3> for LayerNormStep {
    /// x, weight, mean and inverse deviation of each row.
    type State = (FloatTensor<B>, FloatTensor<B>, FloatTensor<B>);

    fn backward(self, ops: Ops<Self::State, 3>, grads: &mut Gradients, _: &mut Checkpointer) {
        let grad = grads.consume::<B>(&ops.node);
        let [x_node, weight_node, bias_node] = ops.parents;
        let (x, weight, rows) = ops.state;
        let (want_weight, want_bias) = (weight_node.is_some(), bias_node.is_some());
        let (dx, d_weight, d_bias) =
            B::enamel_layer_norm_backward(x, weight, rows, grad, want_weight, want_bias);
        let pairs = [(x_node, dx), (weight_node, d_weight), (bias_node, d_bias)];
        for (node, gradient) in pairs {
            if let Some(node) = node {
                grads.register::<B>(node.id, gradient);
            }
        }
    }
}

impl<B: LayerNormOps, C: CheckpointStrategy> LayerNormOps for Autodiff<B, C> {
    fn enamel_layer_norm(
        x: FloatTensor<Self>,
        weight: FloatTensor<Self>,
        bias: FloatTensor<Self>,
        eps: f64,
    ) -> FloatTensor<Self> {
        let (x, x_node) = x.into_parts();
        let (weight, weight_node) = weight.into_parts();
        let (bias, bias_node) = bias.into_parts();
        match LayerNormStep
            .prepare::<C>([x_node, weight_node, bias_node])
            .compute_bound()
            .stateful()
        {
            OpsKind::Tracked(prep) => {
                let (y, rows) =
                    B::enamel_layer_norm_with_rows(x.clone(), weight.clone(), bias, eps);
                prep.finish((x, weight, rows), y)
            }
            OpsKind::UnTracked(prep) => prep.finish(B::enamel_layer_norm(x, weight, bias, eps)),
        }
    }

    fn enamel_layer_norm_with_rows(
        _: FloatTensor<Self>,
        _: FloatTensor<Self>,
        _: FloatTensor<Self>,
        _: f64,
    ) -> (FloatTensor<Self>, FloatTensor<Self>) {
        unimplemented!("second-order gradients of layer_norm")
    }

    fn enamel_layer_norm_backward(
        _: FloatTensor<Self>,
        _: FloatTensor<Self>,
        _: FloatTensor<Self>,
        _: FloatTensor<Self>,
        _: bool,
        _: bool,
    ) -> (FloatTensor<Self>, FloatTensor<Self>, FloatTensor<Self>) {
        unimplemented!("second-order gradients of layer_norm")
    }
}
