//! The weight of a base's linear layer or embedding as a module keeps it: f32 or bf16 while it is frozen,
//! f32 once it is trained.

use burn::module::{Module, Param};
use burn::tensor::{Device, Int, Tensor};
use enamel_kernels::base_weight::widened;
use enamel_kernels::{BaseWeight, Compute, Held, Matrix, PackedWeight, embedding};

use crate::base::ids::frozen_param;

/// A matrix `[out, in]`, and what products with it round their factors to. The one place that knows in
/// which form it is held: everything else asks for [`Self::get`] to multiply with it and for
/// [`Self::dense`] to compute with its values.
#[derive(Module, Debug)]
pub struct BaseParam {
    /// The values, unless they are packed.
    values: Option<Param<Tensor<2>>>,
    #[module(skip)]
    packed: Option<PackedWeight>,
    #[module(skip)]
    compute: Compute,
}

impl BaseParam {
    /// Frozen; `name` is the full parameter name and decides the parameter's id.
    pub fn new(name: &str, weight: BaseWeight) -> Self {
        let compute = weight.compute();
        match weight.matrix().clone() {
            Held::Dense(values) => Self {
                values: Some(frozen_param(name, values)),
                packed: None,
                compute,
            },
            Held::Packed(packed) => Self {
                values: None,
                packed: Some(packed),
                compute,
            },
        }
    }

    fn matrix(&self) -> Matrix {
        match (&self.values, &self.packed) {
            (Some(values), _) => Held::Dense(values.val()),
            (None, Some(packed)) => Held::Packed(packed.clone()),
            (None, None) => unreachable!("a base parameter has values or is packed"),
        }
    }

    /// Rows (outputs) and columns (inputs).
    pub fn dims(&self) -> [usize; 2] {
        match &self.values {
            Some(values) => values.dims(),
            None => self.matrix().dims(),
        }
    }

    /// Where it is.
    pub fn device(&self) -> Device {
        self.matrix().device()
    }

    /// What products multiply with.
    pub fn get(&self) -> BaseWeight {
        BaseWeight::new(self.matrix(), self.compute)
    }

    /// The quantised values, if it is packed.
    pub fn packed(&self) -> Option<&PackedWeight> {
        self.packed.as_ref()
    }

    /// The values in f32: the parameter's own tensor, or a widened copy of it.
    pub fn dense(&self) -> Tensor<2> {
        self.matrix().dense()
    }

    /// What products round their factors to.
    pub fn compute(&self) -> Compute {
        self.compute
    }

    /// The parameter, where it is one that could be trained: a packed one could not.
    pub(crate) fn param(&self) -> Option<&Param<Tensor<2>>> {
        self.values.as_ref()
    }

    /// The same, to change it.
    pub(crate) fn param_mut(&mut self) -> Option<&mut Param<Tensor<2>>> {
        self.values.as_mut()
    }

    /// Makes it a parameter in f32 that is trained, or only could be. A packed one stays as it is: what
    /// trains whole bases refuses it beforehand.
    pub(crate) fn widen(&mut self, trainable: bool) {
        if let Some(values) = self.values.take() {
            self.values = Some(values.map(widened).set_require_grad(trainable));
        }
    }

    pub(crate) fn set_frozen(&mut self) {
        self.values = self.values.take().map(Param::no_grad);
    }

    /// The same parameter with other values, out of the graph; dense from now on. `name` is as in
    /// [`Self::new`].
    pub(crate) fn with_values(&self, name: &str, values: Tensor<2>) -> Self {
        let values = match &self.values {
            Some(held) => held.clone().map(|_| values),
            None => frozen_param(name, values),
        };
        Self {
            values: Some(values),
            packed: None,
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
