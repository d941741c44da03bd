//! The readers of packed rows, for each instruction set. Their bits are those of the formats' definitions: the
//! number of a code times a scale, rounded.

#[cfg(target_arch = "x86_64")]
use crate::cpu::simd::code;
use crate::cpu::simd::simd_fn;
use crate::quantized::formats::{FloatKind, FourBitTensor, PER_STEP};

simd_fn! {
    /// Values of a 4-bit weight from `start` on, counted row-major, rounded to `dtype` and then to `compute`; they
    /// must be there. A block has sixteen numbers, which are multiplied and rounded once.
    pub(crate) fn four_bit<L>(
        tensor: &FourBitTensor,
        start: usize,
        dtype: FloatKind,
        compute: FloatKind,
        out: &mut [f32],
    ) {
        let (table, codes, size) = (tensor.kind().table(), tensor.codes(), tensor.block());
        let (mut block, mut at) = (start / size, start);
        let mut rest = out;
        while !rest.is_empty() {
            let length = rest.len().min((block + 1) * size - at);
            let (now, later) = rest.split_at_mut(length);
            let scale = tensor.absmax().scale(block);
            let mut numbers = [0.0; 16];
            for i in 0..16 {
                numbers[i] = table[i] * scale;
            }
            nearest(dtype, &mut numbers);
            if compute != dtype {
                nearest(compute, &mut numbers);
            }
            look_up::<L>(&numbers, codes, at, now);
            (rest, at, block) = (later, at + length, block + 1);
        }
    }
}

simd_fn! {
    /// 8-bit codes times their row's scale.
    pub(crate) fn int8<L>(codes: &[i8], scale: f32, out: &mut [f32]) {
        for (value, code) in out.iter_mut().zip(codes) {
            *value = f32::from(*code) * scale * PER_STEP;
        }
    }
}

simd_fn! {
    /// 8-bit codes as numbers.
    pub(crate) fn widen<L>(codes: &[i8], out: &mut [f32]) {
        for (value, code) in out.iter_mut().zip(codes) {
            *value = f32::from(*code);
        }
    }
}

simd_fn! {
    /// Rounds all values as [`FloatKind::round`] does.
    pub(crate) fn round<L>(kind: FloatKind, values: &mut [f32]) {
        nearest(kind, values);
    }
}

#[inline(always)]
fn nearest(kind: FloatKind, values: &mut [f32]) {
    match kind {
        FloatKind::F32 => {}
        FloatKind::Bf16 => values.iter_mut().for_each(|x| *x = nearest_bf16(*x)),
        FloatKind::F16 => values.iter_mut().for_each(|x| *x = nearest_f16(*x)),
    }
}

/// Without branches, so that it vectorises.
#[inline(always)]
fn nearest_bf16(x: f32) -> f32 {
    let bits = x.to_bits();
    let near = bits.wrapping_add(0x7FFF + (bits >> 16 & 1)) & 0xFFFF_0000;
    let nan = bits & 0xFFFF_0000 | 0x0040_0000;
    f32::from_bits(if x.is_nan() { nan } else { near })
}

/// The same for half precision, whose numbers below 2⁻¹⁴ are multiples of 2⁻²⁴: as those of f32 from a half on.
#[inline(always)]
fn nearest_f16(x: f32) -> f32 {
    /// Halfway from the largest number to the next there would be.
    const TOO_LARGE: f32 = 65520.0;
    const NORMAL: f32 = f32::from_bits((127 - 14) << 23);
    let (bits, size) = (x.to_bits(), x.abs());
    let normal = f32::from_bits(size.to_bits().wrapping_add(0xFFF + (bits >> 13 & 1)) & !0x1FFF);
    let near = if size < NORMAL {
        (size + 0.5) - 0.5
    } else {
        normal
    };
    let near = if size >= TOO_LARGE {
        f32::INFINITY
    } else {
        near
    };
    let nan = bits & !0x1FFF | 0x0040_0000;
    let near = near.to_bits() | bits & 0x8000_0000;
    f32::from_bits(if x.is_nan() { nan } else { near })
}

