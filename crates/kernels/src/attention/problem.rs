//! Sizes, masks and tiles of an attention call.

use super::AttentionSpec;
use crate::cpu::heads::Heads;

/// Queries of a tile.
pub(super) const QUERIES: usize = 64;
/// Columns are computed in whole vectors of the widest kind: rows of a tile are padded to so many.
pub(super) const VECTOR: usize = 16;

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
    /// Of q `[batch, tokens, heads, dim]` and of k and v `[batch, keys, kv_heads, dim]`.
    pub(super) fn new(
        q: [usize; 4],
        k: [usize; 4],
        v: [usize; 4],
        spec: &'a AttentionSpec,
    ) -> Self {
        let [batch, tokens, heads, dim] = q;
        let [_, keys, kv_heads, _] = k;
        assert!(
            k[0] == batch && k[3] == dim && v == k,
            "q {q:?}, k {k:?} and v {v:?} disagree in batch, keys, heads or head_dim"
        );
        assert!(
            kv_heads > 0 && heads % kv_heads == 0,
            "{heads} heads over {kv_heads} key heads"
        );
        if let Some(mask) = &spec.key_mask {
            assert!(
                mask.valid.len() == batch * keys,
                "the key mask has {} entries for {batch} rows of {keys} keys",
                mask.valid.len()
            );
        }
        if let Some(segments) = &spec.segments {
            let (rows, width) = (segments.batch(), segments.keys());
            assert!(
                rows == batch && width == keys,
                "segments of {rows} rows of {width} keys for {batch} rows of {keys}"
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

    /// `dim` in whole vectors.
    pub(super) fn padded(&self) -> usize {
        self.dim.next_multiple_of(VECTOR)
    }

    /// Keys that query `t` may see, the padding mask aside. Both ends grow with `t`.
    pub(super) fn visible(&self, batch: usize, t: usize) -> (usize, usize) {
        let p = t + self.spec.offset;
        let (mut start, mut end) = match &self.spec.segments {
            Some(segments) => segments.around(batch, p),
            None => (0, self.keys),
        };
        if self.spec.causal {
            end = end.min(p + 1);
        }
        if let Some(w) = self.spec.sliding_window {
            start = start.max((p + 1).saturating_sub(w));
        }
        (start.min(end), end)
    }

    /// Keys that any of the queries `from .. to` may see.
    pub(super) fn visible_to_any(&self, batch: usize, from: usize, to: usize) -> (usize, usize) {
        (self.visible(batch, from).0, self.visible(batch, to - 1).1)
    }

    /// Query `t`'s visible columns of the key block `from .. to`, relative to its start.
    pub(super) fn columns(&self, batch: usize, t: usize, from: usize, to: usize) -> (usize, usize) {
        let (start, end) = self.visible(batch, t);
        let end = end.clamp(from, to) - from;
        ((start.clamp(from, to) - from).min(end), end)
    }

    /// Which keys of the block are real.
    pub(super) fn padding(&self, batch: usize, from: usize, to: usize) -> Option<&'a [bool]> {
        let mask = self.spec.key_mask.as_ref()?;
        Some(&mask.valid[batch * self.keys + from..batch * self.keys + to])
    }

    /// Multiply-adds counted as two, of `products` products over the visible pairs: for the profile.
    pub(super) fn flops(&self, products: usize) -> usize {
        let rows = if self.spec.segments.is_some() {
            self.batch
        } else {
            1
        };
        let pairs: usize = (0..rows)
            .flat_map(|b| (0..self.tokens).map(move |t| (b, t)))
            .map(|(b, t)| {
                let (start, end) = self.visible(b, t);
                end - start
            })
            .sum();
        2 * products * self.dim * self.heads * pairs * (self.batch / rows.max(1))
    }

    /// Bytes of q and the output, and of k and v.
    pub(super) fn bytes(&self) -> usize {
        8 * self.batch * self.dim * (self.tokens * self.heads + self.keys * self.kv_heads)
    }
}

/// The queries, keys and values of a call.
#[derive(Clone, Copy)]
pub(super) struct Inputs<'a> {
    pub(super) q: Heads<'a>,
    pub(super) k: Heads<'a>,
    pub(super) v: Heads<'a>,
}

/// Visible columns of one tile: of each row, and of each stripe of rows.
pub(super) struct Columns {
    /// First and one past the last visible column of each row.
    pub(super) rows: [(usize, usize); QUERIES],
    /// Whether every row sees every column.
    pub(super) full: bool,
}

impl Columns {
    /// For queries `from .. to` and the key block `start .. end`.
    pub(super) fn new(
        p: Problem<'_>,
        batch: usize,
        (from, to): (usize, usize),
        (start, end): (usize, usize),
    ) -> Self {
        let mut rows = [(0, 0); QUERIES];
        // Both ends grow with the row: where the last row sees the first column and the first row the
        // last, all see all.
        let full = p.columns(batch, from, start, end).1 == end - start
            && p.columns(batch, to - 1, start, end).0 == 0;
        if full {
            rows[..to - from].fill((0, end - start));
        } else {
            for (row, t) in rows.iter_mut().zip(from..to) {
                *row = p.columns(batch, t, start, end);
            }
        }
        Self { rows, full }
    }

    /// Columns that any of the rows `from .. to` sees.
    pub(super) fn of(&self, from: usize, to: usize) -> (usize, usize) {
        let end = self.rows[to - 1].1;
        (self.rows[from].0.min(end), end)
    }

    /// Rows, of the first `rows`, that see any of the columns `from .. to`.
    pub(super) fn seeing(&self, rows: usize, from: usize, to: usize) -> (usize, usize) {
        if self.full {
            return (0, rows);
        }
        let first = self.rows[..rows].iter().take_while(|r| r.1 <= from).count();
        let last = self.rows[..rows]
            .iter()
            .rev()
            .take_while(|r| r.0 >= to)
            .count();
        (first, (rows - last).max(first))
    }
}
