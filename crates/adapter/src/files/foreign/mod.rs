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

/// Foreign text for a message: without characters that a terminal obeys.
pub(crate) fn shown(text: &str) -> String {
    text.chars()
        .flat_map(|c| {
            let plain = !c.is_control();
            let escaped = (!plain).then(|| c.escape_debug());
            escaped
                .into_iter()
                .flatten()
                .chain(plain.then_some(c))
                .collect::<Vec<_>>()
        })
        .collect()
}

#[cfg(test)]
mod tests;
