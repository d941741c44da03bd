//! X-LoRA (Buehler and Buehler 2024, arXiv:2402.07148): trained LoRA experts, mixed anew for each token.
//!
//! A pass is two. The first, outside any graph, runs the base with a fixed share of every expert (none,
//! by default) and yields hidden states; a classifier turns each token's into its shares of the experts,
//! and the second pass runs with those. As in PEFT 0.18's `tuners/xlora`, whose later versions lose the
//! classifier when they save.
//!
//! On a model the mixture is the adapter called [`DEFAULT`] and the experts are the adapters "0", "1", …
//! beside it; [`set_active`](crate::set_active) can choose one of those alone.

mod config;
mod files;
#[cfg(test)]
mod tests;

use std::any::Any;
use std::sync::Arc;

use burn::module::{Module, Param};
use burn::nn::Dropout;
use burn::tensor::activation::{relu, softmax};
use burn::tensor::{Device, Tensor};
use enamel_kernels::linear;

use crate::base::routing::{DEFAULT, Gates, Routing};
use crate::layers::adaptable::{Adaptable, ModelPart, UseOfPart};
use crate::methods::{ParamMut, ParamRef, at_work};
use crate::model::active::{route, routing};

pub(crate) use config::Expert;
pub use config::XLoraConfig;

/// The classifier that decides the mixture: linear layers with ReLU and dropout between them, on the
/// last hidden states of the first pass.
#[derive(Module, Debug)]
pub struct XLora {
    /// The linear layers.
    pub layers: Vec<GateLayer>,
    /// Between them, in training.
    pub dropout: Dropout,
    #[module(skip)]
    pub(crate) mixing: Mixing,
    #[module(skip)]
    pub(crate) enabled: bool,
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

/// What is fixed about a mixture.
#[derive(Clone, Debug)]
pub(crate) struct Mixing {
    pub config: XLoraConfig,
    pub experts: Arc<[Expert]>,
    pub names: Arc<[String]>,
    /// Adapted layers.
    pub layers: usize,
}

impl XLora {
    /// Names of the experts' adapters, in the order of the shares.
    pub fn experts(&self) -> &[String] {
        &self.mixing.names
    }

    /// How many layers the experts adapt.
    pub fn adapted_layers(&self) -> usize {
        self.mixing.layers
    }

    /// Each token's shares from its hidden state, before any choice among them: what PEFT calls
    /// scalings.
    ///
    /// # Shapes
    /// - hidden: `[batch, tokens, hidden]`
    /// - result: `[batch, tokens, layers, experts]`, with one layer unless `layerwise_scalings`
    pub fn scalings(&self, hidden: Tensor<3>) -> Tensor<4> {
        let [batch, tokens, width] = hidden.dims();
        let mut x = hidden.reshape([batch * tokens, width]);
        for (i, layer) in self.layers.iter().enumerate() {
            if i > 0 {
                x = relu(x);
                // On a device without autodiff nothing is trained, so nothing is dropped.
                if at_work(&self.dropout, &layer.weight) {
                    x = self.dropout.forward(x);
                }
            }
            x = linear(x, layer.weight.val()) + layer.bias.val().unsqueeze();
        }
        let config = &self.mixing.config;
        let experts = self.mixing.names.len();
        let layers = x.dims()[1] / experts;
        let x = x.reshape([batch, tokens, layers, experts]);
        if config.enable_softmax {
            softmax(x.div_scalar(config.softmax_temperature), 3)
        } else {
            x
        }
    }

    /// The shares with which the second pass runs, from the first one's hidden states
    /// `[batch, tokens, hidden]`.
    pub fn gates(&self, hidden: Tensor<3>) -> Gates {
        let scalings = self.scalings(hidden);
        let [batch, tokens, layers, experts] = scalings.dims();
        self.chosen(scalings.reshape([batch * tokens, layers, experts]))
    }

    /// The experts in the first pass: none of them, or a fixed share.
    fn first_pass(&self, tokens: usize, device: &Device) -> Routing {
        let share = self.mixing.config.scaling_pass_value;
        if share == 0.0 {
            return Routing::default();
        }
        let shape = [tokens, 1, self.mixing.names.len()];
        let gates = self.chosen(Tensor::full(shape, share, device));
        Routing::Gated(Arc::new(gates))
    }

    /// Leaves the `top_k_lora` largest of the last axis, normalises those if asked to, and multiplies
    /// by `global_scaling_weight`. Of equal shares the first ones stay.
    fn chosen(&self, mut values: Tensor<3>) -> Gates {
        let config = &self.mixing.config;
        if let Some(k) = config.top_k_lora {
            values = values.clone() * largest(values.detach(), k);
        }
        if config.enable_softmax_topk {
            // A share of exactly zero is no share, as in PEFT, and where there is none at all there is
            // nothing to normalise.
            let absent = values.clone().equal_elem(0.0);
            values = softmax(values.mask_fill(absent.clone(), -1e30), 2).mask_fill(absent, 0.0);
        }
        if config.global_scaling_weight != 1.0 {
            values = values.mul_scalar(config.global_scaling_weight);
        }
        Gates {
            names: self.mixing.names.clone(),
            values,
        }
    }
}

/// A model's place for a classifier. What is in it is the adapter called [`DEFAULT`].
impl ModelPart for Option<XLora> {
    fn occupant(&self) -> Option<&'static str> {
        self.as_ref().map(|_| "X-LoRA's classifier")
    }

