//! Residual sum and RMSNorm in plain Burn operations.

use burn::tensor::Tensor;

pub(super) fn add_rms_norm<const D: usize>(
    x: Tensor<D>,
    branch: Tensor<D>,
    weight: Tensor<1>,
    eps: f64,
) -> (Tensor<D>, Tensor<D>) {
    let sum = x + branch;
    let mean = (sum.clone() * sum.clone()).mean_dim(D - 1);
    let inverse = mean.add_scalar(eps).sqrt().recip();
    (sum.clone(), sum * inverse * weight.unsqueeze())
}
