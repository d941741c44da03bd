//! `enamel bench`: how fast a training step and decoding are, and how much memory they take.

use std::ops::ControlFlow;
use std::time::Instant;

use burn::module::Module;
use burn::optim::{AdamWConfig, ModuleOptimizer};
use burn::tensor::Device;
use burn::train::TrainStep;
use enamel_adapter::{AdapterConfig, RankAllocator};
use enamel_data::Batch;
use enamel_kernels::Compute;
use enamel_model::{CausalLm, Sampling, generate};
use serde::Serialize;

use crate::error::TrainError;
use crate::loaded::OpenBase;
use crate::memory::Memory;
use crate::recipe::Recipe;
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
    /// The methods, as a recipe names them. Several take turns step by step, so that a machine that
    /// slows down slows all of them down.
    pub methods: Vec<String>,
    /// Tokens to decode after a prompt of 128; 0 for none.
    pub decode: usize,
    /// What products with the base multiply.
    pub compute: Compute,
}

/// A training step of one method and shape.
#[derive(Clone, Debug, Serialize)]
pub struct StepFigures {
    /// The method.
    pub method: String,
    /// Trained parameters.
    pub trainable: usize,
    /// Rows.
    pub rows: usize,
    /// Tokens a row.
    pub tokens: usize,
    /// Median seconds of a whole optimizer step.
    pub seconds: f64,
    /// Tokens a second, from the median.
    pub tokens_per_second: f64,
    /// Most resident memory while measuring this shape, in bytes; since the process began where the
    /// system cannot reset its mark. With several methods, what they need together.
    pub peak_memory: u64,
    /// Tokens a second over those of the first method: the median over rounds of both.
    pub relative: f64,
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

/// One method under measurement.
struct Lane {
    method: String,
    trainable: usize,
    trainee: Trainee,
    optimizer: ModuleOptimizer,
    allocator: Option<RankAllocator>,
    seconds: Vec<f64>,
}

impl Lane {
    fn new(
        mut model: CausalLm,
        method: &str,
        options: &BenchOptions,
        device: &Device,
    ) -> Result<Self, TrainError> {
        let config = config(method, options)?;
        let plan = enamel_adapter::attach(&mut model, &config, 42)?;
        let allocator = RankAllocator::of(&config, &model);
        Ok(Self {
            method: method.to_owned(),
            trainable: plan.trainable,
            trainee: Trainee { model }.fork(&device.clone().autodiff()).train(),
            optimizer: AdamWConfig::new()
                .with_epsilon(1e-8)
                .with_weight_decay(0.0)
                .init(),
            allocator,
            seconds: Vec::new(),
        })
    }

    /// One optimizer step as training does it.
    fn step(&mut self, item: StepItem, device: &Device) -> Result<f64, TrainError> {
        let started = Instant::now();
        let step = item.step;
        let output = TrainStep::step(&self.trainee, item);
        if let Some(allocator) = &mut self.allocator {
            allocator.note_gradients(&self.trainee.model, &output.grads)?;
        }
        let trainee = self.trainee.clone();
        self.trainee = trainee.optimize(&mut self.optimizer, 1e-4.into(), output.grads);
        if let Some(allocator) = &mut self.allocator {
            allocator.update(&mut self.trainee.model, step)?;
        }
        device
            .sync()
            .map_err(|e| TrainError::Framework(format!("waiting for the device: {e}")))?;
        Ok(started.elapsed().as_secs_f64())
    }
}

/// The adapter of a method at the rank asked for, on all linear layers.
fn config(method: &str, options: &BenchOptions) -> Result<AdapterConfig, TrainError> {
    let ranked = !["adalora", "ia3", "full", "head"].contains(&method);
    let mut set = vec![format!("adapter.method={method}")];
    if ranked {
        set.push(format!("adapter.r={}", options.r));
        set.push("adapter.target_modules=all-linear".to_owned());
    }
    match method {
        "adalora" => {
            set.push(format!("adapter.init_r={}", options.r));
            set.push(format!("adapter.target_r={}", options.r.div_ceil(2)));
            set.push("adapter.target_modules=all-linear".to_owned());
        }
        "head" => set.push("adapter.modules_to_save=['norm']".to_owned()),
        _ => {}
    }
    if ranked && method != "vera" {
        set.push(format!("adapter.lora_alpha={}", 2 * options.r));
    }
    // Long enough for a budget to be under way in every step that is timed.
    const STEPS: usize = 1000;
    Ok(Recipe::for_model("none", &set)?.adapter.config(STEPS))
}

/// Measures; each figure is handed on as soon as it is there.
pub fn bench(
    base: OpenBase,
    device: &Device,
    options: &BenchOptions,
    on_step: &mut dyn FnMut(&StepFigures),
) -> Result<Option<DecodeFigures>, TrainError> {
    let vocabulary = base.config.vocab_size;
    let model = base.weights(device, options.compute)?;
    drop(base);
    let lanes = options
        .methods
        .iter()
        .map(|method| Lane::new(model.clone(), method, options, device));
    let mut lanes = lanes.collect::<Result<Vec<_>, _>>()?;
    let decode = match (options.decode, lanes.first()) {
        (0, _) | (_, None) => None,
        (tokens, Some(lane)) => Some(decode(&lane.trainee.model.valid(), vocabulary, tokens)?),
    };
    drop(model);
    for &(rows, tokens) in &options.shapes {
        reset_peak();
        lanes.iter_mut().for_each(|lane| lane.seconds.clear());
        for step in 0..=options.steps {
            for lane in &mut lanes {
                let item = StepItem {
                    step: step + 1,
                    seed: 42,
                    micro: vec![batch(rows, tokens, vocabulary)],
                    max_grad_norm: 1.0,
                };
                let seconds = lane.step(item, device)?;
                if step > 0 {
                    lane.seconds.push(seconds);
                }
            }
        }
        let first = lanes
            .first()
            .map(|lane| lane.seconds.clone())
            .unwrap_or_default();
        for lane in &lanes {
            let seconds = median(lane.seconds.clone());
            let ratios = first
                .iter()
                .zip(&lane.seconds)
                .map(|(first, own)| first / own);
            on_step(&StepFigures {
                method: lane.method.clone(),
                trainable: lane.trainable,
                rows,
                tokens,
                seconds,
                tokens_per_second: (rows * tokens) as f64 / seconds,
                peak_memory: Memory::new().peak(),
                relative: median(ratios.collect()),
            });
        }
    }
    Ok(decode)
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values.get(values.len() / 2).copied().unwrap_or(f64::NAN)
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
