//! A frozen linear map with a low-rank adapter beside it and a learnt length for every row of their
//! sum, as DoRA has.

mod cpu;
mod reference;
#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests;

use burn::tensor::Tensor;

use crate::base_weight::{BaseWeight, Held};
use crate::cpu::storage::{OnFlex, note_fallback, weight_on_flex};

/// `y = f ∘ (x · wᵀ + scale · (x · aᵀ) · bᵀ)` with `f = magnitude / ‖w + scale · b·a‖`, row by row. The
/// length of a row is a constant in the backward pass (DoRA, Liu et al. 2024, arXiv:2402.09353, section
/// 4.3), and the sum of the weights is never formed: for a row w and its b,
/// `‖w + s·b·a‖² = ‖w‖² + 2s·(w·aᵀ)·b + s²·b·(a·aᵀ)·b`.
///
/// # Shapes
/// - x: `[rows, in]`, w: `[out, in]`, a: `[r, in]`, b: `[out, r]`, magnitude: `[out]`
/// - base_squares: `[out]`, the squared lengths of w's rows, which get no gradient
/// - result: `[rows, out]`
///
/// # Panics
/// If the shapes do not fit together.
pub fn dora_linear(
    x: Tensor<2>,
    w: impl Into<BaseWeight>,
    a: Tensor<2>,
    b: Tensor<2>,
    magnitude: Tensor<1>,
    base_squares: Tensor<1>,
    scale: f64,
) -> Tensor<2> {
    let w = w.into();
    let ([_, input], [out, _], [r, _]) = (x.dims(), w.dims(), a.dims());
    assert!(
        w.dims()[1] == input
            && a.dims()[1] == input
            && b.dims() == [out, r]
            && magnitude.dims() == [out]
            && base_squares.dims() == [out],
        "dora_linear: x {:?}, w {:?}, a {:?}, b {:?}, magnitude {:?} and base_squares {:?} do not fit; \
         a has w's columns, b, magnitude and base_squares w's rows",
        x.dims(),
        w.dims(),
        a.dims(),
        b.dims(),
        magnitude.dims(),
        base_squares.dims(),
    );
    let rest =
        [&x, &a, &b].iter().all(|t| t.on_flex()) && magnitude.on_flex() && base_squares.on_flex();
    match w.matrix() {
        Held::Dense(dense) if rest && weight_on_flex(dense) => {
            let compute = w.compute();
            let dense = dense.clone();
            cpu::dora_linear(x, dense, a, b, magnitude, base_squares, scale, compute)
        }
        // Of the operations that make it up, each reads the packed rows.
        Held::Packed(_) => reference::dora_linear(x, w, a, b, magnitude, base_squares, scale),
        Held::Dense(dense) => {
            let tensors: [&dyn OnFlex; 6] = [&x, dense, &a, &b, &magnitude, &base_squares];
            note_fallback("dora_linear", &tensors);
            reference::dora_linear(x, w.dense(), a, b, magnitude, base_squares, scale)
        }
    }
}
