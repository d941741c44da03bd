//! What an adapter stands on: the frozen weights of a layer, what a module is, and which adapters are in use.

pub mod base_param;
pub mod ids;
pub mod module_shape;
pub mod routing;

use burn::tensor::Tensor;
use enamel_kernels::BaseWeight;

use crate::error::{AdapterError, Result};

/// Weight and bias of the layer that an adapter is beside.
#[derive(Clone, Debug)]
pub struct Base {
    /// `[out, in]`, with what products round their factors to.
    pub weight: BaseWeight,
    /// `[out]`
    pub bias: Option<Tensor<1>>,
}

impl Base {
    /// `x · Wᵀ + b`, `[rows, in]` to `[rows, out]`.
    pub fn forward(&self, x: Tensor<2>) -> Tensor<2> {
        self.plus_bias(enamel_kernels::linear(x, self.weight.clone()))
    }

    /// Adds the bias, if there is one.
    pub fn plus_bias(&self, y: Tensor<2>) -> Tensor<2> {
        match &self.bias {
            Some(bias) => y + bias.clone().unsqueeze(),
            None => y,
        }
    }
}

/// A tensor's values as f32, row-major.
pub(crate) fn to_host<const D: usize>(name: &str, tensor: Tensor<D>) -> Result<Vec<f32>> {
    tensor
        .try_into_vec_as::<f32>()
        .map_err(|e| AdapterError::Read {
            name: name.to_string(),
            reason: format!("{e:?}"),
        })
}
