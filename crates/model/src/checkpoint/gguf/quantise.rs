//! From f32 to GGUF's element types: the inverse of what `quant` reads.
//!
//! Q8_0 and Q4_0 give the bytes of the `gguf` package's `quantize`, Q6_K those of `quantize_row_q6_K_ref` in
//! llama.cpp's `ggml-quants.c`. Every operation is rounded to f32 by itself: a llama.cpp whose compiler fuses a
//! product with the sum behind it may choose the neighbouring code where a value lies halfway between two.

use half::{bf16, f16};
use rayon::prelude::*;

use super::quant::BlockType;

/// Elements that a thread encodes at once: whole blocks of every type.
const CHUNK: usize = 1 << 14;

/// A value that the type cannot hold.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct OutOfRange;

impl BlockType {
    /// Appends the blocks of `values` (whole rows, each of whole blocks) to `out`.
    ///
    /// # Errors
    /// A value beyond the range of f16 (of a block's scale, if it is packed), or none at all in a packed type.
    ///
    /// A type that is only read appends nothing.
    pub fn quantise(self, values: &[f32], out: &mut Vec<u8>) -> Result<(), OutOfRange> {
        match self {
            Self::F32 => out.extend(values.iter().flat_map(|x| x.to_le_bytes())),
            Self::BF16 => out.extend(values.iter().flat_map(|x| bf16::from_f32(*x).to_le_bytes())),
            Self::F16 => {
                let lost = |x: &f32| x.is_finite() && f16::from_f32(*x).is_infinite();
                if values.iter().any(lost) {
                    return Err(OutOfRange);
                }
                out.extend(values.iter().flat_map(|x| f16::from_f32(*x).to_le_bytes()));
            }
            Self::Q8_0 => blocks(values, out, q8_0)?,
            Self::Q4_0 => blocks(values, out, q4_0)?,
            Self::Q6K => blocks(values, out, q6_k)?,
            _ => {}
        }
        Ok(())
    }
}

/// Applies `one` to every `N` elements, in parallel.
fn blocks<const N: usize, const BYTES: usize>(
    values: &[f32],
    out: &mut Vec<u8>,
    one: fn(&[f32; N], &mut [u8; BYTES]) -> Result<(), OutOfRange>,
) -> Result<(), OutOfRange> {
    let (blocks, _) = values.as_chunks::<N>();
    let start = out.len();
    out.resize(start + blocks.len() * BYTES, 0);
    let (packed, _) = out.split_at_mut(start).1.as_chunks_mut::<BYTES>();
    packed
        .par_chunks_mut(CHUNK / N)
        .zip(blocks.par_chunks(CHUNK / N))
        .try_for_each(|(packed, blocks)| {
            let mut pairs = packed.iter_mut().zip(blocks);
            pairs.try_for_each(
                |(packed, block)| match block.iter().all(|x| x.is_finite()) {
                    true => one(block, packed),
                    false => Err(OutOfRange),
                },
            )
        })
}

/// The scale's bytes; a scale that f16 cannot hold is an error.
fn put_half(at: &mut [u8], scale: f32) -> Result<f16, OutOfRange> {
    let half = f16::from_f32(scale);
    at.copy_from_slice(&half.to_le_bytes());
    match half.is_finite() {
        true => Ok(half),
        false => Err(OutOfRange),
    }
}

/// The value of largest magnitude, with its sign; the first among equals.
fn extreme(values: &[f32]) -> f32 {
    let larger = |max: f32, x: &f32| if x.abs() > max.abs() { *x } else { max };
    values.iter().fold(0.0, larger)
}

fn inverse(scale: f32) -> f32 {
    if scale == 0.0 { 0.0 } else { 1.0 / scale }
}

