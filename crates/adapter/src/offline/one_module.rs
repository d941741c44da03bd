//! A model of one module, which an adapter is attached to in order to be folded.

use burn::tensor::{Device, Tensor, TensorData};

use super::HostModule;
use crate::base::module_shape::ModuleKind;
use crate::base::module_shape::ModuleShape;
use crate::base::routing::DEFAULT;
use crate::base::to_host;
use crate::error::Result;
use crate::layers::adaptable::{Adaptable, Slot, SlotRef};
use crate::layers::embedding::Embedding;
use crate::layers::frozen::Frozen;
use crate::layers::linear::Linear;

/// A model of one module.
pub(super) struct OneModule {
    name: String,
    pub(super) module: Module,
}

#[allow(clippy::large_enum_variant, reason = "there is one at a time")]
pub(super) enum Module {
    Linear(Linear),
    Embedding(Embedding),
    Norm(Frozen<1>),
}

impl OneModule {
    pub(super) fn new(shape: &ModuleShape, base: &HostModule, device: &Device) -> Self {
        let name = &shape.name;
        let sides = |i: usize| shape.shape.get(i).copied().unwrap_or(1);
        let matrix = || {
            let data = TensorData::new(base.weight.clone(), [sides(0), sides(1)]);
            Tensor::<2>::from_data(data, device)
        };
        let vector = |values: &Vec<f32>| {
            let data = TensorData::new(values.clone(), [values.len()]);
            Tensor::<1>::from_data(data, device)
        };
        let module = match shape.kind {
            ModuleKind::Linear | ModuleKind::Head => {
                Module::Linear(Linear::new(name, matrix(), base.bias.as_ref().map(vector)))
            }
            ModuleKind::Embedding => {
                Module::Embedding(Embedding::new(&format!("{name}.weight"), matrix()))
            }
            ModuleKind::Norm => {
                let norm = Frozen::new(&format!("{name}.weight"), vector(&base.weight));
                Module::Norm(match &base.bias {
                    Some(bias) => norm.with_bias(&format!("{name}.bias"), vector(bias)),
                    None => norm,
                })
            }
        };
        Self {
            name: name.clone(),
            module,
        }
    }

    /// Puts another base under the adapter.
    pub(super) fn rebase(&mut self, other: Self) {
        match (&mut self.module, other.module) {
            (Module::Linear(own), Module::Linear(other)) => {
                own.weight = other.weight;
                own.bias = other.bias;
            }
            (Module::Embedding(own), Module::Embedding(other)) => own.weight = other.weight,
            (Module::Norm(own), Module::Norm(other)) => {
                own.weight = other.weight;
                own.bias = other.bias;
            }
            _ => {}
        }
    }

    pub(super) fn folded(self) -> Result<HostModule> {
        let names = [DEFAULT.to_string()];
        let name = &self.name;
        let (weight, bias) = match &self.module {
            Module::Linear(linear) => {
                let folded = linear.folded(&names);
                let bias = folded.bias.map(|b| to_host(name, b)).transpose()?;
                (to_host(name, folded.weight.dense())?, bias)
            }
            Module::Embedding(table) => (to_host(name, table.folded(&names).dense())?, None),
            Module::Norm(norm) => {
                let bias = norm.folded_bias(&names);
                let bias = bias.map(|b| to_host(name, b)).transpose()?;
                (to_host(name, norm.folded(&names))?, bias)
            }
        };
        Ok(HostModule { weight, bias })
    }
}

impl Adaptable for OneModule {
    fn for_each_slot(&mut self, f: &mut dyn FnMut(&str, Slot<'_>)) {
        match &mut self.module {
            Module::Linear(linear) => f(&self.name, Slot::Linear(linear)),
            Module::Embedding(table) => f(&self.name, Slot::Embedding(table)),
            Module::Norm(norm) => f(&self.name, Slot::Norm(norm)),
        }
    }

    fn for_each_slot_ref(&self, f: &mut dyn FnMut(&str, SlotRef<'_>)) {
        match &self.module {
            Module::Linear(linear) => f(&self.name, SlotRef::Linear(linear)),
            Module::Embedding(table) => f(&self.name, SlotRef::Embedding(table)),
            Module::Norm(norm) => f(&self.name, SlotRef::Norm(norm)),
        }
    }
}
