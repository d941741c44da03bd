//! The input of a product with LLM.int8()'s rows, as bitsandbytes' `int8_vectorwise_quant` rounds it.

use std::sync::atomic::{AtomicBool, Ordering};

use rayon::prelude::*;

use crate::cpu::simd::{Level, level, simd_fn};
use crate::quantized::formats::{FloatKind, Int8Rows};
use crate::quantized::{PackedRows, PackedWeight, read};

/// bitsandbytes' 1/127².
pub(super) const PER_PRODUCT: f32 = 6.200_124e-5;
/// Rows that one task looks at.
const TASK: usize = 16;

/// What the rounding of an input is made of.
pub(super) struct Rounding<'a> {
    x: &'a [f32],
    width: usize,
    /// The largest magnitude of each row that is no outlier; NaN where one is.
    scales: Vec<f32>,
    /// Columns that are multiplied as they are, ascending.
    pub(super) outliers: Vec<usize>,
    level: Level,
}

/// The rows of LLM.int8() and their threshold, if that is what the weight is.
pub(super) fn rows(w: &PackedWeight) -> Option<(&Int8Rows, f32)> {
    match w.rows() {
        PackedRows::Int8 { rows, threshold } => Some((rows, *threshold)),
        PackedRows::FourBit(_) | PackedRows::Blocks(_) => None,
    }
}

simd_fn! {
    /// The row's scale; sets the flags of its outliers.
    fn look<L>(row: &[f32], threshold: f32, flags: &[AtomicBool]) -> f32 {
        let mut most = 0.0_f32;
        for (x, flag) in row.iter().zip(flags) {
            let size = x.abs();
            if size >= threshold {
                flag.store(true, Ordering::Relaxed);
            } else if size > most || size.is_nan() {
                most = size;
            }
        }
        most
    }
}

simd_fn! {
    /// `127 · x / scale` to the nearest integer, ties to even.
    fn codes<L>(row: &mut [f32], scale: f32) {
        let factor = 127.0 / scale;
        let factor = if factor.is_finite() { factor } else { 0.0 };
        for x in row {
            let code = (*x * factor).round_ties_even();
            // Outliers, which are not multiplied this way, may be infinite.
            *x = if code.abs() <= 127.0 { code } else { 0.0 };
        }
    }
}

simd_fn! {
    /// Sums of products of codes to what they stand for.
    fn scale_row<L>(row: &mut [f32], scale: f32, columns: &[f32]) {
        for (y, column) in row.iter_mut().zip(columns) {
            *y = *y * (scale * column) * PER_PRODUCT;
        }
    }
}

impl<'a> Rounding<'a> {
    /// Looks for outliers and scales in `x`, rows of `width` numbers. A threshold of 0 finds none.
    pub(super) fn of(x: &'a [f32], width: usize, threshold: f32) -> Self {
        let level = level();
        let threshold = match threshold > 0.0 {
            true => threshold,
            // Nothing is above a NaN.
            false => f32::NAN,
        };
        let flags: Vec<AtomicBool> = (0..width).map(|_| AtomicBool::new(false)).collect();
        let mut scales = vec![0.0; x.len() / width.max(1)];
        let rows = scales.par_chunks_mut(TASK);
        rows.zip(x.par_chunks(TASK * width.max(1)))
            .for_each(|(scales, x)| {
                let mut half = vec![0.0; width];
                for (scale, x) in scales.iter_mut().zip(x.chunks_exact(width)) {
                    half.copy_from_slice(x);
                    read::round(level, FloatKind::F16, &mut half);
                    *scale = look(level, &half, threshold, &flags);
                }
            });
        let flagged = flags.iter().enumerate();
        let outliers = flagged.filter_map(|(i, flag)| flag.load(Ordering::Relaxed).then_some(i));
        Self {
            x,
            width,
            scales,
            outliers: outliers.collect(),
            level,
        }
    }

    fn row(&self, i: usize) -> &'a [f32] {
        &self.x[i * self.width..(i + 1) * self.width]
    }

    /// The integers of a row, zero in the outliers' columns.
    pub(super) fn codes(&self, i: usize, out: &mut [f32]) {
        out.copy_from_slice(self.row(i));
        read::round(self.level, FloatKind::F16, out);
        codes(self.level, out, self.scales[i]);
        for column in &self.outliers {
            out[*column] = 0.0;
        }
    }

    /// What a row has in the outliers' columns.
    pub(super) fn large(&self, i: usize, out: &mut [f32]) {
        let row = self.row(i);
        for (out, column) in out.iter_mut().zip(&self.outliers) {
            *out = row[*column];
        }
    }

    /// Scales row `i` of the integers' products, for all of the weight's rows.
    pub(super) fn scale(&self, i: usize, weight: &[f32], y: &mut [f32]) {
        scale_row(self.level, y, self.scales[i], weight);
    }
}
