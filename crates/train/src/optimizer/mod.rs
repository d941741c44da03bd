//! AdamW over the trained parameters of a module: the moments of each, and one fused step for all.
//!
//! Burn's own optimizer takes parameters one by one, with a pass over memory for every operation of the
//! formula and a copy of each parameter while the model is held elsewhere.

mod bytes;
mod optim;
mod record;
#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests;

use std::collections::HashMap;

use burn::lr_scheduler::module_lr_scheduler::ModuleLearningRate;
use burn::module::{Module, ModuleMapper, Param, ParamId};
use burn::optim::GradientsParams;
use burn::tensor::{GradientCheckpointingStrategy, Shape, Tensor};
use enamel_kernels::{AdamW, AdamWInput, Moments, adamw};

pub use bytes::{OptimizerBytes, state_bytes};
pub use optim::{MIN_8BIT_SIZE, MIN_PAGED_SIZE, Optim};

/// AdamW and what it remembers of each parameter.
#[derive(Debug)]
pub struct Optimizer {
    settings: AdamW,
    states: HashMap<ParamId, State>,
}

/// What AdamW remembers of one parameter.
#[derive(Debug)]
struct State {
    /// Steps taken.
    time: usize,
    shape: Shape,
    moments: Moments,
}

impl Optimizer {
    /// Before the first step.
    pub fn new(settings: AdamW) -> Self {
        Self {
            settings,
            states: HashMap::new(),
        }
    }

    /// The optimizer with its moments, leaving one that remembers nothing: whoever holds moments beside the
    /// one who steps makes each step copy them.
    pub fn take(&mut self) -> Self {
        std::mem::replace(self, Self::new(self.settings))
    }

    /// One step: every parameter with a gradient moves. The gradients count times `factor` (see
    /// [`crate::gradients::Clipping`]), which saves writing scaled ones. Parameters that no other clone of the
    /// model holds are overwritten in place.
    ///
    /// Groups of learning rates go by the parameters' ids.
    pub fn step<M: Module>(
        &mut self,
        model: &mut M,
        mut grads: GradientsParams,
        factor: f64,
        rates: &ModuleLearningRate,
    ) {
        let mut take = Take {
            states: &mut self.states,
            grads: &mut grads,
            rates,
            places: Vec::new(),
            inputs: Vec::new(),
        };
        // A clone is handles only. When the model is replaced by its emptied clone, what was taken out has
        // one handle left.
        let emptied = model.clone().map(&mut take);
        let Take { places, inputs, .. } = take;
        *model = emptied;

        let times: Vec<usize> = inputs.iter().map(|input| input.time).collect();
        let mut values = HashMap::with_capacity(places.len());
        let done = adamw(&self.settings, factor, inputs);
        for ((place, time), (value, moments)) in places.into_iter().zip(times).zip(done) {
            let state = State {
                time,
                shape: place.shape.clone(),
                moments,
            };
            self.states.insert(place.id, state);
            values.insert(place.id, (place, value));
        }
        let filled = model.clone().map(&mut Put { values });
        *model = filled;
    }
}

/// Where a parameter goes back to, and what autodiff knew of it.
struct Place {
    id: ParamId,
    shape: Shape,
    require_grad: bool,
    /// None without autodiff.
    checkpointing: Option<GradientCheckpointingStrategy>,
}

/// Takes out the parameters that have a gradient, which stands in for them.
struct Take<'a> {
    states: &'a mut HashMap<ParamId, State>,
    grads: &'a mut GradientsParams,
    rates: &'a ModuleLearningRate,
    places: Vec<Place>,
    inputs: Vec<AdamWInput>,
}

impl ModuleMapper for Take<'_> {
    fn map_float<const D: usize>(&mut self, param: Param<Tensor<D>>) -> Param<Tensor<D>> {
        let Some(grad) = self.grads.remove::<D>(param.id) else {
            return param;
        };
        let (id, value, mapper) = param.consume();
        self.places.push(Place {
            id,
            shape: value.shape(),
            require_grad: value.is_require_grad(),
            checkpointing: value.gradient_checkpointing_strategy(),
        });
        let (shape, flat) = (value.shape(), [value.shape().num_elements()]);
        let value = value.inner().reshape(flat);
        // Where it has to be put in order, the copy takes its place: never more than one exists twice.
        let grad = grad.reshape(flat);
        let (time, moments) = match self.states.remove(&id) {
            Some(state) => (state.time, state.moments),
            None => {
                let (first, second) = (value.zeros_like(), value.zeros_like());
                (0, Moments { first, second })
            }
        };
        self.inputs.push(AdamWInput {
            value,
            grad: grad.clone(),
            moments,
            rate: self.rates.lr_from_param(id, None),
            time: time + 1,
        });
        Param::from_mapped_value(id, grad.reshape::<D, _>(shape), mapper)
    }
}

/// Puts the new values in.
struct Put {
    values: HashMap<ParamId, (Place, Tensor<1>)>,
}

impl ModuleMapper for Put {
    fn map_float<const D: usize>(&mut self, param: Param<Tensor<D>>) -> Param<Tensor<D>> {
        let Some((place, value)) = self.values.remove(&param.id) else {
            return param;
        };
        let (id, _, mapper) = param.consume();
        let mut value = value.reshape::<D, _>(place.shape);
        if let Some(strategy) = place.checkpointing {
            value = Tensor::from_inner(value).with_gradient_checkpointing_strategy(strategy);
        }
        if place.require_grad {
            value = value.require_grad();
        }
        Param::from_mapped_value(id, value, mapper)
    }
}
