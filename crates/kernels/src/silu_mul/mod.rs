//! The gated activation of SwiGLU.

mod cpu;
mod reference;
#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests;

use burn::tensor::Tensor;

use crate::cpu::storage::{OnFlex, note_fallback};

/// `silu(gate) · up`, with `silu(x) = x · sigmoid(x)`, element by element. All shapes are equal.
pub fn silu_mul<const D: usize>(gate: Tensor<D>, up: Tensor<D>) -> Tensor<D> {
    if gate.on_flex() && up.on_flex() {
        cpu::silu_mul(gate, up)
    } else {
        note_fallback("silu_mul", &[&gate, &up]);
        reference::silu_mul(gate, up)
    }
}
