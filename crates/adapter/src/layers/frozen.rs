//! A base parameter that stays as loaded, with room for the trained copy of `modules_to_save`.

use crate::base::ids::frozen_param;
use burn::module::{Module, Param};
use burn::tensor::Tensor;

use crate::base::routing::Routing;

/// A norm's weight (`D = 1`), or another parameter that is used as a whole.
#[derive(Module, Debug)]
pub struct Frozen<const D: usize> {
    /// The base value. Never trained, unless all of the base is.
    pub weight: Param<Tensor<D>>,
    /// The trained copy of each adapter whose `modules_to_save` names this module.
    pub parts: Vec<FrozenPart<D>>,
    /// The base as it was, while an adapter is merged into it.
    pub(crate) unmerged: Option<Param<Tensor<D>>>,
    #[module(skip)]
    pub(crate) routing: Routing,
    #[module(skip)]
    pub(crate) enabled: bool,
    #[module(skip)]
    pub(crate) trains_base: bool,
}

/// The copy that one adapter trains.
#[derive(Module, Debug)]
pub struct FrozenPart<const D: usize> {
    /// The adapter's name.
    #[module(skip)]
    pub name: String,
    /// Its values.
    pub saved: Param<Tensor<D>>,
}

impl<const D: usize> Frozen<D> {
    /// Wraps a loaded tensor; `name` is the full parameter name and decides the parameter's id.
    pub fn new(name: &str, weight: Tensor<D>) -> Self {
        Self {
            weight: frozen_param(name, weight),
            parts: Vec::new(),
            unmerged: None,
            routing: Routing::default(),
            enabled: true,
            trains_base: false,
        }
    }

    /// The value in use: the trained copy if there is one, else the base.
    pub fn val(&self) -> Tensor<D> {
        match &self.routing {
            Routing::Active(names) if self.enabled && self.unmerged.is_none() => self.folded(names),
            _ => self.weight.val(),
        }
    }

    /// The value under the named adapters; the last one that trains a copy counts.
    pub fn folded(&self, names: &[String]) -> Tensor<D> {
        let copies = names.iter().rev().filter_map(|name| self.part(name));
        let mut copies = copies.map(|part| part.saved.val());
        copies.next().unwrap_or_else(|| self.weight.val())
    }

    /// The copy that the adapter called `name` trains.
    pub fn part(&self, name: &str) -> Option<&FrozenPart<D>> {
        self.parts.iter().find(|part| part.name == name)
    }
}
