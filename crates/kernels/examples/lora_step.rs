//! Times forward and backward of a LoRA step with the shapes of SmolLM2-135M and random weights:
//! `cargo run --release -p enamel-kernels --example lora_step [batch] [tokens] [steps]`. With
//! `MIMALLOC_PURGE_DELAY=-1` in the environment the allocator keeps freed pages, as a trainer should:
//! given back, the kernel clears them again in every step.

#![allow(clippy::print_stdout)]

use std::time::Instant;

use burn::tensor::{Device, Distribution, Tensor};
use enamel_kernels::{
    AttentionSpec, attention, linear_cross_entropy, lora_linear, rms_norm, rope, silu_mul,
};

#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

const HIDDEN: usize = 576;
const HEADS: usize = 9;
const KV_HEADS: usize = 3;
const DIM: usize = 64;
const INNER: usize = 1536;
const LAYERS: usize = 30;
const VOCABULARY: usize = 49152;
const RANK: usize = 16;

struct Lora {
    w: Tensor<2>,
    a: Tensor<2>,
    b: Tensor<2>,
}

impl Lora {
    fn new(input: usize, output: usize, device: &Device) -> Self {
        let noise = |rows, cols, std| {
            Tensor::<2>::random([rows, cols], Distribution::Normal(0.0, std), device)
        };
        Self {
            w: noise(output, input, 0.04).detach(),
            a: noise(RANK, input, 0.02).require_grad(),
            b: noise(output, RANK, 0.02).require_grad(),
        }
    }

    fn forward(&self, x: Tensor<2>) -> Tensor<2> {
        lora_linear(x, self.w.clone(), self.a.clone(), self.b.clone(), 2.0)
    }
}

struct Layer {
    q: Lora,
    k: Lora,
    v: Lora,
    o: Lora,
    gate: Lora,
    up: Lora,
    down: Lora,
}

fn main() {
    let arg = |i, default| {
        std::env::args()
            .nth(i)
            .and_then(|a| a.parse().ok())
            .unwrap_or(default)
    };
    let (batch, tokens, steps) = (arg(1, 4), arg(2, 256), arg(3, 3));
    let device = Device::flex().autodiff();
    let layers: Vec<Layer> = (0..LAYERS)
        .map(|_| Layer {
            q: Lora::new(HIDDEN, HEADS * DIM, &device),
            k: Lora::new(HIDDEN, KV_HEADS * DIM, &device),
            v: Lora::new(HIDDEN, KV_HEADS * DIM, &device),
            o: Lora::new(HEADS * DIM, HIDDEN, &device),
            gate: Lora::new(HIDDEN, INNER, &device),
            up: Lora::new(HIDDEN, INNER, &device),
            down: Lora::new(INNER, HIDDEN, &device),
        })
        .collect();
    let norm = Tensor::<1>::ones([HIDDEN], &device);
    let head = Tensor::<2>::random(
        [VOCABULARY, HIDDEN],
        Distribution::Normal(0.0, 0.04),
        &device,
    );
    let table = Tensor::<2>::random([tokens, DIM / 2], Distribution::Uniform(-1.0, 1.0), &device);
    let rows = batch * tokens;
    let input = Tensor::<2>::random([rows, HIDDEN], Distribution::Normal(0.0, 1.0), &device);
    let labels: Vec<i64> = (0..rows as i64)
        .map(|i| i * 7919 % VOCABULARY as i64)
        .collect();
    let spec = AttentionSpec {
        causal: true,
        scale: 0.125,
        offset: 0,
        sliding_window: None,
        key_mask: None,
        segments: None,
    };
    println!(
        "cpu path: {}, threads: {}",
        enamel_kernels::CpuPath::chosen().name(),
        rayon::current_num_threads()
    );
    for step in 0..steps {
        let start = Instant::now();
        let mut spent = [0.0f64; 6];
        let mut timed = |slot: usize, since: Instant| spent[slot] += since.elapsed().as_secs_f64();
        let mut h = input.clone();
        for l in &layers {
            let t = Instant::now();
            let x = rms_norm(h.clone(), norm.clone(), 1e-5);
            timed(0, t);
            let t = Instant::now();
            let (q, k, v) = (
                l.q.forward(x.clone()),
                l.k.forward(x.clone()),
                l.v.forward(x),
            );
            timed(1, t);
            let t = Instant::now();
            let heads = |t: Tensor<2>, n| t.reshape([batch, tokens, n, DIM]);
            let q = rope(heads(q, HEADS), table.clone(), table.clone());
            let k = rope(heads(k, KV_HEADS), table.clone(), table.clone());
            timed(2, t);
            let t = Instant::now();
            let y = attention(q, k, heads(v, KV_HEADS), &spec);
            timed(3, t);
            let t = Instant::now();
            h = h + l.o.forward(y.reshape([rows, HEADS * DIM]));
            timed(1, t);
            let t = Instant::now();
            let x = rms_norm(h.clone(), norm.clone(), 1e-5);
            timed(0, t);
            let t = Instant::now();
            let (gate, up) = (l.gate.forward(x.clone()), l.up.forward(x));
            timed(1, t);
            let t = Instant::now();
            let x = silu_mul(gate, up);
            timed(4, t);
            let t = Instant::now();
            h = h + l.down.forward(x);
            timed(1, t);
        }
        let t = Instant::now();
        let loss = linear_cross_entropy(rms_norm(h, norm.clone(), 1e-5), head.clone(), &labels);
        timed(5, t);
        let forward = start.elapsed().as_secs_f64();
        let grads = loss.backward();
        let total = start.elapsed().as_secs_f64();
        drop(grads);
        println!(
            "step {step}: {:.0} tokens/s, forward {forward:.3} s (norm {:.3}, linear {:.3}, rope \
             {:.3}, attention {:.3}, silu {:.3}, loss {:.3}), backward {:.3} s, peak {} MB",
            rows as f64 / total,
            spent[0],
            spent[1],
            spent[2],
            spent[3],
            spent[4],
            spent[5],
            total - forward,
            peak_megabytes(),
        );
    }
}

/// The process's peak resident memory; 0 where /proc does not tell.
fn peak_megabytes() -> usize {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = status.lines().find_map(|l| l.strip_prefix("VmHWM:"));
    line.and_then(|l| l.trim().split(' ').next()?.parse::<usize>().ok())
        .map_or(0, |k| k / 1024)
}
