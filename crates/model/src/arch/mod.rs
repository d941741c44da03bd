//! The architectures, one file each, with Hugging Face's parameter names.

pub mod llama;
mod recompute;

pub use llama::Llama;
