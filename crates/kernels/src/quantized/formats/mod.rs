//! Quantised weights in bitsandbytes' formats, on the host: NF4, FP4, doubly quantised scales, LLM.int8() rows.
//!
//! Codes, scales and dequantised values are those of bitsandbytes 0.50 on a CPU, bit for bit
//! (but for the sign of FP4's second zero, code 8, which there depends on the kernel); the goldens of
//! the tests were written by it. Where its backends differ (the 8-bit map of doubly quantised scales), the
//! CPU's result is the one reproduced, and the documentation of the function says so.

mod dynamic;
mod four_bit;
mod int8;
mod state;
#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests;

use half::{bf16, f16};
use rayon::prelude::*;

pub use dynamic::{DynamicBlocks, dynamic_map, unsigned_dynamic_map};
pub(crate) use dynamic::{STEPS, nearest, step, unsigned_nearest};
pub use four_bit::{Absmax, FourBitOptions, FourBitTensor};
pub(crate) use int8::PER_STEP;
pub use int8::{Int8Rows, OUTLIER_THRESHOLD, outlier_columns, quantise_activations};
pub use state::{NestedState, QuantState};

/// The block sizes of a 4-bit weight that bitsandbytes has kernels for.
pub const BLOCK_SIZES: [usize; 8] = [32, 64, 128, 256, 512, 1024, 2048, 4096];

/// Scales that share one scale of their own when they are quantised in turn.
pub const NESTED_BLOCK: usize = 256;

/// Values that a task looks through for numbers that are not finite.
const STRETCH: usize = 1 << 14;

/// What is wrong with a weight to quantise or with a quantised one.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum QuantError {
    /// A `quant_type` that is neither NF4 nor FP4.
    #[error("the quantisation type {0:?} is unknown: it must be \"nf4\" or \"fp4\"")]
    UnknownType(String),
    /// A dtype that no quantised weight is of.
    #[error(
        "the dtype {0:?} is not one of a quantised weight: it must be \"float32\", \"bfloat16\" or \"float16\""
    )]
    UnknownDtype(String),
    /// A block size bitsandbytes does not have.
    #[error(
        "a 4-bit weight has no blocks of {0} values: choose one of 32, 64, 128, 256, 512, 1024, 2048, 4096"
    )]
    BlockSize(usize),
    /// Values or codes that are not as many as the shape says.
    #[error("{what}: the shape {shape:?} needs {expected}, but {found} are there")]
    Count {
        /// What was counted.
        what: &'static str,
        /// The shape of the whole weight.
        shape: Vec<usize>,
        /// The number the shape asks for.
        expected: usize,
        /// The number found.
        found: usize,
    },
    /// A shape whose number of values does not fit in memory's addresses.
    #[error("the shape {0:?} has more values than a computer can address")]
    TooLarge(Vec<usize>),
    /// A value that cannot be scaled.
    #[error(
        "the value {value} at row-major position {position} cannot be quantised: check the weight for overflow"
    )]
    NotFinite {
        /// Where, counting row by row from 0.
        position: usize,
        /// NaN or an infinity.
        value: f32,
    },
    /// A weight that is not a matrix where one is needed.
    #[error("the shape {0:?} is not that of a matrix: only linear layers stay quantised")]
    NotMatrix(Vec<usize>),
    /// A range outside the weight.
    #[error("values {start}..{end} were asked of a weight of {length}")]
    Range {
        /// First value asked for.
        start: usize,
        /// One past the last.
        end: usize,
        /// Values of the weight.
        length: usize,
    },
    /// A tensor that a quantised checkpoint must have beside its codes.
    #[error(
        "the quantised weight has no `{0}`: the checkpoint is incomplete; save it again with bitsandbytes"
    )]
    Missing(&'static str),
    /// A `quant_state` that is no JSON object or lacks something.
    #[error("the quant_state cannot be read: {0}; save the checkpoint again with bitsandbytes")]
    State(String),
    /// A threshold that separates nothing.
    #[error("the outlier threshold {0} must be a number above zero")]
    Threshold(f32),
}

/// A 4-bit code: what each of the 16 numbers stands for, before the block's scale.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FourBit {
    /// Sixteen quantiles of a normal distribution, 0 and both ends among them (QLoRA, appendix E).
    Nf4,
    /// Sign, two bits of exponent, one of mantissa, the largest made 1.
    Fp4,
}

/// bitsandbytes' table of NF4, ascending.
const NF4: [f32; 16] = [
    -1.0,
    -0.696_192_8,
    -0.525_073_05,
    -0.394_917_5,
    -0.284_441_38,
    -0.184_773_43,
    -0.091_050_036,
    0.0,
    0.079_580_3,
    0.160_930_2,
    0.246_112_3,
    0.337_915_24,
    0.440_709_83,
    0.562_617,
    0.722_956_84,
    1.0,
];

/// Magnitudes of FP4 by its lower three bits, in twelfths: 0.0625 is the smallest, 12 the largest.
const FP4: [f32; 16] = {
    let twelfths = [0.0, 0.0625, 8.0, 12.0, 4.0, 6.0, 2.0, 3.0];
    let mut table = [0.0_f32; 16];
    let mut i = 1;
    while i < 8 {
        table[i] = twelfths[i] / 12.0;
        table[i + 8] = -table[i];
        i += 1;
    }
    table
};