/// `d = max|x| / 127`, codes rounded with halves away from zero.
fn q8_0(block: &[f32; 32], out: &mut [u8; 34]) -> Result<(), OutOfRange> {
    let (scale, codes) = out.split_at_mut(2);
    let d = extreme(block).abs() / 127.0;
    put_half(scale, d)?;
    let inverse = inverse(d);
    for (code, x) in codes.iter_mut().zip(block) {
        *code = (x * inverse).round() as i8 as u8;
    }
    Ok(())
}

/// `d = x_max / -8`, so that the value of largest magnitude has code 0; the others are rounded around 8.
fn q4_0(block: &[f32; 32], out: &mut [u8; 18]) -> Result<(), OutOfRange> {
    let (scale, codes) = out.split_at_mut(2);
    let d = extreme(block) / -8.0;
    put_half(scale, d)?;
    let inverse = inverse(d);
    let code = |x: f32| ((x * inverse + 8.5) as u8).min(15);
    let (low, high) = block.split_at(16);
    for ((byte, low), high) in codes.iter_mut().zip(low).zip(high) {
        *byte = code(*low) | code(*high) << 4;
    }
    Ok(())
}

/// Below it, ggml takes a group for zero (`GROUP_MAX_EPS`).
const NOTHING: f32 = 1e-15;

/// Sixteen scales of sixteen elements each, as eight-bit multiples of one, and six-bit codes.
fn q6_k(block: &[f32; 256], out: &mut [u8; 210]) -> Result<(), OutOfRange> {
    let (groups, _) = block.as_chunks::<16>();
    let mut codes = [0u8; 256];
    let (parts, _) = codes.as_chunks_mut::<16>();
    let mut scales = [0.0f32; 16];
    for ((scale, codes), group) in scales.iter_mut().zip(&mut *parts).zip(groups) {
        *scale = group_scale(group, codes);
    }
    if !scales.iter().all(|scale| scale.is_finite()) {
        return Err(OutOfRange);
    }
    let most = extreme(&scales);
    if most.abs() < NOTHING {
        return Ok(());
    }
    let inverse = -128.0 / most;
    let d = put_half(&mut out[208..], 1.0 / inverse)?.to_f32();
    for (i, (codes, group)) in parts.iter_mut().zip(groups).enumerate() {
        let scale = nearest(inverse * scales[i]).min(127) as i8;
        out[192 + i] = scale as u8;
        let step = d * f32::from(scale);
        if step != 0.0 {
            for (code, x) in codes.iter_mut().zip(group) {
                *code = (nearest(x / step).clamp(-32, 31) + 32) as u8;
            }
        }
    }
    // Each half of 128: four groups of 32, low nibbles in 64 bytes, the bits above in 32.
    let (low, rest) = out.split_at_mut(128);
    for (half, codes) in codes.as_chunks::<128>().0.iter().enumerate() {
        for i in 0..32 {
            let q = [codes[i], codes[i + 32], codes[i + 64], codes[i + 96]];
            low[half * 64 + i] = (q[0] & 0x0F) | q[2] << 4;
            low[half * 64 + i + 32] = (q[1] & 0x0F) | q[3] << 4;
            rest[half * 32 + i] = q[0] >> 4 | q[1] >> 4 << 2 | q[2] >> 4 << 4 | q[3] >> 4 << 6;
        }
    }
    Ok(())
}

fn nearest(x: f32) -> i32 {
    x.round_ties_even() as i32
}

