//! How a model shows its parameters to this crate: by name, in a fixed order.

use crate::frozen::Frozen;
use crate::linear::Linear;

/// A named place that an adapter or `modules_to_save` can take hold of, to change it.
pub enum Slot<'a> {
    /// A linear layer.
    Linear(&'a mut Linear),
    /// An embedding table.
    Embedding(&'a mut Frozen<2>),
    /// A norm's weight.
    Norm(&'a mut Frozen<1>),
}

/// A named place, to read it.
pub enum SlotRef<'a> {
    /// A linear layer.
    Linear(&'a Linear),
    /// An embedding table.
    Embedding(&'a Frozen<2>),
    /// A norm's weight.
    Norm(&'a Frozen<1>),
}

impl SlotRef<'_> {
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
            Self::Norm(norm) => (ModuleKind::Norm, norm.weight.dims().to_vec(), false),
        };
        ModuleShape {
            name: name.to_string(),
            kind,
            shape,
            bias,
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
    /// Whether the linear layer called `name` yields the logits, so that `all-linear` leaves it out.
    /// Unless a model says otherwise, that is the one called `lm_head`.
    fn is_head(&self, name: &str) -> bool {
        name.rsplit('.').next() == Some("lm_head")
    }
}

/// What kind of module a name stands for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ModuleKind {
    /// A linear layer (an adapter's target).
    Linear,
    /// The linear layer that yields logits; `all-linear` leaves it out.
    Head,
    /// An embedding table.
    Embedding,
    /// A norm.
    Norm,
}

/// One module of a model that need not be loaded: enough to match targets and count parameters.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ModuleShape {
    /// Full name.
    pub name: String,
    /// Kind.
    pub kind: ModuleKind,
    /// Shape of `weight`: `[out, in]`, `[vocabulary, hidden]` or `[hidden]`.
    pub shape: Vec<usize>,
    /// Whether there is a bias, of `shape[0]` elements.
    pub bias: bool,
}
