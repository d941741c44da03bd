//! Adapters as other programs leave them: keys with names and wrappers in them, mlx-lm's files, and files
//! that are named for what they are because they cannot be read.
#![deny(
    clippy::string_slice,
    clippy::indexing_slicing,
    clippy::arithmetic_side_effects
)]

mod keys;
mod mlx;
mod named;

pub(crate) use keys::{canonical, moved};
pub(crate) use mlx::{config as mlx_config, is_mlx, tensors as mlx_tensors};
pub(crate) use named::what_is_there;

/// mlx-lm's file of weights.
pub(crate) const MLX_WEIGHTS: &str = "adapters.safetensors";

#[cfg(test)]
mod tests;