/// The scale for which six-bit codes come closest to `x`, the errors weighed with `x²`: the largest value is
/// taken to -32, and to a few numbers around it.
fn group_scale(x: &[f32; 16], codes: &mut [u8; 16]) -> f32 {
    let most = extreme(x);
    if most.abs() < NOTHING {
        return 0.0;
    }
    let sums = |inverse: f32| {
        let (mut products, mut squares) = (0.0f32, 0.0f32);
        for x in x {
            let code = nearest(inverse * x).clamp(-32, 31) as f32;
            let weight = x * x;
            products += weight * x * code;
            squares += weight * code * code;
        }
        (products, squares)
    };
    let mut put = |inverse: f32| {
        for (code, x) in codes.iter_mut().zip(x) {
            *code = (nearest(inverse * x).clamp(-32, 31) + 32) as u8;
        }
    };
    let first = -32.0 / most;
    put(first);
    let (products, squares) = sums(first);
    let mut scale = if squares != 0.0 {
        products / squares
    } else {
        0.0
    };
    let mut best = scale * products;
    for step in (-9..=9).filter(|step| *step != 0) {
        let inverse = -(32.0 + 0.1 * step as f32) / most;
        let (products, squares) = sums(inverse);
        if squares > 0.0 && products * products > best * squares {
            put(inverse);
            scale = products / squares;
            best = scale * products;
        }
    }
    scale
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    fn packed(block: BlockType, values: &[f32]) -> Vec<u8> {
        let mut out = Vec::new();
        block.quantise(values, &mut out).unwrap();
        assert_eq!(out.len(), values.len() / block.elements() * block.bytes());
        out
    }

    /// `tests/fixtures/quantise.json`: values as bits, and the bytes that the `gguf` package makes of them.
    #[test]
    fn q8_0_and_q4_0_are_the_bytes_of_the_gguf_package() {
        let path = concat!(
            env!("CARGO_MANIFEST_DIR"),
            "/../../tests/fixtures/quantise.json"
        );
        let golden: serde_json::Value =
            serde_json::from_str(&std::fs::read_to_string(path).unwrap()).unwrap();
        let bytes = |text: &serde_json::Value| -> Vec<u8> {
            let text = text.as_str().unwrap();
            let digit = |i: usize| u8::from_str_radix(&text[i..i + 2], 16).unwrap();
            (0..text.len()).step_by(2).map(digit).collect()
        };
        let raw = bytes(&golden["values"]);
        let values: Vec<f32> = raw
            .as_chunks::<4>()
            .0
            .iter()
            .map(|b| f32::from_le_bytes(*b))
            .collect();
        assert!(values.len() >= 1024);
        for (name, block) in [("q8_0", BlockType::Q8_0), ("q4_0", BlockType::Q4_0)] {
            assert_eq!(packed(block, &values), bytes(&golden[name]), "{name}");
        }
        let (ours, theirs) = (packed(BlockType::Q6K, &values), bytes(&golden["q6_k"]));
        assert_eq!(ours, theirs, "q6_k");
    }

    #[test]
    fn what_was_dequantised_comes_back_as_it_was() {
        let values: Vec<f32> = (0..4096)
            .map(|i| ((i * 37 % 101) as f32 - 50.0) * 0.013)
            .collect();
        for block in [
            BlockType::F16,
            BlockType::BF16,
            BlockType::Q8_0,
            BlockType::Q4_0,
        ] {
            let once = packed(block, &values);
            let twice = packed(block, &block.dequantise(&once));
            // A scale moves by the rounding to f16 at most, so values by that, and codes not at all.
            let [a, b] = [&once, &twice].map(|bytes| block.dequantise(bytes));
            for (a, b) in a.iter().zip(&b) {
                assert!((a - b).abs() <= 1e-3 * a.abs(), "{block:?}: {a} {b}");
            }
        }
    }

    #[test]
    fn what_no_block_can_hold_is_an_error_and_zeros_are_not() {
        for block in [
            BlockType::F16,
            BlockType::Q8_0,
            BlockType::Q4_0,
            BlockType::Q6K,
        ] {
            let zeros = packed(block, &[0.0; 256]);
            assert!(
                block.dequantise(&zeros).iter().all(|x| *x == 0.0),
                "{block:?}"
            );
            for bad in [1e30, f32::NAN, f32::INFINITY] {
                let mut values = [0.5; 256];
                values[77] = bad;
                let result = block.quantise(&values, &mut Vec::new());
                // f16 has a NaN and an infinity of its own.
                let kept = block == BlockType::F16 && !bad.is_finite();
                assert_eq!(result.is_ok(), kept, "{block:?} {bad}");
            }
        }
    }
}
