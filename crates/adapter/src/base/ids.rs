//! Ids of parameters: a name gives the same one in every process.

use burn::module::{Param, ParamId};
use burn::tensor::Tensor;

use crate::linalg::random::fnv1a;

/// A parameter that needs no gradient, with an id derived from its name.
pub fn frozen_param<const D: usize>(name: &str, value: Tensor<D>) -> Param<Tensor<D>> {
    Param::initialized(param_id(name), value).set_require_grad(false)
}

/// The id of the parameter called `name`: it depends on nothing but the name, so that optimizer state
/// keyed by it can be read back in another process.
pub fn param_id(name: &str) -> ParamId {
    ParamId::from(fnv1a(name))
}
