//! Dense matrices on the host: products, norms, and (in `factor`) QR and SVD, always on one thread, so
//! that a result does not depend on how many there are.

mod factor;
pub(crate) mod random;
pub(crate) mod torch_rng;

pub use factor::{Svd, ThinSvd, qr, svd_randomized, svd_randomized_from, svd_truncated};

use faer::linalg::matmul::matmul;
use faer::{Accum, Mat, MatRef, Par};

/// What can go wrong with a matrix.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
pub enum LinalgError {
    /// Sizes that do not go together, or a rank that a matrix cannot have.
    #[error("{0}")]
    Shape(String),
    /// A value that is NaN or infinite.
    #[error(
        "a [{rows}, {cols}] matrix holds {value} at row {row}, column {col}, but only finite values can \
         be worked with; check the weights or the training run that it comes from"
    )]
    NonFinite {
        /// Rows of the matrix.
        rows: usize,
        /// Columns of the matrix.
        cols: usize,
        /// Where the first such value lies.
        row: usize,
        /// Where the first such value lies.
        col: usize,
        /// The value.
        value: f32,
    },
    /// The iteration behind an SVD did not converge.
    #[error(
        "the singular values of a [{rows}, {cols}] matrix did not converge; check that its values are \
         of a usual size"
    )]
    NoConvergence {
        /// Rows of the matrix.
        rows: usize,
        /// Columns of the matrix.
        cols: usize,
    },
}

/// This module's results.
pub type Result<T> = std::result::Result<T, LinalgError>;

/// A dense matrix `[rows, cols]` of f32, one row after the other.
#[derive(Debug, Clone, PartialEq)]
pub struct Matrix {
    rows: usize,
    cols: usize,
    data: Vec<f32>,
}

impl Matrix {
    /// From its values, row by row; `data` holds `rows · cols` of them.
    pub fn new(rows: usize, cols: usize, data: Vec<f32>) -> Result<Self> {
        match rows.checked_mul(cols) {
            Some(count) if count == data.len() => Ok(Self { rows, cols, data }),
            _ => Err(LinalgError::Shape(format!(
                "a [{rows}, {cols}] matrix cannot be made of {} values",
                data.len()
            ))),
        }
    }

    /// All zeros.
    pub fn zeros(rows: usize, cols: usize) -> Self {
        Self {
            rows,
            cols,
            data: vec![0.0; rows * cols],
        }
    }

    /// From a function of row and column.
    pub fn from_fn(rows: usize, cols: usize, value: impl Fn(usize, usize) -> f32) -> Self {
        let data = (0..rows * cols)
            .map(|i| value(i / cols, i % cols))
            .collect();
        Self { rows, cols, data }
    }

    /// The number of rows.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// The number of columns.
    pub fn cols(&self) -> usize {
        self.cols
    }

    /// The values, row by row.
    pub fn data(&self) -> &[f32] {
        &self.data
    }

    /// The values to change in place, row by row.
    pub fn data_mut(&mut self) -> &mut [f32] {
        &mut self.data
    }

    /// The values, row by row.
    pub fn into_data(self) -> Vec<f32> {
        self.data
    }

    /// The values of one row.
    ///
    /// # Panics
    ///
    /// Where the matrix has no such row.
    pub fn row(&self, row: usize) -> &[f32] {
        &self.data[row * self.cols..(row + 1) * self.cols]
    }

    /// `[cols, rows]`.
    pub fn transpose(&self) -> Self {
        Self::from_fn(self.cols, self.rows, |i, j| self.data[j * self.cols + i])
    }

    /// `self · other`: `[m, k] · [k, n] = [m, n]`, accumulated in f32.
    pub fn matmul(&self, other: &Self) -> Result<Self> {
        self.product("·", self.view(), other, other.view())
    }

    /// `selfᵀ · other`: `[k, m]ᵀ · [k, n] = [m, n]`, without a transposed copy.
    pub fn transposed_matmul(&self, other: &Self) -> Result<Self> {
        self.product("ᵀ ·", self.view().transpose(), other, other.view())
    }

    /// `self · otherᵀ`: `[m, k] · [n, k]ᵀ = [m, n]`, without a transposed copy.
    pub fn matmul_transposed(&self, other: &Self) -> Result<Self> {
        self.product("· transposed", self.view(), other, other.view().transpose())
    }

