//! LoRA beside an embedding: `y = E[id] + s·Aᵀ[id]·Bᵀ`, and its DoRA.
//!
//! As PEFT's `lora.Embedding`: A starts at zero, B is normal, and the table counts as transposed.

use burn::module::{Module, Param};
use burn::tensor::{Int, Tensor, module::embedding};
use enamel_kernels::BaseWeight;

use super::{MAGNITUDE, row_lengths, untracked};
use crate::methods::{ParamMut, ParamRef, Parameters, Placement};
use crate::plan::TargetPlan;

pub(crate) const A: &str = "lora_embedding_A";
pub(crate) const B: &str = "lora_embedding_B";

/// The two factors beside one embedding.
#[derive(Module, Debug)]
pub struct LoraEmbedding {
    /// `[r, vocabulary]`
    pub a: Param<Tensor<2>>,
    /// `[hidden, r]`
    pub b: Param<Tensor<2>>,
    /// DoRA's length of each of the table's columns, `[hidden]`.
    pub magnitude: Option<Param<Tensor<1>>>,
    /// Factor in front of the product.
    #[module(skip)]
    pub scale: f64,
}

/// Names and shapes of an embedding's parameters.
pub(crate) fn parameters(target: &TargetPlan, dora: bool) -> Parameters {
    let (r, rows, width) = (target.r, target.in_features, target.out_features);
    let mut all = vec![(A, vec![r, rows]), (B, vec![width, r])];
    if dora {
        all.push((MAGNITUDE, vec![width]));
    }
    all
}

impl LoraEmbedding {
    pub(crate) fn build(
        target: &TargetPlan,
        values: Vec<Vec<f32>>,
        place: &Placement<'_>,
        dora: bool,
    ) -> Self {
        let (r, rows, width) = (target.r, target.in_features, target.out_features);
        let mut values = values.into_iter();
        let mut next = || values.next().unwrap_or_default();
        Self {
            a: place.param(&target.key(A), next(), [r, rows]),
            b: place.param(&target.key(B), next(), [width, r]),
            magnitude: dora.then(|| place.param(&target.key(MAGNITUDE), next(), [width])),
            scale: target.scale,
        }
    }

    /// Adds the factors' part to `y`, what `table` gave for `ids`.
    ///
    /// # Shapes
    /// - ids: `[batch, tokens]`, y and result: `[batch, tokens, hidden]`, table: `[vocabulary, hidden]`
    pub fn forward(&self, ids: Tensor<2, Int>, y: Tensor<3>, table: &BaseWeight) -> Tensor<3> {
        let own = self.contribution(ids);
        match self.factor(|| table.dense()) {
            Some(factor) => (y + own) * factor.unsqueeze(),
            None => y + own,
        }
    }

    /// What the factors add without DoRA, `[batch, tokens, hidden]`.
    pub(crate) fn contribution(&self, ids: Tensor<2, Int>) -> Tensor<3> {
        let [batch, tokens] = ids.dims();
        let [width, r] = self.b.dims();
        let low: Tensor<3> = embedding(self.a.val().transpose(), ids);
        low.reshape([batch * tokens, r])
            .matmul(self.b.val().transpose())
            .mul_scalar(self.scale)
            .reshape([batch, tokens, width])
    }

    /// The table with the factors folded in, `[vocabulary, hidden]`.
    pub fn merged(&self, table: Tensor<2>) -> Tensor<2> {
        let sum = table.clone() + self.delta();
        match self.factor(|| table) {
            Some(factor) => sum * factor.unsqueeze(),
            None => sum,
        }
    }

    /// `s·Aᵀ·Bᵀ`, `[vocabulary, hidden]`.
    fn delta(&self) -> Tensor<2> {
        let product = self.b.val().matmul(self.a.val()).mul_scalar(self.scale);
        product.transpose()
    }

    /// DoRA's learnt lengths over those of the columns of the sum, `[hidden]`.
    fn factor(&self, table: impl FnOnce() -> Tensor<2>) -> Option<Tensor<1>> {
        let magnitude = self.magnitude.as_ref()?;
        let sum = untracked(table()) + untracked(self.delta());
        Some(magnitude.val() / row_lengths(sum.transpose()))
    }

    pub(crate) fn for_each_param(&self, f: &mut dyn FnMut(&'static str, ParamRef<'_>)) {
        f(A, ParamRef::Matrix(&self.a));
        f(B, ParamRef::Matrix(&self.b));
        if let Some(magnitude) = &self.magnitude {
            f(MAGNITUDE, ParamRef::Vector(magnitude));
        }
    }

    pub(crate) fn for_each_param_mut(&mut self, f: &mut dyn FnMut(&'static str, ParamMut<'_>)) {
        f(A, ParamMut::Matrix(&mut self.a));
        f(B, ParamMut::Matrix(&mut self.b));
        if let Some(magnitude) = &mut self.magnitude {
            f(MAGNITUDE, ParamMut::Vector(magnitude));
        }
    }
}
