//! The layers that a model is built of, so that adapters can be put on them.

pub mod adaptable;
pub mod embedding;
pub mod frozen;
pub mod linear;
pub mod slots;
