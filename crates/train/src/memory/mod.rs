//! Peak memory of training before any weight is loaded, part by part: a pure function of the model's shape,
//! the adapter and the settings.
//!
//! What is counted is what the operations keep (`kept.rs`) and what the largest of them works in
//! (`work.rs`), in bytes; only the program itself and what the allocator cannot fill are measured constants.
//! `docs/measurements/memory.md` sets the estimate against measured peaks.

mod activations;
mod available;
mod estimate;
mod fit;
mod model;
pub mod oom_notice;
pub mod process;
mod settings;
#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests;
mod workspace;

use std::fmt;

use serde::{Deserialize, Serialize};

pub use available::{Room, room};
pub use estimate::Estimate;
pub use fit::{Change, Proposal, fit, parse_bytes};
pub use model::{Block, Head, Kind, ModelSizes, Part};
pub use settings::{Settings, Weights};

use crate::optimizer::state_bytes;
use crate::text::bytes_text;

/// Bytes of a float in memory.
const FLOAT: usize = size_of::<f32>();

/// How far a measured peak may lie from the estimate, as a share of it.
pub const ERROR: f64 = 0.10;

/// Bytes by what they are for. Each part is its own most; [`Footprint::peak`] is the most at one time.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Footprint {
    /// Frozen weights.
    pub base: usize,
    /// Trained parameters.
    pub adapter: usize,
    /// Their gradients, twice while those of several forward passes are added up.
    pub gradients: usize,
    /// The optimizer's moments, without those that are paged.
    pub optimizer: usize,
    /// What the forward pass keeps for the backward pass.
    pub activations: usize,
    /// The buffers of the loss.
    pub logits: usize,
    /// What the largest operation of the backward pass works in, or the making of first values (LoftQ).
    pub workspace: usize,
    /// The program, the tokenizer, and memory that the allocator cannot fill.
    pub runtime: usize,
    /// What is counted above and is never there at the same time.
    pub overlap: usize,
}

impl Footprint {
    /// Bytes at the moment when most is in memory.
    pub fn peak(&self) -> usize {
        let parts: usize = self.parts().iter().map(|(_, bytes)| bytes).sum();
        parts - self.overlap
    }

    /// The parts by name, as the table has them.
    pub fn parts(&self) -> [(&'static str, usize); 8] {
        [
            ("base", self.base),
            ("adapter", self.adapter),
            ("gradients", self.gradients),
            ("optimizer", self.optimizer),
            ("activations", self.activations),
            ("logits", self.logits),
            ("workspace", self.workspace),
            ("runtime", self.runtime),
        ]
    }

    /// The peak without what is measured and not counted: the tensors of a step.
    pub fn tensors(&self) -> usize {
        self.peak() - self.runtime
    }

    /// The peak of several adapters on one base that train in turns.
    pub fn in_turns(all: &[Self]) -> Self {
        let Some(mut sum) = all.iter().copied().max_by_key(Self::peak) else {
            return Self::default();
        };
        sum.adapter = all.iter().map(|f| f.adapter).sum();
        sum.optimizer = all.iter().map(|f| f.optimizer).sum();
        sum
    }
}

impl fmt::Display for Footprint {
    /// A line a part, and the peak below.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (name, bytes) in self.parts() {
            writeln!(f, "{name:<12} {:>11}", bytes_text(bytes))?;
        }
        if self.overlap > 0 {
            writeln!(
                f,
                "not at once  {:>11}",
                format!("-{}", bytes_text(self.overlap))
            )?;
        }
        write!(f, "peak         {:>11}", bytes_text(self.peak()))
    }
}

/// What training `model` with these settings takes.
pub fn estimate(model: &ModelSizes, settings: &Settings) -> Footprint {
    let trained: usize = model.trained.iter().sum();
    let summed = settings.accumulation > 1;
    let base = settings.base_bytes(model);
    let adapter = FLOAT * (trained + model.shared);
    let gradients = FLOAT * trained * if summed { 2 } else { 1 };
    let optimizer = state_bytes(settings.optim, model.trained.iter().copied()).resident;
    let kept = activations::activations(model, settings);
    let logits = workspace::logits(model, settings);
    let backward = workspace::backward(model, settings);

    // Five moments may be the largest: the loss, the first block of the backward pass, its last, its end, when no
    // activation is left and all gradients are there, and the making of first values. Gradients of earlier
    // passes are there throughout.
    let earlier = if summed { FLOAT * trained } else { 0 };
    let there = gradients.saturating_sub(model.gradients_to_come(settings.every));
    let moments = [
        kept.between + logits + earlier,
        kept.most + backward + model.head_gradient() + earlier,
        kept.last + workspace::late(model, settings) + there,
        gradients,
        model.start,
    ];
    let step = moments.into_iter().max().unwrap_or(0);
    let activations = kept.most.max(kept.between);
    let workspace = backward.max(model.start);
    let counted = gradients + activations + logits + workspace;
    let tensors = workspace::Tensors {
        step,
        segment: settings.every.map_or(0, |_| kept.last + backward),
        moments: optimizer,
    };
    Footprint {
        base,
        adapter,
        gradients,
        optimizer,
        activations,
        logits,
        workspace,
        runtime: workspace::runtime(model, settings, tensors),
        overlap: counted.saturating_sub(step),
    }
}
