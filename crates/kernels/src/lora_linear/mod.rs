//! A frozen linear map, alone and with a low-rank adapter beside it.

mod reference;

use burn::tensor::Tensor;

/// `y = x · wᵀ`.
///
/// # Shapes
/// - x: `[rows, in]`, w: `[out, in]` (Hugging Face order), result: `[rows, out]`
pub fn linear(x: Tensor<2>, w: Tensor<2>) -> Tensor<2> {
    reference::linear(x, w)
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
    reference::lora_linear(x, w, a, b, scale)
}
