//! Rows made ready for products: turned around into panels that a tile reads by vectors.

use std::mem::MaybeUninit;

use rayon::prelude::*;

use super::super::simd::level;
use super::super::storage::Fresh;
use super::room::with_room;
use super::tile::Tiles;
use super::view::pairs;

/// Panels of `[width, columns]`, each row of x a column: all but the last are as wide as a tile, the last is
/// as wide as its vectors; columns past the last row are zero.
pub(super) struct Panels {
    data: Vec<f32>,
    pub(super) rows: usize,
    pub(super) width: usize,
    pub(super) tiles: Tiles,
}

/// One panel.
#[derive(Clone, Copy)]
pub(super) struct Panel {
    /// Its first element.
    pub(super) at: *const f32,
    /// Vectors a row.
    pub(super) vectors: usize,
    /// The row of x that the first column is.
    pub(super) first: usize,
    /// Columns that are rows of x.
    pub(super) cols: usize,
}

// SAFETY: a view of floats that are only read.
unsafe impl Send for Panel {}
// SAFETY: as above.
unsafe impl Sync for Panel {}

impl Panels {
    /// Packs `rows` rows of `width` values; `fill` writes all of the row it is given by number.
    pub(super) fn new(
        rows: usize,
        width: usize,
        tiles: Tiles,
        fill: impl Fn(usize, &mut [f32]) + Sync,
    ) -> Self {
        let panel = tiles.panel();
        let lanes = tiles.lanes;
        let padded = rows.div_ceil(lanes) * lanes;
        let mut data = Fresh::new(padded * width);
        let pack = |(p, out): (usize, &mut [MaybeUninit<f32>])| {
            let first = p * panel;
            let columns = (padded - first).min(panel);
            let cols = (rows - first).min(panel);
            let out = out.as_mut_ptr().cast::<f32>();
            // Eight rows at a time, padded so that whole blocks are turned around.
            let stride = width.next_multiple_of(8);
            let mut strip = vec![0.0f32; 8 * stride];
            for eight in (0..columns).step_by(8) {
                let height = columns.saturating_sub(eight).min(8);
                for i in 0..height {
                    let row = &mut strip[i * stride..i * stride + width];
                    if eight + i < cols {
                        fill(first + eight + i, row);
                    } else {
                        row.fill(0.0);
                    }
                }
                // SAFETY: the panel holds `width · columns` floats, and all of these are written here.
                unsafe {
                    turn(
                        &tiles,
                        &strip,
                        stride,
                        width,
                        height,
                        out.add(eight),
                        columns,
                    )
                };
            }
        };
        if width > 0 {
            let slots = data.slots();
            if rows <= panel {
                slots.chunks_mut(panel * width).enumerate().for_each(pack);
            } else {
                slots
                    .par_chunks_mut(panel * width)
                    .enumerate()
                    .for_each(pack);
            }
        }
        // SAFETY: the panels cover the buffer.
        let data = unsafe { data.into_vec() };
        Self {
            data,
            rows,
            width,
            tiles,
        }
    }

    /// The same with the numbers rounded to bf16, in pairs.
    pub(super) fn of_pairs(
        rows: usize,
        width: usize,
        tiles: Tiles,
        fill: impl Fn(usize, &mut [f32]) + Sync,
    ) -> Self {
        let level = level();
        Self::new(rows, width.div_ceil(2), tiles, |i, row| {
            with_room(width, |numbers| {
                fill(i, numbers);
                pairs(level, numbers, row);
            });
        })
    }

    pub(super) fn count(&self) -> usize {
        self.rows.div_ceil(self.tiles.panel())
    }

    pub(super) fn panel(&self, i: usize) -> Panel {
        let first = i * self.tiles.panel();
        let cols = (self.rows - first).min(self.tiles.panel());
        Panel {
            at: self.data[first * self.width..].as_ptr(),
            vectors: cols.div_ceil(self.tiles.lanes),
            first,
            cols,
        }
    }
}

/// Writes `height` rows of a strip as columns.
///
/// # Safety
/// `to` may be written at rows `0 .. width` of `to_stride`, columns `0 .. height`.
unsafe fn turn(
    tiles: &Tiles,
    strip: &[f32],
    stride: usize,
    width: usize,
    height: usize,
    to: *mut f32,
    to_stride: usize,
) {
    let whole = if height == 8 { width / 8 * 8 } else { 0 };
    for k in (0..whole).step_by(8) {
        // SAFETY: passed on to the caller; the strip holds eight rows.
        unsafe {
            (tiles.transpose)(
                strip[k..].as_ptr(),
                stride,
                to.add(k * to_stride),
                to_stride,
            );
        }
    }
    for k in whole..width {
        for i in 0..height {
            // SAFETY: passed on to the caller.
            unsafe { *to.add(k * to_stride + i) = strip[i * stride + k] };
        }
    }
}
