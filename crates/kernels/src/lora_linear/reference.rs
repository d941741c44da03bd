//! Linear and LoRA linear in plain Burn operations.

use burn::tensor::Tensor;

pub(super) fn linear(x: Tensor<2>, w: Tensor<2>) -> Tensor<2> {
    x.matmul(w.transpose())
}

pub(super) fn lora_linear(
    x: Tensor<2>,
    w: Tensor<2>,
    a: Tensor<2>,
    b: Tensor<2>,
    scale: f64,
) -> Tensor<2> {
    let low = x.clone().matmul(a.transpose()).mul_scalar(scale);
    linear(x, w) + low.matmul(b.transpose())
}
