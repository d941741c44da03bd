//! Several sequences packed into one row: where each begins and ends.

use std::fmt;
use std::sync::Arc;

/// The sequences that each batch row holds, one after the other. A token attends inside its own
/// sequence only; tokens behind the last sequence see nothing and are seen by none.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Segments {
    /// Row-major `[batch, keys]`: the first key of the position's sequence, and the one past its last.
    bounds: Arc<Vec<[u32; 2]>>,
    batch: usize,
    keys: usize,
}

/// Sequences that do not fit their row.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SegmentsError {
    row: usize,
    total: usize,
    keys: usize,
}

impl fmt::Display for SegmentsError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { row, total, keys } = self;
        write!(
            f,
            "the sequences packed into batch row {row} have {total} tokens together, but a row has {keys}: \
             pack fewer into it, or make rows longer"
        )
    }
}

impl std::error::Error for SegmentsError {}

impl Segments {
    /// From the lengths of each row's sequences (the differences of flash-attention's `cu_seqlens`),
    /// in rows of `keys` tokens.
    ///
    /// # Errors
    /// Where a row's sequences are longer than the row.
    pub fn from_lengths<R: AsRef<[usize]>>(
        lengths: &[R],
        keys: usize,
    ) -> Result<Self, SegmentsError> {
        let mut bounds = Vec::with_capacity(lengths.len() * keys);
        for (row, lengths) in lengths.iter().enumerate() {
            let lengths = lengths.as_ref();
            let total = lengths.iter().fold(0usize, |n, x| n.saturating_add(*x));
            if total > keys || u32::try_from(total).is_err() {
                return Err(SegmentsError { row, total, keys });
            }
            let mut start = 0;
            for length in lengths {
                let end = start + length;
                bounds.extend(std::iter::repeat_n([start as u32, end as u32], *length));
                start = end;
            }
            bounds.extend(std::iter::repeat_n([start as u32; 2], keys - start));
        }
        Ok(Self {
            bounds: Arc::new(bounds),
            batch: lengths.len(),
            keys,
        })
    }

    /// Batch rows.
    pub fn batch(&self) -> usize {
        self.batch
    }

    /// Tokens a row.
    pub fn keys(&self) -> usize {
        self.keys
    }

    /// The keys `start .. end` of the sequence that the position belongs to; an empty range where it
    /// belongs to none. Both grow with the position.
    pub fn around(&self, batch: usize, position: usize) -> (usize, usize) {
        if position >= self.keys {
            return (self.keys, self.keys);
        }
        let [start, end] = self.bounds[batch * self.keys + position];
        (start as usize, end as usize)
    }
}
