//! `config.json`: what every architecture has in it, and reading it.
//!
//! Transformers 4 says `rope_theta`, `rope_scaling` and `torch_dtype`; version 5 says `rope_parameters`
//! and `dtype`. Keys that are not understood are kept for writing the file back.

mod common;
mod decoder;
mod reader;
mod rope;

pub use common::Common;
pub(crate) use common::CommonKeys;
pub use decoder::DecoderConfig;
pub(crate) use decoder::DecoderDefaults;
pub use reader::Reader;
pub(crate) use reader::{LARGEST_LAYERS, LARGEST_SIZE};
pub(crate) use rope::yarn_mscale;
pub use rope::{RopeConfig, RopeScaling};

/// Why a `config.json` cannot be used. The caller knows the file and adds its name.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ConfigError {
    /// Not a JSON object.
    #[error("config.json is not a JSON object: check that the file is a model's config.json")]
    NotAnObject,
    /// No `model_type`, so nothing else can be judged.
    #[error("config.json has no `model_type`; supported are {supported}")]
    NoModelType {
        /// The types that can be read.
        supported: String,
    },
    /// An architecture that is not implemented.
    #[error("model_type '{found}' is not supported; supported are {supported}")]
    UnsupportedModelType {
        /// What the file says.
        found: String,
        /// The types that can be read.
        supported: String,
    },
    /// Missing, mistyped, contradictory or unsupported settings, all of them.
    #[error("config.json cannot be used:{}", bullets(.problems))]
    Invalid {
        /// One sentence each, naming the key.
        problems: Vec<String>,
    },
}

/// Puts each line on its own, indented, behind a dash.
pub(crate) fn bullets(lines: &[String]) -> String {
    lines.iter().map(|line| format!("\n  - {line}")).collect()
}
