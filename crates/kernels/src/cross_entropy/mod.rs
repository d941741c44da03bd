//! Head product and cross-entropy in one, so that logits of a whole batch never exist at once.

mod reference;

use burn::tensor::Tensor;

/// Sum over rows of `−log softmax(hidden · headᵀ)[label]`, rows with a negative label left out.
/// Divide by the number of trained tokens yourself: gradient accumulation needs the sum.
///
/// # Shapes
/// - hidden: `[rows, hidden]`, head: `[vocabulary, hidden]`, labels: `rows` of them, result: `[1]`
pub fn linear_cross_entropy(hidden: Tensor<2>, head: Tensor<2>, labels: &[i64]) -> Tensor<1> {
    reference::linear_cross_entropy(hidden, head, labels)
}

/// `log softmax(hidden · headᵀ)[label]` per row, 0 where the label is negative. No gradient.
///
/// # Shapes
/// - hidden: `[rows, hidden]`, head: `[vocabulary, hidden]`, labels: `rows` of them, result: `[rows]`
pub fn token_log_probs(hidden: Tensor<2>, head: Tensor<2>, labels: &[i64]) -> Tensor<1> {
    reference::token_log_probs(hidden, head, labels)
}
