//! Models: their configuration, their weights from files, the forward pass and text generation.

pub mod arch;
pub mod cache;
pub mod digest;
pub mod error;
pub mod generation;
pub mod heads;
mod model;
pub mod nn;
pub mod quantization;
// Bytes of others are read in these two, and in `source`: no index, cut or sum that could panic.
#[cfg_attr(
    not(test),
    deny(
        clippy::string_slice,
        clippy::indexing_slicing,
        clippy::arithmetic_side_effects
    )
)]
pub mod checkpoint;
#[cfg_attr(
    not(test),
    deny(
        clippy::string_slice,
        clippy::indexing_slicing,
        clippy::arithmetic_side_effects
    )
)]
pub mod config;
pub mod save;
pub mod source;
#[cfg(test)]
mod testing;

pub use crate::generation::{GenerateError, Sampling, generate};
pub use crate::quantization::{Format, Loading, Quantization};
pub use arch::ArchConfig;
pub use cache::Cache;
pub use config::ConfigError;
pub use error::LoadError;
pub use heads::{Head, HeadConfig};
pub use model::{Model, StoredNames};
pub use nn::input::ModelInput;

/// The README's examples.
#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct Readme;
