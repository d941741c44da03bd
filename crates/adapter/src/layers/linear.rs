//! The linear layer that adapters attach to.

use crate::base::Base;
use std::fmt;
use std::sync::Arc;

use burn::module::{Module, Param};
use burn::tensor::Tensor;
use enamel_kernels::{BaseWeight, Compute, Projection};

use crate::base::base_param::BaseParam;
use crate::base::ids::frozen_param;
use crate::base::routing::{Routing, groups, index, reunite};
use crate::methods::Adapter;

/// `y = x·Wᵀ + b` with a frozen base and any number of adapters beside it.
#[derive(Module, Debug)]
pub struct Linear {
    /// Base weight `[out, in]`, as in Hugging Face files.
    pub weight: BaseParam,
    /// Base bias `[out]`.
    pub bias: Option<Param<Tensor<1>>>,
    /// What each adapter that touches this layer does to it.
    pub parts: Vec<LinearPart>,
    /// The base as it was, while adapters are merged into it.
    pub(crate) unmerged: Option<UnmergedLinear>,
    #[module(skip)]
    pub(crate) routing: Routing,
    /// Whether adapters and copies are in use at all.
    #[module(skip)]
    pub(crate) enabled: bool,
    /// Whether the base itself is trained (full fine-tuning).
    #[module(skip)]
    pub(crate) trains_base: bool,
    /// Whether checkpoints have the weight as `[in, out]` (transformers' `Conv1D`).
    #[module(skip)]
    pub(crate) transposed: bool,
    /// Place among the layers that X-LoRA's experts adapt.
    #[module(skip)]
    pub(crate) place: usize,
    /// What looks at the inputs, where something does (EVA).
    #[module(skip)]
    pub(crate) probe: Option<Probe>,
}

/// Is shown the input of a layer, `[rows, in]`.
#[derive(Clone)]
pub(crate) struct Probe(pub(crate) Arc<dyn Fn(&Tensor<2>) + Send + Sync>);

impl fmt::Debug for Probe {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Probe")
    }
}

/// What one adapter does to one linear layer: at most one of `adapter` and `saved`.
#[derive(Module, Debug)]
pub struct LinearPart {
    /// The adapter's name.
    #[module(skip)]
    pub name: String,
    /// The adapter, when this layer is a target.
    pub adapter: Option<Adapter>,
    /// The trained copy, when `modules_to_save` names this layer.
    pub saved: Option<SavedLinear>,
    /// The trained bias, when `bias` asks for it.
    pub bias: Option<Param<Tensor<1>>>,
}

/// A copy of a linear layer's weights.
#[derive(Module, Debug)]
pub struct SavedLinear {
    /// `[out, in]`
    pub weight: Param<Tensor<2>>,
    /// `[out]`
    pub bias: Option<Param<Tensor<1>>>,
}

/// What a layer was before adapters were merged into it.
#[derive(Module, Debug)]
pub(crate) struct UnmergedLinear {
    pub(crate) weight: BaseParam,
    pub(crate) bias: Option<Param<Tensor<1>>>,
}

impl Linear {
    /// Wraps loaded tensors. `name` is the module's path (`model.layers.0.self_attn.q_proj`).
    pub fn new(name: &str, weight: impl Into<BaseWeight>, bias: Option<Tensor<1>>) -> Self {
        Self {
            weight: BaseParam::new(&format!("{name}.weight"), weight.into()),
            bias: bias.map(|b| frozen_param(&format!("{name}.bias"), b)),
            parts: Vec::new(),
            unmerged: None,
            routing: Routing::default(),
            enabled: true,
            trains_base: false,
            transposed: false,
            place: 0,
            probe: None,
        }
    }

    /// The same layer, whose weight checkpoints have as `[in, out]` (transformers' `Conv1D`).
    pub fn stored_transposed(mut self) -> Self {
        self.transposed = true;
        self
    }

    /// Whether checkpoints have the weight as `[in, out]`.
    pub fn is_stored_transposed(&self) -> bool {
        self.transposed
    }

    /// The same from burn's own linear layer, whose weight is `[in, out]`.
    pub fn from_burn(name: &str, linear: burn::nn::Linear) -> Self {
        let weight = linear.weight.val().detach().transpose();
        let bias = linear.bias.map(|bias| bias.val().detach());
        Self::new(name, weight, bias)
    }

    /// Applies the layer over the last axis: `[..., in]` to `[..., out]`.
    pub fn forward<const D: usize>(&self, x: Tensor<D>) -> Tensor<D> {
        let mut dims = x.dims();
        let [out, width] = self.weight.dims();
        let rows = x.shape().num_elements() / width;
        // Two axes: a batched product would read the weight again for every batch row.
        let y = self.rows(x.reshape([rows, width]));
        dims[D - 1] = out;
        y.reshape(dims)
    }

    /// What products with the base round their factors to.
    pub fn compute(&self) -> Compute {
        self.weight.compute()
    }

