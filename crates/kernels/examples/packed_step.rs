//! Times products with dense and packed weights, all formats in turn, at 1024 × 576 × 1536; decoding; and
//! quantising: `cargo run --release -p enamel-kernels --example packed_step [repetitions]`. The fastest of all
//! repetitions counts.

#![allow(clippy::print_stdout)]

use std::error::Error;
use std::time::Instant;

use burn::tensor::{Device, Distribution, Tensor};
use enamel_kernels::quantized::formats::{FloatKind, FourBitOptions, FourBitTensor, Int8Rows};
use enamel_kernels::{
    BaseWeight, Compute, GgufKind, GgufRows, Held, PackedRows, PackedWeight, Projection, project,
};

#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

const ROWS: usize = 1024;
const WIDTH: usize = 576;
const OUT: usize = 1536;
/// Values of the weight that is quantised.
const LARGE: usize = 1 << 25;

fn weights(device: &Device) -> Result<Vec<(&'static str, BaseWeight)>, Box<dyn Error>> {
    let shape = [OUT, WIDTH];
    let random = Distribution::Normal(0.0, 0.04);
    let dense = Tensor::<2>::random(shape, random, device);
    let values: Vec<f32> = dense.to_data().try_to_vec()?;
    let packed = |rows, compute| -> Result<BaseWeight, Box<dyn Error>> {
        let packed = PackedWeight::new(rows, compute, device)?;
        Ok(BaseWeight::new(Held::Packed(packed), Compute::F32))
    };
    let four = |double, dtype| -> Result<PackedRows, Box<dyn Error>> {
        let options = FourBitOptions {
            double,
            dtype,
            ..FourBitOptions::default()
        };
        let tensor = FourBitTensor::quantise(&values, &shape, options)?;
        Ok(PackedRows::FourBit(tensor))
    };
    let int8 = PackedRows::Int8 {
        rows: Int8Rows::quantise(&values, shape)?,
        threshold: 0.0,
    };
    let blocks = |kind: GgufKind| -> Result<PackedRows, Box<dyn Error>> {
        let bytes = vec![0x11; OUT * WIDTH / kind.elements() * kind.bytes()];
        Ok(PackedRows::Blocks(GgufRows::new(kind, shape, bytes)?))
    };
    let (f32, bf16) = (FloatKind::F32, FloatKind::Bf16);
    Ok(vec![
        ("f32", BaseWeight::new(dense, Compute::F32)),
        ("nf4", packed(four(false, f32)?, f32)?),
        ("nf4 bf16", packed(four(false, bf16)?, bf16)?),
        ("nf4 double", packed(four(true, bf16)?, bf16)?),
        ("int8", packed(int8, f32)?),
        ("Q4_0", packed(blocks(GgufKind::Q4_0)?, f32)?),
        ("Q4_1", packed(blocks(GgufKind::Q4_1)?, f32)?),
        ("Q8_0", packed(blocks(GgufKind::Q8_0)?, f32)?),
    ])
}

fn product(x: Tensor<2>, weight: &BaseWeight) -> Tensor<2> {
    let projection = Projection {
        weight: weight.matrix().clone(),
        bias: None,
        lora: None,
    };
    project(x, None, vec![projection], weight.compute())
}

fn main() -> Result<(), Box<dyn Error>> {
    let repetitions = std::env::args().nth(1).and_then(|a| a.parse().ok());
    let device = Device::flex().autodiff();
    let weights = weights(&device)?;
    let random = |rows| Tensor::<2>::random([rows, WIDTH], Distribution::Normal(0.0, 1.0), &device);
    let (x, one) = (random(ROWS), random(1));
    // Forward, backward, one row.
    let mut best = vec![[f64::INFINITY; 3]; weights.len()];
    for _ in 0..repetitions.unwrap_or(30) {
        for ((_, weight), best) in weights.iter().zip(&mut best) {
            let mut keep = |slot: usize, since: Instant| {
                best[slot] = best[slot].min(since.elapsed().as_secs_f64());
            };
            let x = x.clone().require_grad();
            let t = Instant::now();
            let y = product(x, weight);
            keep(0, t);
            let t = Instant::now();
            drop(y.backward());
            keep(1, t);
            let t = Instant::now();
            drop(product(one.clone(), weight));
            keep(2, t);
        }
    }
    let path = enamel_kernels::CpuPath::chosen().name();
    println!(
        "cpu path: {path}, threads: {}",
        rayon::current_num_threads()
    );
    let flops = 2.0 * (ROWS * WIDTH * OUT) as f64;
    println!("              forward GFLOP/s  input gradient GFLOP/s  one row µs  GB/s");
    for ((name, weight), [forward, backward, decode]) in weights.iter().zip(best) {
        let bytes = match weight.matrix() {
            Held::Packed(packed) => packed.bytes(),
            Held::Dense(_) => OUT * WIDTH * 4,
        };
        println!(
            "{name:12} {:16.1} {:23.1} {:11.1} {:5.1}",
            flops / forward / 1e9,
            flops / backward / 1e9,
            decode * 1e6,
            bytes as f64 / decode / 1e9,
        );
    }
    let values: Vec<f32> = (0..LARGE)
        .map(|i| ((i * 7919 % 10007) as f32 - 5003.0) * 1e-5)
        .collect();
    for double in [false, true] {
        let options = FourBitOptions {
            double,
            ..FourBitOptions::default()
        };
        let t = Instant::now();
        let tensor = FourBitTensor::quantise(&values, &[LARGE], options)?;
        let spent = t.elapsed().as_secs_f64();
        let speed = 4.0 * tensor.len() as f64 / spent / 1e6;
        println!("quantise, double {double}: {speed:.0} MB/s of f32");
    }
    Ok(())
}
