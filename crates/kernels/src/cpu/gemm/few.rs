//! Products of few rows, as in decoding: bound by reading the weight, which dot products do in order and on
//! all threads.

use rayon::prelude::*;

use super::super::half;
use super::super::matrix::{Into, MatMut};
use super::super::simd::{dot, level, simd_fn};
use super::Weight;
use super::room::with_room;

/// Up to so many rows, a product with w is bound by reading w.
pub(super) const FEW_ROWS: usize = 4;
/// Weights that one task reads.
const TASK: usize = 16 * 1024;

simd_fn! {
    /// `sums[j][i] += x[i] · w[from + j]` for `rows` rows of x.
    fn dots<L>(x: &[f32], w: Weight<'_>, from: usize, sums: &mut [f32], rows: usize) {
        let width = w.width().max(1);
        let rows_of_x = x.chunks_exact(width).take(rows).enumerate();
        match w {
            Weight::F32(w) if w.unit_columns() => {
                for (i, x) in rows_of_x {
                    for (j, sum) in sums[i..].iter_mut().step_by(rows).enumerate() {
                        *sum += dot::<L>(x, w.row(from + j));
                    }
                }
            }
            Weight::F32(w) => {
                for (i, x) in rows_of_x {
                    for (j, sum) in sums[i..].iter_mut().step_by(rows).enumerate() {
                        let products = x.iter().enumerate().map(|(k, x)| x * w.get(from + j, k));
                        *sum += products.sum::<f32>();
                    }
                }
            }
            Weight::Bf16 { data, width, .. } => {
                for (i, x) in rows_of_x {
                    for (j, sum) in sums[i..].iter_mut().step_by(rows).enumerate() {
                        *sum += half::dot::<L>(x, &data[(from + j) * width..][..width]);
                    }
                }
            }
            // A row is read once, whatever the number of x's rows.
            Weight::Packed { .. } => with_room(w.width(), |row| {
                for (j, sums) in sums.chunks_exact_mut(rows).enumerate() {
                    w.read(from + j, 0, row);
                    for (sum, x) in sums.iter_mut().zip(x.chunks_exact(width)) {
                        *sum += dot::<L>(x, row);
                    }
                }
            }),
        }
    }
}

/// `dst = [dst +] Σ x · wᵀ` for `rows` rows, each term's lying one after the other.
pub(super) fn times_t(
    dst: &mut MatMut<'_>,
    into: Into,
    rows: usize,
    terms: &[(&[f32], Weight<'_>)],
) {
    let Some(out) = terms.first().map(|(_, w)| w.out()).filter(|_| rows > 0) else {
        return;
    };
    let width: usize = terms.iter().map(|(_, w)| w.width()).sum();
    let task = (TASK / width.max(1)).max(1);
    let level = level();
    // `[column][row]` first: a task then owns an unbroken piece of it. One row is that already.
    let mut own = Vec::new();
    let columns = match rows {
        1 => dst.row_mut(0, into),
        _ => {
            own.resize(out * rows, 0.0f32);
            own.as_mut_slice()
        }
    };
    let part = |(i, sums): (usize, &mut [f32])| {
        for (x, w) in terms {
            dots(level, x, *w, i * task, sums, rows);
        }
    };
    if out <= task {
        part((0, columns));
    } else {
        columns
            .par_chunks_mut(task * rows)
            .enumerate()
            .for_each(part);
    }
    if rows == 1 {
        return;
    }
    for row in 0..rows {
        for (j, column) in own.chunks_exact(rows).enumerate() {
            dst.put(row, j, into, column[row]);
        }
    }
}