    fn product(
        &self,
        sign: &str,
        left: MatRef<'_, f32>,
        other: &Self,
        right: MatRef<'_, f32>,
    ) -> Result<Self> {
        if left.ncols() != right.nrows() {
            return Err(LinalgError::Shape(format!(
                "[{}, {}] {sign} [{}, {}] is not a product: the inner sizes are {} and {}",
                self.rows,
                self.cols,
                other.rows,
                other.cols,
                left.ncols(),
                right.nrows()
            )));
        }
        let mut result = Self::zeros(left.nrows(), right.ncols());
        // Row-major [m, n] is column-major [n, m], which is what the product writes fastest.
        let target =
            faer::MatMut::from_column_major_slice_mut(&mut result.data, result.cols, result.rows);
        let (left, right) = (left.transpose(), right.transpose());
        matmul(target, Accum::Replace, right, left, 1.0, Par::Seq);
        Ok(result)
    }

    /// Every value times `factor`.
    pub fn scaled(mut self, factor: f32) -> Self {
        self.data.iter_mut().for_each(|value| *value *= factor);
        self
    }

    /// The rows of all parts, in order; the columns agree.
    pub fn stack_rows(parts: &[&Self]) -> Result<Self> {
        let cols = parts.first().map_or(0, |part| part.cols);
        if let Some(part) = parts.iter().find(|part| part.cols != cols) {
            return Err(LinalgError::Shape(format!(
                "rows of {cols} and of {} values cannot be stacked",
                part.cols
            )));
        }
        let data = parts.iter().flat_map(|part| &part.data).copied().collect();
        Self::new(parts.iter().map(|part| part.rows).sum(), cols, data)
    }

    /// The columns of all parts, side by side; the rows agree.
    pub fn stack_cols(parts: &[&Self]) -> Result<Self> {
        let rows = parts.first().map_or(0, |part| part.rows);
        if let Some(part) = parts.iter().find(|part| part.rows != rows) {
            return Err(LinalgError::Shape(format!(
                "columns of {rows} and of {} values cannot be put side by side",
                part.rows
            )));
        }
        let data = (0..rows)
            .flat_map(|row| parts.iter().flat_map(move |part| part.row(row)))
            .copied()
            .collect();
        Self::new(rows, parts.iter().map(|part| part.cols).sum(), data)
    }

    /// `[rows, cols]` with this matrix in its upper left corner and zeros elsewhere.
    pub fn padded(self, rows: usize, cols: usize) -> Result<Self> {
        if (rows, cols) == (self.rows, self.cols) {
            return Ok(self);
        }
        if rows < self.rows || cols < self.cols {
            return Err(LinalgError::Shape(format!(
                "a [{}, {}] matrix does not fit in [{rows}, {cols}]",
                self.rows, self.cols
            )));
        }
        let mut result = Self::zeros(rows, cols);
        for row in 0..self.rows {
            result.data[row * cols..row * cols + self.cols].copy_from_slice(self.row(row));
        }
        Ok(result)
    }

    /// The Euclidean norm of every row, summed in f64.
    pub fn row_norms(&self) -> Vec<f64> {
        (0..self.rows)
            .map(|row| squares(self.row(row)).sqrt())
            .collect()
    }

    /// The Frobenius norm, summed in f64.
    pub fn frobenius(&self) -> f64 {
        squares(&self.data).sqrt()
    }

    /// An error that names the first value that is not finite.
    pub fn check_finite(&self) -> Result<()> {
        match self.data.iter().position(|value| !value.is_finite()) {
            None => Ok(()),
            Some(at) => Err(LinalgError::NonFinite {
                rows: self.rows,
                cols: self.cols,
                row: at / self.cols,
                col: at % self.cols,
                value: self.data[at],
            }),
        }
    }

    fn view(&self) -> MatRef<'_, f32> {
        MatRef::from_row_major_slice(&self.data, self.rows, self.cols)
    }

    /// The same values in f64.
    pub(crate) fn to_f64(&self) -> Mat<f64> {
        self.rows_to_f64(0..self.rows)
    }

    /// The transpose in f64.
    pub(crate) fn to_f64_transposed(&self) -> Mat<f64> {
        Mat::from_fn(self.cols, self.rows, |i, j| {
            f64::from(self.data[j * self.cols + i])
        })
    }

    /// Some of the rows in f64.
    pub(crate) fn rows_to_f64(&self, rows: std::ops::Range<usize>) -> Mat<f64> {
        Mat::from_fn(rows.len(), self.cols, |i, j| {
            f64::from(self.data[(rows.start + i) * self.cols + j])
        })
    }

    /// Rounded from f64.
    pub(crate) fn from_f64(values: MatRef<'_, f64>) -> Self {
        Self::from_fn(values.nrows(), values.ncols(), |i, j| values[(i, j)] as f32)
    }
}

