//! AdamW over the trained parameters of a module: the moments of each, and one fused step for all.
//!
//! Burn's own optimizer takes parameters one by one, with a pass over memory for every operation of the
//! formula and a copy of each parameter while the model is held elsewhere.

mod bytes;
mod pages;
mod record;
#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests;

use std::collections::HashMap;
use std::path::Path;

use burn::lr_scheduler::module_lr_scheduler::ModuleLearningRate;
use burn::module::{Module, ModuleMapper, Param, ParamId};
use burn::optim::GradientsParams;
use burn::tensor::{GradientCheckpointingStrategy, Shape, Tensor};
use enamel_kernels::{AdamW, AdamWInput, Codes, Moments, adamw, adamw_8bit, adamw_host};

pub use crate::recipe::optim::{MIN_8BIT_SIZE, MIN_PAGED_SIZE, Optim};
pub use bytes::{OptimizerBytes, state_bytes};
pub(crate) use pages::PAGES;
use pages::{Pager, Pages};
pub(crate) use record::check_optim;

use crate::error::TrainError;

/// AdamW and what it remembers of each parameter.
#[derive(Debug)]
pub struct Optimizer {
    settings: AdamW,
    optim: Optim,
    states: HashMap<ParamId, State>,
    pages: Option<Pages>,
}

/// What AdamW remembers of one parameter.
#[derive(Debug)]
struct State {
    /// Steps taken.
    time: usize,
    shape: Shape,
    moments: Held,
}

/// The moments of one parameter.
#[derive(Debug)]
#[allow(
    clippy::large_enum_variant,
    reason = "one a trained tensor, beside handles of all its moments"
)]
enum Held {
    F32(Box<Moments>),
    EightBit(Box<Moments<Codes>>),
    /// In the parameter's room of [`Pages`].
    Paged,
}

impl Optimizer {
    /// [`Optim::AdamwTorch`] before the first step.
    pub fn new(settings: AdamW) -> Self {
        Self {
            settings,
            optim: Optim::AdamwTorch,
            states: HashMap::new(),
            pages: None,
        }
    }

    /// The optimizer of that name before the first step. What it pages lies in a file in `dir`, which goes away
    /// with the optimizer and bears the id of `run` as long as it has a name; `model` says which parameters are
    /// trained.
    ///
    /// # Errors
    /// When that file cannot be made, or the disk has not enough space for it.
    pub fn with_optim<M: Module>(
        settings: AdamW,
        optim: Optim,
        (dir, run): (&Path, &str),
        model: &M,
    ) -> Result<Self, TrainError> {
        let pages = Pages::new(optim, (dir, run), model)?;
        Ok(Self {
            optim,
            pages,
            ..Self::new(settings)
        })
    }

    /// The optimizer with its moments, leaving one that remembers nothing: whoever holds moments beside the
    /// one who steps makes each step copy them. What is left behind pages nothing.
    pub fn take(&mut self) -> Self {
        Self {
            settings: self.settings,
            optim: self.optim,
            states: std::mem::take(&mut self.states),
            pages: self.pages.take(),
        }
    }

    /// One step: every parameter with a gradient moves. The gradients count times `factor` (see
    /// [`crate::training::grad_clipping::Clipping`]), which saves writing scaled ones. Parameters that no other clone of the
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
            optim: self.optim,
            pages: self.pages.as_mut(),
            states: &mut self.states,
            grads: &mut grads,
            rates,
            f32: Inputs::default(),
            eight_bit: Inputs::default(),
            paged: Inputs::default(),
        };
        // A clone is handles only. When the model is replaced by its emptied clone, what was taken out has
        // one handle left.
        let emptied = model.clone().map(&mut take);
        let (f32, eight_bit, paged) = (take.f32, take.eight_bit, take.paged);
        *model = emptied;

        let mut put = Put {
            states: &mut self.states,
            values: HashMap::new(),
        };
        let settings = &self.settings;
        let done = adamw(settings, factor, f32.inputs);
        put.note(
            f32.places,
            done.into_iter().map(|(v, m)| (v, Held::F32(Box::new(m)))),
        );
        let done = adamw_8bit(settings, factor, eight_bit.inputs);
        let done = done
            .into_iter()
            .map(|(v, m)| (v, Held::EightBit(Box::new(m))));
        put.note(eight_bit.places, done);
        if let Some(pages) = &mut self.pages {
            let mut rooms = pages.rooms();
            let mut places = Vec::with_capacity(paged.places.len());
            let mut inputs = Vec::with_capacity(paged.places.len());
            for (place, input) in paged.places.into_iter().zip(paged.inputs) {
                if let Some(room) = rooms.remove(&place.id) {
                    inputs.push(input.with(room.moments()));
                    places.push(place);
                }
            }
            let done = adamw_host(settings, factor, &Pager, inputs);
            put.note(places, done.into_iter().map(|value| (value, Held::Paged)));
        }
        let filled = model.clone().map(&mut put);
        *model = filled;
    }
}

