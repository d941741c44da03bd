//! The architectures, one file each, with Hugging Face's parameter names.

pub mod llama;

pub use llama::Llama;
