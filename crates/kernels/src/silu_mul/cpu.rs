//! Fused `silu(gate) · up` on Flex: one pass forward, one backward.

use std::mem::MaybeUninit;

use burn::backend::autodiff::Autodiff;
use burn::backend::autodiff::checkpoint::{base::Checkpointer, strategy::CheckpointStrategy};
use burn::backend::autodiff::grads::Gradients;
use burn::backend::autodiff::ops::{Backward, Ops, OpsKind};
use burn::backend::tensor::FloatTensor;
use burn::backend::{Backend, Dispatch, Flex, backend_extension};
use burn::tensor::Tensor;
use rayon::prelude::*;

use crate::cpu::exp::sigmoid;
use crate::cpu::simd::{level, simd_fn};
use crate::cpu::storage::{CHUNK, Fresh, dense, owned, values};
use crate::profile;

/// The operation as a backend extension.
#[backend_extension(Flex, Autodiff)]
pub trait SiluMulOps: Backend {
    /// `silu(gate) · up`.
    fn enamel_silu_mul(gate: FloatTensor<Self>, up: FloatTensor<Self>) -> FloatTensor<Self>;

    /// Gradients of gate and up.
    fn enamel_silu_mul_backward(
        gate: FloatTensor<Self>,
        up: FloatTensor<Self>,
        grad: FloatTensor<Self>,
    ) -> (FloatTensor<Self>, FloatTensor<Self>);
}

pub(super) fn silu_mul<const D: usize>(gate: Tensor<D>, up: Tensor<D>) -> Tensor<D> {
    Tensor::from_dispatch(<Dispatch as SiluMulOps>::enamel_silu_mul(
        gate.into_dispatch(),
        up.into_dispatch(),
    ))
}

simd_fn! {
    fn forward<L>(gate: &[f32], up: &[f32], out: &mut [MaybeUninit<f32>]) {
        for ((x, u), y) in gate.iter().zip(up).zip(out) {
            y.write(x * sigmoid::<L>(*x) * u);
        }
    }
}

simd_fn! {
    /// With `s = sigmoid(x)`: `dx = g·u·s·(1 + x·(1 − s))` replaces x, `du = g·x·s` replaces g.
    fn backward<L>(gate: &mut [f32], up: &[f32], grad: &mut [f32]) {
        for ((x, u), g) in gate.iter_mut().zip(up).zip(grad) {
            let s = sigmoid::<L>(*x);
            let d_up = *g * (*x * s);
            *x = *g * u * (s * (1.0 + *x * (1.0 - s)));
            *g = d_up;
        }
    }
}

impl SiluMulOps for Flex {
    fn enamel_silu_mul(gate: FloatTensor<Self>, up: FloatTensor<Self>) -> FloatTensor<Self> {
        let (gate, up) = (dense(gate), dense(up));
        let (x, u, level) = (values(&gate), values(&up), level());
        let _timer = profile::op("silu_mul", 20 * x.len(), 12 * x.len());
        assert_eq!(x.len(), u.len(), "gate and up have the same shape");
        let mut out = Fresh::new(x.len());
        if x.len() <= CHUNK {
            forward(level, x, u, out.slots());
        } else {
            let inputs = x.par_chunks(CHUNK).zip(u.par_chunks(CHUNK));
            out.slots()
                .par_chunks_mut(CHUNK)
                .zip(inputs)
                .for_each(|(y, (x, u))| forward(level, x, u, y));
        }
        // SAFETY: the chunks cover the output, and the three lengths agree.
        unsafe { out.into_tensor(gate.layout().shape().clone()) }
    }

    fn enamel_silu_mul_backward(
        gate: FloatTensor<Self>,
        up: FloatTensor<Self>,
        grad: FloatTensor<Self>,
    ) -> (FloatTensor<Self>, FloatTensor<Self>) {
        // In a training step these are the last handles of gate and gradient: no allocation.
        let (mut gate, up, mut grad) = (owned(gate), dense(up), owned(grad));
        let (x, u, g) = (
            gate.storage_mut::<f32>(),
            values(&up),
            grad.storage_mut::<f32>(),
        );
        let _timer = profile::op("silu_mul backward", 26 * x.len(), 20 * x.len());
        assert!(
            x.len() == u.len() && x.len() == g.len(),
            "gate, up and gradient agree"
        );
        let level = level();
        if x.len() <= CHUNK {
            backward(level, x, u, g);
        } else {
            let inputs = u.par_chunks(CHUNK).zip(g.par_chunks_mut(CHUNK));
            x.par_chunks_mut(CHUNK)
                .zip(inputs)
                .for_each(|(x, (u, g))| backward(level, x, u, g));
        }
        (gate, grad)
    }
}

#[derive(Debug)]
struct SiluMulStep;

impl<B: SiluMulOps> Backward<B, 2> for SiluMulStep {
    type State = (FloatTensor<B>, FloatTensor<B>);

    fn backward(self, ops: Ops<Self::State, 2>, grads: &mut Gradients, _: &mut Checkpointer) {
        let grad = grads.consume::<B>(&ops.node);
        let [gate_node, up_node] = ops.parents;
        let (gate, up) = ops.state;
        let (d_gate, d_up) = B::enamel_silu_mul_backward(gate, up, grad);
        if let Some(node) = gate_node {
            grads.register::<B>(node.id, d_gate);
        }
        if let Some(node) = up_node {
            grads.register::<B>(node.id, d_up);
        }
    }
}

impl<B: SiluMulOps, C: CheckpointStrategy> SiluMulOps for Autodiff<B, C> {
    fn enamel_silu_mul(gate: FloatTensor<Self>, up: FloatTensor<Self>) -> FloatTensor<Self> {
        let (gate, gate_node) = gate.into_parts();
        let (up, up_node) = up.into_parts();
        match SiluMulStep
            .prepare::<C>([gate_node, up_node])
            .compute_bound()
            .stateful()
        {
            OpsKind::Tracked(prep) => {
                let state = (gate.clone(), up.clone());
                prep.finish(state, B::enamel_silu_mul(gate, up))
            }
            OpsKind::UnTracked(prep) => prep.finish(B::enamel_silu_mul(gate, up)),
        }
    }

    fn enamel_silu_mul_backward(
        _: FloatTensor<Self>,
        _: FloatTensor<Self>,
        _: FloatTensor<Self>,
    ) -> (FloatTensor<Self>, FloatTensor<Self>) {
        unimplemented!("second-order gradients of silu_mul")
    }
}
