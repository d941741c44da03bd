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
    /// Q4_0.
    pub const Q4_0: Self = Self::Blocks(GgufKind::Q4_0);
    /// Q4_1.
    pub const Q4_1: Self = Self::Blocks(GgufKind::Q4_1);
    /// Q5_0.
    pub const Q5_0: Self = Self::Blocks(GgufKind::Q5_0);
    /// Q5_1.
    pub const Q5_1: Self = Self::Blocks(GgufKind::Q5_1);
    /// Q8_0.
    pub const Q8_0: Self = Self::Blocks(GgufKind::Q8_0);
    /// Q4_K.
    pub const Q4K: Self = Self::Blocks(GgufKind::Q4K);
    /// Q5_K.
    pub const Q5K: Self = Self::Blocks(GgufKind::Q5K);
    /// Q6_K.
    pub const Q6K: Self = Self::Blocks(GgufKind::Q6K);

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
