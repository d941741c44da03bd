//! Writers of the formats that are fuzzed, with every field open to changes.

pub mod gguf;
pub mod llama;
pub mod safetensors;
pub mod zip;
