//! The settings that memory depends on, and what the frozen weights take under them.

use std::num::NonZeroUsize;

use enamel_adapter::{ModuleKind, ModuleShape};
use enamel_model::Quantization;

use super::{FLOAT, Kind, ModelSizes};
use crate::optimizer::Optim;

/// How frozen matrices are held.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Weights {
    /// Four bytes a number.
    F32,
    /// Two bytes a number.
    Bf16,
}

/// What a recipe says that memory depends on.
#[derive(Clone, Debug, PartialEq)]
pub struct Settings {
    /// Rows a forward pass.
    pub batch: usize,
    /// Forward passes an optimizer step.
    pub accumulation: usize,
    /// Tokens of the longest row.
    pub length: usize,
    /// Blocks a segment of gradient checkpointing; none without it.
    pub every: Option<NonZeroUsize>,
    /// The optimizer.
    pub optim: Optim,
    /// How frozen matrices are held.
    pub weights: Weights,
    /// What becomes of linear layers.
    pub quantization: Quantization,
    /// Threads that work.
    pub threads: usize,
    /// What computes.
    pub kind: Kind,
}

impl Settings {
    /// Tokens of a forward pass, padding included.
    pub fn rows(&self) -> usize {
        self.batch * self.length
    }

    /// Bytes of the frozen weights.
    pub(super) fn base_bytes(&self, model: &ModelSizes) -> usize {
        if model.trains_base() {
            return 0;
        }
        let matrix = self.number_bytes(model);
        let bytes = |module: &ModuleShape| {
            let rows = module.shape.first().copied().unwrap_or(0);
            let bias = if module.bias { FLOAT * rows } else { 0 };
            let numbers: usize = module.shape.iter().product();
            let weight = match module.kind {
                ModuleKind::Norm => FLOAT * numbers,
                ModuleKind::Linear => self.packed(model, module).unwrap_or(matrix * numbers),
                _ => matrix * numbers,
            };
            weight + bias
        };
        model.modules.iter().map(bytes).sum()
    }

    /// Bytes of the linear layers that are held dense, trained or not.
    pub(super) fn dense_bytes(&self, model: &ModelSizes) -> usize {
        let dense = model.modules.iter().filter(|module| {
            let frozen = !model.trains_base();
            module.kind == ModuleKind::Linear && !(frozen && self.packed(model, module).is_some())
        });
        let numbers: usize = dense.map(|m| m.shape.iter().product::<usize>()).sum();
        self.number_bytes(model) * numbers
    }

    /// Bytes of a number of the base's dense matrices.
    fn number_bytes(&self, model: &ModelSizes) -> usize {
        match self.weights {
            Weights::Bf16 if !model.trains_base() => 2,
            _ => FLOAT,
        }
    }

    /// Bytes of a linear layer that is held quantised: as its file has it, or as the recipe asks
    /// (`Quantization::pack` decides so for the weights).
    fn packed(&self, model: &ModelSizes, module: &ModuleShape) -> Option<usize> {
        if self.quantization.skips(&module.name) || self.quantization.dequantize {
            return None;
        }
        let stored = model.packed.get(&format!("{}.weight", module.name));
        match (stored, self.quantization.format, module.shape.as_slice()) {
            (Some(stored), format, _) if stored.bitsandbytes || format.is_none() => {
                Some(stored.bytes)
            }
            (_, Some(format), &[rows, columns]) => Some(format.bytes([rows, columns])),
            _ => None,
        }
    }
}
