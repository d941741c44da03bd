//! How two deltas of one layer differ.

use super::LoraFactors;
use crate::linalg::{LinalgError, Matrix, matmul_f64};
use faer::Mat;

/// Two deltas compared, all in f64.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct DeltaDiff {
    /// The Frobenius norm of the first.
    pub norm_first: f64,
    /// The Frobenius norm of the second.
    pub norm_second: f64,
    /// The Frobenius norm of their difference.
    pub norm_difference: f64,
    /// The cosine of the angle between them as vectors, in `[-1, 1]`; none where one is zero.
    pub cosine: Option<f64>,
    /// The largest magnitude of an entry of their difference.
    pub max_difference: f64,
}

/// The Frobenius norm of `scale · b · a`: `scale² · tr((bᵀb)(aaᵀ))`, from two `r × r` matrices.
pub fn norm(factors: &LoraFactors) -> Result<f64, LinalgError> {
    check(factors)?;
    Ok(inner(factors, factors).max(0.0).sqrt())
}

/// Compares the deltas of two LoRAs, of any rank, for one `[out, in]` weight. Norms and cosine come from
/// the factors; for the difference a few rows at a time are formed, never the whole.
pub fn diff(first: &LoraFactors, second: &LoraFactors) -> Result<DeltaDiff, LinalgError> {
    let (norm_first, norm_second) = (norm(first)?, norm(second)?);
    let shapes = [first, second].map(|f| (f.b.rows(), f.a.cols()));
    same_shape(shapes)?;
    let rights = [first.a.to_f64(), second.a.to_f64()];
    let rows = |factors: &LoraFactors, right: &Mat<f64>, range| {
        let left = factors.b.rows_to_f64(range) * faer::Scale(factors.scale);
        matmul_f64(left.as_ref(), right.as_ref())
    };
    let (norm_difference, max_difference) = differences(shapes[0].0, |range| {
        [
            rows(first, &rights[0], range.clone()),
            rows(second, &rights[1], range),
        ]
    });
    Ok(DeltaDiff {
        norm_first,
        norm_second,
        norm_difference,
        cosine: cosine(inner(first, second), norm_first, norm_second),
        max_difference,
    })
}

/// Compares two dense deltas `[out, in]`.
pub fn diff_dense(first: &Matrix, second: &Matrix) -> Result<DeltaDiff, LinalgError> {
    same_shape([first, second].map(|m| (m.rows(), m.cols())))?;
    first.check_finite()?;
    second.check_finite()?;
    let (norm_first, norm_second) = (first.frobenius(), second.frobenius());
    let (norm_difference, max_difference) = differences(first.rows(), |range| {
        [first.rows_to_f64(range.clone()), second.rows_to_f64(range)]
    });
    let pairs = first.data().iter().zip(second.data());
    let product = pairs.map(|(&x, &y)| f64::from(x) * f64::from(y)).sum();
    Ok(DeltaDiff {
        norm_first,
        norm_second,
        norm_difference,
        cosine: cosine(product, norm_first, norm_second),
        max_difference,
    })
}

fn check(factors: &LoraFactors) -> Result<(), LinalgError> {
    factors.a.check_finite()?;
    factors.b.check_finite()?;
    if factors.a.rows() == factors.b.cols() {
        return Ok(());
    }
    Err(LinalgError::Shape(format!(
        "lora_A has rank {} and lora_B rank {}",
        factors.a.rows(),
        factors.b.cols()
    )))
}

fn same_shape([first, second]: [(usize, usize); 2]) -> Result<(), LinalgError> {
    if first == second {
        return Ok(());
    }
    Err(LinalgError::Shape(format!(
        "deltas of [{}, {}] and [{}, {}] cannot be compared; both have to be for the same layer",
        first.0, first.1, second.0, second.1
    )))
}

/// `⟨Δ₁, Δ₂⟩ = s₁·s₂ · Σ (b₁ᵀb₂) ∘ (a₁a₂ᵀ)`.
fn inner(first: &LoraFactors, second: &LoraFactors) -> f64 {
    let b = matmul_f64(
        first.b.to_f64_transposed().as_ref(),
        second.b.to_f64().as_ref(),
    );
    let a = matmul_f64(
        first.a.to_f64().as_ref(),
        second.a.to_f64_transposed().as_ref(),
    );
    let mut sum = 0.0;
    for j in 0..b.ncols() {
        for i in 0..b.nrows() {
            sum += b[(i, j)] * a[(i, j)];
        }
    }
    first.scale * second.scale * sum
}

fn cosine(product: f64, first: f64, second: f64) -> Option<f64> {
    (first > 0.0 && second > 0.0).then(|| (product / first / second).clamp(-1.0, 1.0))
}

