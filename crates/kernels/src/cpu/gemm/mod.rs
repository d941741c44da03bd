//! Products of a linear layer: the rows of x are packed once and used by every weight that shares them;
//! weights are read as they lie.

#[cfg(target_arch = "x86_64")]
mod amx;
#[cfg(target_arch = "x86_64")]
mod x86;

mod drive;
mod few;
mod pack;
mod room;
#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests;
mod tile;
mod view;

use ::half::bf16;
use burn::backend::flex::FlexTensor;
use burn::tensor::DType;
use rayon::prelude::*;

use super::half;
use super::matrix::{Into, MatMut, MatRef};
use super::path::CpuPath;
use super::simd::level;
use crate::base_weight::Held;
use crate::profile;
use crate::quantized::PackedWeight;
use few::FEW_ROWS;
use pack::Panels;
use tile::Tiles;
use view::{View, pairs};

/// What the factors of a product are rounded to; sums are f32 always.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Compute {
    /// f32.
    #[default]
    F32,
    /// bf16 where the machine multiplies bf16 (AMX, AVX-512 BF16), f32 elsewhere.
    Bf16,
}

impl Compute {
    /// The tiles that multiply bf16, if that is asked for and the machine has them.
    fn tiles(self) -> Option<Tiles> {
        match self {
            Self::F32 => None,
            Self::Bf16 => Tiles::of_bf16(CpuPath::chosen()),
        }
    }
}

/// A `[out, in]` matrix.
#[derive(Clone, Copy)]
pub(crate) enum Weight<'a> {
    F32(MatRef<'a>),
    Bf16 {
        data: &'a [bf16],
        out: usize,
        width: usize,
    },
    /// Rows `first .. first + out`.
    Packed {
        data: &'a PackedWeight,
        first: usize,
        out: usize,
        reading: Reading<'a>,
    },
}

/// What is read of a packed row.
#[derive(Clone, Copy)]
pub(crate) enum Reading<'a> {
    /// The values that it stands for.
    Values,
    /// Its integers, without the scale: of LLM.int8()'s rows.
    Codes,
    /// Its values in some columns.
    Columns(&'a [usize]),
}

impl<'a> Weight<'a> {
    /// A matrix as it is held.
    pub(crate) fn held(w: &'a Held<FlexTensor>) -> Self {
        match w {
            Held::Dense(tensor) => Self::of(tensor),
            Held::Packed(packed) => Self::packed(packed, Reading::Values),
        }
    }

    /// All rows of a packed matrix.
    pub(crate) fn packed(data: &'a PackedWeight, reading: Reading<'a>) -> Self {
        let [out, _] = data.dims();
        Self::Packed {
            data,
            first: 0,
            out,
            reading,
        }
    }

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
            Self::Bf16 { out, .. } | Self::Packed { out, .. } => *out,
        }
    }

    pub(crate) fn width(&self) -> usize {
        match self {
            Self::F32(w) => w.cols(),
            Self::Bf16 { width, .. } => *width,
            Self::Packed { data, reading, .. } => match reading {
                Reading::Values | Reading::Codes => data.dims()[1],
                Reading::Columns(columns) => columns.len(),
            },
        }
    }

    /// Bytes in memory.
    pub(crate) fn bytes(&self) -> usize {
        match self {
            Self::F32(w) => w.rows() * w.cols() * 4,
            Self::Bf16 { out, width, .. } => out * width * 2,
            Self::Packed { data, out, .. } => data.bytes() * out / data.dims()[0].max(1),
        }
    }

    /// Reads a row from column `from` on, as f32.
    pub(crate) fn read(&self, row: usize, from: usize, to: &mut [f32]) {
        match self {
            Self::F32(w) if w.unit_columns() => {
                to.copy_from_slice(&w.row(row)[from..from + to.len()]);
            }
            Self::F32(w) => {
                for (j, to) in to.iter_mut().enumerate() {
                    *to = w.get(row, from + j);
                }
            }
            Self::Bf16 { data, width, .. } => {
                half::widen(level(), &data[row * width + from..][..to.len()], to);
            }
            Self::Packed {
                data,
                first,
                reading,
                ..
            } => match reading {
                Reading::Values => data.read(first + row, from, to),
                Reading::Codes => data.read_codes(first + row, from, to),
                Reading::Columns(columns) => {
                    data.read_columns(first + row, &columns[from..from + to.len()], to);
                }
            },
        }
    }
}

/// Rows made ready to be multiplied with weights.
pub(crate) struct Packed(Form);

enum Form {
    /// Few rows, as they are.
    Rows {
        data: Vec<f32>,
        rows: usize,
        width: usize,
    },
    Panels {
        panels: Panels,
        width: usize,
    },
}

impl Packed {
    /// Packs `rows` rows of `width` values; `fill` writes all of a row it is given by number.
    pub(crate) fn new(
        rows: usize,
        width: usize,
        compute: Compute,
        fill: impl Fn(usize, &mut [f32]) + Sync,
    ) -> Self {
        if rows <= FEW_ROWS {
            let mut data = vec![0.0; rows * width];
            for (i, row) in data.chunks_exact_mut(width.max(1)).enumerate() {
                fill(i, row);
            }
            return Self(Form::Rows { data, rows, width });
        }
        let _timer = profile::product("packing", 0, rows * width * 8);
        let panels = match compute.tiles() {
            Some(tiles) => Panels::of_pairs(rows, width, tiles, fill),
            None => Panels::new(rows, width, Tiles::of(level()), fill),
        };
        Self(Form::Panels { panels, width })
    }

