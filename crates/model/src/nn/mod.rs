//! Parts that architectures are built of.

pub mod attention;
pub mod decoder_layer;
pub mod input;
pub mod kv_cache;
pub mod mlp;
pub(crate) mod recompute;
pub mod weights;
