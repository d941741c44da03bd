//! A frozen linear map, alone and with a low-rank adapter beside it.

mod cpu;
mod reference;
#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests;

use burn::tensor::Tensor;

use crate::cpu::storage::OnFlex;

/// `y = x · wᵀ`.
///
/// # Shapes
/// - x: `[rows, in]`, w: `[out, in]` (Hugging Face order), result: `[rows, out]`
pub fn linear(x: Tensor<2>, w: Tensor<2>) -> Tensor<2> {
    if x.on_flex() && w.on_flex() {
        cpu::linear(x, w)
    } else {
        reference::linear(x, w)
    }
}

/// `y = x · wᵀ + scale · ((x · aᵀ) · bᵀ)`, in activation space: `w + scale · b·a` is never formed.
///
/// # Shapes
/// - x: `[rows, in]`, w: `[out, in]`, a: `[r, in]`, b: `[out, r]`, result: `[rows, out]`
pub fn lora_linear(
    x: Tensor<2>,
    w: Tensor<2>,
    a: Tensor<2>,
    b: Tensor<2>,
    scale: f64,
) -> Tensor<2> {
    if x.on_flex() && w.on_flex() && a.on_flex() && b.on_flex() {
        cpu::lora_linear(x, w, a, b, scale)
    } else {
        reference::lora_linear(x, w, a, b, scale)
    }
}
