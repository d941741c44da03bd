//! Rotary position embedding, rotate-half form (as in Hugging Face Llama).

mod reference;

use burn::tensor::Tensor;

/// Rotates each head's halves: `y1 = x1·cos − x2·sin`, `y2 = x2·cos + x1·sin`, where `x1`, `x2` are
/// the first and second half of the last axis.
///
/// # Shapes
/// - x, result: `[batch, tokens, heads, head_dim]`
/// - cos, sin: `[tokens, head_dim / 2]`, one row a position (any attention scaling already in them)
pub fn rope(x: Tensor<4>, cos: Tensor<2>, sin: Tensor<2>) -> Tensor<4> {
    reference::rope(x, cos, sin)
}
