//! How a model shows its parameters to this crate: by name, in a fixed order.

use crate::base::module_shape::ModuleKind;
use crate::base::module_shape::ModuleShape;
use crate::base::routing::Routing;
use crate::layers::embedding::Embedding;
use crate::layers::frozen::Frozen;
use crate::layers::linear::Linear;
use crate::methods::xlora::XLora;

/// A named place that an adapter or `modules_to_save` can take hold of, to change it.
pub enum Slot<'a> {
    /// A linear layer.
    Linear(&'a mut Linear),
    /// An embedding table.
    Embedding(&'a mut Embedding),
    /// A norm's weight, with its bias if it has one.
    Norm(&'a mut Frozen<1>),
}

/// A named place, to read it.
pub enum SlotRef<'a> {
    /// A linear layer.
    Linear(&'a Linear),
    /// An embedding table.
    Embedding(&'a Embedding),
    /// A norm's weight, with its bias if it has one.
    Norm(&'a Frozen<1>),
}

/// Does the same to whatever kind of module a slot is.
macro_rules! each {
    ($slot:expr, $module:ident => $body:expr) => {
        match $slot {
            Slot::Linear($module) => $body,
            Slot::Embedding($module) => $body,
            Slot::Norm($module) => $body,
        }
    };
    (ref $slot:expr, $module:ident => $body:expr) => {
        match $slot {
            SlotRef::Linear($module) => $body,
            SlotRef::Embedding($module) => $body,
            SlotRef::Norm($module) => $body,
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
    /// The classifier that mixes X-LoRA's experts, where the model has room for one and carries one.
    fn gate(&self) -> Option<&XLora> {
        None
    }
    /// Where that classifier goes, in a model that has room for one.
    fn gate_place(&mut self) -> Option<&mut Option<XLora>> {
        None
    }
    /// The classifier, to change it.
    fn gate_mut(&mut self) -> Option<&mut XLora> {
        self.gate_place().and_then(Option::as_mut)
    }
    /// Whether the linear layer called `name` yields the logits, so that `all-linear` leaves it out.
    /// Unless a model says otherwise, that is the one called `lm_head`.
    fn is_head(&self, name: &str) -> bool {
        name.rsplit('.').next() == Some("lm_head")
    }
}
