//! Times clipping and AdamW over an adapter of SmolLM2-135M's shape, with Burn's optimizer and with ours in turn;
//! then each `train.optim` over four of Llama-3-8B's blocks at rank 64, with the memory that each keeps between
//! steps: `cargo run --release -p enamel-train --example optimizer_step [rounds [folder of the paged moments]]`.

#![allow(clippy::print_stdout)]

use std::path::{Path, PathBuf};
use std::time::Instant;

use burn::module::{Module, Param};
use burn::optim::{AdamWConfig, GradientsParams};
use burn::tensor::{Device, Distribution, Tensor};
use enamel_kernels::AdamW;
use enamel_train::memory::process::Memory;
use enamel_train::optimizer::{Optim, Optimizer, state_bytes};
use enamel_train::training::grad_clipping::Clipping;

#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

const SETTINGS: AdamW = AdamW {
    beta1: 0.9,
    beta2: 0.999,
    epsilon: 1e-8,
    weight_decay: 1e-4,
};

/// Where an adapter is put.
struct Base {
    layers: usize,
    rank: usize,
    /// Input and output of the linear layers of a block.
    linear: [[usize; 2]; 7],
}

const SMOLLM2: Base = Base {
    layers: 30,
    rank: 16,
    linear: LINEAR,
};

const LLAMA: Base = Base {
    layers: 4,
    rank: 64,
    linear: [
        [4096, 4096],
        [4096, 1024],
        [4096, 1024],
        [4096, 4096],
        [4096, 14336],
        [4096, 14336],
        [14336, 4096],
    ],
};

const LINEAR: [[usize; 2]; 7] = [
    [576, 576],
    [576, 192],
    [576, 192],
    [576, 576],
    [576, 1536],
    [576, 1536],
    [1536, 576],
];

#[derive(Module, Debug)]
struct Factors {
    all: Vec<Param<Tensor<2>>>,
}

impl Factors {
    /// So many pairs of factors a linear layer: one in LoRA, two in LoHa.
    fn new(base: &Base, pairs: usize, device: &Device) -> Self {
        let noise = |shape: [usize; 2]| {
            let noise = Tensor::<2>::random(shape, Distribution::Normal(0.0, 0.02), device);
            Param::from_tensor(noise)
        };
        let layers = std::iter::repeat_n(base.linear, base.layers).flatten();
        let factors = layers.flat_map(|[input, output]| {
            let pair = [[base.rank, input], [output, base.rank]];
            std::iter::repeat_n(pair, pairs).flatten().map(noise)
        });
        Self {
            all: factors.collect(),
        }
    }

    /// Gradients in memory of their own, as backward passes leave them.
    fn grads(&self, of: &[Tensor<2>]) -> GradientsParams {
        let mut grads = GradientsParams::new();
        for (param, grad) in self.all.iter().zip(of) {
            grads.register(param.id, grad.clone().mul_scalar(1.01));
        }
        grads
    }
}

/// Clipping and a step with plain Burn operations.
struct Burns {
    optimizer: burn::optim::ModuleOptimizer,
    model: Factors,
}

impl Burns {
    fn step(&mut self, mut grads: GradientsParams) {
        let squares = self.model.all.iter().filter_map(|p| {
            let grad = grads.get::<2>(p.id)?;
            Some((grad.clone() * grad).sum())
        });
        let sum = squares.reduce(|a, b| a + b).map(Tensor::into_data);
        let sum = sum.and_then(|data| data.iter::<f64>().next());
        let factor = 1.0 / (sum.unwrap_or(f64::NAN).sqrt() + 1e-6);
        let mut scaled = GradientsParams::new();
        for param in &self.model.all {
            if let Some(grad) = grads.remove::<2>(param.id) {
                scaled.register(param.id, grad.mul_scalar(factor));
            }
        }
        self.model = self.optimizer.step(1e-4, self.model.clone(), scaled);
    }
}

fn main() {
    let mut arguments = std::env::args().skip(1);
    let rounds = arguments.next().and_then(|a| a.parse().ok()).unwrap_or(40);
    let folder = arguments
        .next()
        .map_or_else(std::env::temp_dir, PathBuf::from);
    against_burn(rounds);
    each_optim(rounds, &folder);
}

