//! DoRA's linear map in plain Burn operations.

use burn::tensor::Tensor;

use crate::base_weight::{BaseWeight, Held};
use crate::quantized_linear::values_linear;

pub(super) fn dora_linear(
    x: Tensor<2>,
    w: impl Into<BaseWeight>,
    a: Tensor<2>,
    b: Tensor<2>,
    magnitude: Tensor<1>,
    base_squares: Tensor<1>,
    scale: f64,
) -> Tensor<2> {
    let w = w.into();
    let lengths = lengths(
        w.clone(),
        untracked(a.clone()),
        untracked(b.clone()),
        untracked(base_squares),
        scale,
    );
    let factor: Tensor<2> = (magnitude / lengths).unsqueeze();
    crate::lora_linear(x, w, a, b, scale) * factor
}

/// Lengths of the rows of `w + scale · b·a`, `[out]`.
fn lengths(
    w: BaseWeight,
    a: Tensor<2>,
    b: Tensor<2>,
    base_squares: Tensor<1>,
    scale: f64,
) -> Tensor<1> {
    let [out, _] = w.dims();
    // `[r, out]`: few rows times the weight, which is read once. They are weights and no input: LLM.int8() would
    // round them.
    let across = match w.matrix() {
        Held::Dense(dense) => crate::linear(a.clone(), untracked(dense.clone())),
        Held::Packed(packed) => values_linear(a.clone(), packed.clone(), w.compute()),
    };
    let across = across.transpose();
    let gram = a.clone().matmul(a.transpose());
    let both = across.mul_scalar(2.0 * scale) + b.clone().matmul(gram).mul_scalar(scale * scale);
    let squares = base_squares + (both * b).sum_dim(1).reshape([out]);
    // Rounding may leave a row of zeros slightly below zero.
    squares.clamp_min(0.0).sqrt()
}

/// Out of the graph: a leaf that is trained stays one when it is detached.
fn untracked<const D: usize>(tensor: Tensor<D>) -> Tensor<D> {
    tensor.detach().set_require_grad(false)
}
