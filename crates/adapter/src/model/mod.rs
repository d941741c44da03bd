//! What is done to a whole model: adapters attached, chosen, merged, and their parameters read and written.

pub mod active;
pub mod attach;
pub mod merge;
pub mod plan;
pub mod trainable;
