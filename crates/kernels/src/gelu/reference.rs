//! GELU in plain Burn operations.

use burn::tensor::Tensor;

use super::GeluKind;

pub(super) fn gelu<const D: usize>(x: Tensor<D>, kind: GeluKind) -> Tensor<D> {
    let inner = match kind {
        GeluKind::Gelu => x.clone().div_scalar(std::f64::consts::SQRT_2).erf(),
        GeluKind::GeluPytorchTanh => {
            let cube = x.clone().powi_scalar(3).mul_scalar(0.044_715);
            let factor = (2.0 / std::f64::consts::PI).sqrt();
            (x.clone() + cube).mul_scalar(factor).tanh()
        }
    };
    x.mul_scalar(0.5) * inner.add_scalar(1.0)
}
