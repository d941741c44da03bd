//! Dropout masks that are a function of a seed and a position: nothing to store between forward and
//! backward, the same on any number of threads, and a resumed run draws what an uninterrupted one
//! would have.

use burn::backend::flex::FlexTensor;
use rayon::prelude::*;

use super::simd::{level, simd_fn};
use super::storage::{CHUNK, dense, owned, values};

/// Dropout of one call.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Dropout {
    /// Probability of dropping an element, in `[0, 1)`; what stays is scaled by `1 / (1 − p)`.
    pub probability: f64,
    /// Says which mask: derive it from the run's seed, the step and the layer.
    pub seed: u64,
}

/// The seed in two halves, and what the comparison needs.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Mask {
    low: u32,
    high: u32,
    threshold: u32,
    scale: f32,
}

impl From<Dropout> for Mask {
    fn from(dropout: Dropout) -> Self {
        let p = dropout.probability.clamp(0.0, 1.0);
        // SplitMix64's finaliser: neighbouring seeds share no bits afterwards.
        let mut z = dropout.seed.wrapping_add(0x9E37_79B9_7F4A_7C15);
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^= z >> 31;
        Self {
            low: z as u32,
            high: (z >> 32) as u32,
            threshold: (p * 4_294_967_296.0) as u32,
            scale: if p < 1.0 {
                (1.0 / (1.0 - p)) as f32
            } else {
                0.0
            },
        }
    }
}

/// `lowbias32` (C. Wellons, hash-prospector).
#[inline(always)]
fn mixed(x: u32) -> u32 {
    let x = (x ^ (x >> 16)).wrapping_mul(0x7feb_352d);
    let x = (x ^ (x >> 15)).wrapping_mul(0x846c_a68b);
    x ^ (x >> 16)
}

impl Mask {
    /// The factor on element `index` of the row-major tensor.
    #[inline(always)]
    pub(crate) fn factor(self, index: u32) -> f32 {
        let h = mixed(mixed(index.wrapping_add(self.low)) ^ self.high);
        if h >= self.threshold { self.scale } else { 0.0 }
    }
}

simd_fn! {
    /// `x · mask`, for the elements from `start` on.
    pub(crate) fn masked<L>(x: &mut [f32], mask: Mask, start: u32) {
        for (x, i) in x.iter_mut().zip(0u32..) {
            *x *= mask.factor(start.wrapping_add(i));
        }
    }
}

simd_fn! {
    /// `sum + x · mask`, for the elements from `start` on.
    pub(crate) fn masked_sum<L>(sum: &mut [f32], x: &[f32], mask: Mask, start: u32) {
        for ((sum, x), i) in sum.iter_mut().zip(x).zip(0u32..) {
            *sum += x * mask.factor(start.wrapping_add(i));
        }
    }
}

/// `drop(x)`, in place if this is x's last handle.
pub(crate) fn dropped(x: FlexTensor, dropout: Dropout) -> FlexTensor {
    let (mut x, mask, level) = (owned(x), Mask::from(dropout), level());
    x.storage_mut::<f32>()
        .par_chunks_mut(CHUNK)
        .enumerate()
        .for_each(|(i, x)| {
            masked(level, x, mask, (i * CHUNK) as u32);
        });
    x
}

/// `sum + drop(x)`, in place if this is the sum's last handle.
pub(crate) fn dropped_sum(sum: FlexTensor, x: FlexTensor, dropout: Dropout) -> FlexTensor {
    let (mut sum, x) = (owned(sum), dense(x));
    let (mask, level, xs) = (Mask::from(dropout), level(), values(&x));
    let parts = sum
        .storage_mut::<f32>()
        .par_chunks_mut(CHUNK)
        .zip(xs.par_chunks(CHUNK));
    parts.enumerate().for_each(|(i, (sum, x))| {
        masked_sum(level, sum, x, mask, (i * CHUNK) as u32);
    });
    sum
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Share of dropped elements, and of pairs dropped together at several distances and in two
    /// seeds: within five standard deviations of independent draws.
    #[test]
    fn drops_independently_at_the_asked_rate() {
        const N: u32 = 200_000;
        for p in [0.05, 0.5] {
            let of = |seed| {
                Mask::from(Dropout {
                    probability: p,
                    seed,
                })
            };
            let (mask, other) = (of(7), of(8));
            let dropped = |m: Mask, i: u32| m.factor(i) == 0.0;
            let share =
                |f: &dyn Fn(u32) -> bool| (0..N).filter(|i| f(*i)).count() as f64 / f64::from(N);
            let near = |got: f64, want: f64| {
                let deviation = (want * (1.0 - want) / f64::from(N)).sqrt();
                assert!((got - want).abs() < 5.0 * deviation, "{got} {want}");
            };
            near(share(&|i| dropped(mask, i)), p);
            for distance in [1, 2, 64, 576] {
                near(
                    share(&|i| dropped(mask, i) && dropped(mask, i + distance)),
                    p * p,
                );
            }
            near(share(&|i| dropped(mask, i) && dropped(other, i)), p * p);
        }
    }

    #[test]
    fn nothing_dropped_at_zero() {
        let mask = Mask::from(Dropout {
            probability: 0.0,
            seed: 1,
        });
        assert!((0..1000).all(|i| mask.factor(i) == 1.0));
    }
}
