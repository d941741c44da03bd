//! The best LoRA of a given rank, or of a given error, for a dense delta.

use super::LoraFactors;
use crate::linalg::{LinalgError, Matrix, ThinSvd};

/// How the rank of a LoRA is chosen.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum RankChoice {
    /// This rank.
    Fixed(usize),
    /// The smallest rank, at least 1, that leaves a relative Frobenius error of at most this much.
    MaxError(f64),
    /// The smallest rank, at least 1, whose squared singular values make up at least this part of all
    /// (PEFT's `convert_to_lora` with a float). An error of `e` is an energy of `1 - e²`.
    Energy(f64),
}

/// A LoRA in place of a dense delta.
#[derive(Debug, Clone, PartialEq)]
pub struct LowRank {
    /// `a = Vᵀ`, `b = U·S`, scale 1 (`lora_alpha` equals the rank).
    pub factors: LoraFactors,
    /// The rank.
    pub rank: usize,
    /// `‖Δ - b·a‖ / ‖Δ‖`, from the singular values left out; 0 for a delta of zero.
    pub relative_error: f64,
}

/// A decomposed delta, from which LoRAs of several ranks can be taken.
#[derive(Debug, Clone)]
pub struct LowRankFit {
    svd: ThinSvd,
    /// The error of every rank from 0 up.
    errors: Vec<f64>,
}

impl LowRankFit {
    /// Of a dense delta `[out, in]`.
    pub fn new(delta: &Matrix) -> Result<Self, LinalgError> {
        Ok(Self::from_svd(ThinSvd::new(delta)?))
    }

    /// Of a LoRA, whose delta is not formed where its rank is small.
    pub fn of_factors(factors: &LoraFactors) -> Result<Self, LinalgError> {
        let a = factors.a.clone().scaled(factors.scale as f32);
        Ok(Self::from_svd(ThinSvd::of_product(&factors.b, &a)?))
    }

    fn from_svd(svd: ThinSvd) -> Self {
        // Summed from the smallest up, so that the error of a high rank does not drown.
        let mut left = 0.0;
        let mut errors = vec![0.0];
        for s in svd.singular_values().iter().rev() {
            left += s * s;
            errors.push(left);
        }
        errors.reverse();
        let total = errors[0];
        for error in &mut errors {
            *error = if total > 0.0 {
                (*error / total).sqrt()
            } else {
                0.0
            };
        }
        Self { svd, errors }
    }

    /// The relative Frobenius error of the best LoRA of every rank, from 0 up to the full rank.
    pub fn errors(&self) -> &[f64] {
        &self.errors
    }

    /// The rank that a choice amounts to here.
    pub fn rank(&self, choice: RankChoice) -> Result<usize, LinalgError> {
        let full = self.errors.len() - 1;
        let limit = match choice {
            RankChoice::Fixed(rank) if (1..=full).contains(&rank) => return Ok(rank),
            RankChoice::Fixed(rank) => {
                return Err(LinalgError::Shape(format!(
                    "rank {rank} is asked for; choose one from 1 to {full}, the smaller side of the \
                     delta"
                )));
            }
            RankChoice::MaxError(error) if error >= 0.0 => error,
            RankChoice::Energy(energy) if energy > 0.0 && energy <= 1.0 => (1.0 - energy).sqrt(),
            RankChoice::MaxError(error) => {
                return Err(LinalgError::Shape(format!(
                    "the largest error is {error}; it must be 0 or more"
                )));
            }
            RankChoice::Energy(energy) => {
                return Err(LinalgError::Shape(format!(
                    "the energy to keep is {energy}; it must be above 0 and at most 1"
                )));
            }
        };
        Ok((1..full)
            .find(|&rank| self.errors[rank] <= limit)
            .unwrap_or(full))
    }

    /// The LoRA of the chosen rank.
    pub fn fit(&self, choice: RankChoice) -> Result<LowRank, LinalgError> {
        let rank = self.rank(choice)?;
        let terms = self.svd.truncated(rank)?;
        let b = terms.us();
        Ok(LowRank {
            factors: LoraFactors {
                a: terms.vt,
                b,
                scale: 1.0,
            },
            rank,
            relative_error: self.errors[rank],
        })
    }
}

