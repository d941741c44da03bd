//! Linear cross-entropy in plain Burn operations: one logits tensor for the labelled rows.

use burn::tensor::{DType, FloatDType, Int, Tensor, TensorData, activation::log_softmax};

use super::LossSpec;

/// Rows with a label, and their labels.
fn labelled(labels: &[i64]) -> (Vec<i64>, Vec<i64>) {
    (0i64..)
        .zip(labels)
        .filter(|(_, l)| **l >= 0)
        .map(|(i, l)| (i, *l))
        .unzip()
}

/// A head in bf16 is widened.
fn as_hidden(head: Tensor<2>) -> Tensor<2> {
    if head.dtype() == DType::F32 {
        return head;
    }
    head.cast(FloatDType::F32)
}

pub(super) fn linear_cross_entropy(
    hidden: Tensor<2>,
    head: Tensor<2>,
    labels: &[i64],
    spec: LossSpec,
) -> Tensor<1> {
    let device = hidden.device();
    let (rows, targets) = labelled(labels);
    let n = rows.len();
    if n == 0 {
        return hidden.sum().mul_scalar(0.0);
    }
    let rows: Tensor<1, Int> = Tensor::from_data(TensorData::new(rows, [n]), &device);
    let targets: Tensor<2, Int> = Tensor::from_data(TensorData::new(targets, [n, 1]), &device);
    let vocabulary = head.dims()[0];
    let logits = hidden.select(0, rows).matmul(as_hidden(head).transpose());
    let log_probs = log_softmax(logits, 1);
    let sharp = log_probs.clone().gather(1, targets).sum().neg();
    let s = spec.label_smoothing;
    if s == 0.0 {
        return sharp;
    }
    let even = log_probs.sum().neg().div_scalar(vocabulary as f64);
    sharp.mul_scalar(1.0 - s) + even.mul_scalar(s)
}

pub(super) fn token_log_probs(hidden: Tensor<2>, head: Tensor<2>, labels: &[i64]) -> Tensor<1> {
    let device = hidden.device();
    let n = labels.len();
    let keep: Vec<f32> = labels
        .iter()
        .map(|l| if *l >= 0 { 1.0 } else { 0.0 })
        .collect();
    let targets: Vec<i64> = labels.iter().map(|l| (*l).max(0)).collect();
    let keep: Tensor<1> = Tensor::from_data(TensorData::new(keep, [n]), &device);
    let targets: Tensor<2, Int> = Tensor::from_data(TensorData::new(targets, [n, 1]), &device);
    let logits = hidden.matmul(as_hidden(head).transpose());
    log_softmax(logits, 1).gather(1, targets).reshape([n]) * keep
}
