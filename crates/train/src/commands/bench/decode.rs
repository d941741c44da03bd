//! Greedy decoding, one token after the other, against the rate at which memory can be read.

use std::ops::ControlFlow;
use std::time::Instant;

use burn::module::{Module, ModuleVisitor, Param};
use burn::tensor::Tensor;
use enamel_model::arch::Backbone;
use enamel_model::{Model, Sampling, generate};
use serde::Serialize;

use super::{reset_peak, token};
use crate::error::TrainError;
use crate::memory::process::Memory;

/// Decoding one token after the other.
#[derive(Clone, Debug, Serialize)]
pub struct DecodeFigures {
    /// `base`, or the method of the unmerged adapter.
    pub variant: String,
    /// Tokens of the prompt.
    pub prompt: usize,
    /// Seconds until the first token.
    pub first_token_seconds: f64,
    /// Tokens a second after the first.
    pub tokens_per_second: f64,
    /// Bytes of weights that each token reads.
    pub weight_bytes: u64,
    /// Bytes a second that this machine reads in order on all threads, measured in the same run.
    pub read_bandwidth: f64,
    /// The speed reached, as a share of what reading the weights alone would allow.
    pub share_of_bandwidth: f64,
    /// Most resident memory, in bytes.
    pub peak_memory: u64,
}

/// Tokens of the prompt before decoding.
const PROMPT: usize = 128;

/// Decodes `tokens` tokens; the bandwidth is filled in by [`DecodeFigures::against`].
pub(super) fn decode(
    model: &Model,
    variant: &str,
    tokens: usize,
) -> Result<DecodeFigures, TrainError> {
    reset_peak();
    let vocabulary = model.config().vocab_size;
    let prompt: Vec<u32> = (0..PROMPT).map(|i| token(i, vocabulary) as u32).collect();
    let started = Instant::now();
    let mut first = None;
    let produced = generate(model, &prompt, &[], &Sampling::greedy(tokens), &mut |_| {
        first.get_or_insert_with(|| started.elapsed().as_secs_f64());
        ControlFlow::Continue(())
    })?;
    let first = first.unwrap_or(f64::NAN);
    let after = started.elapsed().as_secs_f64() - first;
    Ok(DecodeFigures {
        variant: variant.to_owned(),
        prompt: PROMPT,
        first_token_seconds: first,
        tokens_per_second: produced.len().saturating_sub(1) as f64 / after,
        weight_bytes: bytes_a_token(model),
        read_bandwidth: f64::NAN,
        share_of_bandwidth: f64::NAN,
        peak_memory: Memory::new().peak(),
    })
}

impl DecodeFigures {
    /// Compares with `bandwidth`, in bytes a second.
    pub(super) fn against(mut self, bandwidth: f64) -> Self {
        self.read_bandwidth = bandwidth;
        self.share_of_bandwidth = self.tokens_per_second * self.weight_bytes as f64 / bandwidth;
        self
    }
}

/// Every weight once. An embedding that is not the head too is read a row at a time: nothing.
fn bytes_a_token(model: &Model) -> u64 {
    let mut bytes = Bytes(0);
    model.visit(&mut bytes);
    if !model.config().ties_head() {
        let mut embedding = Bytes(0);
        model.backbone.embedding().visit(&mut embedding);
        bytes.0 -= embedding.0;
    }
    bytes.0
}

struct Bytes(u64);

impl ModuleVisitor for Bytes {
    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
        let tensor = param.val();
        self.0 += (tensor.shape().num_elements() * tensor.dtype().size()) as u64;
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn the_share_is_of_the_time_that_reading_takes() {
        let figures = DecodeFigures {
            variant: "base".into(),
            prompt: 1,
            first_token_seconds: 0.1,
            tokens_per_second: 30.0,
            weight_bytes: 500_000_000,
            read_bandwidth: f64::NAN,
            share_of_bandwidth: f64::NAN,
            peak_memory: 0,
        };
        // 15 GB are read a second, of 20.
        let figures = figures.against(20e9);
        assert!((figures.share_of_bandwidth - 0.75).abs() < 1e-12);
    }
}
