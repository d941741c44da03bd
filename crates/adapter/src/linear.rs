//! The linear layer that adapters attach to.

use burn::module::{Module, Param};
use burn::tensor::Tensor;

use crate::frozen::frozen_param;
use crate::methods::Adapter;

/// `y = x·Wᵀ + b` with a frozen base and, once attached, an adapter beside it.
#[derive(Module, Debug)]
pub struct Linear {
    /// Base weight `[out, in]`, as in Hugging Face files.
    pub weight: Param<Tensor<2>>,
    /// Base bias `[out]`.
    pub bias: Option<Param<Tensor<1>>>,
    /// The adapter, when this layer is a target.
    pub adapter: Option<Adapter>,
    /// The trained copy, when `modules_to_save` names this layer.
    pub saved: Option<SavedLinear>,
    /// Whether adapter and copy are in use.
    #[module(skip)]
    pub(crate) enabled: bool,
}

/// The trained copy of a linear layer.
#[derive(Module, Debug)]
pub struct SavedLinear {
    /// `[out, in]`
    pub weight: Param<Tensor<2>>,
    /// `[out]`
    pub bias: Option<Param<Tensor<1>>>,
}

impl Linear {
    /// Wraps loaded tensors. `name` is the module's path (`model.layers.0.self_attn.q_proj`).
    pub fn new(name: &str, weight: Tensor<2>, bias: Option<Tensor<1>>) -> Self {
        Self {
            weight: frozen_param(&format!("{name}.weight"), weight),
            bias: bias.map(|b| frozen_param(&format!("{name}.bias"), b)),
            adapter: None,
            saved: None,
            enabled: true,
        }
    }

    /// Applies the layer over the last axis: `[..., in]` to `[..., out]`.
    pub fn forward<const D: usize>(&self, x: Tensor<D>) -> Tensor<D> {
        let mut dims = x.dims();
        let [out, width] = self.weight.dims();
        let rows = x.shape().num_elements() / width;
        // Two axes: a batched product would read the weight again for every batch row.
        let mut y = self.product(x.reshape([rows, width]));
        if let Some(bias) = self.bias_in_use() {
            y = y + bias.unsqueeze();
        }
        dims[D - 1] = out;
        y.reshape(dims)
    }

    /// `x · Wᵀ` with the weights in use, `[rows, in]` to `[rows, out]`.
    fn product(&self, x: Tensor<2>) -> Tensor<2> {
        match (&self.saved, &self.adapter) {
            (Some(saved), _) if self.enabled => enamel_kernels::linear(x, saved.weight.val()),
            (None, Some(adapter)) if self.enabled => adapter.forward(x, self.weight.val()),
            _ => enamel_kernels::linear(x, self.weight.val()),
        }
    }

    /// The weight that `forward` multiplies by, `[out, in]`: the trained copy, or the base plus what the
    /// adapter adds, or the base. Formed anew where there is an adapter; in training, gradients flow
    /// through it.
    pub fn weight_in_use(&self) -> Tensor<2> {
        match (&self.saved, &self.adapter) {
            (Some(saved), _) if self.enabled => saved.weight.val(),
            (None, Some(adapter)) if self.enabled => self.weight.val() + adapter.delta_weight(),
            _ => self.weight.val(),
        }
    }

    /// The bias that `forward` adds, `[out]`.
    pub fn bias_in_use(&self) -> Option<Tensor<1>> {
        match &self.saved {
            Some(saved) if self.enabled => saved.bias.as_ref().map(|b| b.val()),
            _ => self.bias.as_ref().map(|b| b.val()),
        }
    }
}