/// The best LoRA for a dense delta `[out, in]`, by a truncated SVD (Eckart and Young 1936).
pub fn to_lora(delta: &Matrix, choice: RankChoice) -> Result<LowRank, LinalgError> {
    LowRankFit::new(delta)?.fit(choice)
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used)]
mod tests {
    use super::*;
    use crate::linalg::tests::{distance, noise};

    fn difference(a: &Matrix, b: &Matrix) -> f64 {
        let row = |i: usize, j: usize| a.row(i)[j] - b.row(i)[j];
        Matrix::from_fn(a.rows(), a.cols(), row).frobenius()
    }

    #[test]
    fn the_reported_error_is_the_error_for_every_rank() {
        for (rows, cols) in [(20, 30), (30, 20), (8, 8)] {
            let delta = noise(1, rows, cols);
            let fit = LowRankFit::new(&delta).unwrap();
            assert_eq!(fit.errors().len(), rows.min(cols) + 1);
            for rank in 1..=rows.min(cols) {
                let lora = fit.fit(RankChoice::Fixed(rank)).unwrap();
                assert_eq!((lora.factors.a.rows(), lora.factors.b.cols()), (rank, rank));
                let error = difference(&delta, &lora.factors.delta().unwrap()) / delta.frobenius();
                assert!(
                    (error - lora.relative_error).abs() < 1e-6,
                    "{rank}: {error}"
                );
            }
        }
    }

    #[test]
    fn the_smallest_rank_within_the_error_is_chosen() {
        let fit = LowRankFit::new(&noise(2, 20, 30)).unwrap();
        for limit in [0.9, 0.5, 0.1] {
            let lora = fit.fit(RankChoice::MaxError(limit)).unwrap();
            assert!(lora.relative_error <= limit);
            assert!(lora.rank == 1 || fit.errors()[lora.rank - 1] > limit);
            let energy = RankChoice::Energy(1.0 - limit * limit);
            assert!(fit.rank(energy).unwrap().abs_diff(lora.rank) == 0);
        }
        assert_eq!(fit.rank(RankChoice::MaxError(5.0)).unwrap(), 1);
        assert_eq!(fit.rank(RankChoice::MaxError(0.0)).unwrap(), 20);
        assert_eq!(fit.rank(RankChoice::Energy(1.0)).unwrap(), 20);
    }

    #[test]
    fn a_delta_of_low_rank_is_found_again() {
        let delta = noise(3, 40, 3).matmul(&noise(4, 3, 25)).unwrap();
        let lora = to_lora(&delta, RankChoice::MaxError(1e-5)).unwrap();
        assert_eq!(lora.rank, 3);
        assert!(distance(&lora.factors.delta().unwrap(), &delta) < 1e-5);
    }

    #[test]
    fn a_lora_can_be_cut_to_a_lower_rank_without_its_delta() {
        let factors = LoraFactors {
            a: noise(5, 6, 25),
            b: noise(6, 40, 6),
            scale: 0.25,
        };
        let dense = LowRankFit::new(&factors.delta().unwrap()).unwrap();
        let factored = LowRankFit::of_factors(&factors).unwrap();
        let choice = RankChoice::Fixed(2);
        let (dense, factored) = (dense.fit(choice).unwrap(), factored.fit(choice).unwrap());
        assert!((dense.relative_error - factored.relative_error).abs() < 1e-5);
        let [dense, factored] = [dense, factored].map(|lora| lora.factors.delta().unwrap());
        assert!(distance(&dense, &factored) < 1e-5);
    }

    #[test]
    fn a_delta_of_zero_has_no_error_and_a_rank_that_cannot_be_is_an_error() {
        let zero = to_lora(&Matrix::zeros(4, 5), RankChoice::MaxError(0.1)).unwrap();
        assert_eq!((zero.rank, zero.relative_error), (1, 0.0));
        let delta = noise(7, 4, 5);
        for choice in [
            RankChoice::Fixed(0),
            RankChoice::Fixed(5),
            RankChoice::MaxError(-1.0),
            RankChoice::MaxError(f64::NAN),
            RankChoice::Energy(0.0),
            RankChoice::Energy(1.5),
        ] {
            assert!(to_lora(&delta, choice).is_err(), "{choice:?}");
        }
    }
}
