//! The architectures, one file each, with Hugging Face's parameter names.

pub mod llama;
mod recompute;

pub(crate) use llama::Fetched;
pub use llama::Llama;
