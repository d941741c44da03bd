//! Residual sum and RMSNorm on Flex.
//!
//! A node of Burn's graph has one output, and the backward wants both gradients at once. So there are three
//! nodes: one that has the inputs as parents, and below it one for each output. The two do no more than
//! leave their gradient in a place that all three share; the first runs after both, whichever of them were
//! used, and takes what is there.

use std::mem::MaybeUninit;
use std::sync::{Arc, Mutex, PoisonError};

use burn::backend::autodiff::Autodiff;
use burn::backend::autodiff::checkpoint::{base::Checkpointer, strategy::CheckpointStrategy};
use burn::backend::autodiff::grads::Gradients;
use burn::backend::autodiff::ops::{Backward, Ops, OpsKind};
use burn::backend::flex::FlexTensor;
use burn::backend::tensor::FloatTensor;
use burn::backend::{Backend, Dispatch, Flex, backend_extension};
use burn::tensor::{Shape, Tensor};
use rayon::prelude::*;

use crate::cpu::simd::{dot, fma, level, simd_fn};
use crate::cpu::storage::{CHUNK, Fresh, dense, owned, tensor, values};
use crate::profile;

/// The operation as a backend extension.
#[backend_extension(Flex, Autodiff)]
pub trait AddRmsNormOps: Backend {
    /// The sum and the normalised sum.
    fn enamel_add_rms_norm(
        x: FloatTensor<Self>,
        branch: FloatTensor<Self>,
        weight: FloatTensor<Self>,
        eps: f64,
    ) -> (FloatTensor<Self>, FloatTensor<Self>);

    /// The same, and `1/rms` of each row.
    fn enamel_add_rms_norm_with_rows(
        x: FloatTensor<Self>,
        branch: FloatTensor<Self>,
        weight: FloatTensor<Self>,
        eps: f64,
    ) -> (FloatTensor<Self>, FloatTensor<Self>, FloatTensor<Self>);

    /// Gradient of either addend and of the weight (`[0]` unless wanted) for that of the normalised
    /// tensor, and of the sum if `with_sum` (`grad_sum` is not read otherwise).
    fn enamel_add_rms_norm_backward(
        sum: FloatTensor<Self>,
        weight: FloatTensor<Self>,
        inverse: FloatTensor<Self>,
        grad: FloatTensor<Self>,
        grad_sum: FloatTensor<Self>,
        with_sum: bool,
        want_weight: bool,
    ) -> (FloatTensor<Self>, FloatTensor<Self>);

    /// Zeros in the shape of a tensor.
    fn enamel_zeros_like(like: FloatTensor<Self>) -> FloatTensor<Self>;
}

pub(super) fn add_rms_norm<const D: usize>(
    x: Tensor<D>,
    branch: Tensor<D>,
    weight: Tensor<1>,
    eps: f64,
) -> (Tensor<D>, Tensor<D>) {
    let (sum, y) = <Dispatch as AddRmsNormOps>::enamel_add_rms_norm(
        x.into_dispatch(),
        branch.into_dispatch(),
        weight.into_dispatch(),
        eps,
    );
    (Tensor::from_dispatch(sum), Tensor::from_dispatch(y))
}

simd_fn! {
    /// Several rows: the other addend is added to `sum`, then `y = sum·inverse·weight`.
    fn forward<L>(
        sum: &mut [f32],
        other: &[f32],
        weight: &[f32],
        eps: f32,
        y: &mut [MaybeUninit<f32>],
        inverse: &mut [MaybeUninit<f32>],
    ) {
        let n = weight.len();
        let inputs = sum.chunks_exact_mut(n).zip(other.chunks_exact(n));
        for (((sum, other), y), inverse) in inputs.zip(y.chunks_exact_mut(n)).zip(inverse) {
            for (s, o) in sum.iter_mut().zip(other) {
                *s += o;
            }
            let inv = (dot::<L>(sum, sum) / n as f32 + eps).sqrt().recip();
            inverse.write(inv);
            for ((y, s), w) in y.iter_mut().zip(&*sum).zip(weight) {
                y.write(s * inv * w);
            }
        }
    }
}

