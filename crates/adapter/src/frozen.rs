//! A base parameter that stays as loaded, with room for the trained copy of `modules_to_save`.

use burn::module::{Module, Param, ParamId};
use burn::tensor::Tensor;

use crate::attach::{copy, freeze};
use crate::plan::PREFIX;

/// An embedding table (`D = 2`) or a norm's weight (`D = 1`).
#[derive(Module, Debug)]
pub struct Frozen<const D: usize> {
    /// The base value. Never trained.
    pub weight: Param<Tensor<D>>,
    /// The trained copy, when `modules_to_save` names this module.
    pub saved: Option<Param<Tensor<D>>>,
    /// Whether the trained copy is in use.
    #[module(skip)]
    pub(crate) enabled: bool,
}

impl<const D: usize> Frozen<D> {
    /// Wraps a loaded tensor; `name` is the full parameter name and decides the parameter's id.
    pub fn new(name: &str, weight: Tensor<D>) -> Self {
        Self {
            weight: frozen_param(name, weight),
            saved: None,
            enabled: true,
        }
    }

    /// The value in use: the trained copy if there is one, else the base.
    pub fn val(&self) -> Tensor<D> {
        let saved = self.saved.as_ref().filter(|_| self.enabled);
        saved.unwrap_or(&self.weight).val()
    }

    pub(crate) fn install(&mut self, module: &str, saved: bool, trainable: bool) {
        freeze(&mut self.weight);
        self.enabled = true;
        if saved {
            self.saved = Some(copy(
                &format!("{PREFIX}{module}.weight"),
                &self.weight,
                trainable,
            ));
        }
    }

    pub(crate) fn drop_saved(&mut self) {
        self.saved = None;
        self.enabled = true;
    }
}

/// A parameter that needs no gradient, with an id derived from its name.
pub fn frozen_param<const D: usize>(name: &str, value: Tensor<D>) -> Param<Tensor<D>> {
    Param::initialized(param_id(name), value).set_require_grad(false)
}

/// The id of the parameter called `name`: it depends on nothing but the name, so that optimizer state
/// keyed by it can be read back in another process.
pub fn param_id(name: &str) -> ParamId {
    ParamId::from(fnv1a(name))
}

/// FNV-1a, 64 bits.
pub(crate) fn fnv1a(text: &str) -> u64 {
    text.bytes().fold(0xcbf2_9ce4_8422_2325, |hash, byte| {
        (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3)
    })
}
