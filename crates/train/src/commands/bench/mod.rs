//! `enamel bench`: how fast a training step and decoding are, and how much memory they take.

mod decode;
mod first_step;
mod profile;

use std::time::Instant;

use burn::module::Module;
use burn::tensor::Device;
use burn::train::TrainStep;
use enamel_adapter::{AdapterConfig, RankAllocator};
use enamel_data::Batch;
use enamel_kernels::{AdamW, Compute};
use enamel_model::{Loading, Model, Quantization};
use serde::Serialize;

use crate::base::OpenBase;
use crate::base::Packed;
use crate::error::TrainError;
use crate::memory::process::{Memory, page_faults};
use crate::memory::{Footprint, Kind, ModelSizes, Settings, Weights, estimate};
use crate::optimizer::{Optim, Optimizer};
use crate::recipe::{GradientCheckpointing, Recipe};
use crate::task::CausalLm;
use crate::training::grad_clipping::Clipping;
use crate::training::train_step::{StepItem, TrainModel};

pub use decode::DecodeFigures;
pub use first_step::{FirstStep, first_step, note_start};
pub use profile::{FallbackFigures, OpFigures, StepProfile};

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
    /// How AdamW holds its moments. What it pages lies in a file in the system's folder for such.
    pub optim: Optim,
    /// Whether blocks are computed again in the backward pass.
    pub checkpointing: GradientCheckpointing,
    /// Tokens to decode after a prompt of 128, with the base alone and with the first method's adapter,
    /// unmerged; 0 for none.
    pub decode: usize,
    /// Whether one more step a shape and method is profiled.
    pub profile: bool,
    /// What products with the base multiply.
    pub compute: Compute,
    /// What becomes of its linear layers.
    pub quantization: Quantization,
}

impl BenchOptions {
    fn loading(&self) -> Loading {
        Loading {
            compute: self.compute,
            quantization: self.quantization.clone(),
            seed: 0,
        }
    }
}

/// One thing measured; a line of `enamel bench --json`.
#[derive(Clone, Debug, Serialize)]
#[serde(tag = "kind", rename_all = "snake_case")]
pub enum Figure {
    /// Training steps of a method and shape.
    Step(StepFigures),
    /// Where the time of a step goes.
    Profile(StepProfile),
    /// Decoding.
    Decode(DecodeFigures),
    /// From the start of the process to the end of the first step.
    FirstStep(FirstStep),
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
    /// What was expected of that: the most of this shape and those before, since memory is not given
    /// back. In bytes.
    pub estimated_memory: u64,
    /// Tokens a second over those of the first method: the median over rounds of both.
    pub relative: f64,
}

/// The recipe's default.
const MAX_GRAD_NORM: f64 = 1.0;

/// One method under measurement.
struct Lane {
    method: String,
    trainable: usize,
    /// The model as memory sees it.
    sizes: ModelSizes,
    trainee: TrainModel<CausalLm>,
    optimizer: Optimizer,
    allocator: Option<RankAllocator>,
    seconds: Vec<f64>,
}

impl Lane {
    fn new(
        mut model: Model,
        method: &str,
        options: &BenchOptions,
        device: &Device,
    ) -> Result<Self, TrainError> {
        let config = config(method, options)?;
        let plan = enamel_adapter::attach(&mut model, &config, 42)?;
        let allocator = RankAllocator::of(&config, &model);
        model.set_recompute(options.checkpointing.0);
        let task = CausalLm { pad_id: 0 };
        let trainee = TrainModel { model, task }
            .fork(&device.clone().autodiff())
            .train();
        let settings = AdamW {
            beta1: 0.9,
            beta2: 0.999,
            epsilon: 1e-8,
            weight_decay: 0.0,
        };
        let pages = std::env::temp_dir();
        Ok(Self {
            method: method.to_owned(),
            trainable: plan.trainable,
            sizes: ModelSizes::new(trainee.model.config(), &config, &plan),
            optimizer: Optimizer::with_optim(settings, options.optim, (&pages, ""), &trainee)?,
            trainee,
            allocator,
            seconds: Vec::new(),
        })
    }

    /// One optimizer step as training does it.
    fn step(&mut self, item: StepItem<Batch>, device: &Device) -> Result<f64, TrainError> {
        let started = Instant::now();
        let step = item.step;
        let output = TrainStep::step(&self.trainee, item);
        let factor = Clipping::of(&self.trainee, &output.grads, MAX_GRAD_NORM).factor;
        if let Some(allocator) = &mut self.allocator {
            let gradient_of = |id| output.grads.get(id);
            allocator.note_gradients(&self.trainee.model, &gradient_of, factor)?;
        }
        let rates = 1e-4.into();
        self.optimizer
            .step(&mut self.trainee, output.grads, factor, &rates);
        if let Some(allocator) = &mut self.allocator {
            allocator.update(&mut self.trainee.model, step)?;
        }
        device
            .sync()
            .map_err(|e| TrainError::Framework(format!("waiting for the device: {e}")))?;
        Ok(started.elapsed().as_secs_f64())
    }

