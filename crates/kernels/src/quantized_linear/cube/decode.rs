//! What eight neighbouring columns of a packed row stand for, on a CubeCL device. The formulas and the order of
//! their operations are those of the host (`packed::read`, `packed::gguf`).

// `#[cube]` makes functions of these whose arguments it builds itself.
#![allow(clippy::too_many_arguments)]

use burn_cubecl::cubecl;
use cubecl::prelude::*;

use super::layout::{Format, HEAD, MEAN, NESTED, SCALES, Spec};
use crate::quantized::GgufKind;
use crate::quantized::formats::{FloatKind, PER_STEP};

/// Columns that are decoded together.
pub(super) const RUN: usize = 8;

/// Entries of the map of doubly quantised scales.
const MAP: usize = 256;

/// Whether a kind's codes are of five bits.
fn five(kind: GgufKind) -> bool {
    matches!(kind, GgufKind::Q5_0 | GgufKind::Q5_1)
}

/// Whether a kind has a minimum beside its scale.
fn has_min(kind: GgufKind) -> bool {
    !matches!(
        kind,
        GgufKind::Q4_0 | GgufKind::Q5_0 | GgufKind::Q8_0 | GgufKind::Q6K
    )
}

/// Bytes before the fifth bits, or the codes, of the kinds of 32 elements.
fn head(kind: GgufKind) -> usize {
    if has_min(kind) { 4 } else { 2 }
}

/// What is taken off a code without a minimum.
fn middle(kind: GgufKind) -> f32 {
    match kind {
        GgufKind::Q4_0 => 8.0,
        GgufKind::Q5_0 => 16.0,
        GgufKind::Q6K => 32.0,
        _ => 0.0,
    }
}

/// The byte `at` of the bytes that begin at word [`HEAD`].
#[cube]
fn byte(words: &[u32], at: usize) -> u32 {
    (words[HEAD + at / 4] >> (8 * (at % 4) as u32)) & 0xFF
}

/// A byte as a signed number.
#[cube]
fn signed(byte: u32) -> f32 {
    let value = f32::cast_from(byte);
    if byte > 127 { value - 256.0 } else { value }
}

/// The half-precision number at a byte.
#[cube]
fn half_at(words: &[u32], at: usize) -> f32 {
    let bits = byte(words, at) | (byte(words, at + 1) << 8);
    let sign = (bits & 0x8000) << 16;
    let exponent = (bits >> 10) & 31;
    let mantissa = bits & 0x3FF;
    let up = if exponent == 31 {
        224u32.runtime()
    } else {
        112u32.runtime()
    };
    let mut magnitude = ((exponent + up) << 23) | (mantissa << 13);
    if exponent == 0 {
        // Not by way of an f32 below the normal ones, which a device may take for zero.
        magnitude = u32::reinterpret(f32::cast_from(mantissa) * 5.9604645e-8);
    }
    f32::reinterpret(sign | magnitude)
}

/// To the nearest number of bf16 or f16, and among two to the even one.
#[cube]
pub(super) fn rounded(value: f32, #[comptime] kind: FloatKind) -> f32 {
    if comptime!(kind == FloatKind::F32) {
        value
    } else if comptime!(kind == FloatKind::Bf16) {
        let bits = u32::reinterpret(value);
        let to = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF_0000;
        // A NaN would round to infinity.
        if bits & 0x7FFF_FFFF > 0x7F80_0000 {
            value
        } else {
            f32::reinterpret(to)
        }
    } else {
        let bits = u32::reinterpret(value);
        let (sign, size) = (bits & 0x8000_0000, bits & 0x7FFF_FFFF);
        let mut to = (size + 0xFFF + ((size >> 13) & 1)) & 0xFFFF_E000;
        if size >= 0x477F_F000 {
            // 65520 and more; a NaN is seen to below.
            to = 0x7F80_0000;
        }
        if size < 0x3880_0000 {
            // Below 2^-14 the steps are of 2^-24.
            let steps = f32::reinterpret(size) * 16777216.0;
            let below = u32::cast_from(steps);
            let rest = steps - f32::cast_from(below);
            let odd = below & 1;
            let mut count = below;
            if rest > 0.5 || (rest == 0.5 && odd == 1) {
                count += 1;
            }
            to = u32::reinterpret(f32::cast_from(count) * 5.9604645e-8);
        }
        if size > 0x7F80_0000 {
            value
        } else {
            f32::reinterpret(sign | to)
        }
    }
}

