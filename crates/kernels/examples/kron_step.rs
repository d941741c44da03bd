//! Times forward and backward of one linear layer with a LoKr adapter against the same layer with a
//! LoRA adapter of rank 16, in the shapes of SmolLM2-135M with random weights:
//! `cargo run --release -p enamel-kernels --example kron_step [rows] [repeats]`.

#![allow(clippy::print_stdout)]

use std::time::Instant;

use burn::tensor::{Device, Distribution, Tensor};
use enamel_kernels::{kron_linear, lora_linear};

#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

const RANK: usize = 16;
/// Output and input, each as a product of the factors' rows and columns.
const SHAPES: [([usize; 2], [usize; 2]); 4] = [
    ([24, 24], [24, 24]),
    ([32, 48], [24, 24]),
    ([24, 24], [32, 48]),
    ([12, 16], [24, 24]),
];

fn main() {
    let arg = |i, default| {
        std::env::args()
            .nth(i)
            .and_then(|a| a.parse().ok())
            .unwrap_or(default)
    };
    let (rows, repeats) = (arg(1, 1024), arg(2, 100));
    let device = Device::flex().autodiff();
    let noise =
        |rows, cols| Tensor::<2>::random([rows, cols], Distribution::Normal(0.0, 0.04), &device);
    println!(
        "cpu path: {}, threads: {}, rows: {rows}; median and least of {repeats}, milliseconds",
        enamel_kernels::CpuPath::chosen().name(),
        rayon::current_num_threads()
    );
    for ([l, k], [m, n]) in SHAPES {
        let (out, input) = (l * k, m * n);
        let (x, w) = (noise(rows, input).require_grad(), noise(out, input));
        let weights = noise(rows, out);
        let (a, b) = (
            noise(RANK, input).require_grad(),
            noise(out, RANK).require_grad(),
        );
        let (w1, w2) = (noise(l, m).require_grad(), noise(k, n).require_grad());
        let lora = || lora_linear(x.clone(), w.clone(), a.clone(), b.clone(), 2.0);
        let kron = || kron_linear(x.clone(), w.clone(), w1.clone(), w2.clone(), 2.0);
        let layers: [&dyn Fn() -> Tensor<2>; 2] = [&lora, &kron];
        // In turn, so that whatever else the machine does meets both.
        let mut times = [(); 2].map(|()| (Vec::new(), Vec::new()));
        for _ in 0..repeats {
            for (layer, (forwards, totals)) in layers.iter().zip(&mut times) {
                let start = Instant::now();
                let y = layer();
                forwards.push(start.elapsed().as_secs_f64());
                let loss = (y * weights.clone()).sum();
                let start = Instant::now();
                drop(loss.backward());
                let backward = start.elapsed().as_secs_f64();
                totals.push(backward + forwards.last().copied().unwrap_or_default());
            }
        }
        let [lora, kron] = times.map(|(f, t)| [quantiles(f), quantiles(t)]);
        println!(
            "{out} x {input}: lora forward {:.3} {:.3}, both {:.3} {:.3}; kron forward {:.3} {:.3}, \
             both {:.3} {:.3}; ratio of both {:.3} {:.3}",
            lora[0][0],
            lora[0][1],
            lora[1][0],
            lora[1][1],
            kron[0][0],
            kron[0][1],
            kron[1][0],
            kron[1][1],
            kron[1][0] / lora[1][0],
            kron[1][1] / lora[1][1],
        );
    }
}

/// Median and least, in milliseconds.
fn quantiles(mut seconds: Vec<f64>) -> [f64; 2] {
    seconds.sort_by(f64::total_cmp);
    let at = |i: usize| seconds.get(i).copied().unwrap_or(f64::NAN) * 1e3;
    [at(seconds.len() / 2), at(0)]
}
