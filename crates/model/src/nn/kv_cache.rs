//! Keys and values of the tokens seen so far, so that each new token costs one position.

use burn::tensor::{Tensor, s};

/// Room is made for this many further tokens at a time, and at least for half as many as there are.
const BLOCK: usize = 256;

/// The cache of one sequence batch, one entry a block of the model.
///
/// Each entry is a tensor with room to spare that is written in place; on the CPU no key or value is
/// copied per token, only when the room runs out.
#[derive(Debug, Default)]
pub struct KvCache {
    layers: Vec<Option<Entry>>,
    len: usize,
}

/// `[batch, room, kv_heads, head_dim]` each.
#[derive(Debug)]
struct Entry {
    k: Tensor<4>,
    v: Tensor<4>,
}

impl KvCache {
    /// An empty cache for any model.
    pub fn new() -> Self {
        Self::default()
    }

    /// How many tokens it holds.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether it holds none.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Writes one block's keys and values behind those it holds and returns all of them.
    ///
    /// # Shapes
    /// - k, v: `[batch, tokens, kv_heads, head_dim]`
    /// - results: `[batch, len + tokens, kv_heads, head_dim]`
    pub(crate) fn append(
        &mut self,
        layer: usize,
        k: Tensor<4>,
        v: Tensor<4>,
    ) -> (Tensor<4>, Tensor<4>) {
        if self.layers.len() <= layer {
            self.layers.resize_with(layer + 1, || None);
        }
        let len = self.len;
        // Taken out of its place: the write is in place only while nothing else holds the tensor.
        let (old_k, old_v) = self.layers[layer].take().map(|e| (e.k, e.v)).unzip();
        let new_k = write(old_k, k.clone(), len);
        let new_v = write(old_v, v.clone(), len);
        let total = len + k.dims()[1];
        let all = if len == 0 {
            (k, v)
        } else {
            (
                new_k.clone().narrow(1, 0, total),
                new_v.clone().narrow(1, 0, total),
            )
        };
        self.layers[layer] = Some(Entry { k: new_k, v: new_v });
        all
    }

    /// Counts tokens that every block has appended.
    pub(crate) fn advance(&mut self, tokens: usize) {
        self.len += tokens;
    }
}

/// `store` with `new` at positions `len ..`, in a larger tensor if there is no room.
fn write(store: Option<Tensor<4>>, new: Tensor<4>, len: usize) -> Tensor<4> {
    let [batch, tokens, heads, dim] = new.dims();
    let total = len + tokens;
    let store = match store {
        Some(store) if store.dims()[1] >= total => store,
        old => {
            let room = (total + BLOCK.max(total / 2)).next_multiple_of(BLOCK);
            let larger = Tensor::zeros([batch, room, heads, dim], &new.device());
            match old {
                Some(old) => {
                    let held = old.narrow(1, 0, len);
                    larger.slice_assign(s![.., 0..len, .., ..], held)
                }
                None => larger,
            }
        }
    };
    store.slice_assign(s![.., len..total, .., ..], new)
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::testing::{devices, distance, ids, tiny_config, values};
    use crate::{Cache, Model, ModelInput};
    use enamel_kernels::KeyMask;
    use serde_json::json;

    #[test]
    fn pieces_through_the_cache_equal_one_pass() {
        let rows: [Vec<i64>; 2] = [
            (0..9).map(|i| (i * 7 + 3) % 40).collect(),
            (0..9).map(|i| (i * 11 + 1) % 40).collect(),
        ];
        for changes in [
            json!({}),
            json!({"model_type": "mistral", "sliding_window": 3}),
            json!({"rope_scaling": {"type": "yarn", "factor": 4.0}}),
        ] {
            for device in devices() {
                let model = Model::random(&tiny_config(changes.clone()), 5, &device).unwrap();
                // The second row begins with two tokens of padding.
                let mask = |keys: usize| {
                    let valid = [vec![true; keys], (0..keys).map(|i| i >= 2).collect()].concat();
                    Some(KeyMask {
                        valid: Arc::new(valid),
                        batch: 2,
                        keys,
                    })
                };
                let piece = |range: std::ops::Range<usize>| ModelInput {
                    attention_mask: mask(range.end),
                    seed: None,
                    input_ids: ids(&[&rows[0][range.clone()], &rows[1][range]], &device),
                };
                let whole = model.forward_hidden(&piece(0..9), None);
                let mut cache = Cache::new();
                assert!(cache.is_empty());
                let pieces = [0..4, 4..7, 7..8, 8..9]
                    .map(|range| model.forward_hidden(&piece(range), Some(&mut cache)));
                assert_eq!(cache.len(), 9);
                let joined = Tensor::cat(pieces.to_vec(), 1);
                // Sums of another length are taken in another order: rounding only.
                let (a, b) = (
                    values(whole.narrow(1, 2, 7)),
                    values(joined.narrow(1, 2, 7)),
                );
                assert!(distance(&a, &b) < 1e-5, "{changes} on {device:?}");
            }
        }
    }

    #[test]
    fn what_was_appended_survives_growth() {
        for device in devices() {
            let mut cache = KvCache::new();
            let mut expected = Vec::new();
            for step in 0..2 * BLOCK + 90 {
                let new = Tensor::<4>::full([1, 1, 1, 2], step as f32, &device);
                let (k, v) = cache.append(0, new.clone(), new.neg());
                cache.advance(1);
                expected.extend([step as f32; 2]);
                if step % 50 == 0 || step + 1 == 2 * BLOCK + 90 {
                    assert_eq!(values(k), expected);
                    assert_eq!(values(v.neg()), expected);
                }
            }
        }
    }
}