    /// The layer as the fused operations take it, if that is all that [`Self::forward`] does: a base that
    /// is not trained, with one low-rank adapter beside it or none.
    pub fn fused(&self) -> Option<Projection> {
        if self.probe.is_some() {
            return None;
        }
        let (base, adapter) = match &self.routing {
            _ if self.idle() => (self.base(), None),
            Routing::Active(names) => {
                let mut adapters = names.iter().filter_map(|name| self.adapter(name));
                let adapter = adapters.next();
                if adapters.next().is_some() {
                    return None;
                }
                (self.base_for(names), adapter)
            }
            Routing::Rows(_) | Routing::Gated(_) => return None,
        };
        let lora = match adapter {
            Some(adapter) => Some(adapter.low_rank()?),
            None => None,
        };
        let projection = Projection {
            weight: base.weight.matrix().clone(),
            bias: base.bias,
            lora,
        };
        (!projection.trains_base()).then_some(projection)
    }

    /// Whether the base is all there is, however many adapters are attached.
    fn idle(&self) -> bool {
        !self.enabled || self.unmerged.is_some() || self.parts.is_empty()
    }

    fn rows(&self, x: Tensor<2>) -> Tensor<2> {
        if let Some(probe) = &self.probe {
            (probe.0)(&x);
        }
        if self.idle() {
            return self.base().forward(x);
        }
        match &self.routing {
            Routing::Active(names) => self.through(x, names),
            Routing::Rows(rows) => {
                let device = x.device();
                let groups = groups(rows, x.dims()[0]);
                let results = groups.iter().map(|group| {
                    let x = x.clone().select(0, index(group.places.clone(), &device));
                    match group.name {
                        Some(name) => self.through(x, &[name.to_string()]),
                        None => self.base().forward(x),
                    }
                });
                let results = results.collect();
                reunite(&groups, results, &device)
            }
            Routing::Gated(gates) => {
                let base = self.base();
                let mut y = base.forward(x.clone());
                for (i, name) in gates.names.iter().enumerate() {
                    if let Some(adapter) = self.adapter(name) {
                        y = y + adapter.contribution(x.clone(), &base) * gates.share(self.place, i);
                    }
                }
                y
            }
        }
    }

    /// With these adapters. A trained copy stands for the layer; adapters add up on what is left.
    fn through(&self, x: Tensor<2>, names: &[String]) -> Tensor<2> {
        let mut adapters = names.iter().filter_map(|name| self.adapter(name));
        let together = adapters.clone().count() > 1;
        if together && !adapters.clone().all(Adapter::is_additive) {
            // One of them multiplies what the others made, in the order of the names.
            return self.folded(names).forward(x);
        }
        let base = self.base_for(names);
        let Some(first) = adapters.next() else {
            return base.forward(x);
        };
        let mut y = first.forward(x.clone(), &base);
        for other in adapters {
            y = y + other.contribution(x.clone(), &base);
        }
        y
    }

    /// The frozen layer.
    pub fn base(&self) -> Base {
        Base {
            weight: self.weight.get(),
            bias: self.bias.as_ref().map(|b| b.val()),
        }
    }

    /// The layer without the adapters, but with the copies and biases that they train whole.
    fn base_for(&self, names: &[String]) -> Base {
        let mut base = self.base();
        for part in self.parts_of(names) {
            if let Some(saved) = &part.saved {
                base.weight = BaseWeight::new(saved.weight.val(), base.weight.compute());
                base.bias = saved.bias.as_ref().map(|b| b.val());
            }
            if let Some(bias) = &part.bias {
                base.bias = Some(bias.val());
            }
        }
        base
    }

    fn parts_of<'a>(&'a self, names: &'a [String]) -> impl Iterator<Item = &'a LinearPart> {
        names.iter().filter_map(|name| self.part(name))
    }

    /// What the adapter called `name` does here.
    pub fn part(&self, name: &str) -> Option<&LinearPart> {
        self.parts.iter().find(|part| part.name == name)
    }

    fn adapter(&self, name: &str) -> Option<&Adapter> {
        self.part(name).and_then(|part| part.adapter.as_ref())
    }

    /// Weight and bias with the named adapters folded in: the base, or what they train whole, or the
    /// base plus what they add. Formed anew; in training, gradients flow through it.
    pub fn folded(&self, names: &[String]) -> Base {
        let mut base = self.base_for(names);
        for adapter in names.iter().filter_map(|name| self.adapter(name)) {
            base = adapter.merged(base);
        }
        base
    }

    /// The values of the weight that `forward` multiplies by, `[out, in]`, where all rows share one.
    pub fn weight_in_use(&self) -> Tensor<2> {
        self.in_use().weight.dense()
    }

    /// The bias that `forward` adds, `[out]`.
    pub fn bias_in_use(&self) -> Option<Tensor<1>> {
        self.in_use().bias
    }

    /// Weight and bias that stand for `forward` where no dropout is at work and all rows share them.
    pub fn in_use(&self) -> Base {
        match &self.routing {
            Routing::Active(names) if self.enabled && self.unmerged.is_none() => self.folded(names),
            _ => self.base(),
        }
    }

    /// The weight `[out, in]`, if `forward` is a product with it and nothing else: no bias, no dropout, no
    /// difference between rows.
    pub fn as_one_product(&self) -> Option<BaseWeight> {
        let Routing::Active(names) = &self.routing else {
            return None;
        };
        let mut adapters = names.iter().filter_map(|name| self.adapter(name));
        if !self.idle() && adapters.any(Adapter::has_dropout) {
            return None;
        }
        let Base { weight, bias } = self.in_use();
        bias.is_none().then_some(weight)
    }
}
