//! Products of a linear layer: the rows of x are packed once and used by every weight that shares them;
//! weights are read as they lie.

use burn::backend::flex::FlexTensor;
use burn::tensor::DType;
use half::bf16;

use super::matrix::{Into, MatMut, MatRef, Threads, product};

/// What the factors of a product are rounded to; sums are f32 always.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Compute {
    /// f32.
    #[default]
    F32,
    /// bf16 where the machine multiplies bf16 (AMX, AVX-512 BF16), f32 elsewhere.
    Bf16,
}

/// A `[out, in]` matrix whose rows lie in order.
#[derive(Clone, Copy)]
pub(crate) enum Weight<'a> {
    F32(MatRef<'a>),
    Bf16 {
        data: &'a [bf16],
        out: usize,
        width: usize,
    },
}

impl<'a> Weight<'a> {
    /// A rank-2 tensor, f32 (any layout that [`super::matrix::readable`] leaves alone) or bf16
    /// (contiguous).
    pub(crate) fn of(t: &'a FlexTensor) -> Self {
        if t.dtype() == DType::BF16 {
            let shape = t.layout().shape();
            let (out, width) = (shape[0], shape[1]);
            let start = t.layout().start_offset();
            let data = &t.storage::<bf16>()[start..start + out * width];
            return Self::Bf16 { data, out, width };
        }
        Self::F32(MatRef::of(t))
    }

    pub(crate) fn out(&self) -> usize {
        match self {
            Self::F32(w) => w.rows(),
            Self::Bf16 { out, .. } => *out,
        }
    }

    pub(crate) fn width(&self) -> usize {
        match self {
            Self::F32(w) => w.cols(),
            Self::Bf16 { width, .. } => *width,
        }
    }
}

/// Rows made ready to be multiplied with weights.
pub(crate) struct Packed {
    data: Vec<f32>,
    rows: usize,
    width: usize,
}

impl Packed {
    /// Packs `rows` rows of `width` values; `fill` writes all of a row it is given by number.
    pub(crate) fn new(
        rows: usize,
        width: usize,
        _compute: Compute,
        fill: impl Fn(usize, &mut [f32]) + Sync,
    ) -> Self {
        let mut data = vec![0.0; rows * width];
        for (i, row) in data.chunks_exact_mut(width.max(1)).enumerate() {
            fill(i, row);
        }
        Self { data, rows, width }
    }

    /// Packs a matrix times `scale`.
    pub(crate) fn of(x: MatRef<'_>, scale: f32, compute: Compute) -> Self {
        Self::new(x.rows(), x.cols(), compute, |i, row| {
            for (j, v) in row.iter_mut().enumerate() {
                *v = scale * x.get(i, j);
            }
        })
    }

    fn view(&self) -> MatRef<'_> {
        MatRef::rows_of(&self.data, self.rows, self.width)
    }
}

fn dense<'a>(w: &Weight<'a>, buffer: &'a mut Vec<f32>) -> MatRef<'a> {
    match w {
        Weight::F32(w) => *w,
        Weight::Bf16 { data, out, width } => {
            *buffer = data.iter().map(|v| v.to_f32()).collect();
            MatRef::rows_of(buffer, *out, *width)
        }
    }
}

/// `dst [rows, out] = [dst +] Σ x · wᵀ` over the terms, on all threads. The rows were all packed for the
/// same [`Compute`].
pub(crate) fn times_t(dst: &mut MatMut<'_>, mut into: Into, terms: &[(&Packed, Weight<'_>)]) {
    for (x, w) in terms {
        let mut buffer = Vec::new();
        let w = dense(w, &mut buffer);
        product(dst, into, 1.0, x.view(), w.t(), Threads::All);
        into = Into::Add;
    }
}

/// `dst [rows, in] = [dst +] Σ g · w` over the terms, on all threads.
pub(crate) fn times(
    dst: &mut MatMut<'_>,
    mut into: Into,
    terms: &[(MatRef<'_>, Weight<'_>)],
    _compute: Compute,
) {
    for (g, w) in terms {
        let mut buffer = Vec::new();
        let w = dense(w, &mut buffer);
        product(dst, into, 1.0, *g, w, Threads::All);
        into = Into::Add;
    }
}

/// `dst [p, q] = [dst +] scale · gᵀ · x`, for g `[rows, p]` and x `[rows, q]`, on all threads.
pub(crate) fn outer(dst: &mut MatMut<'_>, into: Into, scale: f32, g: MatRef<'_>, x: MatRef<'_>) {
    product(dst, into, scale, g.t(), x, Threads::All);
}