    fn remove(&mut self) {
        *self = None;
    }

    fn enable(&mut self, enabled: bool) {
        if let Some(gate) = self {
            gate.enabled = enabled;
        }
    }

    fn members(&self) -> Arc<[String]> {
        match self {
            Some(gate) => gate.mixing.names.clone(),
            None => Arc::from([]),
        }
    }

    fn trained_along(&self) -> Arc<[String]> {
        match self {
            Some(gate) if gate.mixing.config.use_trainable_adapters => gate.mixing.names.clone(),
            _ => Arc::from([]),
        }
    }

    fn refusal(&self, of: UseOfPart<'_>) -> String {
        match of {
            UseOfPart::BesideOthers => {
                "X-LoRA (\"default\") mixes its experts itself; choose it alone".into()
            }
            UseOfPart::InRows => {
                "X-LoRA (\"default\") is for whole batches; a row can have one of \
                                  its experts"
                    .into()
            }
            UseOfPart::Merged => {
                "X-LoRA mixes its experts anew for each token, so no weights stand for it".into()
            }
            UseOfPart::Without(expert) => {
                format!("{expert:?} is an expert of the X-LoRA \"default\"; delete that first")
            }
        }
    }

    fn for_each_param(&self, f: &mut dyn FnMut(&str, ParamRef<'_>)) {
        for layer in self.iter().flat_map(|gate| &gate.layers) {
            f(&key(layer.index, "weight"), ParamRef::Matrix(&layer.weight));
            f(&key(layer.index, "bias"), ParamRef::Vector(&layer.bias));
        }
    }

    fn for_each_param_mut(&mut self, f: &mut dyn FnMut(&str, ParamMut<'_>)) {
        for layer in self.iter_mut().flat_map(|gate| &mut gate.layers) {
            f(
                &key(layer.index, "weight"),
                ParamMut::Matrix(&mut layer.weight),
            );
            f(&key(layer.index, "bias"), ParamMut::Vector(&mut layer.bias));
        }
    }
}

/// The classifier that a model carries.
fn classifier_of<M: Adaptable>(model: &M) -> Option<&XLora> {
    let part: &dyn Any = model.model_part()?;
    part.downcast_ref::<Option<XLora>>()?.as_ref()
}

/// Where a model has room for one.
fn place_in<M: Adaptable>(model: &mut M) -> Option<&mut Option<XLora>> {
    let part: &mut dyn Any = model.model_part_mut()?;
    part.downcast_mut()
}

/// The key of one of the classifier's parameters in PEFT's file.
fn key(index: usize, own: &str) -> String {
    format!("base_model.internal_xlora_classifier.layers.{index}.{own}")
}

/// Ones at the `k` largest of the last axis, zeros elsewhere; of equals, the first.
fn largest(values: Tensor<3>, k: usize) -> Tensor<3> {
    let [tokens, layers, experts] = values.dims();
    let device = values.device();
    let full = [tokens, layers, experts, experts];
    let mine: Tensor<4> = values.clone().unsqueeze_dim::<4>(3).expand(full);
    let theirs: Tensor<4> = values.unsqueeze_dim::<4>(2).expand(full);
    // Whether another expert stands earlier, which settles a tie.
    let earlier: Tensor<2> = Tensor::<2>::ones([experts, experts], &device).tril(-1);
    let ahead = theirs.clone().greater(mine.clone()).float()
        + theirs.equal(mine).float() * earlier.unsqueeze();
    let rank = ahead.sum_dim(3).reshape([tokens, layers, experts]);
    rank.lower_elem(k as f64 - 0.5).float()
}

/// The classifier, where the mixture is what the model's adapters are set to.
pub fn in_use<M: Adaptable>(model: &M) -> Option<&XLora> {
    let gate = classifier_of(model).filter(|gate| gate.enabled)?;
    match routing(model) {
        Routing::Active(names) if names.iter().eq([DEFAULT]) => Some(gate),
        _ => None,
    }
}

/// The model as the first pass runs it for so many tokens (over all rows): no parameter requires a
/// gradient.
pub fn for_first_pass<M: Adaptable + Module>(
    model: &M,
    gate: &XLora,
    tokens: usize,
    device: &Device,
) -> M {
    let mut model = model.clone().no_grad();
    route(&mut model, &gate.first_pass(tokens, device));
    model
}

/// The model as the second pass runs it. It shares its parameters with `model`: gradients reach those,
/// and through the shares the classifier's.
pub fn for_second_pass<M: Adaptable + Module>(model: &M, gates: Gates) -> M {
    let mut model = model.clone();
    route(&mut model, &Routing::Gated(Arc::new(gates)));
    model
}
