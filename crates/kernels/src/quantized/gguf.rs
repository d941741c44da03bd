//! Rows of GGUF's block types as they lie in the file, and what their codes stand for.
//!
//! A quantised row is a sequence of blocks; a block holds its scales (f16 `d`, minimum `m`) and
//! packed codes `q`. The 32-element types are `x = d·q (+ m)`; the K types pack 256 elements with
//! sub-scales of their own: `x = (d·sc)·q − (dmin·m)`. Layouts: `ggml-common.h` in llama.cpp.
//! Every operation is done in f32 in the order of the reference, so results agree to the bit, on
//! every instruction set.

use rayon::prelude::*;

#[cfg(target_arch = "x86_64")]
use crate::cpu::simd::code;
use crate::cpu::simd::{Level, level, simd_fn};
use crate::quantized::formats::{QuantError, count, expect};

/// Elements in a block of the 32-element types.
const SMALL: usize = 32;
/// Elements in a block of the K types.
const LARGE: usize = 256;
/// Elements that a task dequantises.
const CHUNK: usize = 1 << 14;

/// A block type of GGUF.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum GgufKind {
    /// Four bits and a scale.
    Q4_0,
    /// Four bits, a scale and a minimum.
    Q4_1,
    /// Five bits and a scale.
    Q5_0,
    /// Five bits, a scale and a minimum.
    Q5_1,
    /// Eight bits and a scale.
    Q8_0,
    /// Four bits, scales and minima of six.
    Q4K,
    /// Five bits, scales and minima of six.
    Q5K,
    /// Six bits, scales of eight.
    Q6K,
}

impl GgufKind {
    /// All of them.
    pub const ALL: [Self; 8] = [
        Self::Q4_0,
        Self::Q4_1,
        Self::Q5_0,
        Self::Q5_1,
        Self::Q8_0,
        Self::Q4K,
        Self::Q5K,
        Self::Q6K,
    ];

    /// ggml's name.
    pub fn name(self) -> &'static str {
        match self {
            Self::Q4_0 => "Q4_0",
            Self::Q4_1 => "Q4_1",
            Self::Q5_0 => "Q5_0",
            Self::Q5_1 => "Q5_1",
            Self::Q8_0 => "Q8_0",
            Self::Q4K => "Q4_K",
            Self::Q5K => "Q5_K",
            Self::Q6K => "Q6_K",
        }
    }

    /// Elements in a block.
    pub fn elements(self) -> usize {
        match self {
            Self::Q4_0 | Self::Q4_1 | Self::Q5_0 | Self::Q5_1 | Self::Q8_0 => SMALL,
            Self::Q4K | Self::Q5K | Self::Q6K => LARGE,
        }
    }

    /// Bytes in a block.
    pub fn bytes(self) -> usize {
        match self {
            Self::Q4_0 => 2 + 16,
            Self::Q4_1 => 2 + 2 + 16,
            Self::Q5_0 => 2 + 4 + 16,
            Self::Q5_1 => 2 + 2 + 4 + 16,
            Self::Q8_0 => 2 + 32,
            Self::Q4K => 2 + 2 + 12 + 128,
            Self::Q5K => 2 + 2 + 12 + 32 + 128,
            Self::Q6K => 128 + 64 + 16 + 2,
        }
    }

    /// The elements of whole blocks, on all threads; a last incomplete block is left out.
    pub fn dequantise(self, bytes: &[u8]) -> Vec<f32> {
        let (one, blocks) = (self.elements(), bytes.len() / self.bytes());
        let together = CHUNK / one;
        let mut out = vec![0.0f32; blocks * one];
        let level = level();
        out.par_chunks_mut(together * one)
            .zip(bytes.par_chunks(together * self.bytes()))
            .for_each(|(out, bytes)| whole(level, self, bytes, out));
        out
    }
}

/// A matrix of one of GGUF's block types, row-major; a row is whole blocks.
#[derive(Clone, Debug, PartialEq)]
pub struct GgufRows {
    kind: GgufKind,
    shape: [usize; 2],
    bytes: Vec<u8>,
}

