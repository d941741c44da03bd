//! RMSNorm on Flex: one pass forward and one backward; x and `1/rms` are all that is kept.

use std::mem::MaybeUninit;

use burn::backend::autodiff::Autodiff;
use burn::backend::autodiff::checkpoint::{base::Checkpointer, strategy::CheckpointStrategy};
use burn::backend::autodiff::grads::Gradients;
use burn::backend::autodiff::ops::{Backward, Ops, OpsKind};
use burn::backend::tensor::FloatTensor;
use burn::backend::{Backend, Dispatch, Flex, backend_extension};
use burn::tensor::{Shape, Tensor};
use rayon::prelude::*;

use crate::cpu::simd::{dot, fma, level, simd_fn};
use crate::cpu::storage::{CHUNK, Fresh, dense, owned, tensor, values};
use crate::profile;

/// The operation as a backend extension.
#[backend_extension(Flex, Autodiff)]
pub trait RmsNormOps: Backend {
    /// The normalised x, and `1/rms` of each row.
    fn enamel_rms_norm(
        x: FloatTensor<Self>,
        weight: FloatTensor<Self>,
        eps: f64,
    ) -> (FloatTensor<Self>, FloatTensor<Self>);

    /// Gradients of x and weight; the latter is `[0]` unless wanted.
    fn enamel_rms_norm_backward(
        x: FloatTensor<Self>,
        weight: FloatTensor<Self>,
        inverse: FloatTensor<Self>,
        grad: FloatTensor<Self>,
        want_weight: bool,
    ) -> (FloatTensor<Self>, FloatTensor<Self>);

    /// The normalised x.
    fn enamel_rms_norm_only(
        x: FloatTensor<Self>,
        weight: FloatTensor<Self>,
        eps: f64,
    ) -> FloatTensor<Self>;
}

pub(super) fn rms_norm<const D: usize>(x: Tensor<D>, weight: Tensor<1>, eps: f64) -> Tensor<D> {
    Tensor::from_dispatch(<Dispatch as RmsNormOps>::enamel_rms_norm_only(
        x.into_dispatch(),
        weight.into_dispatch(),
        eps,
    ))
}

simd_fn! {
    /// Several rows: `y = x·inverse·weight` with `inverse = 1/sqrt(mean(x²) + eps)`.
    fn forward<L>(
        x: &[f32],
        weight: &[f32],
        eps: f32,
        y: &mut [MaybeUninit<f32>],
        inverse: &mut [MaybeUninit<f32>],
    ) {
        let width = weight.len();
        let rows = x.chunks_exact(width).zip(y.chunks_exact_mut(width)).zip(inverse);
        for ((x, y), inverse) in rows {
            let inv = (dot::<L>(x, x) / width as f32 + eps).sqrt().recip();
            inverse.write(inv);
            for ((y, x), w) in y.iter_mut().zip(x).zip(weight) {
                y.write(x * inv * w);
            }
        }
    }
}

simd_fn! {
    /// Several rows: with `h = g·weight`, `dx = inverse·h − x·inverse³·mean(h·x)` replaces g, and
    /// `g·x·inverse` is added to `d_weight` unless that is empty.
    pub(crate) fn backward<L>(
        x: &[f32],
        weight: &[f32],
        inverse: &[f32],
        grad: &mut [f32],
        d_weight: &mut [f32],
    ) {
        let width = weight.len();
        let rows = x.chunks_exact(width).zip(grad.chunks_exact_mut(width)).zip(inverse);
        for ((x, g), inv) in rows {
            for ((d, g), x) in d_weight.iter_mut().zip(&*g).zip(x) {
                *d = fma::<L>(*g, x * inv, *d);
            }
            for (g, w) in g.iter_mut().zip(weight) {
                *g *= w;
            }
            let c = -dot::<L>(g, x) / width as f32 * inv * inv * inv;
            for (g, x) in g.iter_mut().zip(x) {
                *g = fma::<L>(*x, c, *g * inv);
            }
        }
    }
}

impl RmsNormOps for Flex {
    fn enamel_rms_norm(
        x: FloatTensor<Self>,
        weight: FloatTensor<Self>,
        eps: f64,
    ) -> (FloatTensor<Self>, FloatTensor<Self>) {
        let (x, weight) = (dense(x), dense(weight));
        let (xs, ws, level) = (values(&x), values(&weight), level());
        let _timer = profile::op("rms_norm", 4 * xs.len(), 8 * xs.len());
        let width = ws.len().max(1);
        let shape = x.layout().shape().clone();
        assert_eq!(
            shape.last().copied(),
            Some(ws.len()),
            "the weight is as long as the last axis"
        );
        let rows = xs.len() / width;
        let (mut y, mut inverse) = (Fresh::new(xs.len()), Fresh::new(rows));
        let task = (CHUNK / width).max(1);
        if rows <= task {
            forward(level, xs, ws, eps as f32, y.slots(), inverse.slots());
        } else {
            y.slots()
                .par_chunks_mut(task * width)
                .zip(inverse.slots().par_chunks_mut(task))
                .zip(xs.par_chunks(task * width))
                .for_each(|((y, inv), x)| forward(level, x, ws, eps as f32, y, inv));
        }
        // SAFETY: the chunks cover every row of both outputs.
        unsafe {
            (
                y.into_tensor(shape),
                inverse.into_tensor(Shape::from(vec![rows])),
            )
        }
    }

