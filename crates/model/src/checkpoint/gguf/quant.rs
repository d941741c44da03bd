//! GGUF's element types: block layouts and dequantisation to f32.
//!
//! A quantised row is a sequence of blocks; a block holds its scales (f16 `d`, minimum `m`) and
//! packed codes `q`. The 32-element types are `x = d·q (+ m)`; the K types pack 256 elements with
//! sub-scales of their own: `x = (d·sc)·q − (dmin·m)`. Layouts: `ggml-common.h` in llama.cpp.
//! Every operation is done in f32 in the order of the reference, so results agree to the bit.

use half::f16;
use rayon::prelude::*;

use crate::checkpoint::widen;

/// An element type that can be read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum BlockType {
    F32,
    F16,
    BF16,
    Q4_0,
    Q4_1,
    Q5_0,
    Q5_1,
    Q8_0,
    Q4K,
    Q5K,
    Q6K,
}

/// Elements in a block of the 32-element types.
const SMALL: usize = 32;
/// Elements in a block of the K types.
const LARGE: usize = 256;
/// Blocks a thread dequantises at once.
const CHUNK: usize = 512;

/// Names of ggml's types by code, for messages about those not read.
const TYPE_NAMES: [&str; 42] = [
    "F32",
    "F16",
    "Q4_0",
    "Q4_1",
    "Q4_2",
    "Q4_3",
    "Q5_0",
    "Q5_1",
    "Q8_0",
    "Q8_1",
    "Q2_K",
    "Q3_K",
    "Q4_K",
    "Q5_K",
    "Q6_K",
    "Q8_K",
    "IQ2_XXS",
    "IQ2_XS",
    "IQ3_XXS",
    "IQ1_S",
    "IQ4_NL",
    "IQ3_S",
    "IQ2_S",
    "IQ4_XS",
    "I8",
    "I16",
    "I32",
    "I64",
    "F64",
    "IQ1_M",
    "BF16",
    "Q4_0_4_4",
    "Q4_0_4_8",
    "Q4_0_8_8",
    "TQ1_0",
    "TQ2_0",
    "IQ4_NL_4_4",
    "IQ4_NL_4_8",
    "IQ4_NL_8_8",
    "MXFP4",
    "NVFP4",
    "Q1_0",
];

impl BlockType {
    /// All readable types, for messages.
    pub const NAMES: &str = "F32, F16, BF16, Q4_0, Q4_1, Q5_0, Q5_1, Q8_0, Q4_K, Q5_K and Q6_K";

    /// The types with ggml's codes.
    const CODES: [(u32, Self); 11] = [
        (0, Self::F32),
        (1, Self::F16),
        (2, Self::Q4_0),
        (3, Self::Q4_1),
        (6, Self::Q5_0),
        (7, Self::Q5_1),
        (8, Self::Q8_0),
        (12, Self::Q4K),
        (13, Self::Q5K),
        (14, Self::Q6K),
        (30, Self::BF16),
    ];

    /// The type with ggml's `code`, or else a name for the type that is not read.
    pub fn from_code(code: u32) -> Result<Self, String> {
        if let Some((_, block)) = Self::CODES.iter().find(|(own, _)| *own == code) {
            return Ok(*block);
        }
        let name = usize::try_from(code)
            .ok()
            .and_then(|code| TYPE_NAMES.get(code));
        Err(name.map_or_else(|| format!("number {code}"), |name| (*name).to_owned()))
    }

    /// ggml's code of the type.
    pub fn code(self) -> u32 {
        let own = Self::CODES.iter().find(|(_, block)| *block == self);
        own.map_or(0, |(code, _)| *code)
    }

