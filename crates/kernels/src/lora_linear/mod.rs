//! A frozen linear map, alone and with a low-rank adapter beside it.

pub(crate) mod cpu;
mod dropped;
mod reference;
#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests;

use burn::tensor::{DType, Tensor};

use crate::base_weight::{BaseWeight, Held, matrix_on_flex};
use crate::block_linear::{LowRank, Projection, project};
use crate::cpu::dropout::Dropout;
use crate::cpu::gemm::Compute;
use crate::cpu::storage::{OnFlex, weight_on_flex};
use crate::quantized_linear::packed_linear;

/// `y = x · wᵀ`. Where the weight asks for bf16 products, both factors are rounded to bf16, forward and for
/// the gradient of x; up to four rows are multiplied as they are, since reading w takes the time then.
///
/// # Shapes
/// - x: `[rows, in]`, w: `[out, in]` (Hugging Face order), result: `[rows, out]`
pub fn linear(x: Tensor<2>, w: impl Into<BaseWeight>) -> Tensor<2> {
    let w = w.into();
    match w.matrix() {
        Held::Dense(dense) if x.on_flex() && weight_on_flex(dense) => {
            cpu::linear(x, dense.clone(), w.compute())
        }
        Held::Packed(packed) if x.dtype() == DType::F32 => {
            packed_linear(x, packed.clone(), w.compute())
        }
        _ => {
            no_kernel("linear", &x, &w);
            reference::linear(x, w.dense())
        }
    }
}

/// `y = x · wᵀ + scale · ((x · aᵀ) · bᵀ)`, in activation space: `w + scale · b·a` is never formed.
///
/// # Shapes
/// - x: `[rows, in]`, w: `[out, in]`, a: `[r, in]`, b: `[out, r]`, result: `[rows, out]`
pub fn lora_linear(
    x: Tensor<2>,
    w: impl Into<BaseWeight>,
    a: Tensor<2>,
    b: Tensor<2>,
    scale: f64,
) -> Tensor<2> {
    let w = w.into();
    let takes = x.on_flex() && matrix_on_flex(w.matrix()) && a.on_flex() && b.on_flex();
    match w.matrix() {
        Held::Dense(dense) if takes => cpu::lora_linear(x, dense.clone(), a, b, scale, w.compute()),
        Held::Packed(_) if x.dtype() == DType::F32 => packed(x, w, a, b, scale, None),
        _ => {
            no_kernel("lora", &x, &w);
            reference::lora_linear(x, w.dense(), a, b, scale)
        }
    }
}

/// [`lora_linear`] with dropout on the adapter's input; the base sees all of x. The mask is a
/// function of the seed and the position alone.
///
/// # Shapes
/// - x: `[rows, in]`, w: `[out, in]`, a: `[r, in]`, b: `[out, r]`, result: `[rows, out]`
pub fn lora_linear_dropout(
    x: Tensor<2>,
    w: impl Into<BaseWeight>,
    a: Tensor<2>,
    b: Tensor<2>,
    scale: f64,
    dropout: Dropout,
) -> Tensor<2> {
    if dropout.probability <= 0.0 {
        return lora_linear(x, w, a, b, scale);
    }
    let w = w.into();
    let takes = x.on_flex() && matrix_on_flex(w.matrix()) && a.on_flex() && b.on_flex();
    match w.matrix() {
        Held::Dense(dense) if takes => {
            dropped::lora_linear_dropout(x, dense.clone(), a, b, scale, dropout, w.compute())
        }
        Held::Packed(_) if x.dtype() == DType::F32 => packed(x, w, a, b, scale, Some(dropout)),
        _ => {
            no_kernel("lora with dropout", &x, &w);
            reference::lora_linear_dropout(x, w.dense(), a, b, scale, dropout)
        }
    }
}

/// `scale · (drop(x) · aᵀ) · bᵀ`, what a low-rank adapter adds to a map.
///
/// # Shapes
/// - x: `[rows, in]`, a: `[r, in]`, b: `[out, r]`, result: `[rows, out]`
fn low_rank(
    x: Tensor<2>,
    a: Tensor<2>,
    b: Tensor<2>,
    scale: f64,
    dropout: Option<Dropout>,
    compute: Compute,
) -> Tensor<2> {
    let x = match dropout {
        Some(dropout) => reference::dropped(x, dropout),
        None => x,
    };
    let low = linear(x, BaseWeight::new(a, compute)).mul_scalar(scale);
    linear(low, BaseWeight::new(b, compute))
}

/// The map with a packed weight: in one operation where the fused ones read it as it lies, in two elsewhere.
fn packed(
    x: Tensor<2>,
    w: BaseWeight,
    a: Tensor<2>,
    b: Tensor<2>,
    scale: f64,
    dropout: Option<Dropout>,
) -> Tensor<2> {
    let lora = LowRank {
        a,
        b,
        scale,
        dropout,
    };
    let projection = Projection {
        weight: w.matrix().clone(),
        bias: None,
        lora: Some(lora.clone()),
    };
    if x.on_flex() && projection.fuses() {
        return project(x, None, vec![projection], w.compute());
    }
    let LowRank { a, b, .. } = lora;
    linear(x.clone(), w.clone()) + low_rank(x, a, b, scale, dropout, w.compute())
}

/// Notes in the profile that the reference computes what no kernel takes.
fn no_kernel(op: &'static str, x: &Tensor<2>, w: &BaseWeight) {
    crate::profile::fallback(op, || {
        let path = crate::CpuPath::chosen();
        let (x, w) = (x.dtype().name(), w.matrix().kind());
        format!("{x} times {w} on this device, path {}", path.name())
    });
}