simd_fn! {
    /// Several rows: with `h = g·weight`, `inverse·h − sum·inverse³·mean(h·sum)` and the sum's own gradient,
    /// unless that is empty, replace g; `g·sum·inverse` is added to `d_weight` unless that is empty.
    fn backward<L>(
        sum: &[f32],
        weight: &[f32],
        inverse: &[f32],
        grad: &mut [f32],
        grad_sum: &[f32],
        d_weight: &mut [f32],
    ) {
        let n = weight.len();
        let each = sum.chunks_exact(n).zip(grad.chunks_exact_mut(n)).zip(inverse);
        for (i, ((sum, g), inv)) in each.enumerate() {
            for ((d, g), s) in d_weight.iter_mut().zip(&*g).zip(sum) {
                *d = fma::<L>(*g, s * inv, *d);
            }
            for (g, w) in g.iter_mut().zip(weight) {
                *g *= w;
            }
            let c = -dot::<L>(g, sum) / n as f32 * inv * inv * inv;
            if grad_sum.is_empty() {
                for (g, s) in g.iter_mut().zip(sum) {
                    *g = fma::<L>(*s, c, *g * inv);
                }
            } else {
                let own = &grad_sum[i * n..][..n];
                for ((g, s), own) in g.iter_mut().zip(sum).zip(own) {
                    *g = fma::<L>(*s, c, fma::<L>(*g, *inv, *own));
                }
            }
        }
    }
}

/// The addend whose memory becomes the sum's, and the other one.
fn in_place(x: FlexTensor, branch: FlexTensor) -> (FlexTensor, FlexTensor) {
    let free = |t: &FlexTensor| {
        let whole = t.layout().is_contiguous() && t.layout().start_offset() == 0;
        t.is_unique() && whole
    };
    if !free(&branch) && free(&x) {
        (x, dense(branch))
    } else {
        (branch, dense(x))
    }
}

impl AddRmsNormOps for Flex {
    fn enamel_add_rms_norm(
        x: FloatTensor<Self>,
        branch: FloatTensor<Self>,
        weight: FloatTensor<Self>,
        eps: f64,
    ) -> (FloatTensor<Self>, FloatTensor<Self>) {
        let (sum, y, _) = Self::enamel_add_rms_norm_with_rows(x, branch, weight, eps);
        (sum, y)
    }

    fn enamel_add_rms_norm_with_rows(
        x: FloatTensor<Self>,
        branch: FloatTensor<Self>,
        weight: FloatTensor<Self>,
        eps: f64,
    ) -> (FloatTensor<Self>, FloatTensor<Self>, FloatTensor<Self>) {
        let (sum, other) = in_place(x, branch);
        let (mut sum, weight) = (owned(sum), dense(weight));
        let shape = sum.layout().shape().clone();
        let (ss, os, ws) = (sum.storage_mut::<f32>(), values(&other), values(&weight));
        let _timer = profile::op("add_rms_norm", 5 * ss.len(), 16 * ss.len());
        assert_eq!(ss.len(), os.len(), "the addends have the same shape");
        let (width, level) = (ws.len().max(1), level());
        let rows = ss.len() / width;
        let (mut y, mut inverse) = (Fresh::new(ss.len()), Fresh::new(rows));
        let task = (CHUNK / width).max(1);
        ss.par_chunks_mut(task * width)
            .zip(os.par_chunks(task * width))
            .zip(y.slots().par_chunks_mut(task * width))
            .zip(inverse.slots().par_chunks_mut(task))
            .for_each(|(((s, o), y), inv)| forward(level, s, o, ws, eps as f32, y, inv));
        // SAFETY: the chunks cover every row of both.
        let (y, inverse) = unsafe {
            (
                y.into_tensor(shape),
                inverse.into_tensor(Shape::from(vec![rows])),
            )
        };
        (sum, y, inverse)
    }

