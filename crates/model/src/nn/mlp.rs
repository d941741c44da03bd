//! The gated MLP.

use burn::module::Module;
use burn::tensor::Tensor;
use enamel_adapter::{Linear, slots};
use enamel_kernels::{Projection, silu_mul};

/// SwiGLU: `down(silu(gate(x)) · up(x))`.
#[derive(Module, Debug)]
pub struct Mlp {
    /// `gate_proj` `[intermediate, hidden]`.
    pub gate_proj: Linear,
    /// `up_proj` `[intermediate, hidden]`.
    pub up_proj: Linear,
    /// `down_proj` `[hidden, intermediate]`.
    pub down_proj: Linear,
}

slots!(Mlp {
    gate_proj,
    up_proj,
    down_proj
});

/// An MLP's layers as the fused operations take them.
pub(crate) struct MlpProjections {
    pub(crate) gate_up: Vec<Projection>,
    pub(crate) down: Projection,
}

impl Mlp {
    pub(crate) fn forward(&self, x: Tensor<3>) -> Tensor<3> {
        let gate = self.gate_proj.forward(x.clone());
        self.down_proj
            .forward(silu_mul(gate, self.up_proj.forward(x)))
    }

    pub(crate) fn fused(&self) -> Option<MlpProjections> {
        Some(MlpProjections {
            gate_up: vec![self.gate_proj.fused()?, self.up_proj.fused()?],
            down: self.down_proj.fused()?,
        })
    }
}
