//! A weight of 4-bit codes with a scale for each block of values.

use std::ops::Range;

use rayon::prelude::*;

use crate::cpu::simd::{level, simd_fn};
use crate::quantized::read::four_bit;

use super::{
    BLOCK_SIZES, DynamicBlocks, FloatKind, FourBit, NESTED_BLOCK, NestedState, QuantError,
    QuantState, absmax, count, dynamic, expect, finite, inside,
};

/// Below this a block's largest magnitude is not divided by; bitsandbytes' number.
const SMALLEST: f32 = 1e-38;

/// Values a task dequantises.
const CHUNK: usize = 1 << 14;

/// How to quantise to 4 bits. The default is that of `BitsAndBytesConfig`, except for NF4 in FP4's place.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FourBitOptions {
    /// The code.
    pub kind: FourBit,
    /// Values that share a scale: one of [`BLOCK_SIZES`].
    pub block: usize,
    /// Whether the scales are quantised too.
    pub double: bool,
    /// The dtype the weight has before; what it is dequantised to unless another is asked for.
    pub dtype: FloatKind,
}

impl Default for FourBitOptions {
    fn default() -> Self {
        Self {
            kind: FourBit::Nf4,
            block: 64,
            double: false,
            dtype: FloatKind::F32,
        }
    }
}

/// The scales of a weight's blocks.
#[derive(Clone, Debug, PartialEq)]
pub enum Absmax {
    /// As they are.
    Plain(Vec<f32>),
    /// As 8-bit codes of what they differ by from their mean.
    Nested {
        /// The differences.
        blocks: DynamicBlocks,
        /// The mean.
        offset: f32,
    },
}

impl Absmax {
    /// Number of scales.
    pub fn len(&self) -> usize {
        match self {
            Self::Plain(scales) => scales.len(),
            Self::Nested { blocks, .. } => blocks.codes.len(),
        }
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The scale of a block; `block` must be below [`Absmax::len`].
    pub fn scale(&self, block: usize) -> f32 {
        match self {
            Self::Plain(scales) => scales[block],
            Self::Nested { blocks, offset } => blocks.value(block) + offset,
        }
    }
}

/// A weight of any shape, quantised row-major to 4 bits a value.
#[derive(Clone, Debug, PartialEq)]
pub struct FourBitTensor {
    kind: FourBit,
    block: usize,
    dtype: FloatKind,
    shape: Vec<usize>,
    length: usize,
    codes: Vec<u8>,
    absmax: Absmax,
}

impl FourBitTensor {
    /// Quantises `values`, row-major in `shape`. They must be numbers of `options.dtype` for the codes to be
    /// bitsandbytes' own.
    ///
    /// A block is multiplied by the reciprocal of its largest magnitude (a last block that is not full is divided), and a
    /// value gets the nearest code; one halfway between two gets the lower. A block of zeros gets scale 0, or 1e-38 if
    /// not full. The value at an even place is in the high half of its byte; an odd number of values is followed by a zero.
    ///
    /// Fails where the block size is not one of [`BLOCK_SIZES`], the values are not as many as the shape
    /// says, or one is not finite.
    pub fn quantise(
        values: &[f32],
        shape: &[usize],
        options: FourBitOptions,
    ) -> Result<Self, QuantError> {
        let FourBitOptions {
            kind, block, dtype, ..
        } = options;
        check_block(block)?;
        expect("values", shape, count(shape)?, values.len())?;
        finite(values)?;
        let (order, midpoints) = kind.midpoints();
        let code = |v: f32| nearest(order, &midpoints, v);
        let level = level();
        let mut codes = vec![0_u8; values.len().div_ceil(2)];
        let mut scales = vec![0.0_f32; values.len().div_ceil(block)];
        (
            values.par_chunks(block),
            codes.par_chunks_mut(block / 2),
            &mut scales,
        )
            .into_par_iter()
            .for_each(|(values, codes, scale)| {
                let largest = absmax(values);
                let divisor = largest.max(SMALLEST);
                let full = values.len() == block;
                *scale = if full { largest } else { divisor };
                if full {
                    return codes_of(level, values, 1.0 / divisor, order, &midpoints, codes);
                }
                for (byte, pair) in codes.iter_mut().zip(values.chunks(2)) {
                    let second = pair.get(1).copied().unwrap_or(0.0);
                    *byte = (code(pair[0] / divisor) << 4) | code(second / divisor);
                }
            });
        let absmax = if options.double {
            let offset = dynamic::mean(&scales);
            let differences: Vec<f32> = scales.iter().map(|s| s - offset).collect();
            Absmax::Nested {
                blocks: DynamicBlocks::quantise(&differences, NESTED_BLOCK)?,
                offset,
            }
        } else {
            Absmax::Plain(scales)
        };
        Ok(Self {
            kind,
            block,
            dtype,
            shape: shape.to_vec(),
            length: values.len(),
            codes,
            absmax,
        })
    }

