//! Batches: the order of an epoch, grouping by length, and padding.

use rand::RngCore;
use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::SeedableRng;

use crate::examples::Example;
use crate::masks::IGNORED;

/// Several examples padded on the right to one length. All arrays are `[batch, len]`, row-major.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Batch {
    /// Token ids, the padding id after a row's end.
    pub input_ids: Vec<i64>,
    /// Labels of the tokens at the same place, [`IGNORED`] after a row's end; the model shifts.
    pub labels: Vec<i64>,
    /// True on real tokens.
    pub attention_mask: Vec<bool>,
    /// Number of rows.
    pub batch: usize,
    /// Padded length.
    pub len: usize,
    /// Tokens that are predicted and trained: what a token-normalised loss divides by.
    pub trained_tokens: usize,
    /// Real tokens.
    pub tokens: usize,
    /// [`Example::index`] of each row.
    pub rows: Vec<usize>,
}

/// Pads `examples` on the right to the longest, rounded up to a multiple of `pad_to_multiple` (0 and
/// 1 round nothing).
pub fn collate(examples: &[&Example], pad_id: u32, pad_to_multiple: usize) -> Batch {
    let longest = examples
        .iter()
        .map(|example| example.input_ids.len())
        .max()
        .unwrap_or(0);
    let len = longest.next_multiple_of(pad_to_multiple.max(1));
    let batch = examples.len();
    let size = batch.saturating_mul(len);
    let mut out = Batch {
        input_ids: Vec::with_capacity(size),
        labels: Vec::with_capacity(size),
        attention_mask: Vec::with_capacity(size),
        batch,
        len,
        trained_tokens: 0,
        tokens: 0,
        rows: examples.iter().map(|example| example.index).collect(),
    };
    let mut end: usize = 0;
    for example in examples {
        let start = end;
        end = start.saturating_add(len);
        out.input_ids
            .extend(example.input_ids.iter().map(|&id| i64::from(id)));
        out.input_ids.resize(end, i64::from(pad_id));
        out.labels.extend(&example.labels);
        out.labels.resize(end, IGNORED);
        out.attention_mask
            .resize(start.saturating_add(example.input_ids.len()), true);
        out.attention_mask.resize(end, false);
        out.tokens = out.tokens.saturating_add(example.input_ids.len());
        let trained = example.trained_tokens();
        out.trained_tokens = out.trained_tokens.saturating_add(trained);
    }
    out
}

/// The order in which an epoch visits `n` examples: a permutation that `seed` and `epoch` decide
/// alone (ChaCha8, the epoch as its stream), or 0, 1, 2, … without `shuffle`.
pub fn epoch_order(n: usize, seed: u64, epoch: usize, shuffle: bool) -> Vec<usize> {
    let mut order: Vec<usize> = (0..n).collect();
    if shuffle {
        permute(&mut order, &mut stream(seed, epoch as u64));
    }
    order
}

/// `order` rearranged so that batches of `batch_size` hold rows of similar length: within windows of
/// `window` batches rows are sorted by length, then the window's batches are shuffled again. Padding
/// shrinks; which window a row is in stays random.
pub fn group_by_length(
    order: &[usize],
    lengths: &[usize],
    batch_size: usize,
    window: usize,
    seed: u64,
    epoch: usize,
) -> Vec<usize> {
    let batch_size = batch_size.max(1);
    // The upper half of the streams, so that it never repeats the numbers of `epoch_order`.
    let mut rng = stream(seed, (epoch as u64) | 1 << 63);
    let mut out = Vec::with_capacity(order.len());
    for rows in order.chunks(batch_size.saturating_mul(window.max(1))) {
        let mut rows = rows.to_vec();
        rows.sort_by_key(|&row| std::cmp::Reverse(lengths.get(row).copied().unwrap_or(0)));
        let mut batches: Vec<&[usize]> = rows.chunks(batch_size).collect();
        // An incomplete batch stays last, else it would shift the ones after it.
        let partial = batches
            .last()
            .is_some_and(|last| last.len() < batch_size)
            .then(|| batches.pop())
            .flatten();
        permute(&mut batches, &mut rng);
        out.extend(batches.into_iter().chain(partial).flatten());
    }
    out
}

/// Splits `n` rows into training and validation rows, both in ascending order. `fraction` of the rows
/// (rounded; at least one on each side where `0 < fraction < 1` and there are two) are for validation.
pub fn split_rows(n: usize, fraction: f64, seed: u64) -> (Vec<usize>, Vec<usize>) {
    let fraction = if fraction.is_nan() {
        0.0
    } else {
        fraction.clamp(0.0, 1.0)
    };
    let mut valid_count = (n as f64 * fraction).round() as usize;
    if fraction > 0.0 && fraction < 1.0 && n >= 2 {
        valid_count = valid_count.clamp(1, n.saturating_sub(1));
    }
    let mut order: Vec<usize> = (0..n).collect();
    permute(&mut order, &mut stream(seed, u64::MAX));
    let mut train = order.split_off(valid_count.min(n));
    order.sort_unstable();
    train.sort_unstable();
    (train, order)
}

