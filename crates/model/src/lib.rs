//! Models: their configuration, their weights from files, the forward pass and text generation.

pub mod arch;
pub mod causal_lm;
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
pub mod generate;
pub mod kv_cache;
pub mod loading;
pub mod rope;
pub mod save;
pub mod source;
#[cfg(test)]
mod testing;

pub use causal_lm::{CausalLm, LoadError, ModelInput};
pub use config::{ConfigError, LlamaConfig};
pub use generate::{GenerateError, Sampling, generate};
pub use kv_cache::KvCache;
pub use loading::{Format, Loading, Quantization};
