//! Dot products of f32 with bf16 in AVX-512 and AVX2.

use std::arch::x86_64::*;

use half::bf16;

/// Sixteen bf16, widened.
#[inline]
#[target_feature(enable = "avx512f")]
fn widened(x: __m256i) -> __m512 {
    _mm512_castsi512_ps(_mm512_slli_epi32::<16>(_mm512_cvtepu16_epi32(x)))
}

/// Both slices have the same length.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl")]
pub(super) fn dot_avx512(a: &[f32], b: &[bf16]) -> f32 {
    let n = a.len().min(b.len());
    let (a, b) = (a.as_ptr(), b.as_ptr().cast::<i16>());
    let mut sums = [_mm512_setzero_ps(); 4];
    let mut i = 0;
    // SAFETY: every load lies below `n`; masked lanes are not read.
    unsafe {
        while i + 64 <= n {
            for (j, sum) in sums.iter_mut().enumerate() {
                let y = widened(_mm256_loadu_si256(b.add(i + 16 * j).cast()));
                *sum = _mm512_fmadd_ps(_mm512_loadu_ps(a.add(i + 16 * j)), y, *sum);
            }
            i += 64;
        }
        while i < n {
            let mask = if n - i >= 16 {
                !0
            } else {
                (1u16 << (n - i)) - 1
            };
            let x = _mm512_maskz_loadu_ps(mask, a.add(i));
            let y = widened(_mm256_maskz_loadu_epi16(mask, b.add(i)));
            sums[0] = _mm512_fmadd_ps(x, y, sums[0]);
            i += 16;
        }
    }
    let sum = _mm512_add_ps(
        _mm512_add_ps(sums[0], sums[1]),
        _mm512_add_ps(sums[2], sums[3]),
    );
    _mm512_reduce_add_ps(sum)
}

/// Both slices have the same length.
#[inline]
#[target_feature(enable = "avx2,fma")]
pub(super) fn dot_avx2(a: &[f32], b: &[bf16]) -> f32 {
    let n = a.len().min(b.len());
    let (xs, ys) = (a.as_ptr(), b.as_ptr().cast::<i16>());
    let mut sums = [_mm256_setzero_ps(); 4];
    let mut i = 0;
    // SAFETY: every load lies below `n`.
    unsafe {
        while i + 32 <= n {
            for (j, sum) in sums.iter_mut().enumerate() {
                let y = _mm256_cvtepu16_epi32(_mm_loadu_si128(ys.add(i + 8 * j).cast()));
                let y = _mm256_castsi256_ps(_mm256_slli_epi32::<16>(y));
                *sum = _mm256_fmadd_ps(_mm256_loadu_ps(xs.add(i + 8 * j)), y, *sum);
            }
            i += 32;
        }
    }
    let mut tail = 0.0f32;
    for j in i..n {
        tail = a[j].mul_add(b[j].to_f32(), tail);
    }
    let sum = _mm256_add_ps(
        _mm256_add_ps(sums[0], sums[1]),
        _mm256_add_ps(sums[2], sums[3]),
    );
    let half = _mm_add_ps(_mm256_castps256_ps128(sum), _mm256_extractf128_ps::<1>(sum));
    let pair = _mm_add_ps(half, _mm_movehl_ps(half, half));
    _mm_cvtss_f32(_mm_add_ss(pair, _mm_movehdup_ps(pair))) + tail
}