/// `left · right` in f64; the caller has seen to the sizes.
pub(crate) fn matmul_f64(left: MatRef<'_, f64>, right: MatRef<'_, f64>) -> Mat<f64> {
    let mut result = Mat::zeros(left.nrows(), right.ncols());
    matmul(result.as_mut(), Accum::Replace, left, right, 1.0, Par::Seq);
    result
}

fn squares(values: &[f32]) -> f64 {
    values
        .iter()
        .map(|&value| f64::from(value) * f64::from(value))
        .sum()
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used)]
pub(crate) mod tests {
    use super::*;

    /// Values in `[-1, 1)` that look random (SplitMix64's last step).
    pub(crate) fn noise(seed: u64, rows: usize, cols: usize) -> Matrix {
        Matrix::from_fn(rows, cols, |i, j| {
            let mut z = (seed << 40 | (i as u64) << 20 | j as u64)
                .wrapping_add(1)
                .wrapping_mul(0x9E37_79B9_7F4A_7C15);
            z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
            z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
            ((z ^ (z >> 31)) >> 40) as f32 / (1_u64 << 23) as f32 - 1.0
        })
    }

    /// The largest difference of two matrices of one shape.
    pub(crate) fn distance(a: &Matrix, b: &Matrix) -> f32 {
        assert_eq!((a.rows, a.cols), (b.rows, b.cols));
        let pairs = a.data.iter().zip(&b.data);
        pairs.map(|(a, b)| (a - b).abs()).fold(0.0, f32::max)
    }

    fn by_hand(a: &Matrix, b: &Matrix) -> Matrix {
        Matrix::from_fn(a.rows, b.cols, |i, j| {
            (0..a.cols)
                .map(|k| f64::from(a.row(i)[k]) * f64::from(b.row(k)[j]))
                .sum::<f64>() as f32
        })
    }

    #[test]
    fn products_agree_with_the_sum_by_hand_in_every_form() {
        for (m, k, n) in [(1, 1, 1), (2, 3, 4), (17, 5, 33), (64, 70, 3), (3, 0, 2)] {
            let (a, b) = (noise(1, m, k), noise(2, k, n));
            let expected = by_hand(&a, &b);
            assert!(distance(&a.matmul(&b).unwrap(), &expected) < 1e-5);
            let at = a.transpose();
            assert!(distance(&at.transposed_matmul(&b).unwrap(), &expected) < 1e-5);
            let bt = b.transpose();
            assert!(distance(&a.matmul_transposed(&bt).unwrap(), &expected) < 1e-5);
        }
    }

    #[test]
    fn sizes_that_do_not_fit_are_named() {
        let error = Matrix::zeros(2, 3)
            .matmul(&Matrix::zeros(4, 5))
            .unwrap_err();
        assert!(error.to_string().contains("[2, 3] · [4, 5]"), "{error}");
        assert!(Matrix::new(2, 3, vec![0.0; 5]).is_err());
        assert!(Matrix::new(usize::MAX, 3, vec![]).is_err());
        assert!(Matrix::zeros(2, 3).padded(3, 2).is_err());
        assert!(Matrix::stack_rows(&[&Matrix::zeros(1, 2), &Matrix::zeros(1, 3)]).is_err());
        assert!(Matrix::stack_cols(&[&Matrix::zeros(2, 1), &Matrix::zeros(3, 1)]).is_err());
    }

    #[test]
    fn stacking_and_padding_keep_the_values_in_place() {
        let a = Matrix::new(1, 2, vec![1.0, 2.0]).unwrap();
        let b = Matrix::new(1, 2, vec![3.0, 4.0]).unwrap();
        let rows = Matrix::stack_rows(&[&a, &b]).unwrap();
        assert_eq!((rows.rows(), rows.data()), (2, &[1.0, 2.0, 3.0, 4.0][..]));
        let cols = Matrix::stack_cols(&[&rows, &rows]).unwrap();
        assert_eq!(cols.data(), [1.0, 2.0, 1.0, 2.0, 3.0, 4.0, 3.0, 4.0]);
        let padded = rows.padded(3, 3).unwrap();
        assert_eq!(padded.data(), [1.0, 2.0, 0.0, 3.0, 4.0, 0.0, 0.0, 0.0, 0.0]);
    }

    #[test]
    fn norms_are_summed_in_f64() {
        let m = Matrix::new(2, 2, vec![3.0, 4.0, 0.0, 0.0]).unwrap();
        assert_eq!(m.row_norms(), [5.0, 0.0]);
        assert_eq!(m.frobenius(), 5.0);
        // In f32 the square of the first value overflows.
        assert!(
            Matrix::new(1, 1, vec![1e30])
                .unwrap()
                .frobenius()
                .is_finite()
        );
    }
}
