//! The small products for x86, by hand: of loops like those in `plain` the compiler keeps the sums in
//! memory, or not, as it happens.

use std::arch::x86_64::*;

use super::tile::{Rows, Strips};
use crate::cpu::matrix::Into;

/// The products for one instruction set. The arguments are the vector's and the mask's type, how many
/// floats a vector has, how many vectors and rows of them fit the registers, and the operations.
macro_rules! kernel {
    (
        $name:ident, $features:literal, $vector:ty, $mask:ty, $lanes:literal, $widest:literal,
        $tallest:literal, $zero:ident, $splat:ident, $mul:ident, $fma:ident, $load:ident,
        $store:ident, $masked_load:path, $masked_store:ident, $first:path, $total:path
    ) => {
        pub(super) mod $name {
            use std::arch::x86_64::*;

            use super::{Into, Rows, Strips};

            /// One product: columns in strips of equal width, so that none is left narrow; of each,
            /// all rows, so that the strip of b stays in the nearest cache.
            ///
            /// # Safety
            /// The operands have the rows and columns.
            #[inline]
            #[target_feature(enable = $features)]
            pub(crate) unsafe fn one(s: Strips, cols: usize) {
                let vectors = cols.div_ceil($lanes);
                let width = vectors.div_ceil(vectors.div_ceil($widest)) * $lanes;
                let mut col = 0;
                while col < cols {
                    let n = width.min(cols - col);
                    let mask = $first((n - 1) % $lanes + 1);
                    // SAFETY: columns stay below the number there is.
                    unsafe {
                        let s = s.from(col);
                        match n.div_ceil($lanes) {
                            1 => strip::<1>(s, mask),
                            2 => strip::<2>(s, mask),
                            _ => strip::<3>(s, mask),
                        }
                    }
                    col += n;
                }
            }

            /// Inner products of `P` rows of a and `Q` rows of b.
            ///
            /// # Safety
            /// The operands have these rows.
            #[inline]
            #[target_feature(enable = $features)]
            #[allow(clippy::needless_range_loop)]
            pub(crate) unsafe fn inner<const P: usize, const Q: usize>(s: Rows) -> [[f32; Q]; P] {
                let mut sums: [[$vector; Q]; P] = [[$zero(); Q]; P];
                let mask = $first((s.depth - 1) % $lanes + 1);
                for c in 0..s.count {
                    let mut d = 0;
                    while d < s.depth {
                        // SAFETY: below the rows' length; what the mask leaves out is not touched.
                        unsafe {
                            let (a, b) = (s.a.0.add(c * s.a.2 + d), s.b.0.add(c * s.b.2 + d));
                            let full = d + $lanes <= s.depth;
                            let read = |at| {
                                if full {
                                    $load(at)
                                } else {
                                    $masked_load(mask, at)
                                }
                            };
                            let mut right: [$vector; Q] = [$zero(); Q];
                            for q in 0..Q {
                                right[q] = read(b.add(q * s.b.1));
                            }
                            for p in 0..P {
                                let left = read(a.add(p * s.a.1));
                                for q in 0..Q {
                                    sums[p][q] = $fma(left, right[q], sums[p][q]);
                                }
                            }
                        }
                        d += $lanes;
                    }
                }
                let mut totals = [[0.0; Q]; P];
                for p in 0..P {
                    for q in 0..Q {
                        totals[p][q] = $total(sums[p][q]);
                    }
                }
                totals
            }

            /// `V` vectors of columns, of the last those in the mask.
            #[inline]
            #[target_feature(enable = $features)]
            unsafe fn strip<const V: usize>(s: Strips, mask: $mask) {
                let mut row = 0;
                // SAFETY: passed on; rows stay below the number there is.
                unsafe {
                    while row + $tallest <= s.rows {
                        tile::<$tallest, V>(s, row, mask);
                        row += $tallest;
                    }
                    while row + 4 <= s.rows {
                        tile::<4, V>(s, row, mask);
                        row += 4;
                    }
                    while row < s.rows {
                        tile::<1, V>(s, row, mask);
                        row += 1;
                    }
                }
            }

            /// `P` rows from row `row` on.
            #[inline]
            #[target_feature(enable = $features)]
            #[allow(clippy::needless_range_loop)]
            unsafe fn tile<const P: usize, const V: usize>(s: Strips, row: usize, mask: $mask) {
                let ((a, rs, cs), (b, stride), (dst, dst_rs)) = (s.a, s.b, s.dst);
                let mut sums: [[$vector; V]; P] = [[$zero(); V]; P];
                // SAFETY: the operands have these rows and columns; what the mask leaves out is not
                // touched.
                unsafe {
                    let a = a.add(row * rs);
                    for d in 0..s.depth {
                        let b = b.add(d * stride);
                        let mut right: [$vector; V] = [$zero(); V];
                        for v in 0..V {
                            let at = b.add(v * $lanes);
                            right[v] = if v + 1 < V {
                                $load(at)
                            } else {
                                $masked_load(mask, at)
                            };
                        }
                        for p in 0..P {
                            let left = $splat(*a.add(p * rs + d * cs));
                            for v in 0..V {
                                sums[p][v] = $fma(left, right[v], sums[p][v]);
                            }
                        }
                    }
                    let scale = $splat(s.scale);
                    for p in 0..P {
                        for v in 0..V {
                            let at = dst.add((row + p) * dst_rs + v * $lanes);
                            let last = v + 1 == V;
                            let sum = if s.into == Into::Set {
                                $mul(scale, sums[p][v])
                            } else if last {
                                $fma(scale, sums[p][v], $masked_load(mask, at))
                            } else {
                                $fma(scale, sums[p][v], $load(at))
                            };
                            if last {
                                $masked_store(at, mask, sum);
                            } else {
                                $store(at, sum);
                            }
                        }
                    }
                }
            }
        }
    };
}