    /// Wraps what a checkpoint holds: the parsed `quant_state`, `weight`, and the scales, of which
    /// `nested_absmax` and `nested_quant_map` belong to a doubly quantised one.
    ///
    /// Fails where a part is missing or of another size than the others say.
    pub fn from_parts(
        state: &QuantState,
        codes: Vec<u8>,
        absmax: Option<Absmax>,
    ) -> Result<Self, QuantError> {
        check_block(state.block)?;
        let absmax = absmax.ok_or(QuantError::Missing("absmax"))?;
        match (&state.nested, &absmax) {
            (Some(_), Absmax::Plain(_)) => return Err(QuantError::Missing("nested_absmax")),
            (None, Absmax::Nested { .. }) => return Err(QuantError::Missing("nested_offset")),
            (Some(nested), Absmax::Nested { blocks, offset }) => {
                if nested.block != blocks.block || nested.offset != *offset {
                    return Err(QuantError::State(format!(
                        "it has nested blocks of {} and the offset {}, its scales {} and {offset}",
                        nested.block, nested.offset, blocks.block
                    )));
                }
            }
            (None, Absmax::Plain(_)) => {}
        }
        let shape = &state.shape;
        let length = count(shape)?;
        expect(
            "bytes of 4-bit codes",
            shape,
            length.div_ceil(2),
            codes.len(),
        )?;
        expect(
            "scales (absmax)",
            shape,
            length.div_ceil(state.block),
            absmax.len(),
        )?;
        Ok(Self {
            kind: state.kind,
            block: state.block,
            dtype: state.dtype,
            shape: shape.clone(),
            length,
            codes,
            absmax,
        })
    }

    /// What a checkpoint's `quant_state` says of it.
    pub fn state(&self) -> QuantState {
        QuantState {
            kind: self.kind,
            block: self.block,
            dtype: self.dtype,
            shape: self.shape.clone(),
            nested: match &self.absmax {
                Absmax::Plain(_) => None,
                Absmax::Nested { blocks, offset } => Some(NestedState {
                    block: blocks.block,
                    offset: *offset,
                }),
            },
        }
    }

    /// The code.
    pub fn kind(&self) -> FourBit {
        self.kind
    }

    /// Values that share a scale.
    pub fn block(&self) -> usize {
        self.block
    }

    /// The dtype of the weight before.
    pub fn dtype(&self) -> FloatKind {
        self.dtype
    }

    /// The shape of the weight.
    pub fn shape(&self) -> &[usize] {
        &self.shape
    }

    /// Number of values.
    pub fn len(&self) -> usize {
        self.length
    }

    /// Whether it has no values.
    pub fn is_empty(&self) -> bool {
        self.length == 0
    }

    /// Two codes a byte, the even place in the high half.
    pub fn codes(&self) -> &[u8] {
        &self.codes
    }

    /// The scales.
    pub fn absmax(&self) -> &Absmax {
        &self.absmax
    }

    /// Bytes of codes and scales.
    pub fn bytes(&self) -> usize {
        let scales = match &self.absmax {
            Absmax::Plain(scales) => 4 * scales.len(),
            Absmax::Nested { blocks, .. } => {
                blocks.codes.len() + 4 * (blocks.absmax.len() + blocks.map.len() + 1)
            }
        };
        self.codes.len() + scales
    }

    /// All values, row-major: the code's number times the scale in f32, rounded to `dtype`.
    pub fn dequantise(&self, dtype: FloatKind) -> Vec<f32> {
        let mut out = vec![0.0; self.length];
        self.fill(0, dtype, &mut out);
        out
    }