fn stream(seed: u64, stream: u64) -> ChaCha8Rng {
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    rng.set_stream(stream);
    rng
}

/// Fisher–Yates. Written out, so that an update of a library never changes the order of a run.
fn permute<T>(items: &mut [T], rng: &mut ChaCha8Rng) {
    for i in (1..items.len()).rev() {
        let j = below((i as u64).saturating_add(1), rng) as usize;
        items.swap(i, j);
    }
}

/// A uniform number below `bound`, without the bias of a plain remainder.
#[allow(clippy::arithmetic_side_effects, reason = "bounds are at least 2")]
fn below(bound: u64, rng: &mut ChaCha8Rng) -> u64 {
    let limit = u64::MAX - u64::MAX % bound;
    loop {
        let x = rng.next_u64();
        if x < limit {
            return x % bound;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::RowRef;
    use std::path::Path;
    use std::sync::Arc;

    fn example(index: usize, ids: &[u32], labels: &[i64]) -> Example {
        let source = RowRef {
            file: Arc::from(Path::new("rows.jsonl")),
            line: index + 1,
        };
        Example {
            input_ids: ids.to_vec(),
            labels: labels.to_vec(),
            source,
            index,
        }
    }

    #[test]
    fn rows_are_padded_on_the_right() {
        let a = example(4, &[5, 6, 7], &[5, IGNORED, 7]);
        let b = example(9, &[8], &[8]);
        let batch = collate(&[&a, &b], 2, 4);
        assert_eq!(batch.input_ids, [5, 6, 7, 2, 8, 2, 2, 2]);
        assert_eq!(batch.labels, [5, -100, 7, -100, 8, -100, -100, -100]);
        let mask = [true, true, true, false, true, false, false, false];
        assert_eq!(batch.attention_mask, mask);
        assert_eq!((batch.batch, batch.len, batch.tokens), (2, 4, 4));
        // The labels of first tokens are predicted by nothing.
        assert_eq!(batch.trained_tokens, 1);
        assert_eq!(batch.rows, [4, 9]);
        assert_eq!(collate(&[&a, &b], 2, 0).len, 3);
        assert_eq!(collate(&[], 2, 8).len, 0);
    }

    #[test]
    fn an_epoch_visits_every_row_once_and_repeats_itself() {
        let order = epoch_order(1000, 7, 3, true);
        let mut sorted = order.clone();
        sorted.sort_unstable();
        assert_eq!(sorted, (0..1000).collect::<Vec<_>>());
        assert_eq!(order, epoch_order(1000, 7, 3, true));
        assert_ne!(order, epoch_order(1000, 7, 4, true));
        assert_ne!(order, epoch_order(1000, 8, 3, true));
        assert_eq!(epoch_order(4, 7, 3, false), [0, 1, 2, 3]);
        assert!(epoch_order(0, 7, 3, true).is_empty());
    }

    #[test]
    fn the_order_of_a_seed_is_fixed() {
        // Pinned: a change here changes every recorded run.
        assert_eq!(epoch_order(8, 0, 0, true), [3, 6, 0, 5, 1, 7, 2, 4]);
    }

    #[test]
    fn grouping_keeps_the_rows_and_cuts_padding() {
        let lengths: Vec<usize> = (0..203).map(|i| i * 37 % 100 + 1).collect();
        let order = epoch_order(203, 1, 0, true);
        let grouped = group_by_length(&order, &lengths, 8, 10, 1, 0);
        let padding = |order: &[usize]| -> usize {
            let padded = order.chunks(8).map(|batch| {
                let longest = batch.iter().map(|&i| lengths[i]).max().unwrap_or(0);
                longest * batch.len()
            });
            padded.sum::<usize>() - lengths.iter().sum::<usize>()
        };
        assert!(padding(&grouped) * 3 < padding(&order));
        assert_eq!(grouped, group_by_length(&order, &lengths, 8, 10, 1, 0));
        let mut rows = grouped;
        rows.sort_unstable();
        assert_eq!(rows, (0..203).collect::<Vec<_>>());
    }

    #[test]
    fn a_split_is_disjoint_complete_and_repeatable() {
        let (train, valid) = split_rows(101, 0.1, 3);
        assert_eq!((train.len(), valid.len()), (91, 10));
        let mut all = [train.clone(), valid.clone()].concat();
        all.sort_unstable();
        assert_eq!(all, (0..101).collect::<Vec<_>>());
        assert_eq!(split_rows(101, 0.1, 3), (train, valid));
        assert_eq!(split_rows(3, 0.01, 0).1.len(), 1);
        assert_eq!(split_rows(3, 0.99, 0).0.len(), 1);
        assert_eq!(split_rows(3, 0.0, 0).1.len(), 0);
        assert_eq!(
            split_rows(1, 0.5, 0).0.len() + split_rows(1, 0.5, 0).1.len(),
            1
        );
        assert_eq!(split_rows(3, f64::NAN, 0).1.len(), 0);
    }
}
