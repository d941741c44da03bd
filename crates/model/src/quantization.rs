//! How the linear layers of a base are held: as the file has them, or quantised one by one as they are read.

use enamel_kernels::quant::{
    FloatKind, FourBit, FourBitOptions, FourBitTensor, Int8Rows, NESTED_BLOCK, OUTLIER_THRESHOLD,
    QuantError,
};
use enamel_kernels::{Compute, HostValues, PackedRows};

use crate::checkpoint::SourceDtype;

/// How a base is to be held and multiplied. A [`Compute`] alone quantises nothing.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Loading {
    /// What products round their factors to.
    pub compute: Compute,
    /// What happens to the weights of linear layers.
    pub quantization: Quantization,
}

impl From<Compute> for Loading {
    fn from(compute: Compute) -> Self {
        Self {
            compute,
            quantization: Quantization::default(),
        }
    }
}

/// What happens to the weights of a base's linear layers. The output head, embeddings and norms are never
/// quantised here.
#[derive(Clone, Debug, PartialEq)]
pub struct Quantization {
    /// The format to quantise to; `None` leaves them as the file has them.
    pub scheme: Option<Scheme>,
    /// What dequantised values are rounded to (`bnb_4bit_compute_dtype`).
    pub compute: FloatKind,
    /// Modules that stay dense, by name or a part of it between dots.
    pub skip_modules: Vec<String>,
    /// Whether weights that the file has quantised are made dense.
    pub dequantize: bool,
}

impl Default for Quantization {
    fn default() -> Self {
        Self {
            scheme: None,
            compute: FloatKind::F32,
            skip_modules: Vec::new(),
            dequantize: false,
        }
    }
}

/// A format to quantise to.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Scheme {
    /// NF4 or FP4 (`load_in_4bit`).
    FourBit {
        /// The code.
        kind: FourBit,
        /// Values that share a scale.
        block: usize,
        /// Whether the scales are quantised in turn.
        double: bool,
    },
    /// LLM.int8() (`load_in_8bit`).
    Int8 {
        /// Inputs of this magnitude and more are multiplied in floating point.
        threshold: f32,
    },
}

impl Scheme {
    /// NF4 in blocks of 64, as QLoRA has it.
    pub const NF4: Self = Self::FourBit {
        kind: FourBit::Nf4,
        block: 64,
        double: false,
    };

    /// LLM.int8() with bitsandbytes' threshold.
    pub const INT8: Self = Self::Int8 {
        threshold: OUTLIER_THRESHOLD,
    };

    /// Quantises a matrix `[rows, columns]` of values that a file holds as `dtype`.
    ///
    /// # Errors
    /// If the block size is not one of bitsandbytes' or a value is not finite.
    pub fn quantise(
        self,
        values: &[f32],
        shape: [usize; 2],
        dtype: FloatKind,
    ) -> Result<PackedRows, QuantError> {
        Ok(match self {
            Self::FourBit {
                kind,
                block,
                double,
            } => {
                let options = FourBitOptions {
                    kind,
                    block,
                    double,
                    dtype,
                };
                PackedRows::FourBit(FourBitTensor::quantise(values, &shape, options)?)
            }
            Self::Int8 { threshold } => {
                // As bitsandbytes, whatever the weight's dtype was.
                let halves: Vec<f32> = values.iter().map(|v| FloatKind::F16.round(*v)).collect();
                PackedRows::Int8 {
                    rows: Int8Rows::quantise(&halves, shape)?,
                    threshold,
                }
            }
        })
    }

    /// In words: `NF4 in blocks of 64, scales quantised`.
    pub fn describe(self) -> String {
        match self {
            Self::FourBit {
                kind,
                block,
                double,
            } => {
                let scales = if double { ", scales quantised" } else { "" };
                format!(
                    "{} in blocks of {block}{scales}",
                    kind.name().to_uppercase()
                )
            }
            Self::Int8 { threshold } => format!("int8 rows, outliers from {threshold}"),
        }
    }

    /// Bytes of a matrix of `rows` by `columns` in this format.
    pub fn bytes(self, rows: usize, columns: usize) -> usize {
        let count = rows * columns;
        match self {
            Self::FourBit { block, double, .. } => {
                let blocks = count.div_ceil(block);
                let scales = match double {
                    // The 8-bit map and the offset come on top.
                    true => blocks + 4 * (blocks.div_ceil(NESTED_BLOCK) + 257),
                    false => 4 * blocks,
                };
                count.div_ceil(2) + scales
            }
            Self::Int8 { .. } => count + 4 * rows,
        }
    }
}

/// The output head, which stays dense as in transformers.
const HEAD: &str = "lm_head";

impl Quantization {
    /// Whether a linear layer called `module` may be held quantised.
    pub fn takes(&self, module: &str) -> bool {
        module != HEAD && !self.skip_modules.iter().any(|skip| names(skip, module))
    }

    /// Entries of `skip_modules` that name none of the modules.
    pub fn unmatched<'a>(&self, modules: impl Iterator<Item = &'a str> + Clone) -> Vec<String> {
        let unmatched = self.skip_modules.iter().filter(|skip| {
            let mut modules = modules.clone();
            !modules.any(|module| names(skip, module))
        });
        unmatched.cloned().collect()
    }
}

/// Whether `skip` is the module's name, or whole parts of it.
fn names(skip: &str, module: &str) -> bool {
    let (skip, module) = (format!(".{skip}."), format!(".{module}."));
    module.contains(&skip)
}

/// The dtype that a file's values have.
pub(crate) fn dtype_of(values: &HostValues, file: Option<SourceDtype>) -> FloatKind {
    match (values, file) {
        (HostValues::Bf16(_), _) => FloatKind::Bf16,
        (_, Some(SourceDtype::F16)) => FloatKind::F16,
        _ => FloatKind::F32,
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn modules_are_skipped_by_name_or_whole_parts_of_it() {
        let skipping = |skip: &str| Quantization {
            skip_modules: vec![skip.to_owned()],
            ..Quantization::default()
        };
        let module = "model.layers.1.mlp.down_proj";
        for skip in ["down_proj", "mlp", "layers.1", module, "model"] {
            assert!(!skipping(skip).takes(module), "{skip}");
        }
        for other in ["down", "layers.11", "proj", "down_proj.x"] {
            assert!(skipping(other).takes(module), "{other}");
            assert_eq!(skipping(other).unmatched([module].into_iter()), [other]);
        }
        assert!(!Quantization::default().takes("lm_head"));
    }

    #[test]
    fn bytes_are_those_of_what_is_quantised() {
        let values: Vec<f32> = (0..70 * 96).map(|i| (i % 13) as f32 - 6.0).collect();
        let double = Scheme::FourBit {
            kind: FourBit::Fp4,
            block: 64,
            double: true,
        };
        for scheme in [Scheme::NF4, double, Scheme::INT8] {
            let rows = scheme.quantise(&values, [70, 96], FloatKind::F32).unwrap();
            let difference = rows.bytes().abs_diff(scheme.bytes(70, 96));
            assert_eq!(difference, 0, "{}", scheme.describe());
        }
    }
}
