//! GELU, alone and times a second input as gated feed-forward layers have it.

mod cpu;
mod reference;
#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests;

use burn::tensor::Tensor;

use crate::cpu::storage::{OnFlex, note_fallback};

/// Which GELU, by the names of `hidden_act` in a model's `config.json`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum GeluKind {
    /// `"gelu"`: `x · Φ(x)`, with the normal distribution function itself.
    Gelu,
    /// `"gelu_pytorch_tanh"`: `x/2 · (1 + tanh(√(2/π) · (x + 0.044715·x³)))`.
    GeluPytorchTanh,
}

impl GeluKind {
    /// Both.
    pub const ALL: [Self; 2] = [Self::Gelu, Self::GeluPytorchTanh];

    /// Its name in `config.json`.
    pub fn name(self) -> &'static str {
        match self {
            Self::Gelu => "gelu",
            Self::GeluPytorchTanh => "gelu_pytorch_tanh",
        }
    }

    /// The one that `config.json` calls so.
    pub fn named(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|kind| kind.name() == name)
    }
}

/// `gelu(x)`, elementwise (Hendrycks and Gimpel 2016, arXiv:1606.08415). An infinite x has a NaN as its
/// gradient, as in the composed form.
///
/// # Shapes
/// - x, result: `[...]`
pub fn gelu<const D: usize>(x: Tensor<D>, kind: GeluKind) -> Tensor<D> {
    if x.on_flex() {
        cpu::gelu(x, kind)
    } else {
        note_fallback("gelu", &[&x]);
        reference::gelu(x, kind)
    }
}

/// `gelu(gate) · up`, elementwise.
///
/// # Shapes
/// - gate, up, result: `[...]`, all alike
///
/// # Panics
/// If the shapes differ.
pub fn gelu_mul<const D: usize>(gate: Tensor<D>, up: Tensor<D>, kind: GeluKind) -> Tensor<D> {
    assert!(
        gate.dims() == up.dims(),
        "gelu_mul: gate {:?} and up {:?} must have the same shape",
        gate.dims(),
        up.dims(),
    );
    if gate.on_flex() && up.on_flex() {
        cpu::gelu_mul(gate, up, kind)
    } else {
        note_fallback("gelu_mul", &[&gate, &up]);
        reference::gelu(gate, kind) * up
    }
}