    /// One more step, with the kernels counting.
    fn profile(
        &mut self,
        (rows, tokens): (usize, usize),
        vocabulary: usize,
        device: &Device,
        options: &BenchOptions,
    ) -> Result<StepProfile, TrainError> {
        reset_peak();
        let item = item(options.steps + 2, rows, tokens, vocabulary);
        let before = page_faults();
        enamel_kernels::profile::start();
        let seconds = self.step(item, device);
        let counts = enamel_kernels::profile::stop();
        let measured = profile::Measured {
            method: self.method.clone(),
            rows,
            tokens,
            seconds: seconds?,
            page_faults: page_faults().zip(before).map(|(now, then)| now - then),
            peak_memory: Memory::new().peak(),
        };
        let machine = || enamel_kernels::measured_product_speed(options.compute);
        Ok(StepProfile::new(measured, &counts, machine))
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
    if ranked && !["vera", "miss"].contains(&method) {
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
    on_figure: &mut dyn FnMut(Figure),
) -> Result<(), TrainError> {
    let vocabulary = base.config.vocab_size;
    let model = base.weights(device, &options.loading())?;
    let held = Held {
        bf16: options.compute == Compute::Bf16 || base.checkpoint.is_bf16(),
        packed: base.packed(),
    };
    drop(base);
    // Before training, which leaves memory behind that would count as decoding's.
    let mut decoded = Vec::new();
    if options.decode > 0 {
        decoded.push(decode::decode(&model, "base", options.decode)?);
    }
    let lanes = options
        .methods
        .iter()
        .map(|method| Lane::new(model.clone(), method, options, device));
    let mut lanes = lanes.collect::<Result<Vec<_>, _>>()?;
    drop(model);
    if let (1.., Some(lane)) = (options.decode, lanes.first()) {
        let adapted = lane.trainee.model.valid();
        decoded.push(decode::decode(&adapted, &lane.method, options.decode)?);
    }
    let mut estimated = 0;
    for &shape in &options.shapes {
        estimated = expected(&lanes, shape, &held, device, options).max(estimated);
        let setting = (vocabulary, estimated);
        steps(&mut lanes, shape, setting, device, options, on_figure)?;
        for lane in lanes.iter_mut().filter(|_| options.profile) {
            let profile = lane.profile(shape, vocabulary, device, options)?;
            on_figure(Figure::Profile(profile));
        }
    }
    if !decoded.is_empty() {
        let bandwidth = enamel_kernels::measured_read_bandwidth();
        for figures in decoded {
            on_figure(Figure::Decode(figures.against(bandwidth)));
        }
    }
    Ok(())
}

/// How the file has the base.
struct Held {
    bf16: bool,
    packed: Packed,
}

/// Bytes that steps of a shape are estimated to take at most, all methods together.
fn expected(
    lanes: &[Lane],
    (rows, tokens): (usize, usize),
    held: &Held,
    device: &Device,
    options: &BenchOptions,
) -> u64 {
    let settings = Settings {
        batch: rows,
        accumulation: 1,
        length: tokens,
        every: options.checkpointing.0,
        optim: options.optim,
        weights: match held.bf16 && enamel_kernels::holds_bf16(device) {
            true => Weights::Bf16,
            false => Weights::F32,
        },
        quantization: options.quantization.clone(),
        threads: rayon::current_num_threads(),
        kind: Kind::of(device),
    };
    let all = lanes.iter().map(|lane| {
        let model = ModelSizes {
            packed: held.packed.clone(),
            ..lane.sizes.clone()
        };
        estimate(&model, &settings)
    });
    Footprint::in_turns(&all.collect::<Vec<_>>()).peak() as u64
}

/// The timed steps of a shape, the methods taking turns.
fn steps(
    lanes: &mut [Lane],
    (rows, tokens): (usize, usize),
    (vocabulary, estimated_memory): (usize, u64),
    device: &Device,
    options: &BenchOptions,
    on_figure: &mut dyn FnMut(Figure),
) -> Result<(), TrainError> {
    reset_peak();
    lanes.iter_mut().for_each(|lane| lane.seconds.clear());
    for step in 0..=options.steps {
        for lane in &mut *lanes {
            let seconds = lane.step(item(step + 1, rows, tokens, vocabulary), device)?;
            if step > 0 {
                lane.seconds.push(seconds);
            }
        }
    }
    let first = lanes
        .first()
        .map(|lane| lane.seconds.clone())
        .unwrap_or_default();
    for lane in lanes {
        let seconds = median(lane.seconds.clone());
        let ratios = first
            .iter()
            .zip(&lane.seconds)
            .map(|(first, own)| first / own);
        on_figure(Figure::Step(StepFigures {
            method: lane.method.clone(),
            trainable: lane.trainable,
            rows,
            tokens,
            seconds,
            tokens_per_second: (rows * tokens) as f64 / seconds,
            peak_memory: Memory::new().peak(),
            estimated_memory,
            relative: median(ratios.collect()),
        }));
    }
    Ok(())
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values.get(values.len() / 2).copied().unwrap_or(f64::NAN)
}

fn item(step: usize, rows: usize, tokens: usize, vocabulary: usize) -> StepItem<Batch> {
    StepItem {
        step,
        seed: 42,
        micro: vec![batch(rows, tokens, vocabulary)],
        rank: 0,
        count: rows * (tokens - 1),
        label_smoothing: 0.0,
    }
}

/// Full rows, every token trained: nothing is padding, so tokens a second means all of them.
fn batch(rows: usize, tokens: usize, vocabulary: usize) -> Batch {
    let ids: Vec<i64> = (0..rows * tokens)
        .map(|i| token(i, vocabulary) as i64)
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

/// Token number `i` of a text without a pattern.
fn token(i: usize, vocabulary: usize) -> usize {
    (i * 7919 + 13) % vocabulary
}

/// Lets the kernel's mark of most resident memory start over (Linux; elsewhere nothing happens).
fn reset_peak() {
    let _ = std::fs::write("/proc/self/clear_refs", "5");
}