impl GgufRows {
    /// Wraps the file's bytes of a matrix `[rows, columns]`. Fails where a row is not whole blocks or the bytes are
    /// not as many as the shape says.
    pub fn new(kind: GgufKind, shape: [usize; 2], bytes: Vec<u8>) -> Result<Self, QuantError> {
        let [rows, columns] = shape;
        let one = kind.elements();
        expect(
            "values of a row's whole blocks",
            &shape,
            columns,
            columns / one * one,
        )?;
        let size = count(&[rows, columns / one, kind.bytes()])?;
        expect("bytes of blocks", &shape, size, bytes.len())?;
        Ok(Self { kind, shape, bytes })
    }

    /// The type of its blocks.
    pub fn kind(&self) -> GgufKind {
        self.kind
    }

    /// Rows and columns.
    pub fn shape(&self) -> [usize; 2] {
        self.shape
    }

    /// The blocks, as they lie in the file.
    pub fn data(&self) -> &[u8] {
        &self.bytes
    }

    /// Bytes in memory.
    pub fn bytes(&self) -> usize {
        self.bytes.len()
    }

    /// Values of a row from column `from` on; they must be there.
    pub(crate) fn read(&self, level: Level, row: usize, from: usize, mut to: &mut [f32]) {
        let (one, size) = (self.kind.elements(), self.kind.bytes());
        let row_bytes = self.shape[1] / one * size;
        let bytes = &self.bytes[row * row_bytes..][..row_bytes];
        let (mut block, skip) = (from / one, from % one);
        let part = |block: usize, skip: usize, to: &mut [f32]| {
            let mut all = [0.0; LARGE];
            let all = &mut all[..one];
            whole(level, self.kind, &bytes[block * size..][..size], all);
            to.copy_from_slice(&all[skip..skip + to.len()]);
        };
        if skip > 0 {
            let (first, rest) = to.split_at_mut((one - skip).min(to.len()));
            part(block, skip, first);
            (block, to) = (block + 1, rest);
        }
        let blocks = to.len() / one;
        let (middle, last) = to.split_at_mut(blocks * one);
        whole(
            level,
            self.kind,
            &bytes[block * size..][..blocks * size],
            middle,
        );
        if !last.is_empty() {
            part(block + blocks, 0, last);
        }
    }
}

simd_fn! {
    /// Whole blocks: as many as both slices have.
    fn whole<L>(kind: GgufKind, bytes: &[u8], out: &mut [f32]) {
        #[cfg(target_arch = "x86_64")]
        if L == code::AVX512 {
            match kind {
                // SAFETY: this code runs only where a `Level` vouches for AVX-512.
                GgufKind::Q4_0 => {
                    return each(bytes, out, |block, out| unsafe { x86::q4_0(block, out) });
                }
                // SAFETY: as above.
                GgufKind::Q4_1 => {
                    return each(bytes, out, |block, out| unsafe { x86::q4_1(block, out) });
                }
                // SAFETY: as above.
                GgufKind::Q4K => {
                    return each(bytes, out, |block, out| unsafe { x86::q4_k(block, out) });
                }
                _ => {}
            }
        }
        match kind {
            GgufKind::Q4_0 => each(bytes, out, q4_0),
            GgufKind::Q4_1 => each(bytes, out, q4_1),
            GgufKind::Q5_0 => each(bytes, out, q5_0),
            GgufKind::Q5_1 => each(bytes, out, q5_1),
            GgufKind::Q8_0 => each(bytes, out, q8_0),
            GgufKind::Q4K => each(bytes, out, q4_k),
            GgufKind::Q5K => each(bytes, out, q5_k),
            GgufKind::Q6K => each(bytes, out, q6_k),
        }
    }
}

/// Applies `one` to every block of `BYTES` bytes and `N` elements.
#[inline(always)]
fn each<const BYTES: usize, const N: usize>(
    bytes: &[u8],
    out: &mut [f32],
    one: impl Fn(&[u8; BYTES], &mut [f32; N]),
) {
    let (blocks, _) = bytes.as_chunks::<BYTES>();
    let (out, _) = out.as_chunks_mut::<N>();
    for (block, out) in blocks.iter().zip(out) {
        one(block, out);
    }
}

/// A half-precision number of a block. Moved into an f32 its exponent is 112 too low, numbers below the normal
/// ones included.
#[inline(always)]
fn half_at(block: &[u8], at: usize) -> f32 {
    let bits = u32::from(u16::from_le_bytes([block[at], block[at + 1]]));
    let sign = (bits & 0x8000) << 16;
    if bits & 0x7C00 == 0x7C00 {
        return f32::from_bits(sign | 0x7F80_0000 | (bits & 0x3FF) << 13);
    }
    const UP: f32 = f32::from_bits((127 + 112) << 23);
    let magnitude = f32::from_bits((bits & 0x7FFF) << 13) * UP;
    f32::from_bits(sign | magnitude.to_bits())
}

