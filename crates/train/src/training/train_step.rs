//! The model as burn-train sees it: one optimizer step's work as `TrainStep`, one validation batch
//! as `InferenceStep`.

use std::time::Instant;

use burn::backend::ExecutionError;
use burn::module::Module;
use burn::optim::{GradientsAccumulator, GradientsParams};
use burn::tensor::{Int, Tensor, TensorData};
use burn::train::{InferenceStep, ItemLazy, TrainOutput, TrainStep};
use enamel_data::Batch;
use enamel_kernels::{LossSpec, linear_cross_entropy_with};
use enamel_model::{CausalLm, ModelInput};

use crate::training::grad_clipping::Clipping;

/// The adapted model under training.
#[derive(Module, Debug)]
pub struct TrainModel {
    /// The frozen base with its adapters.
    pub model: CausalLm,
}

/// All forward passes of one optimizer step. A pure function of the recipe and the step's number,
/// so that a resumed run sees what an uninterrupted one would have seen.
#[derive(Clone, Debug)]
pub struct StepItem {
    /// Optimizer step, counted from 1.
    pub step: usize,
    /// Seed of everything random in this step.
    pub seed: u64,
    /// The micro-batches whose gradients are added up.
    pub micro: Vec<Batch>,
    /// Bound on the global norm of the gradient; 0 for none.
    pub max_grad_norm: f64,
    /// Share of each label that is spread evenly over the vocabulary.
    pub label_smoothing: f64,
}