kernel!(
    avx512,
    "avx512f",
    __m512,
    __mmask16,
    16,
    3,
    8,
    _mm512_setzero_ps,
    _mm512_set1_ps,
    _mm512_mul_ps,
    _mm512_fmadd_ps,
    _mm512_loadu_ps,
    _mm512_storeu_ps,
    _mm512_maskz_loadu_ps,
    _mm512_mask_storeu_ps,
    super::first_16,
    _mm512_reduce_add_ps
);

kernel!(
    avx2,
    "avx2,fma",
    __m256,
    __m256i,
    8,
    2,
    4,
    _mm256_setzero_ps,
    _mm256_set1_ps,
    _mm256_mul_ps,
    _mm256_fmadd_ps,
    _mm256_loadu_ps,
    _mm256_storeu_ps,
    super::masked_load_8,
    _mm256_maskstore_ps,
    super::first_8,
    super::total_8
);

/// The mask of the first `n` floats, of 1 to 16.
#[inline(always)]
fn first_16(n: usize) -> u16 {
    u16::MAX >> (16 - n)
}

/// The mask of the first `n` floats, of 1 to 8.
#[inline]
#[target_feature(enable = "avx2")]
fn first_8(n: usize) -> __m256i {
    let index = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
    _mm256_cmpgt_epi32(_mm256_set1_epi32(n as i32), index)
}

/// The arguments in AVX-512's order.
///
/// # Safety
/// Floats in the mask can be read.
#[inline]
#[target_feature(enable = "avx2")]
unsafe fn masked_load_8(mask: __m256i, at: *const f32) -> __m256 {
    // SAFETY: passed on to the caller.
    unsafe { _mm256_maskload_ps(at, mask) }
}

/// The sum of the floats.
#[inline]
#[target_feature(enable = "avx2")]
fn total_8(x: __m256) -> f32 {
    let half = _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps::<1>(x));
    let pair = _mm_add_ps(half, _mm_movehl_ps(half, half));
    _mm_cvtss_f32(_mm_add_ss(pair, _mm_movehdup_ps(pair)))
}