/// The fifth bits of the 32 codes of a Q5_0 or Q5_1 block.
#[inline(always)]
fn high_bits(block: &[u8], at: usize) -> u32 {
    u32::from_le_bytes([block[at], block[at + 1], block[at + 2], block[at + 3]])
}

/// Nibbles: the low ones are elements 0 to 15, the high ones 16 to 31; a loop for each vectorises.
#[inline(always)]
fn q4_0(block: &[u8; 18], out: &mut [f32; SMALL]) {
    let d = half_at(block, 0);
    let (low, high) = out.split_at_mut(16);
    for (out, &q) in low.iter_mut().zip(&block[2..]) {
        *out = d * f32::from((q & 0x0F) as i8 - 8);
    }
    for (out, &q) in high.iter_mut().zip(&block[2..]) {
        *out = d * f32::from((q >> 4) as i8 - 8);
    }
}

#[inline(always)]
fn q4_1(block: &[u8; 20], out: &mut [f32; SMALL]) {
    let (d, m) = (half_at(block, 0), half_at(block, 2));
    let (low, high) = out.split_at_mut(16);
    for (out, &q) in low.iter_mut().zip(&block[4..]) {
        *out = d * f32::from(q & 0x0F) + m;
    }
    for (out, &q) in high.iter_mut().zip(&block[4..]) {
        *out = d * f32::from(q >> 4) + m;
    }
}

#[inline(always)]
fn q5_0(block: &[u8; 22], out: &mut [f32; SMALL]) {
    let d = half_at(block, 0);
    let high = high_bits(block, 2);
    for (i, &q) in block[6..].iter().enumerate() {
        let low = (q & 0x0F) | fifth_bit(high, i);
        let upper = (q >> 4) | fifth_bit(high, i + 16);
        out[i] = d * f32::from(low as i8 - 16);
        out[i + 16] = d * f32::from(upper as i8 - 16);
    }
}

#[inline(always)]
fn q5_1(block: &[u8; 24], out: &mut [f32; SMALL]) {
    let (d, m) = (half_at(block, 0), half_at(block, 2));
    let high = high_bits(block, 4);
    for (i, &q) in block[8..].iter().enumerate() {
        out[i] = d * f32::from((q & 0x0F) | fifth_bit(high, i)) + m;
        out[i + 16] = d * f32::from((q >> 4) | fifth_bit(high, i + 16)) + m;
    }
}

#[inline(always)]
fn fifth_bit(high: u32, i: usize) -> u8 {
    ((high >> i & 1) << 4) as u8
}

#[inline(always)]
fn q8_0(block: &[u8; 34], out: &mut [f32; SMALL]) {
    let d = half_at(block, 0);
    for (out, &q) in out.iter_mut().zip(&block[2..]) {
        *out = f32::from(q as i8) * d;
    }
}

/// The eight six-bit scales and minima of a Q4_K or Q5_K block: numbers 0 to 3 in the low six bits
/// of bytes 0 to 7; numbers 4 to 7 as nibbles of bytes 8 to 11 with the top bits of bytes 0 to 7.
#[inline(always)]
fn scale_and_min(packed: &[u8], group: usize) -> (u8, u8) {
    if group < 4 {
        (packed[group] & 0x3F, packed[group + 4] & 0x3F)
    } else {
        let nibbles = packed[group + 4];
        (
            (nibbles & 0x0F) | (packed[group - 4] >> 2 & 0x30),
            (nibbles >> 4) | (packed[group] >> 2 & 0x30),
        )
    }
}

/// Eight groups of 32; groups 2k and 2k+1 are the low and high nibbles of the same 32 bytes.
#[inline(always)]
fn q4_k(block: &[u8; 144], out: &mut [f32; LARGE]) {
    let (d, dmin) = (half_at(block, 0), half_at(block, 2));
    let (scales, codes) = block[4..].split_at(12);
    for (group, out) in out.as_chunks_mut::<32>().0.iter_mut().enumerate() {
        let (scale, min) = scale_and_min(scales, group);
        let (scale, min) = (d * f32::from(scale), dmin * f32::from(min));
        let shift = 4 * (group % 2);
        for (out, &q) in out.iter_mut().zip(&codes[group / 2 * 32..]) {
            *out = scale * f32::from(q >> shift & 0x0F) - min;
        }
    }
}

