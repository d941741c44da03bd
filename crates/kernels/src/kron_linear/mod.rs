//! A frozen linear map with a Kronecker product beside it, as LoKr adapters have.

mod cpu;
mod factors;
mod reference;
mod tile;
#[cfg(target_arch = "x86_64")]
mod x86;

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests;

use burn::tensor::Tensor;

use crate::base_weight::{BaseWeight, Held};
use crate::cpu::storage::{OnFlex, note_fallback, weight_on_flex};

/// `y = x · wᵀ + scale · x · kron(w1, w2)ᵀ`, without the Kronecker product: with a row of x as
/// `X: [m, n]`, the adapter's part of the same row of y is `w1 · X · w2ᵀ: [l, k]`
/// (LoKr, LyCORIS, arXiv 2309.14859, with the identity `(A ⊗ B) vec(X) = vec(A X Bᵀ)` for row-major
/// `vec`).
///
/// # Shapes
/// - x: `[rows, in]`, w: `[out, in]`, w1: `[l, m]`, w2: `[k, n]`, with `l·k = out` and `m·n = in`;
///   result: `[rows, out]`
///
/// # Panics
/// If the shapes do not fit together.
pub fn kron_linear(
    x: Tensor<2>,
    w: impl Into<BaseWeight>,
    w1: Tensor<2>,
    w2: Tensor<2>,
    scale: f64,
) -> Tensor<2> {
    let w = w.into();
    let ([_, input], [out, _]) = (x.dims(), w.dims());
    let ([l, m], [k, n]) = (w1.dims(), w2.dims());
    assert!(
        w.dims()[1] == input && m * n == input && l * k == out,
        "kron_linear: x {:?}, w {:?} and kron({:?}, {:?}) do not fit; the products of the factors' \
         rows and columns must be w's",
        x.dims(),
        w.dims(),
        w1.dims(),
        w2.dims(),
    );
    let rest = x.on_flex() && w1.on_flex() && w2.on_flex();
    match w.matrix() {
        Held::Dense(dense) if rest && weight_on_flex(dense) => {
            cpu::kron_linear(x, Some(dense.clone()), w1, w2, scale, w.compute())
        }
        // The base and the factors are an operation each.
        Held::Packed(_) => {
            let compute = w.compute();
            let base = crate::linear(x.clone(), w);
            base + match rest {
                true => cpu::kron_linear(x, None, w1, w2, scale, compute),
                false => reference::part(x, w1, w2, scale),
            }
        }
        Held::Dense(dense) => {
            note_fallback("kron_linear", &[&x, dense, &w1, &w2]);
            reference::kron_linear(x, w.dense(), w1, w2, scale)
        }
    }
}

/// The Kronecker product itself, in plain Burn operations, for merging:
/// `result[i·k + p, j·n + q] = w1[i, j] · w2[p, q]`.
///
/// # Shapes
/// - w1: `[l, m]`, w2: `[k, n]`, result: `[l·k, m·n]`
pub fn kron(w1: Tensor<2>, w2: Tensor<2>) -> Tensor<2> {
    reference::kron(w1, w2)
}