    fn enamel_add_rms_norm_backward(
        sum: FloatTensor<Self>,
        weight: FloatTensor<Self>,
        inverse: FloatTensor<Self>,
        grad: FloatTensor<Self>,
        grad_sum: FloatTensor<Self>,
        with_sum: bool,
        want_weight: bool,
    ) -> (FloatTensor<Self>, FloatTensor<Self>) {
        let (sum, weight, inverse) = (dense(sum), dense(weight), dense(inverse));
        let (mut grad, grad_sum) = (owned(grad), dense(grad_sum));
        let (ss, ws, inv) = (values(&sum), values(&weight), values(&inverse));
        let own = if with_sum { values(&grad_sum) } else { &[] };
        let (gs, level) = (grad.storage_mut::<f32>(), level());
        let _timer = profile::op(
            "add_rms_norm backward",
            8 * ss.len(),
            12 * ss.len() + 4 * own.len(),
        );
        assert!(
            ss.len() == gs.len() && (own.is_empty() || own.len() == gs.len()),
            "the gradients have the sum's shape"
        );
        let width = ws.len().max(1);
        let task = (CHUNK / width).max(1);
        let partial = if want_weight { ws.len() } else { 0 };
        // One partial sum a task, so that the order of summation does not depend on the threads.
        let partials: Vec<Vec<f32>> = gs
            .par_chunks_mut(task * width)
            .zip(ss.par_chunks(task * width))
            .zip(inv.par_chunks(task))
            .enumerate()
            .map(|(i, ((g, s), inv))| {
                let own = match own {
                    [] => own,
                    own => &own[i * task * width..][..g.len()],
                };
                let mut d_weight = vec![0.0; partial];
                backward(level, s, ws, inv, g, own, &mut d_weight);
                d_weight
            })
            .collect();
        let mut d_weight = vec![0.0f32; partial];
        for part in partials {
            d_weight.iter_mut().zip(part).for_each(|(d, p)| *d += p);
        }
        (grad, tensor(d_weight, Shape::from(vec![partial])))
    }

    fn enamel_zeros_like(like: FloatTensor<Self>) -> FloatTensor<Self> {
        let shape = like.layout().shape().clone();
        tensor(vec![0.0; shape.num_elements()], shape)
    }
}

/// Where the outputs leave their gradients.
#[derive(Debug)]
struct Arrived<B: Backend> {
    sum: Option<FloatTensor<B>>,
    normalised: Option<FloatTensor<B>>,
}

type Place<B> = Arc<Mutex<Arrived<B>>>;

/// The node of an output; the flag says whether it is that of the sum.
#[derive(Debug)]
struct OutputStep;

impl<B: AddRmsNormOps> Backward<B, 1> for OutputStep {
    type State = (Place<B>, bool);

    fn backward(self, ops: Ops<Self::State, 1>, grads: &mut Gradients, _: &mut Checkpointer) {
        let grad = grads.consume::<B>(&ops.node);
        let (place, is_sum) = ops.state;
        let mut arrived = place.lock().unwrap_or_else(PoisonError::into_inner);
        if is_sum {
            arrived.sum = Some(grad);
        } else {
            arrived.normalised = Some(grad);
        }
    }
}

/// What the backward of the inputs' node needs.
#[derive(Clone, Debug)]
struct InputsState<B: Backend> {
    place: Place<B>,
    sum: FloatTensor<B>,
    weight: FloatTensor<B>,
    /// `1/rms` of each row.
    inverse: FloatTensor<B>,
}

#[derive(Debug)]
struct InputsStep;

impl<B: AddRmsNormOps> Backward<B, 3> for InputsStep {
    type State = InputsState<B>;