/// As Q4_K, with bit `group` of 32 more bytes as the fifth bit.
#[inline(always)]
fn q5_k(block: &[u8; 176], out: &mut [f32; LARGE]) {
    let (d, dmin) = (half_at(block, 0), half_at(block, 2));
    let (scales, rest) = block[4..].split_at(12);
    let (high, codes) = rest.split_at(32);
    for (group, out) in out.as_chunks_mut::<32>().0.iter_mut().enumerate() {
        let (scale, min) = scale_and_min(scales, group);
        let (scale, min) = (d * f32::from(scale), dmin * f32::from(min));
        let shift = 4 * (group % 2);
        let codes = &codes[group / 2 * 32..];
        for ((out, &q), &h) in out.iter_mut().zip(codes).zip(high) {
            let q = (q >> shift & 0x0F) | (h >> group & 1) << 4;
            *out = scale * f32::from(q) - min;
        }
    }
}

/// Two halves of 128 elements, each of four groups of 32 that share 64 bytes of low nibbles and 32
/// bytes of two-bit tops; a signed scale for every 16 elements.
#[inline(always)]
fn q6_k(block: &[u8; 210], out: &mut [f32; LARGE]) {
    let (low, rest) = block.split_at(128);
    let (high, rest) = rest.split_at(64);
    let (scales, d) = rest.split_at(16);
    let d = half_at(d, 0);
    for (group, out) in out.as_chunks_mut::<32>().0.iter_mut().enumerate() {
        let (half, part) = (group / 4, group % 4);
        let low = &low[half * 64 + part % 2 * 32..];
        let high = &high[half * 32..];
        let (low_shift, high_shift) = (part / 2 * 4, part * 2);
        for (i, ((out, &l), &h)) in out.iter_mut().zip(low).zip(high).enumerate() {
            let q = (l >> low_shift & 0x0F) | (h >> high_shift & 3) << 4;
            let scale = d * f32::from(scales[group * 2 + i / 16] as i8);
            *out = scale * f32::from(q as i8 - 32);
        }
    }
}

/// Blocks of four bits: the sixteen numbers that a block has fill a register, and its codes choose among them.
#[cfg(target_arch = "x86_64")]
mod x86 {
    use std::arch::x86_64::*;

    use super::{LARGE, SMALL, half_at, scale_and_min};

    #[inline]
    #[target_feature(enable = "avx512f,avx512vl,avx512bw")]
    pub(super) fn q4_0(block: &[u8; 18], out: &mut [f32; SMALL]) {
        let eight = _mm512_set1_ps(8.0);
        let numbers = _mm512_sub_ps(counted(), eight);
        let numbers = _mm512_mul_ps(_mm512_set1_ps(half_at(block, 0)), numbers);
        let [_, _, codes @ ..] = block;
        both(numbers, codes, out);
    }

    #[inline]
    #[target_feature(enable = "avx512f,avx512vl,avx512bw")]
    pub(super) fn q4_1(block: &[u8; 20], out: &mut [f32; SMALL]) {
        let (d, m) = (half_at(block, 0), half_at(block, 2));
        let scaled = _mm512_mul_ps(_mm512_set1_ps(d), counted());
        let numbers = _mm512_add_ps(scaled, _mm512_set1_ps(m));
        let [_, _, _, _, codes @ ..] = block;
        both(numbers, codes, out);
    }

    #[inline]
    #[target_feature(enable = "avx512f,avx512vl,avx512bw")]
    pub(super) fn q4_k(block: &[u8; 144], out: &mut [f32; LARGE]) {
        let (d, dmin) = (half_at(block, 0), half_at(block, 2));
        let (scales, codes) = block[4..].split_at(12);
        let (codes, _) = codes.as_chunks::<16>();
        let (out, _) = out.as_chunks_mut::<16>();
        for group in 0..8 {
            let (scale, min) = scale_and_min(scales, group);
            let (scale, min) = (d * f32::from(scale), dmin * f32::from(min));
            let scaled = _mm512_mul_ps(_mm512_set1_ps(scale), counted());
            let numbers = _mm512_sub_ps(scaled, _mm512_set1_ps(min));
            for half in 0..2 {
                let mut codes = widened(&codes[group / 2 * 2 + half]);
                if group % 2 == 1 {
                    codes = _mm512_srli_epi32::<4>(codes);
                }
                choose(numbers, codes, &mut out[group * 2 + half]);
            }
        }
    }

