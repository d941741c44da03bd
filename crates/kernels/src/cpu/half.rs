//! bf16 weights read as they lie, for products of few rows. A bf16 is the upper half of an f32, so that
//! widening is a shift and exact.

use burn::backend::flex::FlexTensor;
use burn::tensor::DType;
use half::bf16;

use super::matrix::readable;
use super::simd::{code, dot_lanes, simd_fn};
use super::storage::dense;

/// The f32 of which a bf16 is the upper half.
#[inline(always)]
fn wide(x: bf16) -> f32 {
    f32::from_bits(u32::from(x.to_bits()) << 16)
}

simd_fn! {
    /// All of `from`, widened.
    pub(super) fn widen<L>(from: &[bf16], to: &mut [f32]) {
        for (to, x) in to.iter_mut().zip(from) {
            *to = wide(*x);
        }
    }
}

/// The weight as [`Weight::of`](super::gemm::Weight::of) reads it, in the type that it is held in.
pub(crate) fn held(w: FlexTensor) -> FlexTensor {
    match w.dtype() {
        DType::BF16 => dense(w),
        _ => readable(w),
    }
}

/// `Σ a·b`, in the order of [`super::simd::dot`]: the same bits as that of the widened b.
#[inline(always)]
pub(super) fn dot<const L: u8>(a: &[f32], b: &[bf16]) -> f32 {
    let n = a.len().min(b.len());
    let (a, b) = (&a[..n], &b[..n]);
    #[cfg(target_arch = "x86_64")]
    {
        if L == code::AVX512 {
            // SAFETY: this code runs only where a `Level` vouches for AVX-512.
            return unsafe { x86::dot_avx512(a, b) };
        }
        if L == code::AVX2 {
            // SAFETY: this code runs only where a `Level` vouches for AVX2 and FMA.
            return unsafe { x86::dot_avx2(a, b) };
        }
    }
    dot_lanes::<L, _>(a, b, wide)
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    use std::arch::x86_64::*;

    use half::bf16;

    use super::super::simd::x86::{first, total};

    /// Both slices have the same length.
    #[inline]
    #[target_feature(enable = "avx512f,avx512vl,avx512bw")]
    pub(super) fn dot_avx512(a: &[f32], b: &[bf16]) -> f32 {
        let (n, a, b) = (a.len(), a.as_ptr(), b.as_ptr().cast::<i16>());
        let wide = |x| _mm512_castsi512_ps(_mm512_slli_epi32::<16>(_mm512_cvtepu16_epi32(x)));
        let (mut s0, mut s1) = (_mm512_setzero_ps(), _mm512_setzero_ps());
        let mut i = 0;
        // SAFETY: every load lies below `n`; masked lanes are not read.
        unsafe {
            while i + 32 <= n {
                let y = wide(_mm256_loadu_si256(b.add(i).cast()));
                s0 = _mm512_fmadd_ps(_mm512_loadu_ps(a.add(i)), y, s0);
                let y = wide(_mm256_loadu_si256(b.add(i + 16).cast()));
                s1 = _mm512_fmadd_ps(_mm512_loadu_ps(a.add(i + 16)), y, s1);
                i += 32;
            }
            while i < n {
                let mask = first(n - i);
                let x = _mm512_maskz_loadu_ps(mask, a.add(i));
                let y = wide(_mm256_maskz_loadu_epi16(mask, b.add(i)));
                s0 = _mm512_fmadd_ps(x, y, s0);
                i += 16;
            }
        }
        _mm512_reduce_add_ps(_mm512_add_ps(s0, s1))
    }

    /// Both slices have the same length.
    #[inline]
    #[target_feature(enable = "avx2,fma")]
    pub(super) fn dot_avx2(a: &[f32], b: &[bf16]) -> f32 {
        let (n, a, b) = (a.len(), a.as_ptr(), b.as_ptr());
        let wide = |x| _mm256_castsi256_ps(_mm256_slli_epi32::<16>(_mm256_cvtepu16_epi32(x)));
        let mut sums = [_mm256_setzero_ps(); 4];
        let (mut i, mut tail) = (0, 0.0f32);
        // SAFETY: every load lies below `n`.
        unsafe {
            while i + 32 <= n {
                for (j, sum) in sums.iter_mut().enumerate() {
                    let x = _mm256_loadu_ps(a.add(i + 8 * j));
                    let y = wide(_mm_loadu_si128(b.add(i + 8 * j).cast()));
                    *sum = _mm256_fmadd_ps(x, y, *sum);
                }
                i += 32;
            }
            while i < n {
                tail = (*a.add(i)).mul_add(super::wide(*b.add(i)), tail);
                i += 1;
            }
        }
        total(sums) + tail
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::super::simd::{self, Level};
    use super::*;
    use crate::check::noise;

    simd_fn! {
        fn both<L>(a: &[f32], b: &[bf16], wide: &[f32]) -> [f32; 2] {
            [dot::<L>(a, b), simd::dot::<L>(a, wide)]
        }
    }

    /// At every remainder, with an infinity and NaN's among them too.
    #[test]
    fn a_dot_product_has_the_bits_of_that_of_the_widened_weights() {
        for n in (0..70).chain([576, 1531]) {
            let a = noise(1, n);
            let mut b: Vec<bf16> = noise(2, n).into_iter().map(bf16::from_f32).collect();
            for round in 0..3 {
                if let (Some(last), 1..) = (b.last_mut(), round) {
                    *last = [bf16::INFINITY, bf16::NAN][round - 1];
                }
                let wide: Vec<f32> = b.iter().map(|x| x.to_f32()).collect();
                for level in Level::available() {
                    let [got, want] = both(level, &a, &b, &wide);
                    assert!(
                        got.to_bits() == want.to_bits() || (got.is_nan() && want.is_nan()),
                        "{level:?} {n}: {got} {want}"
                    );
                }
            }
        }
    }

    #[test]
    fn every_bf16_widens_to_its_value() {
        for bits in 0..=u16::MAX {
            let x = bf16::from_bits(bits);
            let (got, want) = (wide(x), x.to_f32());
            assert!(got.to_bits() == want.to_bits() || (got.is_nan() && want.is_nan()));
        }
    }
}