/// Norm and largest magnitude of the difference of two matrices given by ranges of rows. The norm is
/// not taken from the other norms, which would lose it where the two are nearly equal.
fn differences(rows: usize, block: impl Fn(std::ops::Range<usize>) -> [Mat<f64>; 2]) -> (f64, f64) {
    const ROWS: usize = 64;
    let (mut squares, mut largest) = (0.0, 0.0_f64);
    for start in (0..rows).step_by(ROWS) {
        let [first, second] = block(start..rows.min(start + ROWS));
        for j in 0..first.ncols() {
            for i in 0..first.nrows() {
                let difference: f64 = first[(i, j)] - second[(i, j)];
                squares += difference * difference;
                largest = largest.max(difference.abs());
            }
        }
    }
    (squares.sqrt(), largest)
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used)]
mod tests {
    use super::*;
    use crate::linalg::tests::noise;

    fn factors(seed: u64, r: usize, scale: f64) -> LoraFactors {
        LoraFactors {
            a: noise(seed, r, 50),
            b: noise(seed + 100, 130, r),
            scale,
        }
    }

    fn assert_close(x: f64, y: f64) {
        assert!((x - y).abs() <= 1e-5 * x.abs().max(1.0), "{x} {y}");
    }

    #[test]
    fn factored_and_dense_deltas_compare_alike() {
        let (x, y) = (factors(1, 4, 2.0), factors(2, 7, 0.5));
        let factored = diff(&x, &y).unwrap();
        let dense = diff_dense(&x.delta().unwrap(), &y.delta().unwrap()).unwrap();
        assert_close(factored.norm_first, dense.norm_first);
        assert_close(factored.norm_second, dense.norm_second);
        assert_close(factored.norm_difference, dense.norm_difference);
        assert_close(factored.cosine.unwrap(), dense.cosine.unwrap());
        assert_close(factored.max_difference, dense.max_difference);
    }

    #[test]
    fn a_small_case_agrees_with_the_sum_by_hand() {
        let one = |a: [f32; 2], b: [f32; 2]| LoraFactors {
            a: Matrix::new(1, 2, a.to_vec()).unwrap(),
            b: Matrix::new(2, 1, b.to_vec()).unwrap(),
            scale: 1.0,
        };
        // [[3, 4], [0, 0]] and [[4, 3], [0, 0]].
        let found = diff(&one([3.0, 4.0], [1.0, 0.0]), &one([4.0, 3.0], [1.0, 0.0])).unwrap();
        let expected = DeltaDiff {
            norm_first: 5.0,
            norm_second: 5.0,
            norm_difference: 2_f64.sqrt(),
            cosine: Some(24.0 / 25.0),
            max_difference: 1.0,
        };
        assert_eq!(found, expected);
    }

    #[test]
    fn a_delta_and_its_multiples_point_the_same_way_or_the_opposite() {
        let x = factors(3, 4, 1.0);
        let same = diff(&x, &x).unwrap();
        assert_eq!((same.norm_difference, same.max_difference), (0.0, 0.0));
        assert_close(same.cosine.unwrap(), 1.0);
        let opposite = diff(
            &x,
            &LoraFactors {
                scale: -3.0,
                ..x.clone()
            },
        )
        .unwrap();
        assert_close(opposite.cosine.unwrap(), -1.0);
        assert_close(opposite.norm_difference, 4.0 * opposite.norm_first);
    }

    #[test]
    fn a_difference_far_below_the_norms_is_still_exact() {
        let x = factors(4, 4, 1.0);
        let near = diff(
            &x,
            &LoraFactors {
                scale: 1.0 + 1e-12,
                ..x.clone()
            },
        )
        .unwrap();
        assert!((near.norm_difference / near.norm_first / 1e-12 - 1.0).abs() < 1e-3);
    }

    #[test]
    fn a_delta_of_zero_has_no_direction_and_other_shapes_do_not_compare() {
        let x = factors(5, 4, 1.0);
        let zero = LoraFactors {
            scale: 0.0,
            ..x.clone()
        };
        assert_eq!(diff(&x, &zero).unwrap().cosine, None);
        let other = LoraFactors {
            a: noise(1, 4, 51),
            ..x.clone()
        };
        assert!(
            diff(&x, &other)
                .unwrap_err()
                .to_string()
                .contains("[130, 50] and [130, 51]")
        );
        let broken = LoraFactors {
            a: noise(1, 3, 50),
            ..x
        };
        assert!(norm(&broken).is_err());
        assert!(diff_dense(&Matrix::zeros(2, 3), &Matrix::zeros(3, 2)).is_err());
    }

    #[test]
    fn values_that_are_not_finite_do_not_compare() {
        let x = factors(6, 4, 1.0);
        let mut y = x.clone();
        y.b.data_mut()[0] = f32::NAN;
        assert!(diff(&x, &y).is_err() && norm(&y).is_err());
        assert!(diff_dense(&x.b, &y.b).is_err());
    }
}
