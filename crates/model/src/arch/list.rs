//! The list of architectures: a line each.

use std::num::NonZeroUsize;

use burn::module::Module;
use burn::tensor::Tensor;
use enamel_adapter::{Embedding, Slot, SlotRef, Slots};

use super::architectures;
use crate::config::{Common, DecoderConfig, Reader};
use crate::error::LoadError;
use crate::nn::input::ModelInput;
use crate::nn::kv_cache::KvCache;
use crate::nn::weights::Weights;

architectures! {
    Llama => llama: LlamaConfig, Llama;
    Qwen3 => qwen3: Qwen3Config, Qwen3;
    Gpt2 => gpt2: Gpt2Config, Gpt2;
}
