//! Root-mean-square normalisation over the last axis.

pub(crate) mod cpu;
mod reference;
#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests;

use burn::tensor::Tensor;

use crate::cpu::storage::{OnFlex, note_fallback};

/// `y = x / sqrt(mean(x²) + eps) · weight`, over the last axis.
///
/// # Shapes
/// - x, result: `[..., hidden]`
/// - weight: `[hidden]`
pub fn rms_norm<const D: usize>(x: Tensor<D>, weight: Tensor<1>, eps: f64) -> Tensor<D> {
    if x.on_flex() && weight.on_flex() {
        cpu::rms_norm(x, weight, eps)
    } else {
        note_fallback("rms_norm", &[&x, &weight]);
        reference::rms_norm(x, weight, eps)
    }
}
