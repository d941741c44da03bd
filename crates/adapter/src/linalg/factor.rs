//! QR and singular value decompositions. The work is in f64, the factors come back in f32.
//!
//! Householder's method in LAPACK's conventions (faer). A matrix that is not square is reduced to its
//! triangular factor first: singular vectors are then only formed for the ranks that are asked for.

use std::ops::Range;

use faer::diag::Diag;
use faer::dyn_stack::{MemBuffer, MemStack};
use faer::linalg::householder::{
    apply_block_householder_sequence_on_the_left_in_place_scratch as reflect_scratch,
    apply_block_householder_sequence_on_the_left_in_place_with_conj as reflect,
};
use faer::linalg::qr::no_pivoting::factor::{
    qr_in_place, qr_in_place_scratch, recommended_block_size,
};
use faer::linalg::svd::{ComputeSvdVectors, svd, svd_scratch};
use faer::{Conj, Mat, MatRef, Par};
use rand::SeedableRng;
use rand_chacha::ChaCha8Rng;

use super::{LinalgError, Matrix, Result, matmul_f64};

/// The first `k` terms of a singular value decomposition, `A ≈ u · diag(s) · vt`.
///
/// The entry of largest magnitude in every left vector (column of `u`) is positive; of several, the
/// first. That makes the decomposition unique where the singular values differ.
#[derive(Debug, Clone, PartialEq)]
pub struct Svd {
    /// Left singular vectors, `[rows, k]`, orthonormal columns.
    pub u: Matrix,
    /// Singular values, the largest first.
    pub s: Vec<f64>,
    /// Right singular vectors, `[k, cols]`, orthonormal rows.
    pub vt: Matrix,
}

impl Svd {
    /// `u · diag(s)`, `[rows, k]`.
    pub fn us(&self) -> Matrix {
        Matrix::from_fn(self.u.rows(), self.s.len(), |i, j| {
            (f64::from(self.u.row(i)[j]) * self.s[j]) as f32
        })
    }

    /// `u · diag(s) · vt`, `[rows, cols]`.
    pub fn restore(&self) -> Result<Matrix> {
        self.us().matmul(&self.vt)
    }
}

/// The first `k` terms of the singular value decomposition of `matrix`; `k` is at most its smaller side.
pub fn svd_truncated(matrix: &Matrix, k: usize) -> Result<Svd> {
    ThinSvd::new(matrix)?.truncated(k)
}

/// A singular value decomposition from which any range of terms can be taken. All singular values are
/// there; the vectors are formed on demand.
#[derive(Debug, Clone)]
pub struct ThinSvd {
    rows: usize,
    cols: usize,
    left: Side,
    s: Vec<f64>,
    right: Side,
}

/// Singular vectors as `reflectors · core`: what is left to do is one product for the columns wanted.
#[derive(Debug, Clone)]
struct Side {
    reflectors: Option<Reflectors>,
    core: Mat<f64>,
}

impl Side {
    fn columns(&self, range: Range<usize>) -> Mat<f64> {
        let core = self.core.as_ref().subcols(range.start, range.len());
        match &self.reflectors {
            None => core.to_owned(),
            Some(reflectors) => reflectors.apply(core),
        }
    }
}

impl ThinSvd {
    /// Of a dense matrix `[rows, cols]`.
    pub fn new(matrix: &Matrix) -> Result<Self> {
        matrix.check_finite()?;
        let (rows, cols) = (matrix.rows(), matrix.cols());
        let tall = if rows >= cols {
            matrix.to_f64()
        } else {
            matrix.to_f64_transposed()
        };
        let (mut left, s, mut right) =
            decompose(tall).map_err(|NoConvergence| LinalgError::NoConvergence { rows, cols })?;
        if rows < cols {
            std::mem::swap(&mut left, &mut right);
        }
        Ok(Self {
            rows,
            cols,
            left,
            s,
            right,
        })
    }

    /// Of the product `b · a` of `[rows, r]` and `[r, cols]`, which is not formed where `r` is small:
    /// with `b = Q₁·R₁` and `aᵀ = Q₂·R₂` the decomposition of `R₁·R₂ᵀ` is all that is needed. There
    /// are then `r` terms instead of `min(rows, cols)`; the others are zero.
    pub fn of_product(b: &Matrix, a: &Matrix) -> Result<Self> {
        let (rows, cols, r) = (b.rows(), a.cols(), a.rows());
        if b.cols() != r || r == 0 || r >= rows.min(cols) {
            return Self::new(&b.matmul(a)?);
        }
        b.check_finite()?;
        a.check_finite()?;
        let (q1, r1) = Reflectors::new(b.to_f64());
        let (q2, r2) = Reflectors::new(a.to_f64_transposed());
        let (left, s, right) = decompose(matmul_f64(r1.as_ref(), r2.as_ref().transpose()))
            .map_err(|NoConvergence| LinalgError::NoConvergence { rows, cols })?;
        let left = Side {
            reflectors: Some(q1),
            core: left.core,
        };
        let right = Side {
            reflectors: Some(q2),
            core: right.core,
        };
        Ok(Self {
            rows,
            cols,
            left,
            s,
            right,
        })
    }