    pub fn name(self) -> &'static str {
        match self {
            Self::F32 => "F32",
            Self::F16 => "F16",
            Self::BF16 => "BF16",
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
            Self::F32 | Self::F16 | Self::BF16 => 1,
            Self::Q4_0 | Self::Q4_1 | Self::Q5_0 | Self::Q5_1 | Self::Q8_0 => SMALL,
            Self::Q4K | Self::Q5K | Self::Q6K => LARGE,
        }
    }

    /// Bytes in a block.
    pub fn bytes(self) -> usize {
        match self {
            Self::F32 => 4,
            Self::F16 | Self::BF16 => 2,
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

    /// The elements of whole blocks; a last incomplete block (which the header check excludes)
    /// is left out.
    pub fn dequantise(self, bytes: &[u8]) -> Vec<f32> {
        match self {
            Self::F32 => widen::f32_le(bytes),
            Self::F16 => widen::f16_le(bytes),
            Self::BF16 => widen::bf16_le(bytes),
            Self::Q4_0 => blocks(bytes, q4_0),
            Self::Q4_1 => blocks(bytes, q4_1),
            Self::Q5_0 => blocks(bytes, q5_0),
            Self::Q5_1 => blocks(bytes, q5_1),
            Self::Q8_0 => blocks(bytes, q8_0),
            Self::Q4K => blocks(bytes, q4_k),
            Self::Q5K => blocks(bytes, q5_k),
            Self::Q6K => blocks(bytes, q6_k),
        }
    }
}

/// Applies `one` to every block of `BYTES` bytes and `N` elements, in parallel.
fn blocks<const BYTES: usize, const N: usize>(
    bytes: &[u8],
    one: fn(&[u8; BYTES], &mut [f32; N]),
) -> Vec<f32> {
    let (blocks, _) = bytes.as_chunks::<BYTES>();
    let mut out = vec![0.0f32; blocks.len() * N];
    out.par_chunks_mut(CHUNK * N)
        .zip(blocks.par_chunks(CHUNK))
        .for_each(|(out, blocks)| {
            let (out, _) = out.as_chunks_mut::<N>();
            for (block, out) in blocks.iter().zip(out) {
                one(block, out);
            }
        });
    out
}

fn half_at(block: &[u8], at: usize) -> f32 {
    f16::from_le_bytes([block[at], block[at + 1]]).to_f32()
}

/// The fifth bits of the 32 codes of a Q5_0 or Q5_1 block.
fn high_bits(block: &[u8], at: usize) -> u32 {
    u32::from_le_bytes([block[at], block[at + 1], block[at + 2], block[at + 3]])
}

/// Nibbles: the low ones are elements 0 to 15, the high ones 16 to 31.
fn q4_0(block: &[u8; 18], out: &mut [f32; SMALL]) {
    let d = half_at(block, 0);
    for (i, &q) in block[2..].iter().enumerate() {
        out[i] = d * f32::from((q & 0x0F) as i8 - 8);
        out[i + 16] = d * f32::from((q >> 4) as i8 - 8);
    }
}

fn q4_1(block: &[u8; 20], out: &mut [f32; SMALL]) {
    let (d, m) = (half_at(block, 0), half_at(block, 2));
    for (i, &q) in block[4..].iter().enumerate() {
        out[i] = d * f32::from(q & 0x0F) + m;
        out[i + 16] = d * f32::from(q >> 4) + m;
    }
}

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

fn q5_1(block: &[u8; 24], out: &mut [f32; SMALL]) {
    let (d, m) = (half_at(block, 0), half_at(block, 2));
    let high = high_bits(block, 4);
    for (i, &q) in block[8..].iter().enumerate() {
        out[i] = d * f32::from((q & 0x0F) | fifth_bit(high, i)) + m;
        out[i + 16] = d * f32::from((q >> 4) | fifth_bit(high, i + 16)) + m;
    }
}

fn fifth_bit(high: u32, i: usize) -> u8 {
    ((high >> i & 1) << 4) as u8
}

fn q8_0(block: &[u8; 34], out: &mut [f32; SMALL]) {
    let d = half_at(block, 0);
    for (out, &q) in out.iter_mut().zip(&block[2..]) {
        *out = f32::from(q as i8) * d;
    }
}

/// The eight six-bit scales and minima of a Q4_K or Q5_K block: numbers 0 to 3 in the low six bits
/// of bytes 0 to 7; numbers 4 to 7 as nibbles of bytes 8 to 11 with the top bits of bytes 0 to 7.
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
