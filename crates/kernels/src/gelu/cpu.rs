//! GELU on Flex: one pass forward, one backward, in place where the inputs have no other use.

use std::mem::MaybeUninit;

use burn::backend::autodiff::Autodiff;
use burn::backend::autodiff::checkpoint::{base::Checkpointer, strategy::CheckpointStrategy};
use burn::backend::autodiff::grads::Gradients;
use burn::backend::autodiff::ops::{Backward, Ops, OpsKind};
use burn::backend::tensor::FloatTensor;
use burn::backend::{Backend, Dispatch, Flex, backend_extension};
use burn::tensor::Tensor;
use rayon::prelude::*;

use super::GeluKind;
use crate::cpu::erf::normal;
use crate::cpu::exp::sigmoid;
use crate::cpu::simd::{fma, level, simd_fn};
use crate::cpu::storage::{CHUNK, Fresh, dense, owned, values};
use crate::profile;

/// Operations on one element, roughly: an exponential and a polynomial or a division.
const FLOPS: usize = 30;

/// The operations as a backend extension.
#[backend_extension(Flex, Autodiff)]
pub trait GeluOps: Backend {
    /// `gelu(x)`.
    fn enamel_gelu(x: FloatTensor<Self>, kind: GeluKind) -> FloatTensor<Self>;

    /// Gradient of x.
    fn enamel_gelu_backward(
        x: FloatTensor<Self>,
        grad: FloatTensor<Self>,
        kind: GeluKind,
    ) -> FloatTensor<Self>;

    /// `gelu(gate) · up`.
    fn enamel_gelu_mul(
        gate: FloatTensor<Self>,
        up: FloatTensor<Self>,
        kind: GeluKind,
    ) -> FloatTensor<Self>;

    /// Gradients of gate and up.
    fn enamel_gelu_mul_backward(
        gate: FloatTensor<Self>,
        up: FloatTensor<Self>,
        grad: FloatTensor<Self>,
        kind: GeluKind,
    ) -> (FloatTensor<Self>, FloatTensor<Self>);
}

pub(super) fn gelu<const D: usize>(x: Tensor<D>, kind: GeluKind) -> Tensor<D> {
    let y = <Dispatch as GeluOps>::enamel_gelu(x.into_dispatch(), kind);
    Tensor::from_dispatch(y)
}

pub(super) fn gelu_mul<const D: usize>(
    gate: Tensor<D>,
    up: Tensor<D>,
    kind: GeluKind,
) -> Tensor<D> {
    Tensor::from_dispatch(<Dispatch as GeluOps>::enamel_gelu_mul(
        gate.into_dispatch(),
        up.into_dispatch(),
        kind,
    ))
}

/// The share of x that passes, and by how much `gelu(x)` grows with x.
#[inline(always)]
fn share_and_slope<const L: u8, const TANH: bool>(x: f32) -> (f32, f32) {
    if TANH {
        // (1 + tanh u) / 2 = sigmoid(2u), which has no difference of nearly equal numbers in it.
        const TWICE_ROOT: f32 = 1.595_769;
        const CUBE: f32 = 0.044_715 * TWICE_ROOT;
        let square = x * x;
        let share = sigmoid::<L>(x * fma::<L>(square, CUBE, TWICE_ROOT));
        let inner = fma::<L>(square, 3.0 * CUBE, TWICE_ROOT);
        (share, fma::<L>(x * inner, share * (1.0 - share), share))
    } else {
        /// `1/√(2π)`
        const HEIGHT: f32 = 0.398_942_3;
        let (share, bell) = normal::<L>(x);
        (share, fma::<L>(x * HEIGHT, bell, share))
    }
}

#[inline(always)]
fn forward<const L: u8, const TANH: bool>(
    x: &[f32],
    up: Option<&[f32]>,
    y: &mut [MaybeUninit<f32>],
) {
    match up {
        Some(up) => {
            for ((x, u), y) in x.iter().zip(up).zip(y) {
                y.write(x * share_and_slope::<L, TANH>(*x).0 * u);
            }
        }
        None => {
            for (x, y) in x.iter().zip(y) {
                y.write(x * share_and_slope::<L, TANH>(*x).0);
            }
        }
    }
}