/// The scale of a block of 4-bit codes.
#[cube]
fn block_scale(words: &[u32], block: usize, #[comptime] nested: usize) -> f32 {
    let scales = words[SCALES] as usize;
    if comptime!(nested == 0) {
        f32::reinterpret(words[scales + block])
    } else {
        let code = byte(words, 4 * (scales - HEAD) + block) as usize;
        let map = words[NESTED] as usize;
        let number = f32::reinterpret(words[map + code]);
        let scale = f32::reinterpret(words[map + MAP + block / nested]);
        number * scale + f32::reinterpret(words[MEAN])
    }
}

/// The six-bit scale or minimum of a group of Q4_K or Q5_K.
#[cube]
fn six_bits(words: &[u32], at: usize, group: usize, #[comptime] minimum: bool) -> f32 {
    // Groups 0 to 3 have a byte; the later ones a nibble, and the two highest bits of an earlier group's byte.
    let whole = if comptime!(minimum) { group + 4 } else { group };
    let mut bits = byte(words, at + whole) & 0x3F;
    if group >= 4 {
        let nibbles = byte(words, at + group + 4);
        if comptime!(minimum) {
            bits = (nibbles >> 4) | ((byte(words, at + group) >> 2) & 0x30);
        } else {
            bits = (nibbles & 0x0F) | ((byte(words, at + group - 4) >> 2) & 0x30);
        }
    }
    f32::cast_from(bits)
}

/// What a code of a GGUF block, from element `from` of the block that begins at byte `base`, is multiplied with.
#[cube]
fn gguf_scale(words: &[u32], base: usize, from: usize, #[comptime] kind: GgufKind) -> f32 {
    if comptime!(kind == GgufKind::Q6K) {
        let sub = signed(byte(words, base + 192 + from / 16));
        half_at(words, base + 208) * sub
    } else if comptime!(kind == GgufKind::Q4K || kind == GgufKind::Q5K) {
        half_at(words, base) * six_bits(words, base + 4, from / 32, false)
    } else {
        half_at(words, base)
    }
}

/// What is added to that product.
#[cube]
fn gguf_min(words: &[u32], base: usize, from: usize, #[comptime] kind: GgufKind) -> f32 {
    if comptime!(kind == GgufKind::Q4K || kind == GgufKind::Q5K) {
        let min = half_at(words, base + 2) * six_bits(words, base + 4, from / 32, true);
        -min
    } else if comptime!(has_min(kind)) {
        half_at(words, base + 2)
    } else {
        0.0f32.runtime()
    }
}

/// The code of element `at` of a GGUF block, less its middle.
#[cube]
fn gguf_code(words: &[u32], base: usize, at: usize, #[comptime] kind: GgufKind) -> f32 {
    if comptime!(kind == GgufKind::Q8_0) {
        signed(byte(words, base + 2 + at))
    } else if comptime!(kind == GgufKind::Q6K) {
        let (half, part, i) = (at / 128, (at / 32) % 4, at % 32);
        let low = byte(words, base + half * 64 + (part % 2) * 32 + i);
        let high = byte(words, base + 128 + half * 32 + i);
        let low = (low >> (4 * (part / 2) as u32)) & 0x0F;
        let high = (high >> (2 * part as u32)) & 3;
        f32::cast_from(low | (high << 4)) - comptime!(middle(kind))
    } else if comptime!(kind == GgufKind::Q4K || kind == GgufKind::Q5K) {
        let (group, i) = (at / 32, at % 32);
        let codes = comptime!(if kind == GgufKind::Q5K { 48 } else { 16 });
        let low = byte(words, base + codes + (group / 2) * 32 + i);
        let mut code = (low >> (4 * (group % 2) as u32)) & 0x0F;
        if comptime!(kind == GgufKind::Q5K) {
            let high = byte(words, base + 16 + i);
            code |= ((high >> group as u32) & 1) << 4;
        }
        f32::cast_from(code)
    } else {
        let first = comptime!(head(kind));
        let codes = comptime!(if five(kind) { first + 4 } else { first });
        let low = byte(words, base + codes + at % 16);
        let mut code = (low >> (4 * (at / 16) as u32)) & 0x0F;
        if comptime!(five(kind)) {
            let high = byte(words, base + first + at / 8);
            code |= ((high >> (at % 8) as u32) & 1) << 4;
        }
        f32::cast_from(code) - comptime!(middle(kind))
    }
}

