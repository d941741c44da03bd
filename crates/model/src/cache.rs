//! What a model keeps of the tokens it has seen.

use crate::nn::kv_cache::KvCache;

/// What a [`Model`](crate::Model) keeps of one batch of sequences, from one call to the next.
#[derive(Debug, Default)]
pub struct Cache {
    layers: KvCache,
    /// What a mixture's first pass has seen: other hidden states, so other keys and values. Empty without one.
    first_pass: KvCache,
}

impl Cache {
    /// An empty cache for any model.
    pub fn new() -> Self {
        Self::default()
    }

    /// How many tokens it holds.
    pub fn len(&self) -> usize {
        self.layers.len()
    }

    /// Whether it holds none.
    pub fn is_empty(&self) -> bool {
        self.layers.is_empty()
    }

    /// The keys and values of the model as it answers, and those of a mixture's first pass.
    pub(crate) fn passes(&mut self) -> (&mut KvCache, &mut KvCache) {
        (&mut self.layers, &mut self.first_pass)
    }
}