    /// Packs a matrix times `scale`.
    pub(crate) fn of(x: MatRef<'_>, scale: f32, compute: Compute) -> Self {
        Self::new(x.rows(), x.cols(), compute, |i, row| {
            if x.unit_columns() {
                for (v, x) in row.iter_mut().zip(x.row(i)) {
                    *v = scale * x;
                }
            } else {
                for (j, v) in row.iter_mut().enumerate() {
                    *v = scale * x.get(i, j);
                }
            }
        })
    }

    fn shape(&self) -> (usize, usize) {
        match &self.0 {
            Form::Rows { rows, width, .. } => (*rows, *width),
            Form::Panels { panels, width } => (panels.rows, *width),
        }
    }
}

/// `dst [rows, out] = [dst +] Σ x · wᵀ` over the terms, on all threads. The rows were all packed for the
/// same [`Compute`].
pub(crate) fn times_t(dst: &mut MatMut<'_>, into: Into, terms: &[(&Packed, Weight<'_>)]) {
    let (rows, out) = (dst.rows(), dst.cols());
    let mut flops = 0;
    let mut bytes = rows * out * 4;
    for (x, w) in terms {
        let (x_rows, width) = x.shape();
        assert!(
            x_rows == rows && w.out() == out && w.width() == width,
            "product of mismatched shapes"
        );
        flops += 2 * rows * out * width;
        bytes += rows * width * 4 + w.bytes();
    }
    if few(terms) {
        let _timer = profile::product("x · wᵀ, few rows", flops, bytes);
        let terms = terms.iter().filter_map(|(x, w)| match &x.0 {
            Form::Rows { data, .. } => Some((data.as_slice(), *w)),
            Form::Panels { .. } => None,
        });
        return few::times_t(dst, into, rows, &terms.collect::<Vec<_>>());
    }
    let _timer = profile::product("x · wᵀ", flops, bytes);
    let terms = terms.iter().filter_map(|(x, w)| match &x.0 {
        Form::Panels { panels, .. } if panels.tiles.pairs => Some((panels, View::RowPairs(*w))),
        Form::Panels { panels, .. } => Some((panels, View::Plain(*w))),
        Form::Rows { .. } => None,
    });
    drive::times_t(dst, into, &terms.collect::<Vec<_>>());
}

fn few(terms: &[(&Packed, Weight<'_>)]) -> bool {
    matches!(terms.first(), Some((Packed(Form::Rows { .. }), _)))
}

/// `dst [rows, in] = [dst +] Σ g · w` over the terms, on all threads.
pub(crate) fn times(
    dst: &mut MatMut<'_>,
    into: Into,
    terms: &[(MatRef<'_>, Weight<'_>)],
    compute: Compute,
) {
    let (rows, width) = (dst.rows(), dst.cols());
    let mut flops = 0;
    let mut bytes = rows * width * 4;
    for (g, w) in terms {
        assert!(
            g.rows() == rows && w.width() == width && w.out() == g.cols(),
            "product of mismatched shapes"
        );
        flops += 2 * rows * width * g.cols();
        bytes += rows * g.cols() * 4 + w.bytes();
    }
    let _timer = profile::product("g · w", flops, bytes);
    let Some(tiles) = compute.tiles() else {
        let terms = terms.iter().map(|(g, w)| (*g, View::Plain(*w)));
        return drive::times(Tiles::of(level()), dst, into, &terms.collect::<Vec<_>>());
    };
    let rounded: Vec<Vec<f32>> = terms.iter().map(|(g, _)| in_pairs(*g)).collect();
    let terms = terms.iter().zip(&rounded).map(|((g, w), pairs)| {
        let g = MatRef::rows_of(pairs, g.rows(), g.cols().div_ceil(2));
        (g, View::ColumnPairs(*w))
    });
    drive::times(tiles, dst, into, &terms.collect::<Vec<_>>());
}

/// The numbers of g rounded to bf16, neighbours in a row side by side.
fn in_pairs(g: MatRef<'_>) -> Vec<f32> {
    let width = g.cols().div_ceil(2).max(1);
    let mut out = vec![0.0f32; g.rows() * width];
    let level = level();
    let row = |(i, to): (usize, &mut [f32])| {
        if g.unit_columns() {
            pairs(level, g.row(i), to);
        } else {
            let numbers: Vec<f32> = (0..g.cols()).map(|j| g.get(i, j)).collect();
            pairs(level, &numbers, to);
        }
    };
    out.par_chunks_mut(width).enumerate().for_each(row);
    out
}

/// `dst [p, q] = [dst +] scale · gᵀ · x`, for g `[rows, p]` and x `[rows, q]`, on all threads.
pub(crate) fn outer(dst: &mut MatMut<'_>, into: Into, scale: f32, g: MatRef<'_>, x: MatRef<'_>) {
    let (p, q) = (dst.rows(), dst.cols());
    assert!(
        g.rows() == x.rows() && g.cols() == p && x.cols() == q,
        "product of mismatched shapes"
    );
    let rows = g.rows();
    let bytes = 4 * (p * q + rows * (p + q));
    let _timer = profile::product("gᵀ · x", 2 * rows * p * q, bytes);
    drive::outer(Tiles::of(level()), dst, into, scale, g, x);
}
