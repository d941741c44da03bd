//! SwiGLU's activation in plain Burn operations.

use burn::tensor::{Tensor, activation::silu};

pub(super) fn silu_mul<const D: usize>(gate: Tensor<D>, up: Tensor<D>) -> Tensor<D> {
    silu(gate) * up
}
