//! The settings that memory depends on, and what the frozen weights take under them.

use std::num::NonZeroUsize;

use enamel_adapter::ModuleKind;

use super::{FLOAT, Kind, Model, Optim};

/// How frozen matrices are held.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Weights {
    /// Four bytes a number.
    F32,
    /// Two bytes a number.
    Bf16,
}

/// How the linear layers of the blocks are quantised; the output head and the embedding never are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Quantisation {
    /// NF4 or FP4.
    FourBit {
        /// Numbers that share a scale.
        block: usize,
        /// Whether the scales are quantised themselves.
        double: bool,
    },
    /// LLM.int8().
    Int8,
}

impl Quantisation {
    /// Scales that share one of their own in double quantisation.
    const NESTED: usize = 256;

    /// Bytes of a matrix `[rows, columns]`: bitsandbytes' format.
    pub fn bytes(self, rows: usize, columns: usize) -> usize {
        let n = rows * columns;
        match self {
            Self::FourBit { block, double } => {
                let scales = n.div_ceil(block);
                let scales = match double {
                    // A byte each, f32 for so many of them, the map of 256 values and the offset.
                    true => scales + FLOAT * scales.div_ceil(Self::NESTED) + 256 * FLOAT + FLOAT,
                    false => FLOAT * scales,
                };
                n.div_ceil(2) + scales
            }
            Self::Int8 => n + FLOAT * rows,
        }
    }
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
    /// How the blocks' linear layers are quantised.
    pub quantisation: Option<Quantisation>,
    /// Modules that are not quantised: a name or the last parts of one.
    pub skip_modules: Vec<String>,
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
    pub(super) fn base_bytes(&self, model: &Model) -> usize {
        if model.trains_base() {
            return 0;
        }
        let matrix = match self.weights {
            Weights::F32 => FLOAT,
            Weights::Bf16 => 2,
        };
        let bytes = |module: &enamel_adapter::ModuleShape| {
            let bias = if module.bias {
                FLOAT * module.shape.first().unwrap_or(&0)
            } else {
                0
            };
            let weight = match (module.kind, module.shape.as_slice(), self.quantisation) {
                (ModuleKind::Linear, [rows, columns], Some(format))
                    if !self.skips(&module.name) =>
                {
                    format.bytes(*rows, *columns)
                }
                (ModuleKind::Norm, shape, _) => FLOAT * shape.iter().product::<usize>(),
                (_, shape, _) => matrix * shape.iter().product::<usize>(),
            };
            weight + bias
        };
        model.modules.iter().map(bytes).sum()
    }

    fn skips(&self, name: &str) -> bool {
        self.skip_modules.iter().any(|skip| {
            name.strip_suffix(skip.as_str())
                .is_some_and(|head| head.is_empty() || head.ends_with('.'))
        })
    }
}
