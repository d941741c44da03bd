//! Principal directions of rows that come batch by batch, in memory for a few directions only.
//!
//! The incremental analysis of Ross et al. 2008 (Int. J. Computer Vision 77, "Incremental learning for
//! robust visual tracking"), with the choices of PEFT's `utils/incremental_pca.py`: of a new batch and the
//! directions so far, each as long as its singular value, the leading directions of both are kept.

use crate::linalg::{Matrix, Result, svd_randomized, svd_truncated};

/// Up to this smaller side a batch is decomposed exactly; past it by a randomised method, as all of
/// PEFT's are.
const EXACT: usize = 256;
/// Power iterations of the randomised method, PEFT's number.
const POWER_STEPS: usize = 4;
/// Seed of its start, PEFT's number.
const SEED: u64 = 42;

/// The leading directions of the rows seen so far, about their mean.
#[derive(Clone, Debug, Default)]
pub(super) struct Pca {
    count: usize,
    seen: usize,
    mean: Vec<f64>,
    /// Sum over rows and columns of the squared distance from the mean.
    spread: f64,
    /// `[count, width]` with orthonormal rows, once there is anything; the entry of largest magnitude in
    /// each is positive.
    directions: Option<Matrix>,
    singular: Vec<f64>,
}

impl Pca {
    /// For `count` directions, which is at most the rows' width.
    pub fn new(count: usize) -> Self {
        Self {
            count,
            ..Self::default()
        }
    }

    /// Rows seen.
    pub fn seen(&self) -> usize {
        self.seen
    }

    /// The directions and their singular values, the largest first; `None` before there is anything.
    pub fn directions(&self) -> Option<(&Matrix, &[f64])> {
        self.directions.as_ref().map(|d| (d, &self.singular[..]))
    }

    /// Share of all variance that lies along each direction.
    pub fn shares(&self) -> Vec<f64> {
        let share = |s: &f64| match self.spread > 0.0 {
            true => s * s / self.spread,
            false => 0.0,
        };
        self.singular.iter().map(share).collect()
    }

    /// Takes in a batch `[rows, width]`. Returns the cosine between each direction and what it was
    /// before; nothing where there was none before. A batch of fewer rows than directions is left out.
    pub fn learn(&mut self, batch: &Matrix) -> Result<Option<Vec<f64>>> {
        let (rows, width) = (batch.rows(), batch.cols());
        if rows < self.count || self.count == 0 {
            return Ok(None);
        }
        let mut mean = vec![0.0; width];
        for row in batch.data().chunks(width) {
            mean.iter_mut()
                .zip(row)
                .for_each(|(sum, v)| *sum += f64::from(*v));
        }
        mean.iter_mut().for_each(|sum| *sum /= rows as f64);
        let centred: Vec<f64> = batch
            .data()
            .chunks(width)
            .flat_map(|row| row.iter().zip(&mean).map(|(v, m)| f64::from(*v) - m))
            .collect();
        self.spread += centred.iter().map(|v| v * v).sum::<f64>();
        let centred = centred.into_iter().map(|v| v as f32);

        let (old, new) = (self.seen as f64, rows as f64);
        let total = old + new;
        let stacked = match &self.directions {
            None => {
                self.mean = mean;
                Matrix::new(rows, width, centred.collect())?
            }
            Some(directions) => {
                // What the batch's own mean hides: one row more, for the way between the two means.
                let length = (old / total * new).sqrt();
                let step: Vec<f64> = self
                    .mean
                    .iter()
                    .zip(&mean)
                    .map(|(m, b)| length * (m - b))
                    .collect();
                self.spread += step.iter().map(|v| v * v).sum::<f64>();
                for (all, batch) in self.mean.iter_mut().zip(&mean) {
                    *all = (*all * old + batch * new) / total;
                }
                let known = directions.data().chunks(width).zip(&self.singular);
                let known =
                    known.flat_map(|(row, s)| row.iter().map(move |v| (f64::from(*v) * s) as f32));
                let step = step.into_iter().map(|v| v as f32);
                let data = known.chain(centred).chain(step).collect();
                Matrix::new(directions.rows() + rows + 1, width, data)?
            }
        };
        self.seen += rows;
        let (directions, singular) = leading(&stacked, self.count)?;
        let cosines = self.directions.as_ref().map(|before| {
            let pairs = before
                .data()
                .chunks(width)
                .zip(directions.data().chunks(width));
            pairs.map(|(a, b)| cosine(a, b)).collect()
        });
        (self.directions, self.singular) = (Some(directions), singular);
        Ok(cosines)
    }
}

