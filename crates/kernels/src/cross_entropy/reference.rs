//! Linear cross-entropy in plain Burn operations: one logits tensor for the labelled rows.

use burn::tensor::{Int, Tensor, TensorData, activation::log_softmax};

/// Rows with a label, and their labels.
fn labelled(labels: &[i64]) -> (Vec<i64>, Vec<i64>) {
    (0i64..)
        .zip(labels)
        .filter(|(_, l)| **l >= 0)
        .map(|(i, l)| (i, *l))
        .unzip()
}

pub(super) fn linear_cross_entropy(
    hidden: Tensor<2>,
    head: Tensor<2>,
    labels: &[i64],
) -> Tensor<1> {
    let device = hidden.device();
    let (rows, targets) = labelled(labels);
    let n = rows.len();
    if n == 0 {
        return hidden.sum().mul_scalar(0.0);
    }
    let rows: Tensor<1, Int> = Tensor::from_data(TensorData::new(rows, [n]), &device);
    let targets: Tensor<2, Int> = Tensor::from_data(TensorData::new(targets, [n, 1]), &device);
    let logits = hidden.select(0, rows).matmul(head.transpose());
    log_softmax(logits, 1).gather(1, targets).sum().neg()
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
    let logits = hidden.matmul(head.transpose());
    log_softmax(logits, 1).gather(1, targets).reshape([n]) * keep
}
