//! Rows of a head copied side by side, as they lie or transposed, padded with zeros to whole vectors.

use std::mem::MaybeUninit;

use crate::cpu::heads::Heads;
use crate::cpu::simd::{Level, simd_fn};

/// Rows `token .. token + rows` of a head to `dst`, `stride` apart; what is left of each row is zero.
pub(super) fn rows(
    x: &Heads<'_>,
    (batch, token, head): (usize, usize, usize),
    rows: usize,
    dst: &mut [MaybeUninit<f32>],
    stride: usize,
) {
    for (i, dst) in dst.chunks_exact_mut(stride).take(rows).enumerate() {
        let row = x.row(batch, token + i, head);
        let (values, rest) = dst.split_at_mut(row.len());
        for (d, x) in values.iter_mut().zip(row) {
            d.write(*x);
        }
        rest.fill(MaybeUninit::new(0.0));
    }
}

/// The same rows times `scale` as the columns of `dst`, `[dim, stride]`, and zeros beside them up to
/// whole vectors.
pub(super) fn columns(
    level: Level,
    x: &Heads<'_>,
    (batch, token, head): (usize, usize, usize),
    rows: usize,
    scale: f32,
    dst: &mut [MaybeUninit<f32>],
    stride: usize,
) {
    const SIDE: usize = 16;
    let empty: &[f32] = &[];
    for from in (0..rows).step_by(SIDE) {
        let mut block = [empty; SIDE];
        for (i, row) in block.iter_mut().enumerate().take(rows - from) {
            *row = x.row(batch, token + from + i, head);
        }
        if rows - from >= SIDE {
            transposed(level, &block, scale, &mut dst[from..], stride);
        } else {
            for d in 0..block[0].len() {
                for (i, row) in block.iter().enumerate() {
                    dst[d * stride + from + i].write(row.get(d).map_or(0.0, |x| scale * x));
                }
            }
        }
    }
}

simd_fn! {
    /// Sixteen rows of equal length as columns.
    fn transposed<L>(rows: &[&[f32]; 16], scale: f32, dst: &mut [MaybeUninit<f32>], stride: usize) {
        let dim = rows[0].len();
        let rows = rows.map(|r| &r[..dim]);
        for d in 0..dim {
            let dst = &mut dst[d * stride..d * stride + 16];
            for i in 0..16 {
                dst[i].write(scale * rows[i][d]);
            }
        }
    }
}