/// The first `count` right singular vectors `[count, width]` and singular values. The entry of largest
/// magnitude in each vector (the first of several) is positive.
fn leading(matrix: &Matrix, count: usize) -> Result<(Matrix, Vec<f64>)> {
    let side = matrix.rows().min(matrix.cols());
    let drawn = 2 * count;
    let svd = if side <= EXACT || side <= drawn {
        svd_truncated(matrix, count)?
    } else {
        svd_randomized(matrix, drawn, POWER_STEPS, SEED)?
    };
    let width = matrix.cols();
    let mut data = svd.vt.into_data();
    data.truncate(count * width);
    for row in data.chunks_mut(width) {
        let largest = row
            .iter()
            .fold(0.0_f32, |m, v| if v.abs() > m.abs() { *v } else { m });
        if largest < 0.0 {
            row.iter_mut().for_each(|v| *v = -*v);
        }
    }
    let singular = svd.s.into_iter().take(count).collect();
    Ok((Matrix::new(count, width, data)?, singular))
}

fn cosine(a: &[f32], b: &[f32]) -> f64 {
    let product = |a: &[f32], b: &[f32]| -> f64 {
        a.iter()
            .zip(b)
            .map(|(a, b)| f64::from(*a) * f64::from(*b))
            .sum()
    };
    product(a, b) / (product(a, a) * product(b, b)).sqrt().max(1e-8)
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use crate::linalg::random::{gaussian, rng};

    /// Rows about a mean that is not zero, with three directions of unequal length.
    fn rows(count: usize, width: usize, salt: u64) -> Matrix {
        let mut draw = rng(salt, "rows");
        let noise = gaussian(&mut draw, count * width, 0.1);
        let along = gaussian(&mut draw, count * 3, 1.0);
        Matrix::from_fn(count, width, |i, j| {
            let planted: f32 = (0..3)
                .map(|k| {
                    if j % 3 == k {
                        along[i * 3 + k] * (3 - k) as f32
                    } else {
                        0.0
                    }
                })
                .sum();
            noise[i * width + j] + planted + 2.0
        })
    }

    #[test]
    fn a_single_batch_is_analysed_as_a_whole() {
        let batch = rows(60, 12, 1);
        let mut pca = Pca::new(3);
        assert_eq!(pca.learn(&batch).unwrap(), None);
        let (directions, _) = pca.directions().unwrap();
        for (k, row) in directions.data().chunks(12).enumerate() {
            for (j, v) in row.iter().enumerate() {
                // Every third column belongs to the direction; of unit length over four columns.
                let wanted = if j % 3 == k { 0.5 } else { 0.0 };
                assert!(
                    (v.abs() - wanted).abs() < 0.2,
                    "direction {k}, column {j}: {v}"
                );
            }
        }
        let shares = pca.shares();
        assert!(shares.is_sorted_by(|a, b| a > b) && shares.iter().sum::<f64>() < 1.0);
        assert!(shares.iter().sum::<f64>() > 0.95);
    }

    #[test]
    fn batches_give_what_all_rows_at_once_give_where_nothing_is_cut_off() {
        let (first, second) = (rows(20, 12, 1), rows(31, 12, 2));
        let mut once = Pca::new(12);
        once.learn(&Matrix::stack_rows(&[&first, &second]).unwrap())
            .unwrap();
        let mut twice = Pca::new(12);
        twice.learn(&first).unwrap();
        let cosines = twice.learn(&second).unwrap().unwrap();
        assert_eq!(cosines.len(), 12);
        assert_eq!((once.seen(), twice.seen()), (51, 51));
        let worst = |a: &[f64], b: &[f64]| {
            a.iter()
                .zip(b)
                .map(|(a, b)| (a - b).abs())
                .fold(0.0, f64::max)
        };
        assert!(worst(&once.shares(), &twice.shares()) < 1e-6);
        assert!(worst(&once.mean, &twice.mean) < 1e-9);
        let (a, b) = (once.directions().unwrap().0, twice.directions().unwrap().0);
        for k in 0..3 {
            assert!(cosine(a.row(k), b.row(k)) > 1.0 - 1e-6, "direction {k}");
        }
    }

    #[test]
    fn a_batch_with_fewer_rows_than_directions_is_left_out() {
        let mut pca = Pca::new(4);
        assert_eq!(pca.learn(&rows(3, 12, 1)).unwrap(), None);
        assert!(pca.directions().is_none());
        assert_eq!(pca.seen(), 0);
    }

    #[test]
    fn a_large_batch_is_decomposed_as_an_exact_method_would() {
        let batch = rows(EXACT + 60, EXACT + 30, 3);
        let (fast, values) = leading(&batch, 3).unwrap();
        let exact = svd_truncated(&batch, 3).unwrap();
        for (k, value) in values.iter().enumerate() {
            assert!(cosine(fast.row(k), exact.vt.row(k)).abs() > 1.0 - 1e-6);
            assert!((value / exact.s[k] - 1.0).abs() < 1e-6);
        }
    }

    #[test]
    fn rows_that_are_all_alike_have_no_direction_to_speak_of() {
        let mut pca = Pca::new(2);
        pca.learn(&Matrix::from_fn(5, 4, |_, j| j as f32)).unwrap();
        assert_eq!(pca.shares(), [0.0, 0.0]);
    }
}
