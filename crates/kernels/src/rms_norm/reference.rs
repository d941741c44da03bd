//! RMSNorm in plain Burn operations.

use burn::tensor::Tensor;

pub(super) fn rms_norm<const D: usize>(x: Tensor<D>, weight: Tensor<1>, eps: f64) -> Tensor<D> {
    let inv = x
        .clone()
        .powf_scalar(2.0)
        .mean_dim(D - 1)
        .add_scalar(eps)
        .sqrt()
        .recip();
    x * inv * weight.unsqueeze()
}
