//! The estimate of a step's memory against the bytes that a step allocates, counted by the allocator.
#![allow(clippy::unwrap_used, clippy::print_stdout)]

use std::alloc::{GlobalAlloc, Layout, System};
use std::num::NonZeroUsize;
use std::sync::atomic::{AtomicUsize, Ordering};

use burn::module::Module;
use burn::tensor::Device;
use burn::train::TrainStep;
use enamel_data::Batch;
use enamel_kernels::AdamW;
use enamel_model::{ArchConfig, Model, Quantization};
use enamel_train::memory::{Kind, ModelSizes, Settings, Weights, estimate};
use enamel_train::optimizer::{Optim, Optimizer};
use enamel_train::recipe::Recipe;
use enamel_train::task::CausalLm;
use enamel_train::training::grad_clipping::Clipping;
use enamel_train::training::train_step::{StepItem, TrainModel};

struct Counting;
static LIVE: AtomicUsize = AtomicUsize::new(0);
static PEAK: AtomicUsize = AtomicUsize::new(0);

fn add(n: usize) {
    let now = LIVE.fetch_add(n, Ordering::Relaxed) + n;
    PEAK.fetch_max(now, Ordering::Relaxed);
}

unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        add(layout.size());
        unsafe { System.alloc(layout) }
    }
    unsafe fn dealloc(&self, ptr: *mut u8, layout: Layout) {
        LIVE.fetch_sub(layout.size(), Ordering::Relaxed);
        unsafe { System.dealloc(ptr, layout) }
    }
    unsafe fn realloc(&self, ptr: *mut u8, layout: Layout, new: usize) -> *mut u8 {
        if new > layout.size() {
            add(new - layout.size())
        } else {
            LIVE.fetch_sub(layout.size() - new, Ordering::Relaxed);
        }
        unsafe { System.realloc(ptr, layout, new) }
    }
    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        add(layout.size());
        unsafe { System.alloc_zeroed(layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

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

/// The most bytes that were allocated at once in the third step, and what the estimate says of them.
fn measure(
    config: &ArchConfig,
    set: &[&str],
    shape: (usize, usize),
    every: usize,
) -> (usize, usize) {
    let device = Device::flex();
    let before = LIVE.load(Ordering::Relaxed);
    let mut model = Model::random(config, 1, &device).unwrap();
    let adapter = Recipe::for_model("none", set).unwrap().adapter.config(1000);
    let plan = enamel_adapter::attach(&mut model, &adapter, 42).unwrap();
    model.set_recompute(NonZeroUsize::new(every));
    let task = CausalLm { pad_id: 0 };
    let mut trainee = TrainModel { model, task }
        .fork(&device.clone().autodiff())
        .train();
    let mut optimizer = Optimizer::new(AdamW {
        beta1: 0.9,
        beta2: 0.999,
        epsilon: 1e-8,
        weight_decay: 0.0,
    });
    let mut peak = 0;
    for step in 1..=3 {
        PEAK.store(LIVE.load(Ordering::Relaxed), Ordering::Relaxed);
        let item = StepItem {
            step,
            seed: 42,
            micro: vec![batch(shape.0, shape.1, config.vocab_size)],
            rank: 0,
            count: shape.0 * (shape.1 - 1),
            label_smoothing: 0.0,
        };
        let output = TrainStep::step(&trainee, item);
        let factor = Clipping::of(&trainee, &output.grads, 1.0).factor;
        optimizer.step(&mut trainee, output.grads, factor, &1e-4.into());
        peak = PEAK.load(Ordering::Relaxed) - before;
    }
    let model = ModelSizes::new(config, &adapter, &plan);
    let settings = Settings {
        batch: shape.0,
        accumulation: 1,
        length: shape.1,
        every: NonZeroUsize::new(every),
        optim: Optim::default(),
        weights: Weights::F32,
        quantization: Quantization::default(),
        threads: rayon::current_num_threads(),
        kind: Kind::Kernels,
    };
    (peak, estimate(&model, &settings).tensors())
}

/// Allocated bytes do not depend on time, nor on how much the allocator can fill. One test, since other
/// threads' bytes would count.
#[test]
fn what_is_counted_is_what_a_training_step_allocates() {
    let config = ArchConfig::from_json(&serde_json::json!({
        "model_type": "llama", "hidden_size": 192, "intermediate_size": 512, "vocab_size": 4096,
        "num_hidden_layers": 6, "num_attention_heads": 3, "num_key_value_heads": 1,
        "max_position_embeddings": 512, "tie_word_embeddings": true
    }))
    .unwrap();
    const ALL: &str = "adapter.target_modules=all-linear";
    let lora = ["adapter.r=16", ALL];
    let mut cases: Vec<(Vec<String>, (usize, usize), usize)> = Vec::new();
    let mut case = |set: &[&str], shape, every| {
        cases.push((set.iter().map(|s| (*s).to_owned()).collect(), shape, every));
    };
    for shape in [(1, 128), (2, 256), (4, 256)] {
        for every in [0, 1, 2] {
            case(&lora, shape, every);
        }
    }
    case(&["adapter.r=64", ALL], (2, 256), 0);
    case(&["adapter.r=16"], (2, 256), 0);
    case(
        &["adapter.r=16", ALL, "adapter.lora_dropout=0.1"],
        (2, 256),
        0,
    );
    case(
        &["adapter.r=16", ALL, "adapter.init_lora_weights=pissa"],
        (2, 256),
        0,
    );
    for method in [
        "dora", "loha", "lokr", "adalora", "vera", "ia3", "miss", "full",
    ] {
        let name = format!("adapter.method={method}");
        let mut set = vec![name.as_str()];
        if !["ia3", "full"].contains(&method) {
            set.push(ALL);
        }
        for every in [0, 1] {
            case(&set, (2, 256), every);
        }
    }
    const MISS: [&str; 3] = [ALL, "adapter.method=miss", "adapter.r=16"];
    let miss = |more: &'static str| [&MISS[..], &[more]].concat();
    case(&miss("adapter.miss_dropout=0.1"), (2, 256), 0);
    case(&miss("adapter.init_weights=bat"), (2, 256), 0);
    case(&miss("adapter.init_weights=bat"), (2, 256), 1);
    // All gradients at once are the most here, and one table of the embedding's more would be a tenth.
    case(&["adapter.method=full"], (1, 64), 1);
    let mut wrong = Vec::new();
    for (set, shape, every) in cases {
        let set: Vec<&str> = set.iter().map(String::as_str).collect();
        let (measured, estimated) = measure(&config, &set, shape, every);
        let ratio = estimated as f64 / measured as f64;
        let line = format!(
            "{set:?} {shape:?} every {every}: {estimated} estimated, {measured} measured, {ratio:.3}"
        );
        println!("{line}");
        if !(0.93..=1.05).contains(&ratio) {
            wrong.push(line);
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}
