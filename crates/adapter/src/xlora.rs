//! X-LoRA (Buehler and Buehler 2024, arXiv:2402.07148): trained LoRA experts, mixed anew for each token.

use std::sync::Arc;

use burn::module::{Module, Param};
use burn::tensor::Tensor;

use crate::methods::{ParamMut, ParamRef};
use crate::routing::DEFAULT;

/// How much of each expert each token gets, in every adapted layer.
#[derive(Clone, Debug)]
pub struct Gates {
    /// The experts, in the order of the last axis.
    pub names: Arc<[String]>,
    /// `[tokens, layers, experts]`; one layer stands for all.
    pub values: Tensor<3>,
}

impl Gates {
    /// The share of `expert` for each token in one layer, `[tokens, 1]`.
    pub(crate) fn share(&self, layer: usize, expert: usize) -> Tensor<2> {
        let [tokens, layers, _] = self.values.dims();
        let layer = layer.min(layers - 1);
        self.values
            .clone()
            .slice([0..tokens, layer..layer + 1, expert..expert + 1])
            .reshape([tokens, 1])
    }
}

/// The classifier that decides the mixture: linear layers with ReLU between them, on the last hidden
/// state of a pass through the bare base.
#[derive(Module, Debug)]
pub struct XLora {
    /// The linear layers.
    pub layers: Vec<GateLayer>,
}

/// One linear layer of the classifier.
#[derive(Module, Debug)]
pub struct GateLayer {
    /// `[out, in]`
    pub weight: Param<Tensor<2>>,
    /// `[out]`
    pub bias: Param<Tensor<1>>,
    /// Its place in PEFT's sequence, in which activations and dropout count.
    #[module(skip)]
    pub index: usize,
}

impl XLora {
    pub(crate) fn for_each_param(&self, adapter: &str, f: &mut dyn FnMut(&str, ParamRef<'_>)) {
        for layer in self.layers.iter().filter(|_| adapter == DEFAULT) {
            f(&layer.key("weight"), ParamRef::Matrix(&layer.weight));
            f(&layer.key("bias"), ParamRef::Vector(&layer.bias));
        }
    }

    pub(crate) fn for_each_param_mut(
        &mut self,
        adapter: &str,
        f: &mut dyn FnMut(&str, ParamMut<'_>),
    ) {
        for layer in self.layers.iter_mut().filter(|_| adapter == DEFAULT) {
            let (weight, bias) = (layer.key("weight"), layer.key("bias"));
            f(&weight, ParamMut::Matrix(&mut layer.weight));
            f(&bias, ParamMut::Vector(&mut layer.bias));
        }
    }
}

impl GateLayer {
    fn key(&self, own: &str) -> String {
        format!("base_model.internal_xlora_classifier.layers.{}.{own}", self.index)
    }
}
