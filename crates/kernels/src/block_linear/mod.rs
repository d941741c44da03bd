//! The linear layers of a transformer block with what stands before and after them: the norm or the gated
//! activation of their input, the adapters beside them, the residual stream that takes their output.
//!
//! Each function is one node of the autodiff graph. What it keeps for the backward pass is its input as it
//! came, a number a row and the adapters' inner activations; the normalised or gated input is made twice and
//! never kept.

mod autodiff;
mod backward;
mod forward;
mod operands;
mod reference;
mod rows;
#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests;

use burn::tensor::Tensor;

use crate::base_weight::{Matrix, matrix_on_flex};
use crate::cpu::dropout::Dropout;
use crate::cpu::gemm::Compute;
use crate::cpu::storage::{OnFlex, is_flex};
use crate::quantized_linear::rounds_input;

/// Projections that one call takes: a node of the graph has a fixed number of parents.
const MOST_PROJECTIONS: usize = 3;

/// A norm over the input's columns: `x / sqrt(mean(x²) + eps) · weight`.
#[derive(Clone, Debug)]
pub struct Norm {
    /// `[in]`
    pub weight: Tensor<1>,
    /// Added to the mean square.
    pub eps: f64,
}

/// A linear map, alone or with a low-rank adapter: `x · weightᵀ + bias + scale · (drop(x) · aᵀ) · bᵀ`.
#[derive(Clone, Debug)]
pub struct Projection {
    /// `[out, in]`, f32, bf16 or packed.
    pub weight: Matrix,
    /// `[out]`
    pub bias: Option<Tensor<1>>,
    /// The adapter.
    pub lora: Option<LowRank>,
}

/// The factors of a low-rank adapter.
#[derive(Clone, Debug)]
pub struct LowRank {
    /// `[r, in]`
    pub a: Tensor<2>,
    /// `[out, r]`
    pub b: Tensor<2>,
    /// The factor in front of their product.
    pub scale: f64,
    /// On the adapter's input alone.
    pub dropout: Option<Dropout>,
}

impl Projection {
    /// Whether the weight or the bias gets a gradient; the separate operations are for that.
    pub fn trains_base(&self) -> bool {
        self.weight.is_tracked() || self.bias.as_ref().is_some_and(|bias| bias.is_tracked())
    }

    /// Whether the fused operations take it. LLM.int8() rounds what its rows are multiplied with, and the
    /// adapter sees the input as it is: that takes two operations.
    pub(crate) fn fuses(&self) -> bool {
        let factors = self.lora.as_ref();
        matrix_on_flex(&self.weight)
            && !rounds_input(&self.weight)
            && !self.trains_base()
            && self.bias.as_ref().is_none_or(OnFlex::on_flex)
            && factors.is_none_or(|lora| lora.a.on_flex() && lora.b.on_flex())
    }
}

/// Whether the fused operations take rows that lie as `x` does; elsewhere the separate operations are as
/// good or better.
pub fn fuses<const D: usize>(x: &Tensor<D>) -> bool {
    x.on_flex()
}

/// Several linear maps of one input, which is normalised first where a norm is given. The results lie side
/// by side in the order of the projections.
///
/// Weights, biases and the norm are frozen in the fused implementation; where one is tracked, the separate
/// operations run.
///
/// # Shapes
/// - x: `[rows, in]`, result: `[rows, Σ out]`
pub fn project(
    x: Tensor<2>,
    norm: Option<Norm>,
    projections: Vec<Projection>,
    compute: Compute,
) -> Tensor<2> {
    let frozen = norm
        .as_ref()
        .is_none_or(|n| n.weight.on_flex() && !n.weight.is_tracked());
    if takes("project", &x, &projections, None) && frozen {
        autodiff::project(x, norm, projections, compute)
    } else {
        reference::project(x, norm, projections)
    }
}

/// A linear map added to the residual stream.
///
/// # Shapes
/// - x: `[rows, in]`, residual, result: `[rows, out]`
pub fn project_add(
    x: Tensor<2>,
    projection: Projection,
    residual: Tensor<2>,
    compute: Compute,
) -> Tensor<2> {
    let projections = vec![projection];
    if takes("project_add", &x, &projections, Some(&residual)) {
        autodiff::project_add(x, projections, residual, compute)
    } else {
        reference::project(x, None, projections) + residual
    }
}

/// The second half of a SwiGLU: `silu(gate) · up`, mapped and added to the residual stream where there is
/// one.
///
/// # Shapes
/// - gate_up: `[rows, 2 · in]`, gate in the first half of each row
/// - residual, result: `[rows, out]`
pub fn swiglu_project(
    gate_up: Tensor<2>,
    projection: Projection,
    residual: Option<Tensor<2>>,
    compute: Compute,
) -> Tensor<2> {
    let projections = vec![projection];
    if takes("swiglu_project", &gate_up, &projections, residual.as_ref()) {
        return autodiff::swiglu_project(gate_up, projections, residual, compute);
    }
    let y = reference::swiglu_project(gate_up, projections);
    match residual {
        Some(residual) => y + residual,
        None => y,
    }
}

fn takes(
    op: &'static str,
    x: &Tensor<2>,
    projections: &[Projection],
    residual: Option<&Tensor<2>>,
) -> bool {
    let whole = x.on_flex() && residual.is_none_or(|r| r.on_flex());
    let count = (1..=MOST_PROJECTIONS).contains(&projections.len());
    let takes = whole && count && projections.iter().all(Projection::fuses);
    if !takes && is_flex(&x.device()) {
        crate::profile::fallback(op, || {
            let trains = projections.iter().any(Projection::trains_base);
            let reason = match (whole, count, trains) {
                (false, ..) => "no kernel for the input's type, or none is to be used",
                (true, false, _) => "too many projections",
                (true, true, true) => "the base is trained",
                (true, true, false) => "no kernel for a weight's type or device",
            };
            reason.to_string()
        });
    }
    takes
}
