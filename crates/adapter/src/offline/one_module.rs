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
    Conv(Frozen<4>),
    Param(Frozen<3>),
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
            ModuleKind::Norm => Module::Norm(frozen(shape, base, device)),
            ModuleKind::Conv => Module::Conv(frozen(shape, base, device)),
            ModuleKind::Param => Module::Param(frozen(shape, base, device)),
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
            (Module::Norm(own), Module::Norm(other)) => rebase(own, other),
            (Module::Conv(own), Module::Conv(other)) => rebase(own, other),
            (Module::Param(own), Module::Param(other)) => rebase(own, other),
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
            Module::Norm(norm) => folded(norm, name, &names)?,
            Module::Conv(conv) => folded(conv, name, &names)?,
            Module::Param(param) => folded(param, name, &names)?,
        };
        Ok(HostModule { weight, bias })
    }
}

/// A module that is used as a whole.
fn frozen<const D: usize>(shape: &ModuleShape, base: &HostModule, device: &Device) -> Frozen<D> {
    let sides: [usize; D] = std::array::from_fn(|i| shape.shape.get(i).copied().unwrap_or(1));
    let data = TensorData::new(base.weight.clone(), sides);
    let module = Frozen::new(&shape.weight_name(), Tensor::from_data(data, device));
    match &base.bias {
        Some(bias) => {
            let data = TensorData::new(bias.clone(), [bias.len()]);
            module.with_bias(
                &format!("{}.bias", shape.name),
                Tensor::from_data(data, device),
            )
        }
        None => module,
    }
}

fn rebase<const D: usize>(own: &mut Frozen<D>, other: Frozen<D>) {
    own.weight = other.weight;
    own.bias = other.bias;
}

fn folded<const D: usize>(
    module: &Frozen<D>,
    name: &str,
    names: &[String],
) -> Result<(Vec<f32>, Option<Vec<f32>>)> {
    let bias = module.folded_bias(names);
    let bias = bias.map(|bias| to_host(name, bias)).transpose()?;
    Ok((to_host(name, module.folded(names))?, bias))
}

impl Adaptable for OneModule {
    fn for_each_slot(&mut self, f: &mut dyn FnMut(&str, Slot<'_>)) {
        match &mut self.module {
            Module::Linear(linear) => f(&self.name, Slot::Linear(linear)),
            Module::Embedding(table) => f(&self.name, Slot::Embedding(table)),
            Module::Norm(norm) => f(&self.name, Slot::Norm(norm)),
            Module::Conv(conv) => f(&self.name, Slot::Conv(conv)),
            Module::Param(param) => f(&self.name, Slot::Param(param)),
        }
    }

    fn for_each_slot_ref(&self, f: &mut dyn FnMut(&str, SlotRef<'_>)) {
        match &self.module {
            Module::Linear(linear) => f(&self.name, SlotRef::Linear(linear)),
            Module::Embedding(table) => f(&self.name, SlotRef::Embedding(table)),
            Module::Norm(norm) => f(&self.name, SlotRef::Norm(norm)),
            Module::Conv(conv) => f(&self.name, SlotRef::Conv(conv)),
            Module::Param(param) => f(&self.name, SlotRef::Param(param)),
        }
    }
}