/// The codes of FP4 by ascending value. Of the two zeros bitsandbytes has 0 first, so that a number a
/// little above zero gets 8 and one a little below gets 0; both mean zero.
const FP4_ASCENDING: [u8; 16] = [11, 10, 13, 12, 15, 14, 9, 0, 8, 1, 6, 7, 4, 5, 2, 3];
const NF4_ASCENDING: [u8; 16] = [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15];

impl FourBit {
    /// What each code stands for, by code: a checkpoint's `quant_map`.
    pub fn table(self) -> &'static [f32; 16] {
        match self {
            Self::Nf4 => &NF4,
            Self::Fp4 => &FP4,
        }
    }

    /// Its name in a `quant_state` and in `bnb_4bit_quant_type`.
    pub fn name(self) -> &'static str {
        match self {
            Self::Nf4 => "nf4",
            Self::Fp4 => "fp4",
        }
    }

    /// The code of that name, or an error that says which there are.
    pub fn from_name(name: &str) -> Result<Self, QuantError> {
        match name {
            "nf4" => Ok(Self::Nf4),
            "fp4" => Ok(Self::Fp4),
            _ => Err(QuantError::UnknownType(name.to_string())),
        }
    }

    /// Codes by ascending value, and the midpoints between neighbours.
    fn midpoints(self) -> (&'static [u8; 16], [f32; 15]) {
        let (table, order) = match self {
            Self::Nf4 => (&NF4, &NF4_ASCENDING),
            Self::Fp4 => (&FP4, &FP4_ASCENDING),
        };
        let value = |i: usize| table[order[i] as usize];
        (
            order,
            std::array::from_fn(|i| (value(i) + value(i + 1)) / 2.0),
        )
    }
}

/// The dtype a quantised weight had and is dequantised to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum FloatKind {
    /// 32 bits.
    F32,
    /// bfloat16.
    Bf16,
    /// IEEE half precision.
    F16,
}

impl FloatKind {
    /// PyTorch's name, as a `quant_state` has it.
    pub fn name(self) -> &'static str {
        match self {
            Self::F32 => "float32",
            Self::Bf16 => "bfloat16",
            Self::F16 => "float16",
        }
    }

    /// The dtype of that name, or an error that says which there are.
    pub fn from_name(name: &str) -> Result<Self, QuantError> {
        match name {
            "float32" => Ok(Self::F32),
            "bfloat16" => Ok(Self::Bf16),
            "float16" => Ok(Self::F16),
            _ => Err(QuantError::UnknownDtype(name.to_string())),
        }
    }

    /// The nearest value of this dtype, ties to even.
    pub fn round(self, value: f32) -> f32 {
        match self {
            Self::F32 => value,
            Self::Bf16 => bf16::from_f32(value).to_f32(),
            Self::F16 => f16::from_f32(value).to_f32(),
        }
    }
}

/// Number of values of a shape.
pub(crate) fn count(shape: &[usize]) -> Result<usize, QuantError> {
    let product = shape.iter().try_fold(1_usize, |n, &d| n.checked_mul(d));
    product.ok_or_else(|| QuantError::TooLarge(shape.to_vec()))
}

/// Refuses `found` things where the shape needs `expected`.
pub(crate) fn expect(
    what: &'static str,
    shape: &[usize],
    expected: usize,
    found: usize,
) -> Result<(), QuantError> {
    if expected == found {
        return Ok(());
    }
    Err(QuantError::Count {
        what,
        shape: shape.to_vec(),
        expected,
        found,
    })
}

/// Refuses NaN and infinities, naming the first.
fn finite(values: &[f32]) -> Result<(), QuantError> {
    // Whole stretches at a time, so that the comparison vectorises.
    let all = |part: &[f32]| part.iter().fold(true, |all, v| all & v.is_finite());
    let stretch = values.par_chunks(STRETCH).position_first(|part| !all(part));
    let from = stretch.map_or(values.len(), |i| i * STRETCH);
    match values[from..].iter().position(|v| !v.is_finite()) {
        Some(place) => Err(QuantError::NotFinite {
            position: from + place,
            value: values[from + place],
        }),
        None => Ok(()),
    }
}

/// Refuses a range that does not lie inside `length` values.
fn inside(range: &std::ops::Range<usize>, length: usize) -> Result<(), QuantError> {
    if range.start <= range.end && range.end <= length {
        return Ok(());
    }
    Err(QuantError::Range {
        start: range.start,
        end: range.end,
        length,
    })
}

/// The largest magnitude.
fn absmax(values: &[f32]) -> f32 {
    let larger = |m: f32, v: f32| if v > m { v } else { m };
    let (chunks, rest) = values.as_chunks::<16>();
    let mut lanes = [0.0_f32; 16];
    for chunk in chunks {
        for i in 0..16 {
            lanes[i] = larger(lanes[i], chunk[i].abs());
        }
    }
    let rest = rest.iter().fold(0.0, |m, v| larger(m, v.abs()));
    lanes.into_iter().fold(rest, larger)
}