/// One value of a 4-bit weight, counted row-major.
#[cube]
fn four_bit(words: &[u32], at: usize, #[comptime] block: usize, #[comptime] nested: usize) -> f32 {
    let pair = byte(words, at / 2);
    let code = (pair >> (4 * (1 - at % 2) as u32)) & 0x0F;
    f32::reinterpret(words[code as usize]) * block_scale(words, at / block, nested)
}

/// The scale of a row of LLM.int8().
#[cube]
pub(super) fn row_scale(words: &[u32], row: usize) -> f32 {
    f32::reinterpret(words[words[SCALES] as usize + row])
}

/// The values of a row from column `from` on, a multiple of [`RUN`]; zeros past the row's end.
#[cube]
pub(super) fn run(
    words: &[u32],
    row: usize,
    from: usize,
    width: usize,
    values: &mut Array<f32>,
    #[comptime] spec: Spec,
) {
    if comptime!(matches!(spec.format, Format::FourBit { .. })) {
        let block = comptime!(match spec.format {
            Format::FourBit { block, .. } => block,
            _ => 1,
        });
        let nested = comptime!(match spec.format {
            Format::FourBit { nested, .. } => nested,
            _ => 0,
        });
        let start = row * width + from;
        if comptime!(spec.whole) {
            let scale = block_scale(words, start / block, nested);
            let codes = words[HEAD + start / 8];
            #[unroll]
            for j in 0..RUN {
                let shift = comptime!((8 * (j / 2) + 4 * (1 - j % 2)) as u32);
                let code = ((codes >> shift) & 0x0F) as usize;
                values[j] = rounded(f32::reinterpret(words[code]) * scale, spec.compute);
            }
        } else {
            #[unroll]
            for j in 0..RUN {
                let mut value = 0.0f32;
                // Blocks do not end where rows do.
                if from + j < width {
                    value = rounded(four_bit(words, start + j, block, nested), spec.compute);
                }
                values[j] = value;
            }
        }
    } else if comptime!(matches!(spec.format, Format::Blocks(_))) {
        let kind = comptime!(match spec.format {
            Format::Blocks(kind) => kind,
            _ => GgufKind::Q8_0,
        });
        let (one, size) = comptime!((kind.elements(), kind.bytes()));
        let (base, at) = ((row * (width / one) + from / one) * size, from % one);
        let scale = gguf_scale(words, base, at, kind);
        let min = gguf_min(words, base, at, kind);
        #[unroll]
        for j in 0..RUN {
            let code = gguf_code(words, base, at + j, kind);
            if comptime!(has_min(kind)) {
                values[j] = rounded(scale * code + min, spec.compute);
            } else {
                values[j] = rounded(scale * code, spec.compute);
            }
        }
    } else {
        let start = row * width + from;
        let mut scale = 1.0f32;
        if comptime!(matches!(spec.format, Format::Int8)) {
            scale = row_scale(words, row);
        }
        #[unroll]
        for j in 0..RUN {
            let mut value = 0.0f32;
            if comptime!(spec.whole) || from + j < width {
                let code = signed(byte(words, start + j));
                if comptime!(matches!(spec.format, Format::Int8)) {
                    value = rounded(code * scale * PER_STEP, spec.compute);
                } else {
                    value = code;
                }
            }
            values[j] = value;
        }
    }
}