    fn backward(self, ops: Ops<Self::State, 3>, grads: &mut Gradients, _: &mut Checkpointer) {
        let [x_node, branch_node, weight_node] = ops.parents;
        let InputsState {
            place,
            sum,
            weight,
            inverse,
        } = ops.state;
        let (of_sum, of_normalised) = {
            let mut arrived = place.lock().unwrap_or_else(PoisonError::into_inner);
            (arrived.sum.take(), arrived.normalised.take())
        };
        let (with_sum, with_normalised) = (of_sum.is_some(), of_normalised.is_some());
        let grad = match (of_sum, of_normalised) {
            (None, None) => return,
            (Some(grad), None) => grad,
            (of_sum, Some(grad)) => {
                // What did not come is not read: any tensor does in its place.
                let of_sum = of_sum.unwrap_or_else(|| inverse.clone());
                let (grad, d_weight) = B::enamel_add_rms_norm_backward(
                    sum,
                    weight.clone(),
                    inverse,
                    grad,
                    of_sum,
                    with_sum,
                    weight_node.is_some(),
                );
                if let Some(node) = &weight_node {
                    grads.register::<B>(node.id, d_weight);
                }
                grad
            }
        };
        // A parent's own backward counts on a gradient, even one of zeros.
        if let (Some(node), false) = (weight_node, with_normalised) {
            grads.register::<B>(node.id, B::enamel_zeros_like(weight));
        }
        if let Some(node) = x_node {
            grads.register::<B>(node.id, grad.clone());
        }
        if let Some(node) = branch_node {
            grads.register::<B>(node.id, grad);
        }
    }
}

impl<B: AddRmsNormOps, C: CheckpointStrategy> AddRmsNormOps for Autodiff<B, C> {
    fn enamel_add_rms_norm(
        x: FloatTensor<Self>,
        branch: FloatTensor<Self>,
        weight: FloatTensor<Self>,
        eps: f64,
    ) -> (FloatTensor<Self>, FloatTensor<Self>) {
        let (x, x_node) = x.into_parts();
        let (branch, branch_node) = branch.into_parts();
        let (weight, weight_node) = weight.into_parts();
        match InputsStep
            .prepare::<C>([x_node, branch_node, weight_node])
            .compute_bound()
            .stateful()
        {
            OpsKind::Tracked(prep) => {
                let (sum, y, inverse) =
                    B::enamel_add_rms_norm_with_rows(x, branch, weight.clone(), eps);
                let place = Arc::new(Mutex::new(Arrived {
                    sum: None,
                    normalised: None,
                }));
                let state = InputsState {
                    place: place.clone(),
                    sum: sum.clone(),
                    weight,
                    inverse,
                };
                let inputs = prep.finish(state, sum.clone());
                let output = |value, is_sum| match OutputStep
                    .prepare::<C>([inputs.node()])
                    .compute_bound()
                    .stateful()
                {
                    OpsKind::Tracked(prep) => prep.finish((place.clone(), is_sum), value),
                    OpsKind::UnTracked(prep) => prep.finish(value),
                };
                (output(sum, true), output(y, false))
            }
            OpsKind::UnTracked(prep) => {
                let (sum, y) = B::enamel_add_rms_norm(x, branch, weight, eps);
                let sum = prep.finish(sum);
                (sum, <Self as burn::backend::AutodiffBackend>::from_inner(y))
            }
        }
    }

    fn enamel_add_rms_norm_with_rows(
        _: FloatTensor<Self>,
        _: FloatTensor<Self>,
        _: FloatTensor<Self>,
        _: f64,
    ) -> (FloatTensor<Self>, FloatTensor<Self>, FloatTensor<Self>) {
        unimplemented!("second-order gradients of add_rms_norm")
    }

    fn enamel_add_rms_norm_backward(
        _: FloatTensor<Self>,
        _: FloatTensor<Self>,
        _: FloatTensor<Self>,
        _: FloatTensor<Self>,
        _: FloatTensor<Self>,
        _: bool,
        _: bool,
    ) -> (FloatTensor<Self>, FloatTensor<Self>) {
        unimplemented!("second-order gradients of add_rms_norm")
    }

    fn enamel_zeros_like(_: FloatTensor<Self>) -> FloatTensor<Self> {
        unimplemented!("second-order gradients of add_rms_norm")
    }
}
