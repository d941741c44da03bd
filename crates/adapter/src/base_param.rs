//! The weight of a base's linear layer or embedding as a module keeps it: f32 or bf16 while it is frozen,
//! f32 once it is trained.

use burn::module::{Module, Param};
use burn::tensor::{Device, Int, Tensor, module::embedding};
use enamel_kernels::base_weight::widened;
use enamel_kernels::{BaseWeight, Compute};

use crate::frozen::frozen_param;

/// A matrix `[out, in]`, and what products with it round their factors to. The one place that knows in
/// which form it is held: everything else asks for [`Self::get`] to multiply with it and for
/// [`Self::dense`] to compute with its values.
#[derive(Module, Debug)]
pub struct BaseParam {
    values: Param<Tensor<2>>,
    #[module(skip)]
    compute: Compute,
}

impl BaseParam {
    /// Frozen; `name` is the full parameter name and decides the parameter's id.
    pub fn new(name: &str, weight: BaseWeight) -> Self {
        Self {
            values: frozen_param(name, weight.values()),
            compute: weight.compute(),
        }
    }

    /// Rows (outputs) and columns (inputs).
    pub fn dims(&self) -> [usize; 2] {
        self.values.dims()
    }

    /// Where it is.
    pub fn device(&self) -> Device {
        self.values.val().device()
    }

    /// What products multiply with.
    pub fn get(&self) -> BaseWeight {
        BaseWeight::new(self.values.val(), self.compute)
    }

    /// The values in f32: the parameter's own tensor, or a widened copy of it.
    pub fn dense(&self) -> Tensor<2> {
        widened(self.values.val())
    }

    /// What products round their factors to.
    pub fn compute(&self) -> Compute {
        self.compute
    }

    /// The parameter, where it is one that is trained.
    pub(crate) fn param(&self) -> &Param<Tensor<2>> {
        &self.values
    }

    /// The same, to change it.
    pub(crate) fn param_mut(&mut self) -> &mut Param<Tensor<2>> {
        &mut self.values
    }

    /// Makes it a parameter in f32 that is trained, or only could be.
    pub(crate) fn widen(&mut self, trainable: bool) {
        let wide = self.values.clone().map(widened);
        self.values = wide.set_require_grad(trainable);
    }

    pub(crate) fn set_frozen(&mut self) {
        self.values = self.values.clone().no_grad();
    }

    /// The same parameter with other values, out of the graph.
    pub(crate) fn with_values(&self, values: Tensor<2>) -> Self {
        Self {
            values: self.values.clone().map(|_| values),
            compute: self.compute,
        }
    }
}

/// Rows of a table by token, `[batch, tokens, hidden]` in f32: a table in bf16 is not widened as a whole.
pub(crate) fn rows_of(table: &BaseWeight, ids: Tensor<2, Int>) -> Tensor<3> {
    widened(embedding(table.values(), ids))
}

/// Whether f32 `values` are the weight's, or would be once they are rounded as it was.
pub(crate) fn are_rounded(values: &[f32], weight: &BaseParam, held: &[f32]) -> bool {
    let rounded = |value: f32| enamel_kernels::base_weight::rounded(value);
    weight.compute == Compute::Bf16
        && values.len() == held.len()
        && values.iter().zip(held).all(|(v, h)| rounded(*v) == *h)
}
