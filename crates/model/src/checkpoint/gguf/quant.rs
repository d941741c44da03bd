//! GGUF's element types by ggml's codes. What the codes of the block types stand for is in
//! `enamel_kernels`, which multiplies them as they lie.

use enamel_kernels::GgufKind;

use crate::checkpoint::widen;

/// An element type that can be read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum BlockType {
    F32,
    F16,
    BF16,
    Blocks(GgufKind),
}

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

    /// The type with ggml's `code`, or else a name for the type that is not read.
    pub fn from_code(code: u32) -> Result<Self, String> {
        Ok(match code {
            0 => Self::F32,
            1 => Self::F16,
            2 => Self::Blocks(GgufKind::Q4_0),
            3 => Self::Blocks(GgufKind::Q4_1),
            6 => Self::Blocks(GgufKind::Q5_0),
            7 => Self::Blocks(GgufKind::Q5_1),
            8 => Self::Blocks(GgufKind::Q8_0),
            12 => Self::Blocks(GgufKind::Q4K),
            13 => Self::Blocks(GgufKind::Q5K),
            14 => Self::Blocks(GgufKind::Q6K),
            30 => Self::BF16,
            other => {
                return Err(usize::try_from(other)
                    .ok()
                    .and_then(|code| TYPE_NAMES.get(code))
                    .map_or_else(|| format!("number {other}"), |name| (*name).to_owned()));
            }
        })
    }

    pub fn name(self) -> &'static str {
        match self {
            Self::F32 => "F32",
            Self::F16 => "F16",
            Self::BF16 => "BF16",
            Self::Blocks(kind) => kind.name(),
        }
    }

    /// Elements in a block.
    pub fn elements(self) -> usize {
        match self {
            Self::F32 | Self::F16 | Self::BF16 => 1,
            Self::Blocks(kind) => kind.elements(),
        }
    }

    /// Bytes in a block.
    pub fn bytes(self) -> usize {
        match self {
            Self::F32 => 4,
            Self::F16 | Self::BF16 => 2,
            Self::Blocks(kind) => kind.bytes(),
        }
    }

    /// The elements of whole blocks; a last incomplete block (which the header check excludes)
    /// is left out.
    pub fn dequantise(self, bytes: &[u8]) -> Vec<f32> {
        match self {
            Self::F32 => widen::f32_le(bytes),
            Self::F16 => widen::f16_le(bytes),
            Self::BF16 => widen::bf16_le(bytes),
            Self::Blocks(kind) => kind.dequantise(bytes),
        }
    }
}