    fn enamel_rms_norm_backward(
        x: FloatTensor<Self>,
        weight: FloatTensor<Self>,
        inverse: FloatTensor<Self>,
        grad: FloatTensor<Self>,
        want_weight: bool,
    ) -> (FloatTensor<Self>, FloatTensor<Self>) {
        let (x, weight, inverse, mut grad) = (dense(x), dense(weight), dense(inverse), owned(grad));
        let (xs, ws, inv, level) = (values(&x), values(&weight), values(&inverse), level());
        let gs = grad.storage_mut::<f32>();
        let _timer = profile::op("rms_norm backward", 8 * xs.len(), 12 * xs.len());
        assert_eq!(xs.len(), gs.len(), "the gradient has x's shape");
        let width = ws.len().max(1);
        let task = (CHUNK / width).max(1);
        // One partial sum a task, so that the order of summation does not depend on the threads.
        let partial = if want_weight { ws.len() } else { 0 };
        let partials: Vec<Vec<f32>> = gs
            .par_chunks_mut(task * width)
            .zip(xs.par_chunks(task * width))
            .zip(inv.par_chunks(task))
            .map(|((g, x), inv)| {
                let mut d_weight = vec![0.0; partial];
                backward(level, x, ws, inv, g, &mut d_weight);
                d_weight
            })
            .collect();
        let mut d_weight = vec![0.0f32; partial];
        for part in partials {
            d_weight.iter_mut().zip(part).for_each(|(d, p)| *d += p);
        }
        (grad, tensor(d_weight, Shape::from(vec![partial])))
    }

    fn enamel_rms_norm_only(
        x: FloatTensor<Self>,
        weight: FloatTensor<Self>,
        eps: f64,
    ) -> FloatTensor<Self> {
        Self::enamel_rms_norm(x, weight, eps).0
    }
}

#[derive(Debug)]
struct RmsNormStep;

impl<B: RmsNormOps> Backward<B, 2> for RmsNormStep {
    /// x, weight, 1/rms.
    type State = (FloatTensor<B>, FloatTensor<B>, FloatTensor<B>);

    fn backward(self, ops: Ops<Self::State, 2>, grads: &mut Gradients, _: &mut Checkpointer) {
        let grad = grads.consume::<B>(&ops.node);
        let [x_node, weight_node] = ops.parents;
        let (x, weight, inverse) = ops.state;
        let want_weight = weight_node.is_some();
        let (dx, d_weight) = B::enamel_rms_norm_backward(x, weight, inverse, grad, want_weight);
        if let Some(node) = x_node {
            grads.register::<B>(node.id, dx);
        }
        if let Some(node) = weight_node {
            grads.register::<B>(node.id, d_weight);
        }
    }
}

impl<B: RmsNormOps, C: CheckpointStrategy> RmsNormOps for Autodiff<B, C> {
    fn enamel_rms_norm_only(
        x: FloatTensor<Self>,
        weight: FloatTensor<Self>,
        eps: f64,
    ) -> FloatTensor<Self> {
        let (x, x_node) = x.into_parts();
        let (weight, weight_node) = weight.into_parts();
        match RmsNormStep
            .prepare::<C>([x_node, weight_node])
            .compute_bound()
            .stateful()
        {
            OpsKind::Tracked(prep) => {
                let (y, inverse) = B::enamel_rms_norm(x.clone(), weight.clone(), eps);
                prep.finish((x, weight, inverse), y)
            }
            OpsKind::UnTracked(prep) => prep.finish(B::enamel_rms_norm_only(x, weight, eps)),
        }
    }

    fn enamel_rms_norm(
        _: FloatTensor<Self>,
        _: FloatTensor<Self>,
        _: f64,
    ) -> (FloatTensor<Self>, FloatTensor<Self>) {
        unimplemented!("second-order gradients of rms_norm")
    }

    fn enamel_rms_norm_backward(
        _: FloatTensor<Self>,
        _: FloatTensor<Self>,
        _: FloatTensor<Self>,
        _: FloatTensor<Self>,
        _: bool,
    ) -> (FloatTensor<Self>, FloatTensor<Self>) {
        unimplemented!("second-order gradients of rms_norm")
    }
}
