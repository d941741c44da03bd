//! A frozen linear map, alone and with a low-rank adapter beside it.

pub(crate) mod cpu;
mod dropped;
mod mask;
mod reference;
#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests;

use burn::tensor::Tensor;

use crate::base_weight::BaseWeight;
use crate::cpu::storage::{OnFlex, weight_on_flex};

pub use mask::Dropout;

/// `y = x · wᵀ`. Where the weight asks for bf16 products, both factors are rounded to bf16, forward and for
/// the gradient of x; up to four rows are multiplied as they are, since reading w takes the time then.
///
/// # Shapes
/// - x: `[rows, in]`, w: `[out, in]` (Hugging Face order), result: `[rows, out]`
pub fn linear(x: Tensor<2>, w: impl Into<BaseWeight>) -> Tensor<2> {
    let w = w.into();
    if x.on_flex() && weight_on_flex(&w.values()) {
        cpu::linear(x, w.values(), w.compute())
    } else {
        no_kernel("linear", &x, &w);
        reference::linear(x, w.dense())
    }
}

/// `y = x · wᵀ + scale · ((x · aᵀ) · bᵀ)`, in activation space: `w + scale · b·a` is never formed.
///
/// # Shapes
/// - x: `[rows, in]`, w: `[out, in]`, a: `[r, in]`, b: `[out, r]`, result: `[rows, out]`
pub fn lora_linear(
    x: Tensor<2>,
    w: impl Into<BaseWeight>,
    a: Tensor<2>,
    b: Tensor<2>,
    scale: f64,
) -> Tensor<2> {
    let w = w.into();
    if x.on_flex() && weight_on_flex(&w.values()) && a.on_flex() && b.on_flex() {
        cpu::lora_linear(x, w.values(), a, b, scale, w.compute())
    } else {
        no_kernel("lora", &x, &w);
        reference::lora_linear(x, w.dense(), a, b, scale)
    }
}

/// [`lora_linear`] with dropout on the adapter's input; the base sees all of x. The mask is a
/// function of the seed and the position alone.
///
/// # Shapes
/// - x: `[rows, in]`, w: `[out, in]`, a: `[r, in]`, b: `[out, r]`, result: `[rows, out]`
pub fn lora_linear_dropout(
    x: Tensor<2>,
    w: impl Into<BaseWeight>,
    a: Tensor<2>,
    b: Tensor<2>,
    scale: f64,
    dropout: Dropout,
) -> Tensor<2> {
    if dropout.probability <= 0.0 {
        return lora_linear(x, w, a, b, scale);
    }
    let w = w.into();
    if x.on_flex() && weight_on_flex(&w.values()) && a.on_flex() && b.on_flex() {
        dropped::lora_linear_dropout(x, w.values(), a, b, scale, dropout, w.compute())
    } else {
        no_kernel("lora with dropout", &x, &w);
        reference::lora_linear_dropout(x, w.dense(), a, b, scale, dropout)
    }
}

/// Notes in the profile that the reference computes what no kernel takes.
fn no_kernel(op: &'static str, x: &Tensor<2>, w: &BaseWeight) {
    crate::profile::fallback(op, || {
        let path = crate::CpuPath::chosen();
        let (x, w) = (x.dtype(), w.values().dtype());
        format!("{x:?} times {w:?} on this device, path {}", path.name())
    });
}
