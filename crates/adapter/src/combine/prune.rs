//! Pruning the entries of several tensors and merging them into one: TIES (Yadav et al. 2023) and DARE
//! (Yu et al. 2024), in f32 and in the order of operations of PEFT's `merge_utils`.

use rand::SeedableRng;
use rand_chacha::ChaCha8Rng;

use super::MajoritySign;
use crate::linalg::random::fnv1a;
use crate::linalg::random::unit;

/// Which mask is asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Draw<'a> {
    /// The module.
    pub module: &'a str,
    /// `lora_A`, `lora_B` or, where whole deltas are pruned, `delta_weight`.
    pub tensor: &'static str,
    /// The adapter, by its place in the list.
    pub adapter: usize,
}

/// Where DARE's random masks come from. For one module all adapters' `lora_A` are asked for in order,
/// then all `lora_B`, as PEFT draws them; a density of 1 draws nothing.
pub trait Masks {
    /// For each of `count` entries (row by row) whether it stays, with probability `density`.
    fn mask(&mut self, draw: Draw<'_>, density: f64, count: usize) -> Vec<bool>;
}

impl<F: FnMut(Draw<'_>, f64, usize) -> Vec<bool>> Masks for F {
    fn mask(&mut self, draw: Draw<'_>, density: f64, count: usize) -> Vec<bool> {
        self(draw, density, count)
    }
}

/// Masks that depend on this seed and on what is asked for, not on the order of asking.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SeededMasks(pub u64);

impl Masks for SeededMasks {
    fn mask(&mut self, draw: Draw<'_>, density: f64, count: usize) -> Vec<bool> {
        let mut key = [0; 32];
        key[..8].copy_from_slice(&self.0.to_le_bytes());
        key[8..16].copy_from_slice(&fnv1a(draw.module).to_le_bytes());
        key[16..24].copy_from_slice(&fnv1a(draw.tensor).to_le_bytes());
        key[24..].copy_from_slice(&(draw.adapter as u64).to_le_bytes());
        let mut rng = ChaCha8Rng::from_seed(key);
        (0..count).map(|_| unit(&mut rng) < density).collect()
    }
}

/// Keeps the `⌊density · n⌋` entries of largest magnitude, of equal ones the first, and zeros the rest.
pub(super) fn by_magnitude(values: &mut [f32], density: f64) {
    if density >= 1.0 {
        return;
    }
    let keep = (density * values.len() as f64) as usize;
    let mut order: Vec<usize> = (0..values.len()).collect();
    if keep > 0 {
        order.select_nth_unstable_by(keep - 1, |&i, &j| {
            values[j].abs().total_cmp(&values[i].abs()).then(i.cmp(&j))
        });
    }
    for &dropped in &order[keep..] {
        values[dropped] = 0.0;
    }
}

/// Zeros what the mask drops and divides the rest by `density`, which keeps the expected value.
pub(super) fn by_mask(values: &mut [f32], mask: &[bool], density: f64) {
    for (value, &stays) in values.iter_mut().zip(mask) {
        *value = if stays { *value / density as f32 } else { 0.0 };
    }
}

/// `Σ w·t`.
pub(super) fn weighted_sum(tensors: &[Vec<f32>], weights: &[f32]) -> Vec<f32> {
    let mut sum = vec![0.0; tensors.first().map_or(0, Vec::len)];
    for (tensor, weight) in tensors.iter().zip(weights) {
        for (sum, value) in sum.iter_mut().zip(tensor) {
            *sum += weight * value;
        }
    }
    sum
}

/// For every entry the mean of `w·t` over the tensors whose entry has the elected sign; 0 where none
/// has it. The election looks at the tensors without their weights.
pub(super) fn elected_mean(
    tensors: &[Vec<f32>],
    weights: &[f32],
    majority: MajoritySign,
) -> Vec<f32> {
    let entry = |i: usize| {
        let votes: f32 = match majority {
            MajoritySign::Total => tensors.iter().map(|t| t[i]).sum(),
            MajoritySign::Frequency => tensors.iter().map(|t| sign(t[i])).sum(),
        };
        // A tie is positive.
        let elected = if votes >= 0.0 { 1.0 } else { -1.0 };
        let (mut sum, mut count) = (0.0, 0.0_f32);
        for (tensor, weight) in tensors.iter().zip(weights) {
            if sign(tensor[i]) == elected {
                sum += weight * tensor[i];
                count += 1.0;
            }
        }
        sum / count.max(1.0)
    };
    (0..tensors.first().map_or(0, Vec::len))
        .map(entry)
        .collect()
}

/// -1, 0 or 1: unlike [`f32::signum`], zero has no sign.
fn sign(value: f32) -> f32 {
    if value == 0.0 { 0.0 } else { value.signum() }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pruning_by_magnitude_keeps_the_largest_entries_and_the_first_of_equal_ones() {
        let mut values = [1.0, -3.0, 2.0, -1.0, 0.5];
        by_magnitude(&mut values, 0.6);
        assert_eq!(values, [1.0, -3.0, 2.0, 0.0, 0.0]);
        let mut values = [1.0, 1.0, 1.0, 1.0];
        by_magnitude(&mut values, 0.5);
        assert_eq!(values, [1.0, 1.0, 0.0, 0.0]);
        let mut values = [1.0, 2.0];
        by_magnitude(&mut values, 1.0);
        assert_eq!(values, [1.0, 2.0]);
        by_magnitude(&mut values, 0.4);
        assert_eq!(values, [0.0, 0.0]);
    }

    #[test]
    fn pruning_by_a_mask_rescales_what_stays() {
        let mut values = [1.0, 2.0, -3.0];
        by_mask(&mut values, &[true, false, true], 0.5);
        assert_eq!(values, [2.0, 0.0, -6.0]);
    }

    #[test]
    fn signs_are_elected_by_the_sum_or_by_the_count() {
        // The sum is positive, but two of three are negative.
        let tensors = [vec![5.0, 0.0], vec![-1.0, 0.0], vec![-2.0, -4.0]];
        let weights = [1.0, 1.0, 0.5];
        let total = elected_mean(&tensors, &weights, MajoritySign::Total);
        assert_eq!(total, [5.0, -2.0]);
        let frequency = elected_mean(&tensors, &weights, MajoritySign::Frequency);
        assert_eq!(frequency, [-1.0, -2.0]);
    }

    #[test]
    fn a_tied_election_is_positive_and_entries_of_zero_do_not_count() {
        let tensors = [vec![2.0, 0.0, 3.0], vec![-2.0, 0.0, 0.0]];
        let merged = elected_mean(&tensors, &[1.0, 1.0], MajoritySign::Total);
        assert_eq!(merged, [2.0, 0.0, 3.0]);
    }

    #[test]
    fn a_negative_weight_turns_the_value_but_not_the_vote() {
        let tensors = [vec![3.0], vec![-1.0]];
        assert_eq!(
            elected_mean(&tensors, &[-1.0, 1.0], MajoritySign::Total),
            [-3.0]
        );
        assert_eq!(weighted_sum(&tensors, &[-1.0, 1.0]), [-4.0]);
    }

    #[test]
    fn seeded_masks_keep_about_the_density_and_depend_on_every_part_of_the_request() {
        let draw = |seed, module, tensor, adapter| {
            SeededMasks(seed).mask(
                Draw {
                    module,
                    tensor,
                    adapter,
                },
                0.3,
                10_000,
            )
        };
        let first = draw(1, "q", "lora_A", 0);
        let kept = first.iter().filter(|&&stays| stays).count();
        assert!((2_800..3_200).contains(&kept), "{kept}");
        assert_eq!(first, draw(1, "q", "lora_A", 0));
        for other in [
            draw(2, "q", "lora_A", 0),
            draw(1, "k", "lora_A", 0),
            draw(1, "q", "lora_B", 0),
            draw(1, "q", "lora_A", 1),
        ] {
            assert_ne!(first, other);
        }
    }
}