/// What one optimizer step measured.
#[derive(Clone, Debug, PartialEq)]
pub struct StepOutput {
    /// Optimizer step, counted from 1.
    pub step: usize,
    /// Steps of the whole run.
    pub total_steps: usize,
    /// Mean negative log-likelihood over the step's trained tokens (of smoothed labels, if they are
    /// smoothed), in nats; what a method adds to it
    /// (AdaLoRA's orthogonality) is left out.
    pub loss: f64,
    /// Tokens with a label.
    pub trained_tokens: usize,
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

/// What one validation batch measured.
#[derive(Clone, Debug, PartialEq)]
pub struct EvalOutput {
    /// Sum of negative log-likelihoods, in nats.
    pub loss_sum: f64,
    /// Tokens with a label.
    pub trained_tokens: usize,
}

impl ItemLazy for StepOutput {
    fn sync(self) -> Result<Self, ExecutionError> {
        Ok(self)
    }
}

impl ItemLazy for EvalOutput {
    fn sync(self) -> Result<Self, ExecutionError> {
        Ok(self)
    }
}

/// Labels of the next token: position `t` of a row gets the label of token `t + 1`, the last one
/// none. Row-major, −100 where nothing is trained.
pub fn shifted_labels(batch: &Batch) -> Vec<i64> {
    let mut shifted = vec![-100; batch.labels.len()];
    for (from, to) in batch
        .labels
        .chunks(batch.len)
        .zip(shifted.chunks_mut(batch.len))
    {
        let n = from.len() - 1;
        to[..n].copy_from_slice(&from[1..]);
    }
    shifted
}

impl TrainModel {
    /// Sum of the negative log-likelihoods of a batch's labels, `[1]`, with `smoothing` as the share of each
    /// that is spread evenly over the vocabulary. transformers' trainer smooths its validation loss too;
    /// here that one says how likely the labels are, whatever the training.
    ///
    /// In training, `seed` decides what the blocks draw ([`ModelInput::seed`]).
    ///
    /// Rows are padded on the right and attention is causal, so no real token ever sees padding and
    /// no mask is needed; the labels leave padding out of the loss.
    pub fn loss_sum(&self, batch: &Batch, smoothing: f64, seed: Option<u64>) -> Tensor<1> {
        let device = self.model.device();
        let ids = TensorData::new(batch.input_ids.clone(), [batch.batch, batch.len]);
        let input = ModelInput {
            seed,
            ..ModelInput::new(Tensor::<2, Int>::from_data(ids, &device))
        };
        let hidden = self.model.forward_hidden(&input, None);
        let [rows, len, width] = hidden.dims();
        let labels = shifted_labels(batch);
        let hidden = hidden.reshape([rows * len, width]);
        match self.model.head_as_one_product() {
            Some(head) => {
                let spec = LossSpec {
                    label_smoothing: smoothing,
                    compute: head.compute(),
                };
                linear_cross_entropy_with(hidden, head.values(), &labels, spec)
            }
            None => self.loss_through_head(hidden, &labels, smoothing),
        }
    }
}

impl TrainModel {
    /// The same where the head does more than multiply (an adapter with a bias or with dropout is on it):
    /// logits of all labelled rows at once.
    fn loss_through_head(&self, hidden: Tensor<2>, labels: &[i64], smoothing: f64) -> Tensor<1> {
        let device = hidden.device();
        let trained = labels.iter().enumerate().filter(|(_, label)| **label >= 0);
        let (places, labels): (Vec<i64>, Vec<i64>) =
            trained.map(|(place, label)| (place as i64, *label)).unzip();
        let count = places.len();
        let int = |values: Vec<i64>| {
            Tensor::<1, Int>::from_data(TensorData::new(values, [count]), &device)
        };
        let logits = self.model.logits(hidden.select(0, int(places)));
        let log_probs = burn::tensor::activation::log_softmax(logits, 1);
        let vocabulary = log_probs.dims()[1] as f64;
        let sharp = -log_probs
            .clone()
            .gather(1, int(labels).unsqueeze_dim(1))
            .sum();
        if smoothing == 0.0 {
            return sharp;
        }
        let even = -log_probs.sum().div_scalar(vocabulary);
        sharp.mul_scalar(1.0 - smoothing) + even.mul_scalar(smoothing)
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

impl TrainStep for TrainModel {
    type Input = StepItem;
    type Output = StepOutput;

    fn step(&self, item: StepItem) -> TrainOutput<StepOutput> {
        let started = Instant::now();
        let device = self.model.device();
        // The mean is over all trained tokens of the step, so that the split into micro-batches
        // does not matter (1 x 8 equals 8 x 1).
        let total: usize = item.micro.iter().map(|b| b.trained_tokens).sum();
        let mut sum = 0.0;
        let mut tokens = 0;
        let mut accumulator = GradientsAccumulator::new();
        for (index, batch) in item.micro.iter().enumerate() {
            // What is drawn outside the blocks comes from the device's generator.
            let seed = mix_seed(item.seed, item.step as u64, index as u64);
            device.seed(seed);
            let loss = self.loss_sum(batch, item.label_smoothing, Some(seed));
            sum += scalar(loss.clone().inner());
            tokens += batch.tokens;
            let mut loss = loss.div_scalar(total.max(1) as f64);
            // What the method adds to the loss counts once a step, however it is split.
            if let (0, Some(own)) = (index, enamel_adapter::regularization(&self.model)) {
                loss = loss + own;
            }
            let grads = loss.backward();
            accumulator.accumulate(self, GradientsParams::from_grads(grads, self));
        }
        let grads = accumulator.grads();
        let clipping = Clipping::of(self, &grads, item.max_grad_norm);
        TrainOutput {
            grads,
            item: StepOutput {
                step: item.step,
                total_steps: 0,
                loss: sum / total.max(1) as f64,
                trained_tokens: total,
                tokens,
                grad_norm: clipping.norm,
                grad_factor: clipping.factor,
                learning_rate: 0.0,
                seconds: started.elapsed().as_secs_f64(),
                memory: 0,
                eta_seconds: 0.0,
            },
        }
    }
}

impl InferenceStep for TrainModel {
    type Input = Batch;
    type Output = EvalOutput;

    fn step(&self, batch: Batch) -> EvalOutput {
        let loss_sum = scalar(self.loss_sum(&batch, 0.0, None));
        EvalOutput {
            loss_sum,
            trained_tokens: batch.trained_tokens,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn labels_move_one_to_the_left_within_each_row() {
        let batch = Batch {
            input_ids: vec![1, 2, 3, 4, 5, 0],
            labels: vec![7, 2, 3, -100, 5, -100],
            attention_mask: vec![true, true, true, true, true, false],
            batch: 2,
            len: 3,
            trained_tokens: 3,
            tokens: 5,
            rows: vec![0, 1],
        };
        assert_eq!(shifted_labels(&batch), [2, 3, -100, 5, -100, -100]);
    }

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
