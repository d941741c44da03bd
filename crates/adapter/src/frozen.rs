//! A base parameter that stays as loaded, with room for the trained copy of `modules_to_save`.

use burn::module::{Module, Param, ParamId};
use burn::tensor::Tensor;

/// An embedding table (`D = 2`) or a norm's weight (`D = 1`).
#[derive(Module, Debug)]
pub struct Frozen<const D: usize> {
    /// The base value. Never trained.
    pub weight: Param<Tensor<D>>,
    /// The trained copy, when `modules_to_save` names this module.
    pub saved: Option<Param<Tensor<D>>>,
}

impl<const D: usize> Frozen<D> {
    /// Wraps a loaded tensor; `name` is the full parameter name and decides the parameter's id.
    pub fn new(name: &str, weight: Tensor<D>) -> Self {
        Self { weight: frozen_param(name, weight), saved: None }
    }

    /// The value in use: the trained copy if there is one, else the base.
    pub fn val(&self) -> Tensor<D> {
        self.saved.as_ref().unwrap_or(&self.weight).val()
    }
}

/// A parameter that needs no gradient, with an id derived from its name.
pub fn frozen_param<const D: usize>(name: &str, value: Tensor<D>) -> Param<Tensor<D>> {
    Param::initialized(param_id(name), value).set_require_grad(false)
}

/// The id of the parameter called `name`: FNV-1a, so that it depends on nothing but the name and
/// optimizer state keyed by it can be read back in another process.
pub fn param_id(name: &str) -> ParamId {
    let hash = name
        .bytes()
        .fold(0xcbf2_9ce4_8422_2325_u64, |h, b| (h ^ u64::from(b)).wrapping_mul(0x0100_0000_01b3));
    ParamId::from(hash)
}
