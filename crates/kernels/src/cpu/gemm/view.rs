//! A weight as the tiles see it: numbers, or pairs of bf16 in the place of numbers.
//!
//! The bf16 instructions multiply pairs: each adds `a₀·b₀ + a₁·b₁` to an f32. A pair is as large as an f32,
//! so a product of pairs moves through the same loops as a product of floats; only the innermost
//! instruction differs.

use super::super::matrix::MatRef;
use super::super::simd::{level, simd_fn};
use super::Weight;

/// What a contraction runs over.
#[derive(Clone, Copy)]
pub(super) enum View<'a> {
    /// The numbers of the matrix.
    Plain(Weight<'a>),
    /// Pairs of neighbours in a row, for contractions over the columns; the last is filled up with zero.
    RowPairs(Weight<'a>),
    /// Pairs of neighbours in a column, for contractions over the rows.
    ColumnPairs(Weight<'a>),
}

impl<'a> View<'a> {
    /// Rows.
    pub(super) fn out(&self) -> usize {
        match self {
            Self::Plain(w) | Self::RowPairs(w) => w.out(),
            Self::ColumnPairs(w) => w.out().div_ceil(2),
        }
    }

    /// Columns.
    pub(super) fn width(&self) -> usize {
        match self {
            Self::Plain(w) | Self::ColumnPairs(w) => w.width(),
            Self::RowPairs(w) => w.width().div_ceil(2),
        }
    }

    /// The matrix itself, where its rows can be read as they lie.
    pub(super) fn direct(&self) -> Option<MatRef<'a>> {
        match self {
            Self::Plain(Weight::F32(w)) if w.unit_columns() => Some(*w),
            Self::RowPairs(Weight::Bf16 { data, out, width }) if width.is_multiple_of(2) => {
                let (before, pairs, after) = {
                    // SAFETY: any bits are a float, which is only copied.
                    unsafe { data.align_to::<f32>() }
                };
                let whole = before.is_empty() && after.is_empty();
                whole.then(|| MatRef::rows_of(pairs, *out, width / 2))
            }
            _ => None,
        }
    }

    /// Reads a row from column `from` on.
    pub(super) fn read(&self, row: usize, from: usize, to: &mut [f32]) {
        match self {
            Self::Plain(w) => w.read(row, from, to),
            Self::RowPairs(w) => {
                let count = (w.width() - 2 * from).min(2 * to.len());
                let mut numbers = [0.0f32; 128];
                for (i, to) in to.chunks_mut(64).enumerate() {
                    let numbers = &mut numbers[..(count - i * 128).min(128)];
                    w.read(row, 2 * from + i * 128, numbers);
                    pairs(level(), numbers, to);
                }
            }
            Self::ColumnPairs(w) => {
                let (mut low, mut high) = ([0.0f32; 64], [0.0f32; 64]);
                for (i, to) in to.chunks_mut(64).enumerate() {
                    let (low, high) = (&mut low[..to.len()], &mut high[..to.len()]);
                    w.read(2 * row, from + 64 * i, low);
                    if 2 * row + 1 < w.out() {
                        w.read(2 * row + 1, from + 64 * i, high);
                    } else {
                        high.fill(0.0);
                    }
                    zipped(level(), low, high, to);
                }
            }
        }
    }
}

/// The bits of the nearest bf16, ties to even; a NaN stays one.
#[inline(always)]
fn rounded(x: f32) -> u32 {
    let bits = x.to_bits();
    let nearest = (bits.wrapping_add(0x7FFF + ((bits >> 16) & 1))) >> 16;
    if x.is_nan() {
        (bits >> 16) | 0x40
    } else {
        nearest
    }
}

simd_fn! {
    /// Neighbours rounded to bf16 and put side by side; what is missing is zero.
    pub(super) fn pairs<L>(from: &[f32], to: &mut [f32]) {
        let whole = from.chunks_exact(2);
        let rest = whole.remainder().first().map_or(0, |x| rounded(*x));
        let count = whole.len();
        for (to, x) in to.iter_mut().zip(whole) {
            *to = f32::from_bits(rounded(x[0]) | rounded(x[1]) << 16);
        }
        for (i, to) in to[count..].iter_mut().enumerate() {
            *to = f32::from_bits(if i == 0 { rest } else { 0 });
        }
    }
}

simd_fn! {
    /// Numbers of two rows rounded to bf16 and put side by side.
    fn zipped<L>(low: &[f32], high: &[f32], to: &mut [f32]) {
        for ((to, low), high) in to.iter_mut().zip(low).zip(high) {
            *to = f32::from_bits(rounded(*low) | rounded(*high) << 16);
        }
    }
}

/// What [`pairs`] makes of a number, widened again.
#[cfg(test)]
pub(super) fn through_bf16(x: f32) -> f32 {
    half::bf16::from_f32(x).to_f32()
}

#[cfg(test)]
mod tests {
    use half::bf16;

    use super::*;

    #[test]
    fn rounds_as_the_half_crate_does() {
        let special = [
            0.0,
            -0.0,
            f32::INFINITY,
            f32::NEG_INFINITY,
            f32::MAX,
            1.0,
            1e-40,
        ];
        let ties = (0..2000u32).map(|i| f32::from_bits(0x3F80_0000 + i * 0x4000));
        for x in special.into_iter().chain(ties) {
            assert_eq!(rounded(x) as u16, bf16::from_f32(x).to_bits(), "{x}");
        }
        assert!(bf16::from_bits(rounded(f32::NAN) as u16).is_nan());
        assert!(bf16::from_bits(rounded(f32::from_bits(0x7F80_0001)) as u16).is_nan());
    }
}