    /// All singular values, the largest first.
    pub fn singular_values(&self) -> &[f64] {
        &self.s
    }

    /// The first `k` terms.
    pub fn truncated(&self, k: usize) -> Result<Svd> {
        self.terms(0..k)
    }

    /// The terms of `range`, counted from the largest singular value: `n - k..n` are the `k` smallest.
    pub fn terms(&self, range: Range<usize>) -> Result<Svd> {
        if range.start > range.end || range.end > self.s.len() {
            return Err(LinalgError::Shape(format!(
                "terms {} to {} of a [{}, {}] matrix are asked for, but its decomposition has {}; \
                 choose a rank of at most {}",
                range.start,
                range.end,
                self.rows,
                self.cols,
                self.s.len(),
                self.s.len()
            )));
        }
        let s = self.s[range.clone()].to_vec();
        Ok(signed(
            self.left.columns(range.clone()),
            s,
            self.right.columns(range),
        ))
    }
}

/// Rounds to f32 with the signs that [`Svd`] promises. `left` is `[rows, k]`, `right` `[cols, k]`.
fn signed(left: Mat<f64>, s: Vec<f64>, right: Mat<f64>) -> Svd {
    let signs: Vec<f64> = (0..s.len())
        .map(|j| {
            let mut largest = 0.0_f64;
            for i in 0..left.nrows() {
                if left[(i, j)].abs() > largest.abs() {
                    largest = left[(i, j)];
                }
            }
            if largest < 0.0 { -1.0 } else { 1.0 }
        })
        .collect();
    let (rows, cols) = (left.nrows(), right.nrows());
    Svd {
        u: Matrix::from_fn(rows, s.len(), |i, j| (left[(i, j)] * signs[j]) as f32),
        vt: Matrix::from_fn(s.len(), cols, |i, j| (right[(j, i)] * signs[i]) as f32),
        s,
    }
}

struct NoConvergence;

/// Left vectors, singular values, right vectors.
type Converged<V> = std::result::Result<(V, Vec<f64>, V), NoConvergence>;

/// Both sides and the singular values of `matrix`, which is at least as tall as wide.
fn decompose(matrix: Mat<f64>) -> Converged<Side> {
    if matrix.nrows() == matrix.ncols() {
        let (u, s, v) = thin(matrix.as_ref())?;
        return Ok((
            Side {
                reflectors: None,
                core: u,
            },
            s,
            Side {
                reflectors: None,
                core: v,
            },
        ));
    }
    let (reflectors, r) = Reflectors::new(matrix);
    let (u, s, v) = thin(r.as_ref())?;
    let left = Side {
        reflectors: Some(reflectors),
        core: u,
    };
    Ok((
        left,
        s,
        Side {
            reflectors: None,
            core: v,
        },
    ))
}

/// The thin decomposition, all of it; no side may be the longer one by much, or [`decompose`] is faster.
fn thin(matrix: MatRef<'_, f64>) -> Converged<Mat<f64>> {
    let (rows, cols) = (matrix.nrows(), matrix.ncols());
    let k = rows.min(cols);
    let (mut u, mut v) = (Mat::zeros(rows, k), Mat::zeros(cols, k));
    let mut s = Diag::zeros(k);
    if k > 0 {
        let vectors = ComputeSvdVectors::Thin;
        let scratch =
            svd_scratch::<f64>(rows, cols, vectors, vectors, Par::Seq, Default::default());
        svd(
            matrix,
            s.as_mut(),
            Some(u.as_mut()),
            Some(v.as_mut()),
            Par::Seq,
            MemStack::new(&mut MemBuffer::new(scratch)),
            Default::default(),
        )
        .map_err(|_| NoConvergence)?;
    }
    let s = s.column_vector().iter().copied().collect();
    Ok((u, s, v))
}

/// The orthogonal factor of a QR decomposition of `[rows, cols]`, as reflections.
#[derive(Debug, Clone)]
struct Reflectors {
    /// The reflections' vectors, below the diagonal of `[rows, min(rows, cols)]`.
    basis: Mat<f64>,
    coefficients: Mat<f64>,
}

impl Reflectors {
    /// The orthogonal factor and `R`, `[min(rows, cols), cols]`.
    fn new(mut matrix: Mat<f64>) -> (Self, Mat<f64>) {
        let (rows, cols) = (matrix.nrows(), matrix.ncols());
        let k = rows.min(cols);
        let block = recommended_block_size::<f64>(rows, cols).max(1);
        let mut coefficients = Mat::zeros(block, k);
        if k > 0 {
            let scratch =
                qr_in_place_scratch::<f64>(rows, cols, block, Par::Seq, Default::default());
            qr_in_place(
                matrix.as_mut(),
                coefficients.as_mut(),
                Par::Seq,
                MemStack::new(&mut MemBuffer::new(scratch)),
                Default::default(),
            );
        }
        let r = Mat::from_fn(k, cols, |i, j| if i <= j { matrix[(i, j)] } else { 0.0 });
        matrix.truncate(rows, k);
        (
            Self {
                basis: matrix,
                coefficients,
            },
            r,
        )
    }

