//! Models: their configuration, their weights from files, the forward pass and text generation.

pub mod checkpoint;
