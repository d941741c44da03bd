//! Times clipping and AdamW over an adapter of SmolLM2-135M's shape, with Burn's optimizer and with ours in turn:
//! `cargo run --release -p enamel-train --example optimizer_step [rounds]`.

#![allow(clippy::print_stdout)]

use std::time::Instant;

use burn::module::{Module, Param};
use burn::optim::{AdamWConfig, GradientsParams};
use burn::tensor::{Device, Distribution, Tensor};
use enamel_kernels::AdamW;
use enamel_train::gradients::Clipping;
use enamel_train::optimizer::Optimizer;

#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

const LAYERS: usize = 30;
const RANK: usize = 16;
/// Input and output of the linear layers of a block.
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
    fn new(pairs: usize, device: &Device) -> Self {
        let noise = |shape: [usize; 2]| {
            let noise = Tensor::<2>::random(shape, Distribution::Normal(0.0, 0.02), device);
            Param::from_tensor(noise)
        };
        let layers = std::iter::repeat_n(LINEAR, LAYERS).flatten();
        let factors = layers.flat_map(|[input, output]| {
            let pair = [[RANK, input], [output, RANK]];
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
    let rounds = std::env::args().nth(1).and_then(|a| a.parse().ok());
    let device = Device::flex().autodiff();
    for (name, pairs) in [("LoRA", 1), ("LoHa", 2)] {
        let mut model = Factors::new(pairs, &device);
        let grads: Vec<Tensor<2>> = model.all.iter().map(|p| p.val().inner()).collect();
        let grads: Vec<Tensor<2>> = grads.into_iter().map(|g| g.mul_scalar(0.5)).collect();
        let count: usize = grads.iter().map(|g| g.shape().num_elements()).sum();
        let mut burns = Burns {
            optimizer: AdamWConfig::new().with_epsilon(1e-8).init(),
            model: Factors::new(pairs, &device),
        };
        let mut ours = Optimizer::new(AdamW {
            beta1: 0.9,
            beta2: 0.999,
            epsilon: 1e-8,
            weight_decay: 1e-4,
        });
        let rates = 1e-4.into();
        let mut best = [f64::INFINITY; 3];
        for _ in 0..rounds.unwrap_or(40) {
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
            "{name}, rank {RANK}: {count} parameters in {} tensors, least of all rounds: \
             Burn {burns:.2} ms, ours {ours:.2} ms, of which the norm {norm:.2} ms",
            grads.len()
        );
    }
}
