//! Root-mean-square normalisation over the last axis.

mod reference;

use burn::tensor::Tensor;

/// `y = x / sqrt(mean(x²) + eps) · weight`, over the last axis.
///
/// # Shapes
/// - x, result: `[..., hidden]`
/// - weight: `[hidden]`
pub fn rms_norm<const D: usize>(x: Tensor<D>, weight: Tensor<1>, eps: f64) -> Tensor<D> {
    reference::rms_norm(x, weight, eps)
}