    /// The orthogonal factor times `core` `[min(rows, cols), k]`: `[rows, k]`.
    fn apply(&self, core: MatRef<'_, f64>) -> Mat<f64> {
        let rows = self.basis.nrows();
        let mut result = Mat::zeros(rows, core.ncols());
        result.as_mut().subrows_mut(0, core.nrows()).copy_from(core);
        if core.ncols() > 0 && self.basis.ncols() > 0 {
            let scratch = reflect_scratch::<f64>(rows, self.coefficients.nrows(), core.ncols());
            reflect(
                self.basis.as_ref(),
                self.coefficients.as_ref(),
                Conj::No,
                result.as_mut(),
                Par::Seq,
                MemStack::new(&mut MemBuffer::new(scratch)),
            );
        }
        result
    }

    /// The thin orthogonal factor, `[rows, min(rows, cols)]`.
    fn thin_q(&self) -> Mat<f64> {
        let k = self.basis.ncols();
        self.apply(Mat::<f64>::identity(k, k).as_ref())
    }
}

/// The thin QR decomposition of `[rows, cols]`: `Q` `[rows, k]` with orthonormal columns and `R`
/// `[k, cols]`, upper triangular, `k = min(rows, cols)`. Signs are LAPACK's (as in `torch.linalg.qr`):
/// a diagonal entry of `R` has the sign opposite to the entry it replaces, so it may be negative.
pub fn qr(matrix: &Matrix) -> Result<(Matrix, Matrix)> {
    matrix.check_finite()?;
    let (reflectors, r) = Reflectors::new(matrix.to_f64());
    Ok((
        Matrix::from_f64(reflectors.thin_q().as_ref()),
        Matrix::from_f64(r.as_ref()),
    ))
}

/// An approximation to the first `k` terms of the singular value decomposition, much faster than the
/// exact one where `k` is small: subspace iteration from a Gaussian start (Halko, Martinsson and Tropp
/// 2011, algorithms 4.4 and 5.1), the start drawn from `seed`. `k` columns are drawn, without
/// oversampling, as `torch.svd_lowrank(A, q=k, niter=n_iter)` does, which PEFT's `pissa_niter_N` calls.
pub fn svd_randomized(matrix: &Matrix, k: usize, n_iter: usize, seed: u64) -> Result<Svd> {
    let side = matrix.rows().min(matrix.cols());
    check_rank(matrix, k)?;
    svd_randomized_from(matrix, &gaussian(side, k, seed)?, n_iter)
}

/// [`svd_randomized`] from a given start, `[min(rows, cols), k]`.
pub fn svd_randomized_from(matrix: &Matrix, start: &Matrix, n_iter: usize) -> Result<Svd> {
    let (rows, cols, k) = (matrix.rows(), matrix.cols(), start.cols());
    check_rank(matrix, k)?;
    if start.rows() != rows.min(cols) {
        return Err(LinalgError::Shape(format!(
            "the start for a [{rows}, {cols}] matrix has {} rows, not {}",
            start.rows(),
            rows.min(cols)
        )));
    }
    matrix.check_finite()?;
    start.check_finite()?;
    let wide = rows < cols;
    let tall = if wide {
        matrix.to_f64_transposed()
    } else {
        matrix.to_f64()
    };
    let tall = tall.as_ref();
    let basis = |sample: Mat<f64>| Reflectors::new(sample).0.thin_q();
    let mut q = basis(matmul_f64(tall, start.to_f64().as_ref()));
    for _ in 0..n_iter {
        q = basis(matmul_f64(tall.transpose(), q.as_ref()));
        q = basis(matmul_f64(tall, q.as_ref()));
    }
    // (qᵀ · tall)ᵀ, so that the small problem is tall as well.
    let small = matmul_f64(tall.transpose(), q.as_ref());
    let (v, s, u) =
        decompose(small).map_err(|NoConvergence| LinalgError::NoConvergence { rows, cols })?;
    let u = matmul_f64(q.as_ref(), u.columns(0..k).as_ref());
    let v = v.columns(0..k);
    Ok(if wide {
        signed(v, s, u)
    } else {
        signed(u, s, v)
    })
}

fn check_rank(matrix: &Matrix, k: usize) -> Result<()> {
    let side = matrix.rows().min(matrix.cols());
    if k <= side {
        return Ok(());
    }
    Err(LinalgError::Shape(format!(
        "rank {k} is asked of a [{}, {}] matrix; choose a rank of at most {side}",
        matrix.rows(),
        matrix.cols()
    )))
}

/// Independent standard normal values, row by row from one generator.
fn gaussian(rows: usize, cols: usize, seed: u64) -> Result<Matrix> {
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    Matrix::new(
        rows,
        cols,
        crate::linalg::random::gaussian(&mut rng, rows * cols, 1.0),
    )
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used)]
mod tests;
