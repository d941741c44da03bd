//! A frozen linear map, alone and with a low-rank adapter beside it.

pub(crate) mod cpu;
mod dropped;
mod mask;
mod reference;
#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests;

use burn::tensor::Tensor;

use crate::cpu::storage::OnFlex;

pub use mask::Dropout;

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

/// [`lora_linear`] with dropout on the adapter's input; the base sees all of x. The mask is a
/// function of the seed and the position alone.
///
/// # Shapes
/// - x: `[rows, in]`, w: `[out, in]`, a: `[r, in]`, b: `[out, r]`, result: `[rows, out]`
pub fn lora_linear_dropout(
    x: Tensor<2>,
    w: Tensor<2>,
    a: Tensor<2>,
    b: Tensor<2>,
    scale: f64,
    dropout: Dropout,
) -> Tensor<2> {
    if dropout.probability <= 0.0 {
        return lora_linear(x, w, a, b, scale);
    }
    if x.on_flex() && w.on_flex() && a.on_flex() && b.on_flex() {
        dropped::lora_linear_dropout(x, w, a, b, scale, dropout)
    } else {
        reference::lora_linear_dropout(x, w, a, b, scale, dropout)
    }
}