/// What the codes from place `at` on stand for; the even place is in the high half of a byte.
#[inline(always)]
fn look_up<const L: u8>(numbers: &[f32; 16], codes: &[u8], at: usize, out: &mut [f32]) {
    let (odd, out) = out.split_at_mut(at % 2);
    if let Some(value) = odd.first_mut() {
        *value = numbers[usize::from(codes[at / 2] & 15)];
    }
    let codes = &codes[at.div_ceil(2)..];
    let whole = out.len() / 2;
    let (out, last) = out.split_at_mut(2 * whole);
    if let Some(value) = last.first_mut() {
        *value = numbers[usize::from(codes[whole] >> 4)];
    }
    pairs::<L>(numbers, &codes[..whole], out);
}

/// Whole bytes; `out` has two places for each.
#[inline(always)]
fn pairs<const L: u8>(numbers: &[f32; 16], codes: &[u8], out: &mut [f32]) {
    #[cfg(target_arch = "x86_64")]
    {
        if L == code::AVX512 {
            // SAFETY: this code runs only where a `Level` vouches for AVX-512.
            return unsafe { x86::pairs_avx512(numbers, codes, out) };
        }
        if L == code::AVX2 {
            // SAFETY: this code runs only where a `Level` vouches for AVX2.
            return unsafe { x86::pairs_avx2(numbers, codes, out) };
        }
    }
    one_by_one(numbers, codes, out);
}

