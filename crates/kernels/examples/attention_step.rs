//! Times attention, forward and backward, with the heads of SmolLM2-135M and random values:
//! `cargo run --release -p enamel-kernels --example attention_step [milliseconds a measurement]`. Each
//! number is the best of many repetitions; the operations are counted as the causal mask leaves them.

#![allow(clippy::print_stdout)]

use std::time::{Duration, Instant};

use burn::tensor::{Device, Distribution, Tensor};
use enamel_kernels::{AttentionSpec, attention, attention_qkv, rope};

#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

const HEADS: usize = 9;
const KV_HEADS: usize = 3;
const DIM: usize = 64;

fn main() {
    let budget = std::env::args().nth(1).and_then(|a| a.parse().ok());
    let budget = Duration::from_millis(budget.unwrap_or(1000));
    println!(
        "cpu path: {}, threads: {}",
        enamel_kernels::CpuPath::chosen().name(),
        rayon::current_num_threads()
    );
    for (batch, tokens) in [(4, 256), (1, 512), (1, 2048)] {
        let spec = AttentionSpec {
            causal: true,
            scale: 0.125,
            offset: 0,
            sliding_window: None,
            key_mask: None,
            segments: None,
        };
        let device = Device::flex().autodiff();
        let noise = |heads: usize, spread: f64| {
            let spread = Distribution::Normal(0.0, spread);
            Tensor::<4>::random([batch, tokens, heads, DIM], spread, &device)
        };
        let (q, k, v) = (
            noise(HEADS, 1.0),
            noise(KV_HEADS, 1.0),
            noise(KV_HEADS, 1.0),
        );
        let tracked = [&q, &k, &v].map(|t| t.clone().detach().require_grad());
        let table = || {
            let uniform = Distribution::Uniform(-1.0, 1.0);
            Tensor::<2>::random([tokens, DIM / 2], uniform, &device)
        };
        let (cos, sin) = (table(), table());
        let width = (HEADS + 2 * KV_HEADS) * DIM;
        let qkv = Tensor::cat(vec![q.clone(), k.clone(), v.clone()], 2);
        let qkv = qkv.reshape([batch, tokens, width]).require_grad();
        // Both operations take what a projection has just written.
        let fresh = |t: &Tensor<4>| t.clone().add_scalar(0.0);
        let apart = |[q, k, v]: [Tensor<4>; 3]| {
            let q = rope(q, cos.clone(), sin.clone());
            let y = attention(q, rope(k, cos.clone(), sin.clone()), v, &spec);
            y.reshape([batch, tokens, HEADS * DIM])
        };
        let together =
            |x: Tensor<3>| attention_qkv(x, cos.clone(), sin.clone(), HEADS, KV_HEADS, &spec);
        let grad = Tensor::<3>::random(
            [batch, tokens, HEADS * DIM],
            Distribution::Normal(0.0, 1.0),
            &device,
        );
        let pairs = batch * HEADS * tokens * (tokens + 1) / 2;
        let operations = 2.0 * (DIM * pairs) as f64;
        let alone = best(
            budget,
            || attention(q.clone(), k.clone(), v.clone(), &spec),
            drop,
        );
        let tracked_attention = |[q, k, v]: [Tensor<4>; 3]| attention(q, k, v, &spec);
        let back = best(
            budget,
            || {
                tracked_attention(tracked.clone())
                    * grad.clone().reshape([batch, tokens, HEADS, DIM])
            },
            |y| drop(y.sum().backward()),
        );
        let forth = best(budget, || tracked_attention(tracked.clone()), drop);
        let rate = |products: f64, seconds: f64| products * operations / seconds / 1e9;
        println!(
            "{batch}×{tokens}: forward {:.2} ms, {:.0} GFLOP/s; backward {:.2} ms, {:.0} GFLOP/s",
            1e3 * alone.0,
            rate(2.0, alone.0),
            1e3 * back.1,
            rate(5.0, back.1),
        );
        let apart = best(
            budget,
            || apart([&tracked[0], &tracked[1], &tracked[2]].map(fresh)) * grad.clone(),
            |y| drop(y.sum().backward()),
        );
        let together = best(
            budget,
            || together(qkv.clone().add_scalar(0.0)) * grad.clone(),
            |y| drop(y.sum().backward()),
        );
        println!(
            "    with rope: apart {:.2} + {:.2} ms, side by side {:.2} + {:.2} ms (tracked forward \
             alone {:.2})",
            1e3 * apart.0,
            1e3 * apart.1,
            1e3 * together.0,
            1e3 * together.1,
            1e3 * forth.0,
        );
    }
}

/// The shortest times of the two steps, run one after the other until the budget is spent.
fn best<T>(budget: Duration, first: impl Fn() -> T, second: impl Fn(T)) -> (f64, f64) {
    let start = Instant::now();
    let mut best = (f64::INFINITY, f64::INFINITY);
    let mut runs = 0;
    while runs < 5 || start.elapsed() < budget {
        let t = Instant::now();
        let value = first();
        best.0 = best.0.min(t.elapsed().as_secs_f64());
        let t = Instant::now();
        second(value);
        best.1 = best.1.min(t.elapsed().as_secs_f64());
        runs += 1;
    }
    best
}
