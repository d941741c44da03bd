//! Little-endian f32, f16 and bf16 bytes to numbers.

use half::{bf16, f16};
use rayon::prelude::*;

/// Elements a thread converts at once; big enough to hide the cost of handing work out.
const CHUNK: usize = 1 << 16;

/// Converts `bytes`, `W` of them an element.
fn widen<const W: usize, T: Copy + Default + Send>(
    bytes: &[u8],
    convert: fn([u8; W]) -> T,
) -> Vec<T> {
    let count = bytes.as_chunks::<W>().0.len();
    let mut out = vec![T::default(); count];
    out.par_chunks_mut(CHUNK)
        .zip(bytes.par_chunks(const { CHUNK * W }))
        .for_each(|(out, bytes)| {
            let (elements, _) = bytes.as_chunks::<W>();
            for (out, element) in out.iter_mut().zip(elements) {
                *out = convert(*element);
            }
        });
    out
}

pub(crate) fn f32_le(bytes: &[u8]) -> Vec<f32> {
    widen(bytes, f32::from_le_bytes)
}

pub(crate) fn f16_le(bytes: &[u8]) -> Vec<f32> {
    widen(bytes, |b| f16::from_le_bytes(b).to_f32())
}

pub(crate) fn bf16_le(bytes: &[u8]) -> Vec<f32> {
    widen(bytes, |b| bf16::from_le_bytes(b).to_f32())
}

/// bf16 as it is.
pub(crate) fn bf16_le_kept(bytes: &[u8]) -> Vec<bf16> {
    widen(bytes, bf16::from_le_bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn all_sixteen_bit_patterns_widen_exactly() {
        let patterns: Vec<u16> = (0..=u16::MAX).collect();
        let bytes: Vec<u8> = patterns.iter().flat_map(|p| p.to_le_bytes()).collect();
        for (pattern, got) in patterns.iter().zip(bf16_le(&bytes)) {
            let want = f32::from_bits(u32::from(*pattern) << 16);
            assert!(got.to_bits() == want.to_bits() || (got.is_nan() && want.is_nan()));
        }
        for (pattern, got) in patterns.iter().zip(f16_le(&bytes)) {
            let want = f16::from_bits(*pattern).to_f32();
            assert!(got.to_bits() == want.to_bits() || (got.is_nan() && want.is_nan()));
        }
    }
}