#[inline(always)]
fn one_by_one(numbers: &[f32; 16], codes: &[u8], out: &mut [f32]) {
    for (byte, to) in codes.iter().zip(out.as_chunks_mut::<2>().0) {
        *to = [
            numbers[usize::from(byte >> 4)],
            numbers[usize::from(byte & 15)],
        ];
    }
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    use std::arch::x86_64::*;

    use super::one_by_one;

    /// A byte widened to 64 bits holds its second code in the low bits; a copy shifted into the upper half, and
    /// the first code in the lower, are two indices. Permutations look at their low bits alone.
    #[inline]
    #[target_feature(enable = "avx512f,avx512vl,avx512bw")]
    pub(super) fn pairs_avx512(numbers: &[f32; 16], codes: &[u8], out: &mut [f32]) {
        let n = codes.len().min(out.len() / 2);
        let mut i = 0;
        // SAFETY: eight codes are read and sixteen values written only while as many are left.
        unsafe {
            let table = _mm512_loadu_ps(numbers.as_ptr());
            while i + 8 <= n {
                let eight = _mm512_cvtepu8_epi64(_mm_loadl_epi64(codes.as_ptr().add(i).cast()));
                let (first, second) = (
                    _mm512_srli_epi64::<4>(eight),
                    _mm512_slli_epi64::<32>(eight),
                );
                let values = _mm512_permutexvar_ps(_mm512_or_si512(first, second), table);
                _mm512_storeu_ps(out.as_mut_ptr().add(2 * i), values);
                i += 8;
            }
        }
        one_by_one(numbers, &codes[i..n], &mut out[2 * i..2 * n]);
    }

    /// The same; the fourth bit of an index chooses between two halves of the table.
    #[inline]
    #[target_feature(enable = "avx2,fma")]
    pub(super) fn pairs_avx2(numbers: &[f32; 16], codes: &[u8], out: &mut [f32]) {
        let n = codes.len().min(out.len() / 2);
        let mut i = 0;
        // SAFETY: four codes are read and eight values written only while as many are left.
        unsafe {
            let low = _mm256_loadu_ps(numbers.as_ptr());
            let high = _mm256_loadu_ps(numbers.as_ptr().add(8));
            while i + 4 <= n {
                let four = codes.as_ptr().add(i).cast::<i32>().read_unaligned();
                let four = _mm256_cvtepu8_epi64(_mm_cvtsi32_si128(four));
                let (first, second) = (_mm256_srli_epi64::<4>(four), _mm256_slli_epi64::<32>(four));
                let index = _mm256_or_si256(first, second);
                let upper = _mm256_castsi256_ps(_mm256_slli_epi32::<28>(index));
                let values = _mm256_blendv_ps(
                    _mm256_permutevar8x32_ps(low, index),
                    _mm256_permutevar8x32_ps(high, index),
                    upper,
                );
                _mm256_storeu_ps(out.as_mut_ptr().add(2 * i), values);
                i += 4;
            }
        }
        one_by_one(numbers, &codes[i..n], &mut out[2 * i..2 * n]);
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use crate::check::{draws, noise};
    use crate::cpu::simd::Level;
    use crate::quantized::formats::{FourBit, FourBitOptions, Int8Rows};

    const DTYPES: [FloatKind; 3] = [FloatKind::F32, FloatKind::Bf16, FloatKind::F16];

    fn bits(values: &[f32]) -> Vec<u32> {
        let bits = |x: &f32| if x.is_nan() { u32::MAX } else { x.to_bits() };
        values.iter().map(bits).collect()
    }

    /// Every 16-bit upper half with lower halves around ties of both formats.
    #[test]
    fn rounding_has_the_bits_of_the_definition_on_every_level() {
        let lower = [
            0, 1, 0x0FFF, 0x1000, 0x1001, 0x3000, 0x7FFF, 0x8000, 0x8001, 0xF000, 0xFFFF,
        ];
        let all = (0..=u16::MAX).flat_map(|upper| lower.map(|low| u32::from(upper) << 16 | low));
        let values: Vec<f32> = all.map(f32::from_bits).collect();
        for kind in DTYPES {
            let want: Vec<f32> = values.iter().map(|x| kind.round(*x)).collect();
            for level in Level::available() {
                let mut got = values.clone();
                round(level, kind, &mut got);
                assert!(bits(&got) == bits(&want), "{kind:?} {level:?}");
            }
        }
    }

    #[test]
    fn any_stretch_of_a_four_bit_weight_has_the_bits_of_the_definition_on_every_level() {
        for (kind, double, block) in [
            (FourBit::Nf4, false, 64),
            (FourBit::Nf4, true, 32),
            (FourBit::Fp4, true, 128),
            (FourBit::Fp4, false, 4096),
        ] {
            for dtype in DTYPES {
                let options = FourBitOptions {
                    kind,
                    block,
                    double,
                    dtype,
                };
                // Rows of 33 and an odd number of values: blocks end inside rows.
                let values: Vec<f32> = noise(5, 33 * 301).iter().map(|x| x * x * x * 0.1).collect();
                let tensor = FourBitTensor::quantise(&values, &[301, 33], options).unwrap();
                let mut draws = draws(9).map(|x| (x >> 33) as usize);
                let mut draw = |below: usize| draws.next().unwrap() % below;
                for _ in 0..60 {
                    let start = draw(values.len());
                    let most = [40, 400, usize::MAX][draw(3)].min(values.len() - start);
                    let mut want = vec![0.0; draw(most + 1)];
                    tensor.define(start, dtype, &mut want);
                    for compute in DTYPES {
                        let want: Vec<f32> = want.iter().map(|x| compute.round(*x)).collect();
                        for level in Level::available() {
                            let mut got = vec![f32::NAN; want.len()];
                            four_bit(level, &tensor, start, dtype, compute, &mut got);
                            assert_eq!(bits(&got), bits(&want), "{options:?} {level:?} {start}");
                        }
                    }
                }
            }
        }
    }

    #[test]
    fn eight_bit_rows_have_the_bits_of_the_definition_on_every_level() {
        let rows = Int8Rows::quantise(&noise(6, 7 * 201), [7, 201]).unwrap();
        for level in Level::available() {
            for from in 0..70 {
                let (row, scale) = (from % 7, rows.absmax()[from % 7]);
                let codes = &rows.codes()[row * 201..][from..201 - from];
                let want: Vec<f32> = codes
                    .iter()
                    .map(|c| f32::from(*c) * scale * PER_STEP)
                    .collect();
                let mut got = vec![f32::NAN; want.len()];
                rows.read(level, row, from, &mut got);
                assert_eq!(bits(&got), bits(&want), "{level:?} {from}");
            }
        }
    }
}
