//! Tiles of a product in AVX-512 and AVX2.

/// A module with the tile function of one instruction set.
macro_rules! tiles {
    ($name:ident, $features:literal, $lanes:literal, $rows:literal, $narrow:literal, $zero:ident, $load:ident, $store:ident, $splat:ident, $fma:ident, $add:ident) => {
        pub(super) mod $name {
            use std::arch::x86_64::*;

            use super::super::tile::{Out, Run, store};
            #[allow(unused_imports)]
            use super::pairs_fma;

            /// # Safety
            /// As [`super::super::tile::TileFn`].
            #[target_feature(enable = $features)]
            pub(crate) unsafe fn tile(rows: usize, vectors: usize, runs: &[Run], out: Out) {
                // SAFETY: passed on to the caller.
                #[allow(unreachable_patterns)]
                unsafe {
                    match (rows, vectors) {
                        ($rows, 3) => body::<$rows, 3>(runs, out),
                        ($rows, 2) => body::<$rows, 2>(runs, out),
                        ($rows, 1) => body::<$rows, 1>(runs, out),
                        ($narrow, 1) => body::<$narrow, 1>(runs, out),
                        (4, 3) => body::<4, 3>(runs, out),
                        (4, 2) => body::<4, 2>(runs, out),
                        (4, 1) => body::<4, 1>(runs, out),
                        (2, 3) => body::<2, 3>(runs, out),
                        (2, 2) => body::<2, 2>(runs, out),
                        (2, 1) => body::<2, 1>(runs, out),
                        (1, 3) => body::<1, 3>(runs, out),
                        (1, 2) => body::<1, 2>(runs, out),
                        (1, 1) => body::<1, 1>(runs, out),
                        _ => unreachable!("no tile of {rows} by {vectors}"),
                    }
                }
            }

            #[inline]
            #[target_feature(enable = $features)]
            unsafe fn body<const M: usize, const N: usize>(runs: &[Run], out: Out) {
                let mut acc = [[$zero(); N]; M];
                // The destination is far away; it comes while the tile is computed.
                if out.transposed {
                    for j in 0..out.cols {
                        let at = out.at.wrapping_offset(j as isize * out.stride);
                        _mm_prefetch::<_MM_HINT_ET0>(at.cast());
                    }
                } else {
                    for i in 0..M {
                        let at = out.at.wrapping_offset(i as isize * out.stride);
                        for v in 0..N {
                            _mm_prefetch::<_MM_HINT_ET0>(at.wrapping_add(v * $lanes).cast());
                        }
                    }
                }
                for run in runs {
                    let (mut a, mut b) = (run.a, run.b);
                    for k in 0..run.len {
                        let ahead = (k & 7) as isize * run.ahead_row + (k >> 3 << 4) as isize;
                        _mm_prefetch::<_MM_HINT_T1>(run.ahead.wrapping_offset(ahead).cast());
                        let mut row = [$zero(); N];
                        // SAFETY: passed on to the caller.
                        unsafe {
                            for (v, row) in row.iter_mut().enumerate() {
                                *row = $load(b.add(v * $lanes));
                                let ahead = b.wrapping_offset(8 * run.b_step);
                                _mm_prefetch::<_MM_HINT_T0>(ahead.wrapping_add(v * $lanes).cast());
                            }
                            for i in 0..M {
                                let x = $splat(*a.offset(i as isize * run.a_row));
                                for v in 0..N {
                                    acc[i][v] = $fma(x, row[v], acc[i][v]);
                                }
                            }
                        }
                        a = a.wrapping_offset(run.a_step);
                        b = b.wrapping_offset(run.b_step);
                    }
                }
                // SAFETY: passed on to the caller; a spilt tile is as large as the tile.
                unsafe {
                    if !out.transposed && out.cols == N * $lanes {
                        for (i, acc) in acc.iter().enumerate() {
                            let at = out.at.offset(i as isize * out.stride);
                            for (v, acc) in acc.iter().enumerate() {
                                let at = at.add(v * $lanes);
                                let old = if out.add { $load(at) } else { $zero() };
                                $store(at, $add(*acc, old));
                            }
                        }
                        return;
                    }
                    let mut spilt = [[0.0f32; $lanes]; 24];
                    for i in 0..M {
                        for v in 0..N {
                            $store(spilt[i * N + v].as_mut_ptr(), acc[i][v]);
                        }
                    }
                    let spilt = spilt.as_ptr().cast::<f32>();
                    if out.transposed && M % 8 == 0 {
                        for i in (0..M).step_by(8) {
                            let part = Out {
                                at: out.at.add(i),
                                ..out
                            };
                            super::store_columns(spilt.add(i * N * $lanes), N * $lanes, part);
                        }
                    } else {
                        store(spilt, M, N * $lanes, out);
                    }
                }
            }
        }
    };
}