simd_fn! {
    fn forward_of<L>(
        x: &[f32],
        up: Option<&[f32]>,
        kind: GeluKind,
        y: &mut [MaybeUninit<f32>],
    ) {
        match kind {
            GeluKind::Gelu => forward::<L, false>(x, up, y),
            GeluKind::GeluPytorchTanh => forward::<L, true>(x, up, y),
        }
    }
}

#[inline(always)]
fn backward<const L: u8, const TANH: bool>(x: &[f32], grad: &mut [f32]) {
    for (x, g) in x.iter().zip(grad) {
        *g *= share_and_slope::<L, TANH>(*x).1;
    }
}

simd_fn! {
    /// `g · gelu'(x)` replaces g.
    fn backward_of<L>(x: &[f32], grad: &mut [f32], kind: GeluKind) {
        match kind {
            GeluKind::Gelu => backward::<L, false>(x, grad),
            GeluKind::GeluPytorchTanh => backward::<L, true>(x, grad),
        }
    }
}

#[inline(always)]
fn mul_backward<const L: u8, const TANH: bool>(gate: &mut [f32], up: &[f32], grad: &mut [f32]) {
    for ((x, u), g) in gate.iter_mut().zip(up).zip(grad) {
        let (share, slope) = share_and_slope::<L, TANH>(*x);
        let d_up = *g * (*x * share);
        *x = *g * u * slope;
        *g = d_up;
    }
}

simd_fn! {
    /// `g·u·gelu'(x)` replaces x, `g·gelu(x)` replaces g.
    fn mul_backward_of<L>(gate: &mut [f32], up: &[f32], grad: &mut [f32], kind: GeluKind) {
        match kind {
            GeluKind::Gelu => mul_backward::<L, false>(gate, up, grad),
            GeluKind::GeluPytorchTanh => mul_backward::<L, true>(gate, up, grad),
        }
    }
}

impl GeluOps for Flex {
    fn enamel_gelu(x: FloatTensor<Self>, kind: GeluKind) -> FloatTensor<Self> {
        let x = dense(x);
        let (xs, level) = (values(&x), level());
        let _timer = profile::op("gelu", FLOPS * xs.len(), 8 * xs.len());
        let mut out = Fresh::new(xs.len());
        out.slots()
            .par_chunks_mut(CHUNK)
            .zip(xs.par_chunks(CHUNK))
            .for_each(|(y, x)| forward_of(level, x, None, kind, y));
        // SAFETY: the chunks cover the output.
        unsafe { out.into_tensor(x.layout().shape().clone()) }
    }

    fn enamel_gelu_backward(
        x: FloatTensor<Self>,
        grad: FloatTensor<Self>,
        kind: GeluKind,
    ) -> FloatTensor<Self> {
        let (x, mut grad) = (dense(x), owned(grad));
        let (xs, gs, level) = (values(&x), grad.storage_mut::<f32>(), level());
        let _timer = profile::op("gelu backward", FLOPS * xs.len(), 12 * xs.len());
        assert_eq!(xs.len(), gs.len(), "the gradient has x's shape");
        gs.par_chunks_mut(CHUNK)
            .zip(xs.par_chunks(CHUNK))
            .for_each(|(g, x)| backward_of(level, x, g, kind));
        grad
    }

    fn enamel_gelu_mul(
        gate: FloatTensor<Self>,
        up: FloatTensor<Self>,
        kind: GeluKind,
    ) -> FloatTensor<Self> {
        let (gate, up) = (dense(gate), dense(up));
        let (x, u, level) = (values(&gate), values(&up), level());
        let _timer = profile::op("gelu_mul", FLOPS * x.len(), 12 * x.len());
        assert_eq!(x.len(), u.len(), "gate and up have the same shape");
        let mut out = Fresh::new(x.len());
        let inputs = x.par_chunks(CHUNK).zip(u.par_chunks(CHUNK));
        out.slots()
            .par_chunks_mut(CHUNK)
            .zip(inputs)
            .for_each(|(y, (x, u))| forward_of(level, x, Some(u), kind, y));
        // SAFETY: the chunks cover the output, and the three lengths agree.
        unsafe { out.into_tensor(gate.layout().shape().clone()) }
    }