/// Where a parameter goes back to, and what autodiff knew of it.
struct Place {
    id: ParamId,
    /// Which step it is.
    time: usize,
    shape: Shape,
    require_grad: bool,
    /// None without autodiff.
    checkpointing: Option<GradientCheckpointingStrategy>,
}

/// Parameters whose moments are held in one way.
struct Inputs<M> {
    places: Vec<Place>,
    inputs: Vec<AdamWInput<M>>,
}

impl<M> Default for Inputs<M> {
    fn default() -> Self {
        Self {
            places: Vec::new(),
            inputs: Vec::new(),
        }
    }
}

impl<M> Inputs<M> {
    fn push(&mut self, place: Place, input: AdamWInput<M>) {
        self.places.push(place);
        self.inputs.push(input);
    }
}

/// Takes out the parameters that have a gradient, which stands in for them.
struct Take<'a> {
    optim: Optim,
    pages: Option<&'a mut Pages>,
    states: &'a mut HashMap<ParamId, State>,
    grads: &'a mut GradientsParams,
    rates: &'a ModuleLearningRate,
    f32: Inputs<Moments>,
    eight_bit: Inputs<Moments<Codes>>,
    paged: Inputs<()>,
}

impl Take<'_> {
    /// The moments of a parameter before its first step.
    fn first(&mut self, id: ParamId, value: &Tensor<1>) -> Held {
        let [elements] = value.dims();
        let pages = self.pages.as_mut();
        if let Some(room) = pages.and_then(|pages| pages.get_mut(id))
            && room.elements() == elements
        {
            room.clear();
            return Held::Paged;
        }
        if self.optim.is_8bit(elements) {
            let zeros = || Codes::zeros(elements, &value.device());
            let (first, second) = (zeros(), zeros());
            return Held::EightBit(Box::new(Moments { first, second }));
        }
        let (first, second) = (value.zeros_like(), value.zeros_like());
        Held::F32(Box::new(Moments { first, second }))
    }
}

impl ModuleMapper for Take<'_> {
    fn map_float<const D: usize>(&mut self, param: Param<Tensor<D>>) -> Param<Tensor<D>> {
        let Some(grad) = self.grads.remove::<D>(param.id) else {
            return param;
        };
        let (id, value, mapper) = param.consume();
        let (require_grad, checkpointing) = (
            value.is_require_grad(),
            value.gradient_checkpointing_strategy(),
        );
        let (shape, flat) = (value.shape(), [value.shape().num_elements()]);
        let value = value.inner().reshape(flat);
        // Where it has to be put in order, the copy takes its place: never more than one exists twice.
        let grad = grad.reshape(flat);
        let (time, moments) = match self.states.remove(&id) {
            Some(state) => (state.time, state.moments),
            None => (0, self.first(id, &value)),
        };
        let time = time + 1;
        let place = Place {
            id,
            time,
            shape: shape.clone(),
            require_grad,
            checkpointing,
        };
        let input = AdamWInput {
            value,
            grad: grad.clone(),
            moments: (),
            rate: self.rates.lr_from_param(id, None),
            time,
        };
        match moments {
            Held::F32(moments) => self.f32.push(place, input.with(*moments)),
            Held::EightBit(moments) => self.eight_bit.push(place, input.with(*moments)),
            Held::Paged => self.paged.push(place, input),
        }
        Param::from_mapped_value(id, grad.reshape::<D, _>(shape), mapper)
    }
}

/// Puts the new values in.
struct Put<'a> {
    states: &'a mut HashMap<ParamId, State>,
    values: HashMap<ParamId, (Place, Tensor<1>)>,
}

impl Put<'_> {
    /// Notes what became of the parameters that were taken from `places`.
    fn note(&mut self, places: Vec<Place>, done: impl Iterator<Item = (Tensor<1>, Held)>) {
        for (place, (value, moments)) in places.into_iter().zip(done) {
            let state = State {
                time: place.time,
                shape: place.shape.clone(),
                moments,
            };
            self.states.insert(place.id, state);
            self.values.insert(place.id, (place, value));
        }
    }
}

impl ModuleMapper for Put<'_> {
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
