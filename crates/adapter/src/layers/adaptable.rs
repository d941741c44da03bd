//! How a model shows its parameters to this crate: by name, in a fixed order.

use std::any::Any;
use std::sync::Arc;

use crate::base::module_shape::ModuleKind;
use crate::base::module_shape::ModuleShape;
use crate::base::routing::Routing;
use crate::layers::embedding::Embedding;
use crate::layers::frozen::Frozen;
use crate::layers::linear::Linear;
use crate::methods::{ParamMut, ParamRef};

/// A named place that an adapter or `modules_to_save` can take hold of, to change it.
pub enum Slot<'a> {
    /// A linear layer.
    Linear(&'a mut Linear),
    /// An embedding table.
    Embedding(&'a mut Embedding),
    /// A norm's weight, with its bias if it has one.
    Norm(&'a mut Frozen<1>),
    /// A convolution over images `[out, in, height, width]`, with its bias if it has one.
    Conv(&'a mut Frozen<4>),
    /// A parameter that belongs to no module of its own `[1, rows, width]`: a class token, a table of positions.
    Param(&'a mut Frozen<3>),
}

/// A named place, to read it.
pub enum SlotRef<'a> {
    /// A linear layer.
    Linear(&'a Linear),
    /// An embedding table.
    Embedding(&'a Embedding),
    /// A norm's weight, with its bias if it has one.
    Norm(&'a Frozen<1>),
    /// A convolution over images.
    Conv(&'a Frozen<4>),
    /// A parameter that belongs to no module of its own.
    Param(&'a Frozen<3>),
}

/// Does the same to whatever kind of module a slot is.
macro_rules! each {
    ($slot:expr, $module:ident => $body:expr) => {
        match $slot {
            Slot::Linear($module) => $body,
            Slot::Embedding($module) => $body,
            Slot::Norm($module) => $body,
            Slot::Conv($module) => $body,
            Slot::Param($module) => $body,
        }
    };
    (ref $slot:expr, $module:ident => $body:expr) => {
        match $slot {
            SlotRef::Linear($module) => $body,
            SlotRef::Embedding($module) => $body,
            SlotRef::Norm($module) => $body,
            SlotRef::Conv($module) => $body,
            SlotRef::Param($module) => $body,
        }
    };
}

impl Slot<'_> {
    pub(crate) fn route(&mut self, routing: &Routing) {
        each!(self, module => module.routing = routing.clone());
    }

    pub(crate) fn enable(&mut self, enabled: bool) {
        each!(self, module => module.enabled = enabled);
    }

    /// Takes off the adapter called `name`, or all of them.
    pub(crate) fn remove(&mut self, name: Option<&str>) {
        each!(self, module => module.parts.retain(|part| name.is_some_and(|name| part.name != name)));
    }

    /// Counts the base as frozen again, whatever was trained of it.
    pub(crate) fn release_base(&mut self) {
        each!(self, module => module.trains_base = false);
    }
}

impl SlotRef<'_> {
    /// Names of the adapters that touch this place.
    pub(crate) fn adapters(&self) -> Vec<&str> {
        each!(ref self, module => module.parts.iter().map(|part| part.name.as_str()).collect())
    }

    /// Whether an adapter is folded into the base here.
    pub(crate) fn is_merged(&self) -> bool {
        each!(ref self, module => module.unmerged.is_some())
    }

    /// Whether the base itself is trained here.
    pub(crate) fn trains_base(&self) -> bool {
        each!(ref self, module => module.trains_base)
    }

    pub(crate) fn routing(&self) -> &Routing {
        each!(ref self, module => &module.routing)
    }

    /// What this place looks like from outside.
    pub fn shape(&self, name: &str, head: bool) -> ModuleShape {
        let (kind, shape, bias) = match self {
            Self::Linear(linear) => {
                let kind = if head {
                    ModuleKind::Head
                } else {
                    ModuleKind::Linear
                };
                (kind, linear.weight.dims().to_vec(), linear.bias.is_some())
            }
            Self::Embedding(table) => (ModuleKind::Embedding, table.weight.dims().to_vec(), false),
            Self::Norm(norm) => {
                let shape = norm.weight.dims().to_vec();
                (ModuleKind::Norm, shape, norm.bias.is_some())
            }
            Self::Conv(conv) => {
                let shape = conv.weight.dims().to_vec();
                (ModuleKind::Conv, shape, conv.bias.is_some())
            }
            Self::Param(param) => (ModuleKind::Param, param.weight.dims().to_vec(), false),
        };
        let transposed = matches!(self, Self::Linear(linear) if linear.transposed);
        ModuleShape {
            name: name.to_string(),
            kind,
            shape,
            bias,
            transposed,
        }
    }
}

/// A model that adapters can be attached to.
pub trait Adaptable {
    /// Calls `f` with each module's full name (`model.layers.0.self_attn.q_proj`), in the order in
    /// which the model lists them; the order is the same in every run.
    fn for_each_slot(&mut self, f: &mut dyn FnMut(&str, Slot<'_>));
    /// The same, for reading.
    fn for_each_slot_ref(&self, f: &mut dyn FnMut(&str, SlotRef<'_>));
    /// The place of an adapter's part that belongs to the model and to none of its layers, in a model that has
    /// room for one.
    fn model_part(&self) -> Option<&dyn ModelPart> {
        None
    }
    /// The same, to change it.
    fn model_part_mut(&mut self) -> Option<&mut dyn ModelPart> {
        None
    }
    /// Whether the linear layer called `name` yields the logits, so that `all-linear` leaves it out.
    /// Unless a model says otherwise, that is the one called `lm_head`.
    fn is_head(&self, name: &str) -> bool {
        name.rsplit('.').next() == Some("lm_head")
    }
}

/// The place of an adapter's part that belongs to the model and to none of its layers: what decides how other
/// adapters are mixed, for one. What is in it belongs to the adapter called
/// [`DEFAULT`](crate::base::routing::DEFAULT).
pub trait ModelPart: Any {
    /// What is in it, by name; `None` where the place is empty.
    fn occupant(&self) -> Option<&'static str>;
    /// Empties it.
    fn remove(&mut self);
    /// Switches what is in it on or off.
    fn enable(&mut self, enabled: bool);
    /// The adapters at the layers that it needs, so that none of them goes before it.
    fn members(&self) -> Arc<[String]>;
    /// Those of [`Self::members`] that are trained with it.
    fn trained_along(&self) -> Arc<[String]>;
    /// Why what is in it cannot be used in such a way.
    fn refusal(&self, of: UseOfPart<'_>) -> String;
    /// Calls `f` with each trained parameter under its whole key in PEFT's file.
    fn for_each_param(&self, f: &mut dyn FnMut(&str, ParamRef<'_>));
    /// The same, to change them.
    fn for_each_param_mut(&mut self, f: &mut dyn FnMut(&str, ParamMut<'_>));
}

/// Uses of an adapter that one with a part at the model itself does not have.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum UseOfPart<'a> {
    /// Together with other adapters.
    BesideOthers,
    /// In some rows of a batch.
    InRows,
    /// Folded into the base.
    Merged,
    /// Without this one of [`ModelPart::members`].
    Without(&'a str),
}

/// What is in the model's place, where something is.
pub(crate) fn model_part<M: Adaptable>(model: &M) -> Option<&dyn ModelPart> {
    model.model_part().filter(|part| part.occupant().is_some())
}
