//! Products of attention's tiles: few rows at a time, whole vectors of columns, operands packed so that
//! nothing needs a mask.

use super::problem::VECTOR;
#[cfg(target_arch = "x86_64")]
use super::x86;
#[cfg(target_arch = "x86_64")]
use crate::cpu::simd::Kind;
use crate::cpu::simd::{Level, fma, simd_fn};

/// Rows computed together: with four vectors of columns, their sums fill the registers.
pub(super) const STRIPE: usize = 6;

/// The left operand: element `(row, d)` lies at `row·stride + d`, or at `row + d·stride` transposed.
#[derive(Clone, Copy)]
pub(super) struct Left {
    pub(super) at: *const f32,
    pub(super) stride: usize,
    pub(super) transposed: bool,
}

impl Left {
    pub(super) fn rows(at: *const f32, stride: usize) -> Self {
        Self {
            at,
            stride,
            transposed: false,
        }
    }

    pub(super) fn t(self) -> Self {
        Self {
            transposed: !self.transposed,
            ..self
        }
    }

    /// From row `row` and depth `depth` on.
    pub(super) fn from(self, row: usize, depth: usize) -> Self {
        let offset = if self.transposed {
            row + depth * self.stride
        } else {
            row * self.stride + depth
        };
        Self {
            at: self.at.wrapping_add(offset),
            ..self
        }
    }
}

/// `c = [c +] left · right` for one stripe.
#[derive(Clone, Copy)]
pub(super) struct Stripe {
    pub(super) left: Left,
    /// `[depth, cols]`, rows `right_stride` apart.
    pub(super) right: *const f32,
    pub(super) right_stride: usize,
    /// `[rows, cols]`, rows `c_stride` apart.
    pub(super) c: *mut f32,
    pub(super) c_stride: usize,
    /// At most [`STRIPE`].
    pub(super) rows: usize,
    /// Whole vectors of [`VECTOR`].
    pub(super) cols: usize,
    pub(super) depth: usize,
    pub(super) add: bool,
}

/// # Safety
/// The operands have the rows, columns and depth; nothing else touches c.
pub(super) unsafe fn stripe(level: Level, s: Stripe) {
    debug_assert!(s.rows <= STRIPE && s.cols.is_multiple_of(VECTOR));
    match level.kind() {
        // SAFETY: passed on to the caller; a `Level` vouches for the instructions.
        #[cfg(target_arch = "x86_64")]
        Kind::Avx512 => unsafe { x86::avx512::stripe(s) },
        // SAFETY: as above.
        #[cfg(target_arch = "x86_64")]
        Kind::Avx2 => unsafe { x86::avx2::stripe(s) },
        _ => plain(level, s),
    }
}

simd_fn! {
    /// For any processor, and for comparison. The caller vouches for the operands.
    fn plain<L>(s: Stripe) {
        for col in (0..s.cols).step_by(VECTOR) {
            let mut row = 0;
            while row < s.rows {
                // SAFETY: rows and columns stay below what there is.
                unsafe {
                    if row + 4 <= s.rows {
                        block::<L, 4>(s, row, col);
                        row += 4;
                    } else {
                        block::<L, 1>(s, row, col);
                        row += 1;
                    }
                }
            }
        }
    }
}

/// `P` rows and one vector of columns.
///
/// # Safety
/// The stripe has these rows and columns.
#[inline(always)]
unsafe fn block<const L: u8, const P: usize>(s: Stripe, row: usize, col: usize) {
    let mut sums = [[0.0f32; VECTOR]; P];
    // SAFETY: inside the operands, says the caller.
    unsafe {
        let c = s.c.add(row * s.c_stride + col).cast::<[f32; VECTOR]>();
        let c = |p: usize| c.cast::<f32>().add(p * s.c_stride).cast::<[f32; VECTOR]>();
        if s.add {
            for (p, sums) in sums.iter_mut().enumerate() {
                *sums = c(p).read();
            }
        }
        for d in 0..s.depth {
            let right = s
                .right
                .add(d * s.right_stride + col)
                .cast::<[f32; VECTOR]>()
                .read();
            for (p, sums) in sums.iter_mut().enumerate() {
                let left = *s.left.from(row + p, d).at;
                for (sum, right) in sums.iter_mut().zip(right) {
                    *sum = fma::<L>(left, right, *sum);
                }
            }
        }
        for (p, sums) in sums.into_iter().enumerate() {
            c(p).write(sums);
        }
    }
}
