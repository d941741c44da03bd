//! Rows of a head copied side by side, as they lie or transposed, padded with zeros to whole vectors, and
//! the buffers that they go to.

use std::mem::MaybeUninit;

use super::problem::VECTOR;
use crate::cpu::heads::Heads;
use crate::cpu::simd::{Level, simd_fn};

/// As many floats as a cache line has, at the start of one: a vector that lies in two is read twice.
#[derive(Clone, Copy)]
#[repr(C, align(64))]
struct Line([MaybeUninit<f32>; VECTOR]);

/// A buffer that begins with a cache line.
pub(super) struct Lines {
    lines: Vec<Line>,
    zeroed: bool,
}

impl Lines {
    /// Of values that are written before they are read.
    pub(super) fn new(len: usize) -> Self {
        let count = len.div_ceil(VECTOR);
        let mut lines = Vec::with_capacity(count);
        // SAFETY: `MaybeUninit` needs no initialisation, and the capacity is `count`.
        unsafe { lines.set_len(count) };
        let zeroed = false;
        Self { lines, zeroed }
    }

    pub(super) fn zeros(len: usize) -> Self {
        let line = Line([MaybeUninit::new(0.0); VECTOR]);
        Self {
            lines: vec![line; len.div_ceil(VECTOR)],
            zeroed: true,
        }
    }

    pub(super) fn slots(&mut self) -> &mut [MaybeUninit<f32>] {
        let (at, len) = (self.lines.as_mut_ptr().cast(), self.lines.len() * VECTOR);
        // SAFETY: a line is so many floats, one after the other.
        unsafe { std::slice::from_raw_parts_mut(at, len) }
    }

    /// The values of a buffer made of zeros; [`Lines::slots`] of it never hands out fewer.
    pub(super) fn values(&mut self) -> &mut [f32] {
        assert!(
            self.zeroed,
            "only a buffer made of zeros has values from the start"
        );
        let (at, len) = (self.lines.as_mut_ptr().cast(), self.lines.len() * VECTOR);
        // SAFETY: as above, and they were all initialised when made.
        unsafe { std::slice::from_raw_parts_mut(at, len) }
    }

    pub(super) fn as_ptr(&self) -> *const f32 {
        self.lines.as_ptr().cast()
    }
}

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
