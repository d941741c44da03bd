//! What this machine can do at most: the speed of its matrix products and of reading memory.

use std::hint::black_box;
use std::time::Instant;

use half::bf16;
use rayon::prelude::*;

use crate::cpu::gemm::{self, Compute, Packed, Weight};
use crate::cpu::matrix::{Into, MatMut, MatRef, Threads, product};

/// Rows, inner axis and columns of the product that is timed: the widest of a block of SmolLM2-135M
/// on 1024 tokens.
const SHAPE: (usize, usize, usize) = (1024, 576, 1536);
/// Repetitions of the product: enough for one that nothing disturbs.
const REPETITIONS: usize = 20;
/// No more repetitions begin after so many seconds.
const ENOUGH: f64 = 0.5;
/// Words that are read: 512 MB, more than any cache holds.
const WORDS: usize = 512_000_000 / size_of::<u64>();
/// Words of one task.
const TASK: usize = 1 << 19;
const READS: usize = 5;

/// Floating-point operations a second of a 1024 × 576 × 1536 product with a frozen weight, on all
/// threads: the best of many. Fewer than the processor's peak: what the kernels make of it.
pub fn measured_product_speed(compute: Compute) -> f64 {
    let (rows, inner, columns) = SHAPE;
    let x: Vec<f32> = (0..rows * inner).map(value).collect();
    let w: Vec<f32> = (0..columns * inner).map(value).collect();
    let narrow: Vec<bf16> = match compute {
        Compute::F32 => Vec::new(),
        Compute::Bf16 => w.iter().map(|v| bf16::from_f32(*v)).collect(),
    };
    let mut y = vec![0.0f32; rows * columns];
    let x = MatRef::rows_of(&x, rows, inner);
    let w = MatRef::rows_of(&w, columns, inner);
    let weight = match compute {
        Compute::F32 => Weight::F32(w),
        Compute::Bf16 => Weight::Bf16 {
            data: &narrow,
            out: columns,
            width: inner,
        },
    };
    let packed = Packed::of(x, 1.0, compute);
    let linear = fastest(|| {
        let mut y = MatMut::rows_of(&mut y, rows, columns);
        gemm::times_t(&mut y, Into::Set, &[(&packed, weight)]);
    });
    let best = match compute {
        Compute::Bf16 => linear,
        Compute::F32 => linear.min(fastest(|| {
            let mut y = MatMut::rows_of(&mut y, rows, columns);
            product(&mut y, Into::Set, 1.0, x, w.t(), Threads::All);
        })),
    };
    black_box(&y);
    (2 * rows * inner * columns) as f64 / best
}

/// Numbers without a pattern, between -0.5 and 0.5.
fn value(i: usize) -> f32 {
    (i * 7919 % 1009) as f32 / 1009.0 - 0.5
}

/// Seconds of the fastest of several runs.
fn fastest(mut run: impl FnMut()) -> f64 {
    let started = Instant::now();
    let mut best = f64::INFINITY;
    for _ in 0..REPETITIONS {
        let start = Instant::now();
        run();
        best = best.min(start.elapsed().as_secs_f64());
        if started.elapsed().as_secs_f64() > ENOUGH {
            break;
        }
    }
    best
}

/// Bytes a second of reading 512 MB in order, on all threads: the best of several. An allocator that
/// keeps freed memory keeps this too, so measure it after everything else.
pub fn measured_read_bandwidth() -> f64 {
    let words: Vec<u64> = (0..WORDS).into_par_iter().map(|i| i as u64).collect();
    let mut best = f64::INFINITY;
    for _ in 0..READS {
        let start = Instant::now();
        let sum = words
            .par_chunks(TASK)
            .map(sum)
            .reduce(|| 0, u64::wrapping_add);
        black_box(sum);
        best = best.min(start.elapsed().as_secs_f64());
    }
    size_of_val(&words[..]) as f64 / best
}

/// In as many sums as keep any vector unit from waiting for itself.
fn sum(words: &[u64]) -> u64 {
    const SUMS: usize = 32;
    let (groups, rest) = words.as_chunks::<SUMS>();
    let mut sums = [0u64; SUMS];
    for group in groups {
        for (sum, word) in sums.iter_mut().zip(group) {
            *sum = sum.wrapping_add(*word);
        }
    }
    sums.iter()
        .chain(rest)
        .fold(0, |sum, word| sum.wrapping_add(*word))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_sum_in_many_parts_is_the_sum() {
        for count in [0, 1, 31, 32, 33, 1000] {
            let words: Vec<u64> = (0..count).map(|i| i * i).collect();
            assert_eq!(sum(&words), words.iter().sum::<u64>());
        }
    }

    #[test]
    fn speeds_are_those_of_a_machine() {
        for compute in [Compute::F32, Compute::Bf16] {
            let speed = measured_product_speed(compute);
            assert!((1e7..1e15).contains(&speed), "{compute:?}: {speed}");
        }
    }
}