tiles!(
    avx512,
    "avx512f,avx2,fma",
    16,
    8,
    16,
    _mm512_setzero_ps,
    _mm512_loadu_ps,
    _mm512_storeu_ps,
    _mm512_set1_ps,
    _mm512_fmadd_ps,
    _mm512_add_ps
);
tiles!(
    avx512bf16,
    "avx512f,avx512bf16,avx2,fma",
    16,
    8,
    16,
    _mm512_setzero_ps,
    _mm512_loadu_ps,
    _mm512_storeu_ps,
    _mm512_set1_ps,
    pairs_fma,
    _mm512_add_ps
);
tiles!(
    avx2,
    "avx2,fma",
    8,
    4,
    8,
    _mm256_setzero_ps,
    _mm256_loadu_ps,
    _mm256_storeu_ps,
    _mm256_set1_ps,
    _mm256_fmadd_ps,
    _mm256_add_ps
);

use std::arch::x86_64::*;

use super::tile::Out;

/// `c + a₀·b₀ + a₁·b₁` for pairs of bf16 in the place of floats.
#[inline]
#[target_feature(enable = "avx512f,avx512bf16")]
fn pairs_fma(a: __m512, b: __m512, c: __m512) -> __m512 {
    // SAFETY: the types differ in name only.
    let (a, b) = unsafe { std::mem::transmute::<(__m512, __m512), (__m512bh, __m512bh)>((a, b)) };
    _mm512_dpbf16_ps(c, a, b)
}

/// Eight vectors of eight, turned around.
#[inline]
#[target_feature(enable = "avx2")]
fn turned(r: [__m256; 8]) -> [__m256; 8] {
    let mut pairs = [_mm256_setzero_ps(); 8];
    for i in 0..4 {
        pairs[2 * i] = _mm256_unpacklo_ps(r[2 * i], r[2 * i + 1]);
        pairs[2 * i + 1] = _mm256_unpackhi_ps(r[2 * i], r[2 * i + 1]);
    }
    let mut fours = [_mm256_setzero_ps(); 8];
    for i in 0..2 {
        let p = [
            pairs[4 * i],
            pairs[4 * i + 1],
            pairs[4 * i + 2],
            pairs[4 * i + 3],
        ];
        fours[4 * i] = _mm256_shuffle_ps::<0x44>(p[0], p[2]);
        fours[4 * i + 1] = _mm256_shuffle_ps::<0xEE>(p[0], p[2]);
        fours[4 * i + 2] = _mm256_shuffle_ps::<0x44>(p[1], p[3]);
        fours[4 * i + 3] = _mm256_shuffle_ps::<0xEE>(p[1], p[3]);
    }
    let mut out = [_mm256_setzero_ps(); 8];
    for i in 0..4 {
        out[i] = _mm256_permute2f128_ps::<0x20>(fours[i], fours[i + 4]);
        out[i + 4] = _mm256_permute2f128_ps::<0x31>(fours[i], fours[i + 4]);
    }
    out
}

/// # Safety
/// As [`super::tile::TransposeFn`].
#[target_feature(enable = "avx2")]
pub(super) unsafe fn transpose(
    from: *const f32,
    from_stride: usize,
    to: *mut f32,
    to_stride: usize,
) {
    let mut rows = [_mm256_setzero_ps(); 8];
    for (i, row) in rows.iter_mut().enumerate() {
        // SAFETY: passed on to the caller.
        *row = unsafe { _mm256_loadu_ps(from.add(i * from_stride)) };
    }
    for (i, column) in turned(rows).into_iter().enumerate() {
        // SAFETY: passed on to the caller.
        unsafe { _mm256_storeu_ps(to.add(i * to_stride), column) };
    }
}

/// Writes a spilt tile of eight rows to eight columns.
///
/// # Safety
/// As [`super::tile::store`].
#[inline]
#[target_feature(enable = "avx2")]
pub(super) unsafe fn store_columns(tile: *const f32, width: usize, out: Out) {
    for from in (0..out.cols).step_by(8) {
        let mut rows = [_mm256_setzero_ps(); 8];
        for (i, row) in rows.iter_mut().enumerate() {
            // SAFETY: a tile's width is a multiple of eight.
            *row = unsafe { _mm256_loadu_ps(tile.add(i * width + from)) };
        }
        let count = (out.cols - from).min(8);
        for (j, column) in turned(rows).into_iter().take(count).enumerate() {
            // SAFETY: passed on to the caller.
            unsafe {
                let at = out.at.offset((from + j) as isize * out.stride);
                let old = if out.add {
                    _mm256_loadu_ps(at)
                } else {
                    _mm256_setzero_ps()
                };
                _mm256_storeu_ps(at, _mm256_add_ps(column, old));
            }
        }
    }
}
