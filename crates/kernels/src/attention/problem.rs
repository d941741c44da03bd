//! Sizes, masks and tiles of an attention call.

use burn::backend::flex::FlexTensor;

use super::AttentionSpec;

/// Queries and keys of a tile: scores, `q`, `k` and `v` of one fit a core's L2 cache together.
pub(super) const QUERIES: usize = 64;
pub(super) const KEYS: usize = 256;

/// Sizes of a call and what is visible to whom.
#[derive(Clone, Copy)]
pub(super) struct Problem<'a> {
    pub(super) batch: usize,
    pub(super) tokens: usize,
    pub(super) keys: usize,
    pub(super) heads: usize,
    pub(super) kv_heads: usize,
    pub(super) dim: usize,
    pub(super) spec: &'a AttentionSpec,
}

impl<'a> Problem<'a> {
    pub(super) fn of(
        q: &FlexTensor,
        k: &FlexTensor,
        v: &FlexTensor,
        spec: &'a AttentionSpec,
    ) -> Self {
        let (qs, ks) = (q.layout().shape(), k.layout().shape());
        let [batch, tokens, heads, dim] = [qs[0], qs[1], qs[2], qs[3]];
        let (keys, kv_heads) = (ks[1], ks[2]);
        assert!(
            ks[0] == batch && ks[3] == dim && v.layout().shape() == ks,
            "q, k and v disagree in batch or head_dim"
        );
        assert!(
            kv_heads > 0 && heads % kv_heads == 0,
            "{heads} heads over {kv_heads} key heads"
        );
        if let Some(mask) = &spec.key_mask {
            assert!(
                mask.valid.len() == batch * keys,
                "the key mask is [batch, keys]"
            );
        }
        Self {
            batch,
            tokens,
            keys,
            heads,
            kv_heads,
            dim,
            spec,
        }
    }

    pub(super) fn group(&self) -> usize {
        self.heads / self.kv_heads
    }

    /// Keys that query `t` may see, the padding mask aside.
    pub(super) fn visible(&self, t: usize) -> (usize, usize) {
        let p = t + self.spec.offset;
        let end = if self.spec.causal {
            (p + 1).min(self.keys)
        } else {
            self.keys
        };
        let start = self
            .spec
            .sliding_window
            .map_or(0, |w| (p + 1).saturating_sub(w));
        (start.min(end), end)
    }

    /// Keys that any of the queries `from .. to` may see.
    pub(super) fn visible_to_any(&self, from: usize, to: usize) -> (usize, usize) {
        (self.visible(from).0, self.visible(to - 1).1)
    }

    /// Query `t`'s visible columns of the key block `from .. to`, relative to its start.
    pub(super) fn columns(&self, t: usize, from: usize, to: usize) -> (usize, usize) {
        let (start, end) = self.visible(t);
        let end = end.clamp(from, to) - from;
        ((start.clamp(from, to) - from).min(end), end)
    }

    /// Which keys of the block are real.
    pub(super) fn padding(&self, batch: usize, from: usize, to: usize) -> Option<&'a [bool]> {
        let mask = self.spec.key_mask.as_ref()?;
        Some(&mask.valid[batch * self.keys + from..batch * self.keys + to])
    }

    pub(super) fn blocks(
        &self,
        queries: (usize, usize),
    ) -> impl Iterator<Item = (usize, usize)> + use<> {
        let (start, end) = self.visible_to_any(queries.0, queries.1);
        let first = start / KEYS * KEYS;
        (first..end)
            .step_by(KEYS)
            .map(move |k| (k, (k + KEYS).min(end)))
    }
}

/// A pointer that parallel tasks share, each writing its own part.
#[derive(Clone, Copy)]
pub(super) struct Shared(pub(super) *mut f32);

// SAFETY: the tasks that share it write disjoint elements; each says which.
unsafe impl Send for Shared {}
// SAFETY: as above.
unsafe impl Sync for Shared {}

impl Shared {
    pub(super) fn at(self, offset: usize) -> *mut f32 {
        self.0.wrapping_add(offset)
    }
}
