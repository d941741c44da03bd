//! Models' files: what is read, and what is refused.

pub(crate) mod checkpoint_errors;
pub(crate) mod gguf;
pub(crate) mod quantised;
pub(crate) mod repositories;
pub(crate) mod smollm2;
