//! Parts that architectures are built of.

pub(crate) mod recompute;
pub mod rope;