    /// Writes the values at `range`, counted row-major, to `out`. Fails where the range leaves the weight or `out`
    /// is of another length.
    pub fn dequantise_range(
        &self,
        range: Range<usize>,
        dtype: FloatKind,
        out: &mut [f32],
    ) -> Result<(), QuantError> {
        inside(&range, self.length)?;
        expect(
            "places for the values asked for",
            &self.shape,
            range.len(),
            out.len(),
        )?;
        self.fill(range.start, dtype, out);
        Ok(())
    }

    /// Values from `start` on, as many as `out` takes; they must be there.
    fn fill(&self, start: usize, dtype: FloatKind, out: &mut [f32]) {
        out.par_chunks_mut(CHUNK).enumerate().for_each(|(i, out)| {
            four_bit(level(), self, start + i * CHUNK, dtype, dtype, out);
        });
    }

    /// The same, value by value: what the readers are compared with.
    #[cfg(test)]
    pub(crate) fn define(&self, start: usize, dtype: FloatKind, mut rest: &mut [f32]) {
        let table = self.kind.table();
        let mut at = start;
        while !rest.is_empty() {
            let block = at / self.block;
            let length = rest.len().min((block + 1) * self.block - at);
            let (now, later) = rest.split_at_mut(length);
            let scale = self.absmax.scale(block);
            for (place, value) in (at..).zip(now) {
                let byte = self.codes[place / 2];
                let code = if place.is_multiple_of(2) {
                    byte >> 4
                } else {
                    byte & 15
                };
                *value = dtype.round(table[code as usize] * scale);
            }
            rest = later;
            at += length;
        }
    }
}

/// The code of a scaled value: that of the nearest number, of two as near the lower.
fn nearest(order: &[u8; 16], midpoints: &[f32; 15], scaled: f32) -> u8 {
    order[midpoints.iter().filter(|m| scaled > **m).count()]
}

simd_fn! {
    /// The same for whole blocks, times `inverse`, two codes a byte. Comparisons with all midpoints are counted: no
    /// branches, and a vector of values side by side.
    fn codes_of<L>(
        values: &[f32],
        inverse: f32,
        order: &[u8; 16],
        midpoints: &[f32; 15],
        codes: &mut [u8],
    ) {
        let (values, codes) = (values.as_chunks::<32>().0, codes.as_chunks_mut::<16>().0);
        for (values, codes) in values.iter().zip(codes) {
            let mut above = [0_u32; 32];
            for midpoint in midpoints {
                for i in 0..32 {
                    above[i] += u32::from(values[i] * inverse > *midpoint);
                }
            }
            for (byte, pair) in codes.iter_mut().zip(above.as_chunks::<2>().0) {
                let [first, second] = pair.map(|n| order[n as usize & 15]);
                *byte = (first << 4) | second;
            }
        }
    }
}

fn check_block(block: usize) -> Result<(), QuantError> {
    if BLOCK_SIZES.contains(&block) {
        return Ok(());
    }
    Err(QuantError::BlockSize(block))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::check::noise;
    use crate::cpu::simd::Level;

    /// Midpoints themselves and their neighbours among the values.
    #[test]
    fn codes_of_a_block_are_those_of_its_values_on_every_level() {
        for kind in [FourBit::Nf4, FourBit::Fp4] {
            let (order, midpoints) = kind.midpoints();
            let near = midpoints
                .iter()
                .flat_map(|m| [*m, m.next_up(), m.next_down()]);
            let mut values: Vec<f32> = near.chain(kind.table().iter().copied()).collect();
            values.extend(noise(8, 4096 - values.len()));
            for inverse in [1.0_f32, 0.37, 1.9] {
                let code = |v: &f32| nearest(order, &midpoints, v * inverse);
                let want: Vec<u8> = values
                    .chunks(2)
                    .map(|pair| (code(&pair[0]) << 4) | code(&pair[1]))
                    .collect();
                for level in Level::available() {
                    let mut got = vec![0; want.len()];
                    codes_of(level, &values, inverse, order, &midpoints, &mut got);
                    assert_eq!(got, want, "{kind:?} {level:?} {inverse}");
                }
            }
        }
    }
}
