//! Why a model could not be loaded.

mod checkpoint;

use enamel_kernels::quantized::formats::QuantError;

pub use self::checkpoint::{CheckpointError, Problems};
use crate::config::bullets;

/// How many tensors of a kind an error spells out.
const LISTED: usize = 40;

/// Why a model could not be loaded.
#[derive(Debug, thiserror::Error)]
pub enum LoadError {
    /// The checkpoint's tensors are not those that the configuration calls for.
    #[error(
        "the weights do not fit config.json (is it the file they came with?):{}",
        describe(.missing, .unexpected, .misshapen)
    )]
    Mismatch {
        /// Names that the model needs and the checkpoint lacks.
        missing: Vec<String>,
        /// Names that the model has no place for.
        unexpected: Vec<String>,
        /// Tensors of another shape than the configuration says.
        misshapen: Vec<Misshapen>,
    },
    /// A tensor's values could not be read.
    #[error(transparent)]
    Checkpoint(#[from] CheckpointError),
    /// The source broke its word about a tensor's shape.
    #[error("tensor '{name}' has {found} values where its shape calls for {expected}")]
    WrongLength {
        /// The tensor.
        name: String,
        /// Product of the shape.
        expected: usize,
        /// Values that came.
        found: usize,
    },
    /// A weight that the format cannot hold.
    #[error(
        "tensor '{name}' cannot be quantised: {source}\n  \
         help: leave its layer dense with model.quantization.skip_modules (--skip-modules)"
    )]
    Quantise {
        /// The tensor.
        name: String,
        /// Why not.
        source: QuantError,
    },
    /// A weight that is no whole number of blocks.
    #[error(
        "tensor '{name}' of shape {shape:?} is no whole number of blocks of {block} values\n  \
         help: choose a smaller model.quantization.bnb_4bit_blocksize (--bnb-4bit-blocksize), or name its layer in \
         skip_modules (--skip-modules)"
    )]
    Blocks {
        /// The tensor.
        name: String,
        /// Its rows and columns.
        shape: [usize; 2],
        /// Values a block.
        block: usize,
    },
    /// Codes of bitsandbytes' in a layer that is stored the other way round.
    #[error(
        "tensor '{name}' is quantised by bitsandbytes in a layer that lies transposed in its files (Conv1D), which is \
         not read\n  help: take the model as it was before, and quantise it while it is loaded"
    )]
    TransposedPacked {
        /// The tensor.
        name: String,
    },
    /// Names in `skip_modules` that no linear layer has, each with the nearest that one has.
    #[error("model.quantization.skip_modules (--skip-modules) names what the model has not:{}", strange(.0))]
    SkipModules(Vec<(String, Option<String>)>),
}

fn strange(names: &[(String, Option<String>)]) -> String {
    let line = |(name, near): &(String, Option<String>)| match near {
        Some(near) => format!("{name} (did you mean {near}?)"),
        None => format!("{name} (no linear layer's name begins or ends so)"),
    };
    bullets(&names.iter().map(line).collect::<Vec<_>>())
}

/// A tensor of the wrong shape.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Misshapen {
    /// The tensor.
    pub name: String,
    /// The shape that the configuration calls for.
    pub expected: Vec<usize>,
    /// The shape in the checkpoint.
    pub found: Vec<usize>,
}

fn describe(missing: &[String], unexpected: &[String], misshapen: &[Misshapen]) -> String {
    let some = |kind: &str, lines: Vec<String>| {
        let mut lines: Vec<_> = lines
            .into_iter()
            .map(|line| format!("{kind} {line}"))
            .collect();
        if lines.len() > LISTED {
            let more = lines.len() - LISTED;
            lines.truncate(LISTED);
            lines.push(format!("and {more} more {kind}"));
        }
        lines
    };
    let mut lines = some("missing", missing.to_vec());
    lines.extend(some("unexpected", unexpected.to_vec()));
    let shapes = misshapen.iter().map(|m| {
        format!(
            "{}: {:?} in the checkpoint, {:?} needed",
            m.name, m.found, m.expected
        )
    });
    lines.extend(some("misshapen", shapes.collect()));
    bullets(&lines)
}
