//! Head product and cross-entropy in one, so that logits of a whole batch never exist at once.

mod cpu;
mod reference;
#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests;

use burn::tensor::Tensor;

use crate::cpu::storage::OnFlex;

/// Sum over rows of `−log softmax(hidden · headᵀ)[label]`, rows with a negative label left out.
/// Divide by the number of trained tokens yourself: gradient accumulation needs the sum.
///
/// # Shapes
/// - hidden: `[rows, hidden]`, head: `[vocabulary, hidden]`, labels: `rows` of them, result: `[1]`
pub fn linear_cross_entropy(hidden: Tensor<2>, head: Tensor<2>, labels: &[i64]) -> Tensor<1> {
    if hidden.on_flex() && head.on_flex() {
        cpu::linear_cross_entropy(hidden, head, labels)
    } else {
        reference::linear_cross_entropy(hidden, head, labels)
    }
}

/// `log softmax(hidden · headᵀ)[label]` per row, 0 where the label is negative. No gradient.
///
/// # Shapes
/// - hidden: `[rows, hidden]`, head: `[vocabulary, hidden]`, labels: `rows` of them, result: `[rows]`
pub fn token_log_probs(hidden: Tensor<2>, head: Tensor<2>, labels: &[i64]) -> Tensor<1> {
    if hidden.on_flex() && head.on_flex() {
        cpu::token_log_probs(hidden, head, labels)
    } else {
        reference::token_log_probs(hidden, head, labels)
    }
}
