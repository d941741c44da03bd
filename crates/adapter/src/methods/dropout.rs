//! Dropout on an adapter's input: when it is at work, and how its masks are drawn.

use burn::module::Param;
use burn::nn::Dropout;
use burn::tensor::{Device, Distribution, Tensor};
use enamel_kernels::{BaseWeight, fuses, linear, lora_linear_dropout};

/// Whether a forward pass drops anything: in training, which is on an autodiff device.
pub(crate) fn at_work<const D: usize>(dropout: &Dropout, parameter: &Param<Tensor<D>>) -> bool {
    dropout.prob > 0.0 && dropout.training.is_enabled() && parameter.val().device().is_autodiff()
}

/// Dropout of one call, whose mask follows from the device's generator.
pub(crate) fn drawn(dropout: &Dropout, device: &Device) -> enamel_kernels::Dropout {
    // Four numbers of 16 bits: an f32 holds 24.
    let parts = Distribution::Uniform(0.0, 65536.0);
    let parts = Tensor::<1>::random([4], parts, device).into_data();
    let seed = parts
        .iter::<f32>()
        .fold(0_u64, |seed, part| (seed << 16) ^ u64::from(part as u32));
    enamel_kernels::Dropout {
        probability: dropout.prob,
        seed,
    }
}

/// `x · wᵀ + scale · (drop(x) · aᵀ) · bᵀ`. Where the kernels run, nothing but x is kept; elsewhere, what was left of
/// it and the mask are.
pub(crate) fn dropping(
    x: Tensor<2>,
    w: BaseWeight,
    a: Tensor<2>,
    b: Tensor<2>,
    scale: f64,
    dropout: &Dropout,
) -> Tensor<2> {
    if fuses(&x) {
        let dropout = drawn(dropout, &x.device());
        return lora_linear_dropout(x, w, a, b, scale, dropout);
    }
    let low = dropout.forward(x.clone()).matmul(a.transpose());
    linear(x, w) + low.mul_scalar(scale).matmul(b.transpose())
}
