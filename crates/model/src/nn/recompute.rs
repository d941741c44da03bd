//! The blocks in training: which of them the graph remembers, and what each of them draws.

use std::num::NonZeroUsize;

use burn::tensor::{Device, Distribution, Tensor};
use enamel_kernels::checkpoint_module;

use crate::arch::llama::{Layer, Positions};

/// Runs all blocks, `[batch, tokens, hidden]` to the same, without a cache.
///
/// With `every`, so many blocks at a time are a segment of which only the input is kept; the backward
/// pass runs it again. With a seed, each block draws (for dropout) from a generator that is seeded anew
/// by it and by the block's number, so that what a block draws depends neither on `every` nor on which
/// of its two runs it is.
pub(crate) fn train_blocks(
    layers: &[Layer],
    mut x: Tensor<3>,
    positions: &Positions,
    every: Option<NonZeroUsize>,
    seed: Option<u64>,
) -> Tensor<3> {
    let device = x.device();
    let Some(every) = every else {
        return run(layers, x, positions, 0, seed);
    };
    let seed = seed.unwrap_or_else(|| drawn(&device));
    for (i, segment) in layers.chunks(every.get()).enumerate() {
        let first = i * every.get();
        let positions = positions.clone();
        x = checkpoint_module(&segment.to_vec(), x, move |layers: &Vec<Layer>, x| {
            run(layers, x, &positions, first, Some(seed))
        });
    }
    x
}

/// The blocks from number `first` on.
fn run(
    layers: &[Layer],
    mut x: Tensor<3>,
    positions: &Positions,
    first: usize,
    seed: Option<u64>,
) -> Tensor<3> {
    for (i, layer) in layers.iter().enumerate() {
        if let Some(seed) = seed {
            x.device().seed(block_seed(seed, first + i));
        }
        x = layer.forward(x, positions, None);
    }
    x
}

/// The seed of one block: SplitMix64's output number `block` + 1.
fn block_seed(seed: u64, block: usize) -> u64 {
    let step = 0x9E37_79B9_7F4A_7C15u64;
    let mut z = seed.wrapping_add(step.wrapping_mul(block as u64 + 1));
    z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    z ^ (z >> 31)
}

/// A seed from the device's generator as it stands: the second run of a segment needs one.
fn drawn(device: &Device) -> u64 {
    let numbers = Tensor::<1>::random([2], Distribution::Default, device).into_data();
    numbers
        .iter::<f32>()
        .fold(0, |seed, number| seed << 32 | u64::from(number.to_bits()))
}

#[cfg(test)]
mod tests;
