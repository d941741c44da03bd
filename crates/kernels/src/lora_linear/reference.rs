//! Linear and LoRA linear in plain Burn operations.

use burn::tensor::{Tensor, TensorData};

use crate::cpu::dropout::{Dropout, Mask};

pub(super) fn linear(x: Tensor<2>, w: Tensor<2>) -> Tensor<2> {
    // The transposed product: NdArray copies a transposed operand, and the weight is the large one.
    w.matmul(x.transpose()).transpose()
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

pub(super) fn lora_linear_dropout(
    x: Tensor<2>,
    w: Tensor<2>,
    a: Tensor<2>,
    b: Tensor<2>,
    scale: f64,
    dropout: Dropout,
) -> Tensor<2> {
    let low = dropped(x.clone(), dropout)
        .matmul(a.transpose())
        .mul_scalar(scale);
    linear(x, w) + low.matmul(b.transpose())
}

/// `drop(x)`.
pub(super) fn dropped(x: Tensor<2>, dropout: Dropout) -> Tensor<2> {
    let mask = Mask::from(dropout);
    let factors: Vec<f32> = (0..x.shape().num_elements())
        .map(|i| mask.factor(i as u32))
        .collect();
    let factors = Tensor::from_data(TensorData::new(factors, x.dims()), &x.device());
    x * factors
}