    /// 0 to 15.
    #[inline]
    #[target_feature(enable = "avx512f,avx512vl,avx512bw")]
    fn counted() -> __m512 {
        _mm512_setr_ps(
            0.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0, 9.0, 10.0, 11.0, 12.0, 13.0, 14.0, 15.0,
        )
    }

    /// What the low nibbles choose, and behind it what the high ones do.
    #[inline]
    #[target_feature(enable = "avx512f,avx512vl,avx512bw")]
    fn both(numbers: __m512, codes: &[u8; 16], out: &mut [f32; SMALL]) {
        let codes = widened(codes);
        let (out, _) = out.as_chunks_mut::<16>();
        choose(numbers, codes, &mut out[0]);
        choose(numbers, _mm512_srli_epi32::<4>(codes), &mut out[1]);
    }

    #[inline]
    #[target_feature(enable = "avx512f,avx512vl,avx512bw")]
    fn widened(codes: &[u8; 16]) -> __m512i {
        // SAFETY: sixteen bytes.
        _mm512_cvtepu8_epi32(unsafe { _mm_loadu_si128(codes.as_ptr().cast()) })
    }

    /// A permutation looks at the low four bits of an index alone.
    #[inline]
    #[target_feature(enable = "avx512f,avx512vl,avx512bw")]
    fn choose(numbers: __m512, codes: __m512i, out: &mut [f32; 16]) {
        let values = _mm512_permutexvar_ps(codes, numbers);
        // SAFETY: sixteen places.
        unsafe { _mm512_storeu_ps(out.as_mut_ptr(), values) };
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use half::f16;

    use super::*;
    use crate::check::draws;

    #[test]
    fn every_half_precision_number_widens_to_its_value() {
        for bits in 0..=u16::MAX {
            let (got, want) = (
                half_at(&bits.to_le_bytes(), 0),
                f16::from_bits(bits).to_f32(),
            );
            assert!(got.to_bits() == want.to_bits() || (got.is_nan() && want.is_nan()));
        }
    }

    /// Blocks of random bytes: any bytes are a block.
    fn rows(kind: GgufKind, shape: [usize; 2]) -> GgufRows {
        let count = shape[0] * shape[1] / kind.elements() * kind.bytes();
        let bytes = draws(7).map(|x| (x >> 40) as u8).take(count).collect();
        GgufRows::new(kind, shape, bytes).unwrap()
    }

    #[test]
    fn any_stretch_of_a_row_has_the_bits_of_all_values_on_every_level() {
        let bits = |x: &[f32]| -> Vec<u32> {
            let bits = |x: &f32| if x.is_nan() { u32::MAX } else { x.to_bits() };
            x.iter().map(bits).collect()
        };
        for kind in GgufKind::ALL {
            let [height, width] = [5, 1024];
            let rows = rows(kind, [height, width]);
            let mut all = vec![0.0; height * width];
            let portable = Level::available().pop().unwrap();
            whole(portable, kind, rows.data(), &mut all);
            assert_eq!(bits(&kind.dequantise(rows.data())), bits(&all), "{kind:?}");
            for level in Level::available() {
                let mut draws = draws(11).map(|x| (x >> 33) as usize);
                let mut draw = |below: usize| draws.next().unwrap() % below;
                for _ in 0..200 {
                    let (row, from) = (draw(height), draw(width));
                    let mut got = vec![f32::NAN; draw(width - from + 1)];
                    rows.read(level, row, from, &mut got);
                    let want = &all[row * width + from..][..got.len()];
                    assert_eq!(bits(&got), bits(want), "{kind:?} {level:?} {row} {from}");
                }
            }
        }
    }

    #[test]
    fn bytes_that_do_not_fit_the_shape_are_refused() {
        for kind in GgufKind::ALL {
            let (one, size) = (kind.elements(), kind.bytes());
            assert!(GgufRows::new(kind, [2, one], vec![0; 2 * size]).is_ok());
            assert!(GgufRows::new(kind, [2, one], vec![0; 2 * size - 1]).is_err());
            assert!(GgufRows::new(kind, [2, one + 1], vec![0; 2 * size]).is_err());
            assert!(GgufRows::new(kind, [usize::MAX, one], vec![0; size]).is_err() || size == 0);
        }
    }
}
