//! A base parameter that stays as loaded, with room for the trained copy of `modules_to_save`.

use burn::module::{Module, Param};
use burn::tensor::Tensor;

use crate::base::ids::frozen_param;
use crate::base::routing::Routing;

/// A norm's weight (`D = 1`), with its bias if it has one, or another parameter that is used as a whole.
#[derive(Module, Debug)]
pub struct Frozen<const D: usize> {
    /// The base value. Never trained, unless all of the base is.
    pub weight: Param<Tensor<D>>,
    /// What is added behind the weight, as LayerNorm does.
    pub bias: Option<Param<Tensor<1>>>,
    /// The trained copies of each adapter that has one of this module's weight or bias.
    pub parts: Vec<FrozenPart<D>>,
    /// The base as it was, while an adapter is merged into it.
    pub(crate) unmerged: Option<UnmergedFrozen<D>>,
    #[module(skip)]
    pub(crate) routing: Routing,
    #[module(skip)]
    pub(crate) enabled: bool,
    #[module(skip)]
    pub(crate) trains_base: bool,
}

/// The copies that one adapter trains.
#[derive(Module, Debug)]
pub struct FrozenPart<const D: usize> {
    /// The adapter's name.
    #[module(skip)]
    pub name: String,
    /// The weight's, where `modules_to_save` names the module.
    pub saved: Option<Param<Tensor<D>>>,
    /// The bias's, where it does or `bias` asks for it.
    pub bias: Option<Param<Tensor<1>>>,
}

/// What a module was before adapters were merged into it.
#[derive(Module, Debug)]
pub(crate) struct UnmergedFrozen<const D: usize> {
    pub(crate) weight: Param<Tensor<D>>,
    pub(crate) bias: Option<Param<Tensor<1>>>,
}

impl<const D: usize> Frozen<D> {
    /// Wraps a loaded tensor; `name` is the full parameter name and decides the parameter's id.
    pub fn new(name: &str, weight: Tensor<D>) -> Self {
        Self {
            weight: frozen_param(name, weight),
            bias: None,
            parts: Vec::new(),
            unmerged: None,
            routing: Routing::default(),
            enabled: true,
            trains_base: false,
        }
    }

    /// The same with a bias under its full parameter name.
    pub fn with_bias(mut self, name: &str, bias: Tensor<1>) -> Self {
        self.bias = Some(frozen_param(name, bias));
        self
    }

    /// The value in use: the trained copy if there is one, else the base.
    pub fn val(&self) -> Tensor<D> {
        match self.names_in_use() {
            Some(names) => self.folded(names),
            None => self.weight.val(),
        }
    }

    /// The bias in use.
    pub fn bias_val(&self) -> Option<Tensor<1>> {
        match self.names_in_use() {
            Some(names) => self.folded_bias(names),
            None => self.bias.as_ref().map(Param::val),
        }
    }

    /// The value under the named adapters; the last one that trains a copy counts.
    pub fn folded(&self, names: &[String]) -> Tensor<D> {
        let copies = names.iter().rev().filter_map(|name| self.part(name));
        let mut copies = copies.filter_map(|part| part.saved.as_ref());
        copies.next().unwrap_or(&self.weight).val()
    }

    /// The bias under the named adapters.
    pub fn folded_bias(&self, names: &[String]) -> Option<Tensor<1>> {
        let copies = names.iter().rev().filter_map(|name| self.part(name));
        let mut copies = copies.filter_map(|part| part.bias.as_ref());
        copies.next().or(self.bias.as_ref()).map(Param::val)
    }

    /// The copies that the adapter called `name` trains.
    pub fn part(&self, name: &str) -> Option<&FrozenPart<D>> {
        self.parts.iter().find(|part| part.name == name)
    }

    fn names_in_use(&self) -> Option<&[String]> {
        match &self.routing {
            Routing::Active(names) if self.enabled && self.unmerged.is_none() => Some(names),
            _ => None,
        }
    }
}
