//! The gradient's norm and AdamW in plain Burn operations.

use burn::tensor::Tensor;

use super::{AdamWInput, Moments, Numbers};

pub(super) fn adamw(n: &Numbers, p: AdamWInput) -> (Tensor<1>, Moments) {
    let grad = if n.factor == 1.0 {
        p.grad
    } else {
        p.grad.mul_scalar(n.factor)
    };
    let Moments { first, second } = p.moments;
    let first = (grad.clone() - first.clone()).mul_scalar(n.rest1) + first;
    let second = second.mul_scalar(n.beta2) + grad.square().mul_scalar(n.rest2);
    let root = second
        .clone()
        .sqrt()
        .mul_scalar(n.root)
        .add_scalar(n.epsilon);
    let value = p.value.mul_scalar(n.kept) - (first.clone() / root).mul_scalar(n.rate);
    (value, Moments { first, second })
}

pub(super) fn sum_of_squares(tensors: &[Tensor<1>]) -> f64 {
    let squares = tensors.iter().map(|t| t.clone().square().sum());
    let sum = squares.reduce(|a, b| a + b).map(Tensor::try_into_data);
    match sum {
        None => 0.0,
        Some(Ok(data)) => data.iter::<f64>().next().unwrap_or(f64::NAN),
        Some(Err(_)) => f64::NAN,
    }
}
