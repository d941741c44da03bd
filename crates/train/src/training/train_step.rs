//! The model as burn-train sees it: one optimizer step's work as `TrainStep`, one validation batch
//! as `InferenceStep`.

use std::time::Instant;

use burn::backend::ExecutionError;
use burn::module::Module;
use burn::optim::{GradientsAccumulator, GradientsParams};
use burn::tensor::Tensor;
use burn::train::{InferenceStep, ItemLazy, TrainOutput, TrainStep};
use enamel_model::Model;

use crate::task::{LossSettings, Measured, Tally, Task, TaskBatch};

/// The adapted model under training.
#[derive(Module, Debug)]
pub struct TrainModel<T: Task> {
    /// The frozen base with its adapters.
    pub model: Model,
    /// What it is trained for.
    #[module(skip)]
    pub task: T,
}

/// All forward passes of one optimizer step. A pure function of the recipe and the step's number,
/// so that a resumed run sees what an uninterrupted one would have seen.
#[derive(Clone, Debug)]
pub struct StepItem<B> {
    /// Optimizer step, counted from 1.
    pub step: usize,
    /// Seed of everything random in this step.
    pub seed: u64,
    /// The micro-batches whose gradients are added up.
    pub micro: Vec<B>,
    /// The process that does this part of the step, from 0.
    pub rank: usize,
    /// Labels that the loss counts in the whole step, on all processes: what the loss is a mean over.
    pub count: usize,
    /// Share of each label that is spread evenly over the vocabulary.
    pub label_smoothing: f64,
}

/// What one optimizer step measured.
#[derive(Clone, Debug, PartialEq)]
pub struct StepOutput<Y> {
    /// Optimizer step, counted from 1.
    pub step: usize,
    /// Steps of the whole run.
    pub total_steps: usize,
    /// The loss (of smoothed labels, if they are smoothed) and what the task counts; what a method adds to the loss
    /// (AdaLoRA's orthogonality) is left out.
    pub measured: Measured<Y>,
    /// Tokens that are not padding.
    pub tokens: usize,
    /// Global gradient norm before clipping.
    pub grad_norm: f64,
    /// By what clipping multiplies the gradients, which are handed out as they were before.
    pub grad_factor: f64,
    /// Learning rate of the step.
    pub learning_rate: f64,
    /// Wall time of forward, backward and clipping.
    pub seconds: f64,
    /// Resident memory of the process after the step, in bytes.
    pub memory: u64,
    /// Estimated time to the end of the run.
    pub eta_seconds: f64,
}

impl<Y: Tally> ItemLazy for StepOutput<Y> {
    fn sync(self) -> Result<Self, ExecutionError> {
        Ok(self)
    }
}

/// Splitmix64 over the parts: independent streams for each step and micro-batch.
pub fn mix_seed(seed: u64, a: u64, b: u64) -> u64 {
    [a, b].iter().fold(seed, |state, part| {
        let mut z =
            (state ^ part.wrapping_mul(0xD6E8_FEB8_6659_FD93)).wrapping_add(0x9E37_79B9_7F4A_7C15);
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^ (z >> 31)
    })
}

/// A one-element tensor as a number; NaN if the device failed, which the caller reports as such.
pub(crate) fn scalar(t: Tensor<1>) -> f64 {
    t.into_data().iter::<f64>().next().unwrap_or(f64::NAN)
}

impl<T: Task> TrainStep for TrainModel<T> {
    type Input = StepItem<T::Batch>;
    type Output = StepOutput<T::Tally>;

    /// The gradients of a step as they are on this process, neither summed nor clipped; what the loop measures is
    /// left at 0.
    fn step(&self, item: StepItem<T::Batch>) -> TrainOutput<StepOutput<T::Tally>> {
        let started = Instant::now();
        let device = self.model.device();
        let mut measured = Measured::default();
        let mut tokens = 0;
        let mut accumulator = GradientsAccumulator::new();
        for (index, batch) in item.micro.iter().enumerate() {
            // What is drawn outside the blocks comes from the device's generator.
            let seed = mix_seed(item.seed, item.step as u64, index as u64);
            device.seed(seed);
            let settings = LossSettings {
                label_smoothing: item.label_smoothing,
                seed: Some(seed),
            };
            let (loss, tally) = self.task.loss(&self.model, batch, settings);
            measured.add(&Measured {
                loss_sum: scalar(loss.clone().inner()),
                count: batch.count(),
                tally,
            });
            tokens += batch.tokens();
            // The mean is over all labels of the step, so that the split into micro-batches
            // does not matter (1 x 8 equals 8 x 1).
            let mut loss = loss.div_scalar(item.count.max(1) as f64);
            // What the method adds to the loss counts once a step, however it is split.
            if (item.rank, index) == (0, 0)
                && let Some(own) = enamel_adapter::regularization(&self.model)
            {
                loss = loss + own;
            }
            let grads = loss.backward();
            accumulator.accumulate(self, GradientsParams::from_grads(grads, self));
        }
        TrainOutput {
            grads: accumulator.grads(),
            item: StepOutput {
                step: item.step,
                total_steps: 0,
                measured,
                tokens,
                grad_norm: 0.0,
                grad_factor: 1.0,
                learning_rate: 0.0,
                seconds: started.elapsed().as_secs_f64(),
                memory: 0,
                eta_seconds: 0.0,
            },
        }
    }
}

impl<T: Task> InferenceStep for TrainModel<T> {
    type Input = T::Batch;
    type Output = Measured<T::Tally>;

    fn step(&self, batch: T::Batch) -> Measured<T::Tally> {
        let (loss, tally) = self.task.loss(&self.model, &batch, LossSettings::default());
        Measured {
            loss_sum: scalar(loss),
            count: batch.count(),
            tally,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn seeds_differ_between_steps_and_micro_batches() {
        let seeds = [
            mix_seed(1, 1, 0),
            mix_seed(1, 0, 1),
            mix_seed(1, 2, 0),
            mix_seed(2, 1, 0),
        ];
        for (i, a) in seeds.iter().enumerate() {
            assert!(seeds[i + 1..].iter().all(|b| a != b));
        }
    }
}
