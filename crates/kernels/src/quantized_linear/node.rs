//! The map as a backend extension, and its node in the autodiff graph, which keeps a handle of the weight.

#![cfg_attr(feature = "ndarray", allow(deprecated))] // Burn 0.22 still has NdArray, and so have we

#[cfg(feature = "ndarray")]
use burn::backend::NdArray;
use burn::backend::autodiff::Autodiff;
use burn::backend::autodiff::checkpoint::{base::Checkpointer, strategy::CheckpointStrategy};
use burn::backend::autodiff::grads::Gradients;
use burn::backend::autodiff::ops::{Backward, Ops, OpsKind};
use burn::backend::tensor::FloatTensor;
use burn::backend::{Backend, Dispatch, Flex, backend_extension};
use burn::tensor::Tensor;

use super::{cpu, reference};
use crate::cpu::gemm::Compute;
use crate::cpu::path::CpuPath;
use crate::quantized::PackedWeight;

/// The operation as a backend extension.
#[backend_extension(Flex, NdArray: cfg(feature = "ndarray"), Cube: cfg(feature = "cube"), Autodiff)]
pub trait PackedLinearOps: Backend {
    /// `x · wᵀ`; `rounds` says whether x is rounded where the format does that.
    fn enamel_packed_linear(
        x: FloatTensor<Self>,
        w: PackedWeight,
        rounds: bool,
        compute: Compute,
    ) -> FloatTensor<Self>;

    /// `g · w`.
    fn enamel_packed_times(
        g: FloatTensor<Self>,
        w: PackedWeight,
        compute: Compute,
    ) -> FloatTensor<Self>;
}

pub(super) fn packed_linear(
    x: Tensor<2>,
    w: PackedWeight,
    rounds: bool,
    compute: Compute,
) -> Tensor<2> {
    let x = x.into_dispatch();
    let y = <Dispatch as PackedLinearOps>::enamel_packed_linear(x, w, rounds, compute);
    Tensor::from_dispatch(y)
}

#[cfg(feature = "ndarray")]
impl PackedLinearOps for NdArray {
    fn enamel_packed_linear(
        x: FloatTensor<Self>,
        w: PackedWeight,
        rounds: bool,
        _: Compute,
    ) -> FloatTensor<Self> {
        reference::forward::<Self>(x, &w, rounds)
    }

    fn enamel_packed_times(g: FloatTensor<Self>, w: PackedWeight, _: Compute) -> FloatTensor<Self> {
        reference::backward::<Self>(g, &w)
    }
}

impl PackedLinearOps for Flex {
    fn enamel_packed_linear(
        x: FloatTensor<Self>,
        w: PackedWeight,
        rounds: bool,
        compute: Compute,
    ) -> FloatTensor<Self> {
        match CpuPath::chosen() {
            CpuPath::Reference => reference::forward::<Self>(x, &w, rounds),
            _ => cpu::forward(x, &w, rounds, compute),
        }
    }

    fn enamel_packed_times(
        g: FloatTensor<Self>,
        w: PackedWeight,
        compute: Compute,
    ) -> FloatTensor<Self> {
        match CpuPath::chosen() {
            CpuPath::Reference => reference::backward::<Self>(g, &w),
            _ => cpu::backward(g, &w, compute),
        }
    }
}

#[derive(Debug)]
struct PackedLinearStep;

impl<B: PackedLinearOps> Backward<B, 1> for PackedLinearStep {
    type State = (PackedWeight, Compute);

    fn backward(self, ops: Ops<Self::State, 1>, grads: &mut Gradients, _: &mut Checkpointer) {
        let grad = grads.consume::<B>(&ops.node);
        let (w, compute) = ops.state;
        if let [Some(x)] = ops.parents {
            grads.register::<B>(x.id, B::enamel_packed_times(grad, w, compute));
        }
    }
}

impl<B: PackedLinearOps, C: CheckpointStrategy> PackedLinearOps for Autodiff<B, C> {
    fn enamel_packed_linear(
        x: FloatTensor<Self>,
        w: PackedWeight,
        rounds: bool,
        compute: Compute,
    ) -> FloatTensor<Self> {
        let (x, node) = x.into_parts();
        match PackedLinearStep
            .prepare::<C>([node])
            .compute_bound()
            .stateful()
        {
            OpsKind::Tracked(prep) => prep.finish(
                (w.clone(), compute),
                B::enamel_packed_linear(x, w, rounds, compute),
            ),
            OpsKind::UnTracked(prep) => prep.finish(B::enamel_packed_linear(x, w, rounds, compute)),
        }
    }

    fn enamel_packed_times(_: FloatTensor<Self>, _: PackedWeight, _: Compute) -> FloatTensor<Self> {
        unimplemented!("second-order gradients of packed_linear")
    }
}
