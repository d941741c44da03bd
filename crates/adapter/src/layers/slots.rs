//! Where a model's layers are, said once: by the fields of its structs.

use crate::layers::adaptable::{Slot, SlotRef};
use crate::layers::embedding::Embedding;
use crate::layers::frozen::Frozen;
use crate::layers::linear::Linear;

/// Something with named layers in it. [`slots!`](crate::slots) writes it for a struct.
pub trait Slots {
    /// Calls `f` with every layer, under its name behind `name`, in the order of the fields.
    fn slots(&mut self, name: &str, f: &mut dyn FnMut(&str, Slot<'_>));
    /// The same, for reading.
    fn slots_ref(&self, name: &str, f: &mut dyn FnMut(&str, SlotRef<'_>));
}

impl Slots for Linear {
    fn slots(&mut self, name: &str, f: &mut dyn FnMut(&str, Slot<'_>)) {
        f(name, Slot::Linear(self));
    }

    fn slots_ref(&self, name: &str, f: &mut dyn FnMut(&str, SlotRef<'_>)) {
        f(name, SlotRef::Linear(self));
    }
}

impl Slots for Embedding {
    fn slots(&mut self, name: &str, f: &mut dyn FnMut(&str, Slot<'_>)) {
        f(name, Slot::Embedding(self));
    }

    fn slots_ref(&self, name: &str, f: &mut dyn FnMut(&str, SlotRef<'_>)) {
        f(name, SlotRef::Embedding(self));
    }
}

/// Whole parameters, by what a tensor of that rank is in a model.
macro_rules! frozen {
    ($($rank:literal => $kind:ident),+) => {$(
        impl Slots for Frozen<$rank> {
            fn slots(&mut self, name: &str, f: &mut dyn FnMut(&str, Slot<'_>)) {
                f(name, Slot::$kind(self));
            }

            fn slots_ref(&self, name: &str, f: &mut dyn FnMut(&str, SlotRef<'_>)) {
                f(name, SlotRef::$kind(self));
            }
        }
    )+};
}
frozen!(1 => Norm, 3 => Param, 4 => Conv);

impl<T: Slots> Slots for Option<T> {
    fn slots(&mut self, name: &str, f: &mut dyn FnMut(&str, Slot<'_>)) {
        if let Some(inner) = self {
            inner.slots(name, f);
        }
    }

    fn slots_ref(&self, name: &str, f: &mut dyn FnMut(&str, SlotRef<'_>)) {
        if let Some(inner) = self {
            inner.slots_ref(name, f);
        }
    }
}

/// By number, as in PyTorch's `ModuleList`.
impl<T: Slots> Slots for Vec<T> {
    fn slots(&mut self, name: &str, f: &mut dyn FnMut(&str, Slot<'_>)) {
        for (i, inner) in self.iter_mut().enumerate() {
            inner.slots(&under(name, &i.to_string()), f);
        }
    }

    fn slots_ref(&self, name: &str, f: &mut dyn FnMut(&str, SlotRef<'_>)) {
        for (i, inner) in self.iter().enumerate() {
            inner.slots_ref(&under(name, &i.to_string()), f);
        }
    }
}

/// `name.field`, or `field` where there is no name.
pub fn under(name: &str, field: &str) -> String {
    match name.is_empty() {
        true => field.to_owned(),
        false => format!("{name}.{field}"),
    }
}

/// Says which fields of a struct hold layers, in the order in which the model lists them. A layer is
/// called as its field, or as the text behind a colon says. With `model` in front the struct is a whole
/// model ([`Adaptable`](crate::Adaptable)).
///
/// ```
/// use burn::module::Module;
/// use enamel_adapter::{Linear, slots};
///
/// #[derive(Module, Debug)]
/// struct Mlp {
///     up: Linear,
///     down: Linear,
/// }
///
/// #[derive(Module, Debug)]
/// struct Net {
///     blocks: Vec<Mlp>,
///     head: Linear,
/// }
///
/// slots!(Mlp { up, down });
/// // `layers.0.up`, `layers.0.down`, `layers.1.up`, ..., `lm_head`
/// slots!(model Net { blocks: "layers", head: "lm_head" });
/// ```
#[macro_export]
macro_rules! slots {
    (model $type:ident { $($fields:tt)* }) => {
        $crate::slots!($type { $($fields)* });

        impl $crate::Adaptable for $type {
            fn for_each_slot(&mut self, f: &mut dyn FnMut(&str, $crate::Slot<'_>)) {
                $crate::Slots::slots(self, "", f);
            }

            fn for_each_slot_ref(&self, f: &mut dyn FnMut(&str, $crate::SlotRef<'_>)) {
                $crate::Slots::slots_ref(self, "", f);
            }
        }
    };
    ($type:ident { $($field:ident $(: $called:literal)?),* $(,)? }) => {
        impl $crate::Slots for $type {
            fn slots(&mut self, name: &str, f: &mut dyn FnMut(&str, $crate::Slot<'_>)) {
                $( $crate::Slots::slots(
                    &mut self.$field,
                    &$crate::layers::slots::under(name, $crate::slots!(@ $field $($called)?)),
                    f,
                ); )*
            }

            fn slots_ref(&self, name: &str, f: &mut dyn FnMut(&str, $crate::SlotRef<'_>)) {
                $( $crate::Slots::slots_ref(
                    &self.$field,
                    &$crate::layers::slots::under(name, $crate::slots!(@ $field $($called)?)),
                    f,
                ); )*
            }
        }
    };
    (@ $field:ident) => { stringify!($field) };
    (@ $field:ident $called:literal) => { $called };
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests;
