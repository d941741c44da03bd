//! The linear layer that adapters attach to.

use burn::module::{Module, Param};
use burn::tensor::Tensor;

use crate::frozen::frozen_param;

/// `y = x·Wᵀ + b` with a frozen base and, once attached, an adapter beside it.
#[derive(Module, Debug)]
pub struct Linear {
    /// Base weight `[out, in]`, as in Hugging Face files.
    pub weight: Param<Tensor<2>>,
    /// Base bias `[out]`.
    pub bias: Option<Param<Tensor<1>>>,
}

impl Linear {
    /// Wraps loaded tensors. `name` is the module's path (`model.layers.0.self_attn.q_proj`).
    pub fn new(name: &str, weight: Tensor<2>, bias: Option<Tensor<1>>) -> Self {
        Self {
            weight: frozen_param(&format!("{name}.weight"), weight),
            bias: bias.map(|b| frozen_param(&format!("{name}.bias"), b)),
        }
    }

    /// Applies the layer over the last axis: `[..., in]` to `[..., out]`.
    pub fn forward<const D: usize>(&self, x: Tensor<D>) -> Tensor<D> {
        let mut dims = x.dims();
        let [out, width] = self.weight.dims();
        let rows = x.shape().num_elements() / width;
        // Two axes: a batched product would read the weight again for every batch row.
        let mut y = enamel_kernels::linear(x.reshape([rows, width]), self.weight.val());
        if let Some(bias) = &self.bias {
            y = y + bias.val().unsqueeze();
        }
        dims[D - 1] = out;
        y.reshape(dims)
    }
}
