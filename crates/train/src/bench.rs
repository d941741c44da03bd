//! `enamel bench`: how fast a training step and decoding are, and how much memory they take.

use std::ops::ControlFlow;
use std::time::Instant;

use burn::module::Module;
use burn::optim::AdamWConfig;
use burn::tensor::Device;
use burn::train::TrainStep;
use enamel_adapter::{LoraConfig, Targets};
use enamel_data::Batch;
use enamel_model::{CausalLm, Sampling, generate};
use serde::Serialize;

use crate::error::TrainError;
use crate::loaded::OpenBase;
use crate::memory::Memory;
use crate::trainee::{StepItem, Trainee};

/// What to measure.
#[derive(Clone, Debug)]
pub struct BenchOptions {
    /// Rows and tokens a row of the training steps.
    pub shapes: Vec<(usize, usize)>,
    /// Timed steps a shape, after one that is not counted.
    pub steps: usize,
    /// Rank of the adapter, on all linear layers of the blocks.
    pub r: usize,
    /// Tokens to decode after a prompt of 128; 0 for none.
    pub decode: usize,
}

/// A training step of one shape.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct StepFigures {
    /// Rows.
    pub rows: usize,
    /// Tokens a row.
    pub tokens: usize,
    /// Median seconds of a whole optimizer step.
    pub seconds: f64,
    /// Tokens a second, from the median.
    pub tokens_per_second: f64,
    /// Most resident memory while measuring this shape, in bytes; since the process began where the
    /// system cannot reset its mark.
    pub peak_memory: u64,
}

/// Decoding one token after the other.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct DecodeFigures {
    /// Tokens of the prompt.
    pub prompt: usize,
    /// Seconds until the first token.
    pub first_token_seconds: f64,
    /// Tokens a second after the first.
    pub tokens_per_second: f64,
    /// Most resident memory, in bytes.
    pub peak_memory: u64,
}

/// Tokens of the prompt before decoding.
const PROMPT: usize = 128;

/// Measures; each figure is handed on as soon as it is there.
pub fn bench(
    base: OpenBase,
    device: &Device,
    options: &BenchOptions,
    on_step: &mut dyn FnMut(&StepFigures),
) -> Result<Option<DecodeFigures>, TrainError> {
    let vocabulary = base.config.vocab_size;
    let mut model = base.weights(device)?;
    drop(base);
    let lora = LoraConfig {
        r: options.r,
        lora_alpha: 2.0 * options.r as f64,
        target_modules: Some(Targets::AllLinear),
        ..LoraConfig::default()
    };
    enamel_adapter::attach(&mut model, &lora, 42)?;
    let decode = match options.decode {
        0 => None,
        tokens => Some(decode(&model, vocabulary, tokens)?),
    };
    let mut trainee = Trainee { model }.fork(&device.clone().autodiff()).train();
    let mut optimizer = AdamWConfig::new()
        .with_epsilon(1e-8)
        .with_weight_decay(0.0)
        .init();
    for &(rows, tokens) in &options.shapes {
        reset_peak();
        let mut seconds = Vec::with_capacity(options.steps);
        for step in 0..=options.steps {
            let started = Instant::now();
            let item = StepItem {
                step: step + 1,
                seed: 42,
                micro: vec![batch(rows, tokens, vocabulary)],
                max_grad_norm: 1.0,
            };
            let output = TrainStep::step(&trainee, item);
            trainee = trainee.optimize(&mut optimizer, 1e-4.into(), output.grads);
            device
                .sync()
                .map_err(|e| TrainError::Framework(format!("waiting for the device: {e}")))?;
            if step > 0 {
                seconds.push(started.elapsed().as_secs_f64());
            }
        }
        seconds.sort_by(f64::total_cmp);
        let seconds = seconds.get(seconds.len() / 2).copied().unwrap_or(f64::NAN);
        on_step(&StepFigures {
            rows,
            tokens,
            seconds,
            tokens_per_second: (rows * tokens) as f64 / seconds,
            peak_memory: Memory::new().peak(),
        });
    }
    Ok(decode)
}

/// Full rows, every token trained: nothing is padding, so tokens a second means all of them.
fn batch(rows: usize, tokens: usize, vocabulary: usize) -> Batch {
    let ids: Vec<i64> = (0..rows * tokens)
        .map(|i| ((i * 7919 + 13) % vocabulary) as i64)
        .collect();
    Batch {
        labels: ids.clone(),
        input_ids: ids,
        attention_mask: vec![true; rows * tokens],
        batch: rows,
        len: tokens,
        trained_tokens: rows * (tokens - 1),
        tokens: rows * tokens,
        rows: (0..rows).collect(),
    }
}

fn decode(model: &CausalLm, vocabulary: usize, tokens: usize) -> Result<DecodeFigures, TrainError> {
    reset_peak();
    let prompt: Vec<u32> = (0..PROMPT)
        .map(|i| ((i * 7919 + 13) % vocabulary) as u32)
        .collect();
    let started = Instant::now();
    let mut first = None;
    let produced = generate(model, &prompt, &[], &Sampling::greedy(tokens), &mut |_| {
        first.get_or_insert_with(|| started.elapsed().as_secs_f64());
        ControlFlow::Continue(())
    })?;
    let first = first.unwrap_or(f64::NAN);
    Ok(DecodeFigures {
        prompt: PROMPT,
        first_token_seconds: first,
        tokens_per_second: (produced.len() - 1) as f64 / (started.elapsed().as_secs_f64() - first),
        peak_memory: Memory::new().peak(),
    })
}

/// Lets the kernel's mark of most resident memory start over (Linux; elsewhere nothing happens).
fn reset_peak() {
    let _ = std::fs::write("/proc/self/clear_refs", "5");
}