    fn enamel_gelu_mul_backward(
        gate: FloatTensor<Self>,
        up: FloatTensor<Self>,
        grad: FloatTensor<Self>,
        kind: GeluKind,
    ) -> (FloatTensor<Self>, FloatTensor<Self>) {
        // In a training step these are the last handles of gate and gradient: no allocation.
        let (mut gate, up, mut grad) = (owned(gate), dense(up), owned(grad));
        let (x, u) = (gate.storage_mut::<f32>(), values(&up));
        let (g, level) = (grad.storage_mut::<f32>(), level());
        let _timer = profile::op("gelu_mul backward", FLOPS * x.len(), 20 * x.len());
        assert!(
            x.len() == u.len() && x.len() == g.len(),
            "gate, up and gradient agree"
        );
        x.par_chunks_mut(CHUNK)
            .zip(u.par_chunks(CHUNK).zip(g.par_chunks_mut(CHUNK)))
            .for_each(|(x, (u, g))| mul_backward_of(level, x, u, g, kind));
        (gate, grad)
    }
}

#[derive(Debug)]
struct GeluStep;

impl<B: GeluOps> Backward<B, 1> for GeluStep {
    type State = (FloatTensor<B>, GeluKind);

    fn backward(self, ops: Ops<Self::State, 1>, grads: &mut Gradients, _: &mut Checkpointer) {
        let grad = grads.consume::<B>(&ops.node);
        let [node] = ops.parents;
        let (x, kind) = ops.state;
        if let Some(node) = node {
            grads.register::<B>(node.id, B::enamel_gelu_backward(x, grad, kind));
        }
    }
}

#[derive(Debug)]
struct GeluMulStep;

impl<B: GeluOps> Backward<B, 2> for GeluMulStep {
    type State = (FloatTensor<B>, FloatTensor<B>, GeluKind);

    fn backward(self, ops: Ops<Self::State, 2>, grads: &mut Gradients, _: &mut Checkpointer) {
        let grad = grads.consume::<B>(&ops.node);
        let [gate_node, up_node] = ops.parents;
        let (gate, up, kind) = ops.state;
        let (d_gate, d_up) = B::enamel_gelu_mul_backward(gate, up, grad, kind);
        if let Some(node) = gate_node {
            grads.register::<B>(node.id, d_gate);
        }
        if let Some(node) = up_node {
            grads.register::<B>(node.id, d_up);
        }
    }
}

impl<B: GeluOps, C: CheckpointStrategy> GeluOps for Autodiff<B, C> {
    fn enamel_gelu(x: FloatTensor<Self>, kind: GeluKind) -> FloatTensor<Self> {
        let (x, node) = x.into_parts();
        match GeluStep.prepare::<C>([node]).compute_bound().stateful() {
            OpsKind::Tracked(prep) => prep.finish((x.clone(), kind), B::enamel_gelu(x, kind)),
            OpsKind::UnTracked(prep) => prep.finish(B::enamel_gelu(x, kind)),
        }
    }

    fn enamel_gelu_mul(
        gate: FloatTensor<Self>,
        up: FloatTensor<Self>,
        kind: GeluKind,
    ) -> FloatTensor<Self> {
        let (gate, gate_node) = gate.into_parts();
        let (up, up_node) = up.into_parts();
        match GeluMulStep
            .prepare::<C>([gate_node, up_node])
            .compute_bound()
            .stateful()
        {
            OpsKind::Tracked(prep) => {
                let state = (gate.clone(), up.clone(), kind);
                prep.finish(state, B::enamel_gelu_mul(gate, up, kind))
            }
            OpsKind::UnTracked(prep) => prep.finish(B::enamel_gelu_mul(gate, up, kind)),
        }
    }

    fn enamel_gelu_backward(
        _: FloatTensor<Self>,
        _: FloatTensor<Self>,
        _: GeluKind,
    ) -> FloatTensor<Self> {
        unimplemented!("second-order gradients of gelu")
    }

    fn enamel_gelu_mul_backward(
        _: FloatTensor<Self>,
        _: FloatTensor<Self>,
        _: FloatTensor<Self>,
        _: GeluKind,
    ) -> (FloatTensor<Self>, FloatTensor<Self>) {
        unimplemented!("second-order gradients of gelu_mul")
    }
}
