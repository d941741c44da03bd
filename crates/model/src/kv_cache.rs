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
