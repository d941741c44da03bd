//! The blocks in training: which of them the graph remembers, and what each of them draws.

use std::num::NonZeroUsize;

use burn::tensor::{Device, Distribution, Tensor};
use enamel_kernels::checkpoint_module;

use burn::module::Module;

use crate::nn::input::{ModelInput, Positions};
use crate::nn::kv_cache::KvCache;

/// A block of a decoder.
pub(crate) trait Block: Module + Send + Sync + 'static {
    /// `[batch, tokens, hidden]` to the same; with a cache and this block's index in it, the tokens' keys and
    /// values are appended and attention covers all that it holds.
    fn forward(
        &self,
        x: Tensor<3>,
        positions: &Positions,
        cache: Option<(&mut KvCache, usize)>,
    ) -> Tensor<3>;
}

/// All blocks, `[batch, tokens, hidden]` to the same. In training, and without a cache, as [`train_blocks`] says.
pub(crate) fn run_blocks<B: Block>(
    layers: &[B],
    mut x: Tensor<3>,
    positions: &Positions,
    (input, recompute): (&ModelInput, Option<NonZeroUsize>),
    cache: Option<&mut KvCache>,
) -> Tensor<3> {
    let [_, tokens, _] = x.dims();
    match cache {
        None if x.device().is_autodiff() => {
            train_blocks(layers, x, positions, recompute, input.seed)
        }
        mut cache => {
            for (i, layer) in layers.iter().enumerate() {
                x = layer.forward(x, positions, cache.as_deref_mut().map(|cache| (cache, i)));
            }
            if let Some(cache) = cache {
                cache.advance(tokens);
            }
            x
        }
    }
}

/// Runs all blocks, `[batch, tokens, hidden]` to the same, without a cache.
///
/// With `every`, so many blocks at a time are a segment of which only the input is kept; the backward
/// pass runs it again. With a seed, each block draws (for dropout) from a generator that is seeded anew
/// by it and by the block's number, so that what a block draws depends neither on `every` nor on which
/// of its two runs it is.
fn train_blocks<B: Block>(
    layers: &[B],
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
        x = checkpoint_module(&segment.to_vec(), x, move |layers: &Vec<B>, x| {
            run(layers, x, &positions, first, Some(seed))
        });
    }
    x
}

/// The blocks from number `first` on.
fn run<B: Block>(
    layers: &[B],
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
