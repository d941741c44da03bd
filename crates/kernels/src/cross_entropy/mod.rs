//! Head product and cross-entropy in one, so that logits of a whole batch never exist at once.

mod cpu;
mod pass;
mod reference;
#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests;

use burn::tensor::Tensor;

use crate::cpu::gemm::Compute;
use crate::cpu::storage::{OnFlex, note_fallback, weight_on_flex};

pub use pass::loss_bytes;

/// How a loss is computed.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct LossSpec {
    /// Share of each target that is spread evenly over the vocabulary, in `[0, 1]`.
    pub label_smoothing: f64,
    /// What the products' factors are rounded to.
    pub compute: Compute,
}

/// Sum over rows of `−log softmax(hidden · headᵀ)[label]`, rows with a negative label left out.
/// Divide by the number of trained tokens yourself: gradient accumulation needs the sum.
///
/// # Shapes
/// - hidden: `[rows, hidden]`, head: `[vocabulary, hidden]`, f32, or bf16 and frozen, labels: `rows` of
///   them, result: `[1]`
///
/// # Panics
/// If a label lies outside the vocabulary.
///
/// ```
/// use burn::tensor::{Device, Tensor};
/// use enamel_kernels::linear_cross_entropy;
///
/// let device = Device::flex().autodiff();
/// // Three tokens, two of them trained, and a vocabulary of two.
/// let hidden = Tensor::<2>::from_floats([[0.0, 0.0], [1.0, -1.0], [5.0, 5.0]], &device).require_grad();
/// let head = Tensor::from_floats([[1.0, 0.0], [0.0, 1.0]], &device);
/// let labels = [0, 1, -100];
///
/// let sum = linear_cross_entropy(hidden.clone(), head, &labels);
/// // ln 2, which is a guess between two, and ln(1 + e²)
/// assert!((sum.clone().into_scalar::<f32>() - 2.820_08).abs() < 1e-5);
///
/// let loss = sum / 2.0;
/// let gradients = loss.backward();
/// let gradient = hidden.grad(&gradients).unwrap().into_data();
/// // Nothing is asked of the row that is left out.
/// assert_eq!(gradient.try_to_vec::<f32>().unwrap()[4..], [0.0, 0.0]);
/// ```
pub fn linear_cross_entropy(hidden: Tensor<2>, head: Tensor<2>, labels: &[i64]) -> Tensor<1> {
    linear_cross_entropy_with(hidden, head, labels, LossSpec::default())
}

/// [`linear_cross_entropy`] against smoothed labels: with smoothing s, a row's loss is
/// `(1 − s)·(−log p[label]) + s/vocabulary · Σ (−log p)`, as PyTorch's `F.cross_entropy` has it with
/// `label_smoothing=s` and `reduction="sum"` (Szegedy et al. 2015, arXiv:1512.00567, section 7).
///
/// # Shapes
/// As in [`linear_cross_entropy`].
///
/// # Panics
/// If a label lies outside the vocabulary, or the smoothing outside `[0, 1]`.
pub fn linear_cross_entropy_with(
    hidden: Tensor<2>,
    head: Tensor<2>,
    labels: &[i64],
    spec: LossSpec,
) -> Tensor<1> {
    assert!(
        (0.0..=1.0).contains(&spec.label_smoothing),
        "linear_cross_entropy: label_smoothing is {}; it is a share, from 0 to 1",
        spec.label_smoothing,
    );
    if hidden.on_flex() && weight_on_flex(&head) {
        cpu::linear_cross_entropy(hidden, head, labels, spec)
    } else {
        note_fallback("linear_cross_entropy", &[&hidden, &head]);
        reference::linear_cross_entropy(hidden, head, labels, spec)
    }
}

/// `log softmax(hidden · headᵀ)[label]` per row, 0 where the label is negative. No gradient.
///
/// # Shapes
/// - hidden: `[rows, hidden]`, head: `[vocabulary, hidden]`, f32 or bf16, labels: `rows` of them, result:
///   `[rows]`
///
/// # Panics
/// If a label lies outside the vocabulary.
pub fn token_log_probs(hidden: Tensor<2>, head: Tensor<2>, labels: &[i64]) -> Tensor<1> {
    if hidden.on_flex() && weight_on_flex(&head) {
        cpu::token_log_probs(hidden, head, labels)
    } else {
        note_fallback("token_log_probs", &[&hidden, &head]);
        reference::token_log_probs(hidden, head, labels)
    }
}
