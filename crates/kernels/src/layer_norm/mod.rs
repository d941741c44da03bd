//! Layer normalisation over the last axis.

mod cpu;
mod reference;
#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests;

use burn::tensor::Tensor;

use crate::cpu::storage::{OnFlex, note_fallback};

/// `y = (x − mean) / sqrt(variance + eps) · weight + bias` over the last axis, with the mean of the squared
/// deviations as variance (Ba, Kiros and Hinton 2016, arXiv:1607.06450).
///
/// # Shapes
/// - x, result: `[..., hidden]`
/// - weight, bias: `[hidden]`
///
/// # Panics
/// If the shapes do not fit together.
pub fn layer_norm<const D: usize>(
    x: Tensor<D>,
    weight: Tensor<1>,
    bias: Option<Tensor<1>>,
    eps: f64,
) -> Tensor<D> {
    let width = x.dims()[D - 1];
    assert!(
        weight.dims() == [width] && bias.as_ref().is_none_or(|b| b.dims() == [width]),
        "layer_norm: weight {:?} and bias {:?} must be as long as the last axis of x {:?}",
        weight.dims(),
        bias.as_ref().map(|b| b.dims()),
        x.dims(),
    );
    let bias_on_flex = bias.as_ref().is_none_or(|b| b.on_flex());
    if x.on_flex() && weight.on_flex() && bias_on_flex {
        cpu::layer_norm(x, weight, bias, eps)
    } else {
        note_fallback("layer_norm", &[&x, &weight]);
        reference::layer_norm(x, weight, bias, eps)
    }
}
