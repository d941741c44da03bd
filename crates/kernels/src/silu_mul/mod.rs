//! The gated activation of SwiGLU.

mod reference;

use burn::tensor::Tensor;

/// `silu(gate) · up`, with `silu(x) = x · sigmoid(x)`, element by element. All shapes are equal.
pub fn silu_mul<const D: usize>(gate: Tensor<D>, up: Tensor<D>) -> Tensor<D> {
    reference::silu_mul(gate, up)
}