/// An optimizer and what it trains.
struct Trained {
    optim: Optim,
    model: Factors,
    grads: Vec<Tensor<2>>,
    optimizer: Optimizer,
    /// Bytes by which the process grew with the moments.
    kept: i64,
    /// Seconds of the quickest step.
    best: f64,
}

impl Trained {
    fn new(optim: Optim, folder: &Path, device: &Device) -> Self {
        let mut model = Factors::new(&LLAMA, 1, device);
        let grads: Vec<Tensor<2>> = model.all.iter().map(|p| p.val().inner()).collect();
        let grads: Vec<Tensor<2>> = grads.into_iter().map(|g| g.mul_scalar(0.5)).collect();
        let mut memory = Memory::new();
        let before = memory.resident() as i64;
        let mut optimizer = match Optimizer::with_optim(SETTINGS, optim, (folder, ""), &model) {
            Ok(optimizer) => optimizer,
            Err(error) => panic!("{error}"),
        };
        let mut first = GradientsParams::new();
        for (param, grad) in model.all.iter().zip(&grads) {
            // Handles: what is freed after the step is nothing but scratch.
            first.register(param.id, grad.clone());
        }
        optimizer.step(&mut model, first, 1.0, &1e-4.into());
        Self {
            optim,
            model,
            grads,
            optimizer,
            kept: memory.resident() as i64 - before,
            best: f64::INFINITY,
        }
    }
}

/// Every optimizer in turn, so that the same disturbances meet each.
fn each_optim(rounds: usize, folder: &Path) {
    let device = Device::flex().autodiff();
    let all = Optim::ALL.into_iter();
    let mut all: Vec<_> = all.map(|o| Trained::new(o, folder, &device)).collect();
    for _ in 0..rounds {
        for one in &mut all {
            let fresh = one.model.grads(&one.grads);
            let started = Instant::now();
            one.optimizer.step(&mut one.model, fresh, 1.0, &1e-4.into());
            one.best = one.best.min(started.elapsed().as_secs_f64());
        }
    }
    for one in &all {
        let sizes = one.grads.iter().map(|g| g.shape().num_elements());
        let bytes = state_bytes(one.optim, sizes.clone());
        println!(
            "{}: {} parameters, {:.2} ms a step; {} bytes of moments resident, {} paged, \
             the process grew by {}",
            one.optim,
            sizes.sum::<usize>(),
            1e3 * one.best,
            bytes.resident,
            bytes.paged,
            one.kept,
        );
    }
}

fn against_burn(rounds: usize) {
    let device = Device::flex().autodiff();
    for (name, pairs) in [("LoRA", 1), ("LoHa", 2)] {
        let mut model = Factors::new(&SMOLLM2, pairs, &device);
        let grads: Vec<Tensor<2>> = model.all.iter().map(|p| p.val().inner()).collect();
        let grads: Vec<Tensor<2>> = grads.into_iter().map(|g| g.mul_scalar(0.5)).collect();
        let count: usize = grads.iter().map(|g| g.shape().num_elements()).sum();
        let mut burns = Burns {
            optimizer: AdamWConfig::new().with_epsilon(1e-8).init(),
            model: Factors::new(&SMOLLM2, pairs, &device),
        };
        let mut ours = Optimizer::new(SETTINGS);
        let rates = 1e-4.into();
        let mut best = [f64::INFINITY; 3];
        for _ in 0..rounds {
            let fresh = burns.model.grads(&grads);
            let started = Instant::now();
            burns.step(fresh);
            best[0] = best[0].min(started.elapsed().as_secs_f64());

            let fresh = model.grads(&grads);
            let started = Instant::now();
            let clipping = Clipping::of(&model, &fresh, 1.0);
            best[1] = best[1].min(started.elapsed().as_secs_f64());
            ours.step(&mut model, fresh, clipping.factor, &rates);
            best[2] = best[2].min(started.elapsed().as_secs_f64());
        }
        let [burns, norm, ours] = best.map(|seconds| 1e3 * seconds);
        println!(
            "{name}, rank {}: {count} parameters in {} tensors, least of all rounds: \
             Burn {burns:.2} ms, ours {ours:.2} ms, of which the norm {norm:.2} ms",
            SMOLLM2.rank,
            grads.len()
        );
    }
}
