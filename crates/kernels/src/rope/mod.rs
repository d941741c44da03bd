//! Rotary position embedding, rotate-half form (as in Hugging Face Llama).

pub(crate) mod cpu;
pub(crate) mod reference;
#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests;

use burn::tensor::Tensor;

use crate::cpu::storage::{OnFlex, note_fallback};

/// Rotates each head's halves: `y1 = x1·cos − x2·sin`, `y2 = x2·cos + x1·sin`, where `x1`, `x2` are
/// the first and second half of the last axis. The tables are constants: they get no gradient.
///
/// # Shapes
/// - x, result: `[batch, tokens, heads, head_dim]`
/// - cos, sin: `[tokens, head_dim / 2]`, one row a position (any attention scaling already in them), or
///   `[batch·tokens, head_dim / 2]` where batch rows have positions of their own
pub fn rope(x: Tensor<4>, cos: Tensor<2>, sin: Tensor<2>) -> Tensor<4> {
    if x.on_flex() && cos.on_flex() && sin.on_flex() {
        cpu::rope(x, cos, sin)
    } else {
        note_fallback("rope", &[&x, &cos, &sin]);
        reference::rope(x, cos, sin)
    }
}
