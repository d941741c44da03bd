//! What a forward pass reads, and what its blocks know of the tokens at hand.

use burn::tensor::{Device, Int, Tensor};
use enamel_kernels::KeyMask;

use crate::config::RopeConfig;

/// What a forward pass reads.
#[derive(Clone, Debug)]
pub struct ModelInput {
    /// Token ids `[batch, tokens]`, each below the vocabulary's size, on the model's device.
    pub input_ids: Tensor<2, Int>,
    /// Which keys are real, over the cached ones and these; `None` if all are.
    pub attention_mask: Option<KeyMask>,
    /// In training: seeds what the blocks draw (dropout), each block by its number, which leaves the
    /// device's generator elsewhere than it was. Without it they draw from that generator as it stands.
    pub seed: Option<u64>,
}

impl ModelInput {
    /// Tokens without padding.
    pub fn new(input_ids: Tensor<2, Int>) -> Self {
        Self {
            input_ids,
            attention_mask: None,
            seed: None,
        }
    }
}

/// What every block needs to know of the tokens at hand.
#[derive(Clone, Debug)]
pub struct Positions {
    /// Cosines `[tokens, head_dim / 2]`.
    pub cos: Tensor<2>,
    /// Sines `[tokens, head_dim / 2]`.
    pub sin: Tensor<2>,
    /// Position of the first token: how many the cache holds already.
    pub offset: usize,
    /// Padding among the keys, if there is any.
    pub key_mask: Option<KeyMask>,
}

impl Positions {
    /// The rotary tables and the mask for `tokens` tokens after `offset` cached ones.
    pub fn new(
        rope: &RopeConfig,
        head_dim: usize,
        (offset, tokens): (usize, usize),
        key_mask: Option<&KeyMask>,
        device: &Device,
    ) -> Self {
        let (cos, sin) = rope.tables(head_dim, offset, tokens, device);
        // A mask that hides nothing would only send attention down its slower path.
        let key_mask = key_mask
            .filter(|mask| mask.valid.iter().any(|valid| !valid))
            .cloned();
        Self {
            cos,
            sin,
            offset,
            key_mask,
        }
    }
}
