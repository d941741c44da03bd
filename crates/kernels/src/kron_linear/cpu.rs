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
use burn::backend::tensor::FloatTensor;
use burn::backend::{Backend, Dispatch, Flex, backend_extension};
use burn::tensor::{Shape, Tensor};
use rayon::prelude::*;

use super::factors::Factors;
use crate::cpu::gemm::{Compute, Packed, Weight, outer, times, times_t};
use crate::cpu::half::held;
use crate::cpu::matrix::{Into, MatMut, MatRef, dims, fresh};
use crate::cpu::storage::{dense, tensor, values};
use crate::profile;

/// Which gradients to compute.
#[derive(Clone, Copy, Debug)]
pub struct Wanted {
    pub(super) x: bool,
    pub(super) w: bool,
    pub(super) w1: bool,
    pub(super) w2: bool,
}

/// The operation as a backend extension.
#[backend_extension(Flex, Autodiff)]
pub trait KronOps: Backend {
    /// `x · wᵀ + scale · x · kron(w1, w2)ᵀ`; without a base the second term alone, and w is not read.
    fn enamel_kron(
        x: FloatTensor<Self>,
        w: FloatTensor<Self>,
        w1: FloatTensor<Self>,
        w2: FloatTensor<Self>,
        based: bool,
        scale: f64,
        compute: Compute,
    ) -> FloatTensor<Self>;

    /// Gradients of x and w, and of w1 and w2; those not wanted are empty. x is read for those of w,
    /// w1 and w2 only, w, where there is one, for that of x.
    #[allow(clippy::type_complexity, clippy::too_many_arguments)]
    fn enamel_kron_backward(
        x: FloatTensor<Self>,
        w: FloatTensor<Self>,
        w1: FloatTensor<Self>,
        w2: FloatTensor<Self>,
        grad: FloatTensor<Self>,
        based: bool,
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
    w: Option<Tensor<2>>,
    w1: Tensor<2>,
    w2: Tensor<2>,
    scale: f64,
    compute: Compute,
) -> Tensor<2> {
    let based = w.is_some();
    let w = w.unwrap_or_else(|| w1.clone().detach().set_require_grad(false));
    Tensor::from_dispatch(<Dispatch as KronOps>::enamel_kron(
        x.into_dispatch(),
        w.into_dispatch(),
        w1.into_dispatch(),
        w2.into_dispatch(),
        based,
        scale,
        compute,
    ))
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
        based: bool,
        scale: f64,
        compute: Compute,
    ) -> FloatTensor<Self> {
        let (x, w1, w2) = (dense(x), dense(w1), dense(w2));
        let w = based.then(|| held(w));
        let f = Factors::new(&w1, &w2, scale);
        let (rows, out) = (dims(&x).0, w.as_ref().map_or(f.output(), |w| dims(w).0));
        let numbers = w.as_ref().map_or(0, |w| dims(w).0 * dims(w).1);
        let _timer = profile::op(
            "kron_linear",
            rows * (2 * numbers + f.flops()),
            4 * (rows * (f.input() + out) + numbers),
        );
        let mut y = match &w {
            Some(w) => base(MatRef::of(&x), Weight::of(w), compute),
            None => vec![0.0; rows * out],
        };
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
        based: bool,
        scale: f64,
        compute: Compute,
        wanted: Wanted,
    ) -> (
        FloatTensor<Self>,
        FloatTensor<Self>,
        FloatTensor<Self>,
        FloatTensor<Self>,
    ) {
        let (x, grad) = (dense(x), dense(grad));
        let w = based.then(|| held(w));
        let (w1, w2) = (dense(w1), dense(w2));
        let f = Factors::new(&w1, &w2, scale);
        let (rows, out) = dims(&grad);
        let input = f.input();
        let large = usize::from(wanted.x && w.is_some()) + usize::from(wanted.w);
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
        let mut dx = match (wanted.x, &w) {
            (true, Some(w)) => matrix(rows, input, |dx| {
                times(dx, Into::Set, &[(g, Weight::of(w))], compute);
            }),
            (true, None) => vec![0.0; rows * input],
            (false, _) => Vec::new(),
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
    /// For the gradient of x, where there is a base.
    w: Option<FloatTensor<B>>,
    w1: FloatTensor<B>,
    w2: FloatTensor<B>,
    based: bool,
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
            based,
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
        let based = based && w.is_some();
        let (x, w) = (
            x.unwrap_or_else(|| w1.clone()),
            w.unwrap_or_else(|| w1.clone()),
        );
        let (dx, dw, dw1, dw2) =
            B::enamel_kron_backward(x, w, w1, w2, grad, based, scale, compute, wanted);
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
        based: bool,
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
                    w: (dx && based).then(|| w.clone()),
                    w1: w1.clone(),
                    w2: w2.clone(),
                    based,
                    scale,
                    compute,
                };
                prep.finish(state, B::enamel_kron(x, w, w1, w2, based, scale, compute))
            }
            OpsKind::UnTracked(prep) => {
                prep.finish(B::enamel_kron(x, w, w1, w2, based, scale, compute))
            }
        }
    }

    fn enamel_kron_backward(
        _: FloatTensor<Self>,
        _: FloatTensor<Self>,
        _: FloatTensor<Self>,
        _: FloatTensor<Self>,
        _: FloatTensor<Self>,
        _: bool,
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
