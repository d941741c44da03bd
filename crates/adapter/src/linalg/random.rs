//! Random first values: a function of seed and name alone.

use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{RngCore, SeedableRng};

/// The generator of the parameter called `name`.
pub(crate) fn rng(seed: u64, name: &str) -> ChaCha8Rng {
    let mut key = [0; 32];
    key[..8].copy_from_slice(&seed.to_le_bytes());
    key[8..16].copy_from_slice(&fnv1a(name).to_le_bytes());
    ChaCha8Rng::from_seed(key)
}

/// Uniform over `[-bound, bound)`. Written out, because a library's distributions may change what
/// they draw from one version to the next.
pub(crate) fn uniform(rng: &mut ChaCha8Rng, count: usize, bound: f64) -> Vec<f32> {
    (0..count)
        .map(|_| ((unit(rng) * 2.0 - 1.0) * bound) as f32)
        .collect()
}

/// Kaiming's uniform distribution with `a = √5` for a matrix of `fan_in` columns: U(±1/√fan_in).
pub(crate) fn kaiming(rng: &mut ChaCha8Rng, rows: usize, fan_in: usize) -> Vec<f32> {
    uniform(rng, rows * fan_in, 1.0 / (fan_in as f64).sqrt())
}

/// Normal with mean 0 (Box and Muller).
pub(crate) fn gaussian(rng: &mut ChaCha8Rng, count: usize, deviation: f64) -> Vec<f32> {
    let mut values = Vec::with_capacity(count + 1);
    while values.len() < count {
        // 1 - u lies in (0, 1], where the logarithm is finite.
        let radius = deviation * (-2.0 * (1.0 - unit(rng)).ln()).sqrt();
        let angle = std::f64::consts::TAU * unit(rng);
        values.extend([(radius * angle.cos()) as f32, (radius * angle.sin()) as f32]);
    }
    values.truncate(count);
    values
}

/// Uniform over `[0, 1)`, of 53 bits.
pub(crate) fn unit(rng: &mut ChaCha8Rng) -> f64 {
    (rng.next_u64() >> 11) as f64 / (1_u64 << 53) as f64
}

/// FNV-1a, 64 bits.
pub(crate) fn fnv1a(text: &str) -> u64 {
    text.bytes().fold(0xcbf2_9ce4_8422_2325, |hash, byte| {
        (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3)
    })
}
