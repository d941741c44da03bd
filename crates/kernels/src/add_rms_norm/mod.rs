//! A residual sum and its root-mean-square normalisation in one.

mod cpu;
mod reference;
#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests;

use burn::tensor::Tensor;

use crate::cpu::storage::{OnFlex, note_fallback};

/// `sum = x + branch` and `rms_norm(sum, weight, eps)` (see [`crate::rms_norm()`]), in one pass over memory
/// forward and one backward: what arrives for the sum and for the normalised tensor is put together where
/// the latter's gradient is computed.
///
/// # Shapes
/// - x, branch, both results: `[..., hidden]`
/// - weight: `[hidden]`
///
/// # Panics
/// If the shapes do not fit together.
pub fn add_rms_norm<const D: usize>(
    x: Tensor<D>,
    branch: Tensor<D>,
    weight: Tensor<1>,
    eps: f64,
) -> (Tensor<D>, Tensor<D>) {
    assert!(
        x.dims() == branch.dims() && weight.dims() == [x.dims()[D - 1]],
        "add_rms_norm: x {:?} and branch {:?} must have the same shape, and weight {:?} the length of \
         their last axis",
        x.dims(),
        branch.dims(),
        weight.dims(),
    );
    if x.on_flex() && branch.on_flex() && weight.on_flex() {
        cpu::add_rms_norm(x, branch, weight, eps)
    } else {
        note_fallback("add_rms_norm", &[&x, &branch, &weight]);
        reference::add_rms_norm(x, branch, weight, eps)
    }
}
