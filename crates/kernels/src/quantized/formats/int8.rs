//! LLM.int8(): 8-bit rows with a scale each, and the columns of an input too large to quantise.

use rayon::prelude::*;

use crate::cpu::simd::{Level, level};
use crate::quantized::read;

use super::{FloatKind, QuantError, absmax, count, expect, finite};

/// The magnitude from which LLM.int8() calls an input an outlier: bitsandbytes' default.
pub const OUTLIER_THRESHOLD: f32 = 6.0;

/// bitsandbytes' 1/127.
pub(crate) const PER_STEP: f32 = 0.007_874_016;

/// A matrix of 8-bit integers whose rows have a scale each: `codes * absmax / 127`.
#[derive(Clone, Debug, PartialEq)]
pub struct Int8Rows {
    shape: [usize; 2],
    codes: Vec<i8>,
    absmax: Vec<f32>,
}

impl Int8Rows {
    /// Quantises a matrix `[rows, columns]`: each value times 127 over its row's largest magnitude, to the nearest
    /// integer, ties to even. Rows of zeros, and of numbers so small that the factor overflows, get zeros.
    ///
    /// bitsandbytes rounds a weight to f16 first whatever its dtype: do the same ([`FloatKind::round`]) for its
    /// codes. Fails where the values are not as many as the shape says or one is not finite.
    pub fn quantise(values: &[f32], shape: [usize; 2]) -> Result<Self, QuantError> {
        expect("values", &shape, count(&shape)?, values.len())?;
        finite(values)?;
        let mut codes = vec![0_i8; values.len()];
        let mut scales = vec![0.0_f32; shape[0]];
        if shape[1] > 0 {
            (
                values.par_chunks(shape[1]),
                codes.par_chunks_mut(shape[1]),
                &mut scales,
            )
                .into_par_iter()
                .for_each(|(values, codes, scale)| {
                    *scale = absmax(values);
                    // PyTorch divides a number by a tensor so, rounding twice.
                    let factor = scale.recip() * 127.0;
                    if factor.is_finite() {
                        for (code, v) in codes.iter_mut().zip(values) {
                            *code = (v * factor).round_ties_even() as i8;
                        }
                    }
                });
        }
        Ok(Self {
            shape,
            codes,
            absmax: scales,
        })
    }

    /// Wraps what a checkpoint holds: `weight` (of `weight_format` 0) and `SCB`. Fails where a part is missing or does not fit.
    pub fn from_parts(
        shape: [usize; 2],
        codes: Vec<i8>,
        absmax: Option<Vec<f32>>,
    ) -> Result<Self, QuantError> {
        let absmax = absmax.ok_or(QuantError::Missing("SCB"))?;
        expect("8-bit codes", &shape, count(&shape)?, codes.len())?;
        expect("row scales (SCB)", &shape, shape[0], absmax.len())?;
        Ok(Self {
            shape,
            codes,
            absmax,
        })
    }

    /// Rows and columns.
    pub fn shape(&self) -> [usize; 2] {
        self.shape
    }

    /// The integers, row-major.
    pub fn codes(&self) -> &[i8] {
        &self.codes
    }

    /// The largest magnitude of each row: a checkpoint's `SCB`.
    pub fn absmax(&self) -> &[f32] {
        &self.absmax
    }

    /// Bytes of codes and scales.
    pub fn bytes(&self) -> usize {
        self.codes.len() + 4 * self.absmax.len()
    }

    /// All values, row-major: code times scale times 1/127 in f32, rounded to `dtype`.
    pub fn dequantise(&self, dtype: FloatKind) -> Vec<f32> {
        let mut out = vec![0.0; self.codes.len()];
        if self.shape[1] > 0 {
            out.par_chunks_mut(self.shape[1])
                .enumerate()
                .for_each(|(row, out)| self.fill(row, dtype, out));
        }
        out
    }

    /// Writes one row's values to `out`. Fails where there is no such row or `out` is not as long as a row.
    pub fn dequantise_row(
        &self,
        row: usize,
        dtype: FloatKind,
        out: &mut [f32],
    ) -> Result<(), QuantError> {
        if row >= self.shape[0] {
            let columns = self.shape[1];
            return Err(QuantError::Range {
                start: row.saturating_mul(columns),
                end: row.saturating_add(1).saturating_mul(columns),
                length: self.codes.len(),
            });
        }
        expect(
            "places for a row's values",
            &self.shape,
            self.shape[1],
            out.len(),
        )?;
        self.fill(row, dtype, out);
        Ok(())
    }

    fn fill(&self, row: usize, dtype: FloatKind, out: &mut [f32]) {
        self.read(level(), row, 0, out);
        read::round(level(), dtype, out);
    }

    /// Values of a row from column `from` on, in f32; they must be there.
    pub(crate) fn read(&self, level: Level, row: usize, from: usize, out: &mut [f32]) {
        let codes = &self.codes[row * self.shape[1] + from..];
        read::int8(level, codes, self.absmax[row], out);
    }

    /// Codes of a row from column `from` on; they must be there.
    pub(crate) fn read_codes(&self, level: Level, row: usize, from: usize, out: &mut [f32]) {
        let codes = &self.codes[row * self.shape[1] + from..][..out.len()];
        read::widen(level, codes, out);
    }

    /// Values of a row in some columns; they must be there.
    pub(crate) fn gather(&self, row: usize, columns: &[usize], out: &mut [f32]) {
        let codes = &self.codes[row * self.shape[1]..][..self.shape[1]];
        for (value, column) in out.iter_mut().zip(columns) {
            *value = f32::from(codes[*column]) * self.absmax[row] * PER_STEP;
        }
    }
}

/// The columns of `values`, `[rows, columns]`, that have an entry of `threshold` or more in magnitude,
/// ascending: LLM.int8() multiplies them in floating point.
///
/// Fails where the values are not as many as the shape says, one is not finite or the threshold is not above zero.
pub fn outlier_columns(
    values: &[f32],
    shape: [usize; 2],
    threshold: f32,
) -> Result<Vec<usize>, QuantError> {
    if threshold.is_nan() || threshold <= 0.0 {
        return Err(QuantError::Threshold(threshold));
    }
    expect("values", &shape, count(&shape)?, values.len())?;
    finite(values)?;
    let columns = shape[1];
    let mut outlier = vec![false; columns];
    for row in values.chunks(columns.max(1)) {
        for (flag, v) in outlier.iter_mut().zip(row) {
            *flag |= v.abs() >= threshold;
        }
    }
    Ok((0..columns).filter(|&c| outlier[c]).collect())
}

/// Quantises an input's rows without its outliers: entries of `threshold` or more count as zero for their row's scale, and
/// the columns that have one are zero in every row. Also gives those columns. Fails as [`outlier_columns`] does.
pub fn quantise_activations(
    values: &[f32],
    shape: [usize; 2],
    threshold: f32,
) -> Result<(Int8Rows, Vec<usize>), QuantError> {
    let outliers = outlier_columns(values, shape, threshold)?;
    let small = |v: &f32| if v.abs() >= threshold { 0.0 } else { *v };
    let inner: Vec<f32> = values.par_iter().map(small).collect();
    let mut rows = Int8Rows::quantise(&inner, shape)?;
    for row in rows.codes.chunks_mut(shape[1].max(1)) {
        for &column in &outliers {
            row[column] = 0;
        }
    }
    Ok((rows, outliers))
}
