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
    let mut out = Batch {
        input_ids: Vec::with_capacity(batch * len),
        labels: Vec::with_capacity(batch * len),
        attention_mask: Vec::with_capacity(batch * len),
        batch,
        len,
        trained_tokens: 0,
        tokens: 0,
        rows: examples.iter().map(|example| example.index).collect(),
    };
    for (row, example) in examples.iter().enumerate() {
        let end = (row + 1) * len;
        out.input_ids
            .extend(example.input_ids.iter().map(|&id| i64::from(id)));
        out.input_ids.resize(end, i64::from(pad_id));
        out.labels.extend(&example.labels);
        out.labels.resize(end, IGNORED);
        out.attention_mask
            .resize(row * len + example.input_ids.len(), true);
        out.attention_mask.resize(end, false);
        out.tokens += example.input_ids.len();
        out.trained_tokens += example.trained_tokens();
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
        valid_count = valid_count.clamp(1, n - 1);
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
        let j = below(i as u64 + 1, rng) as usize;
        items.swap(i, j);
    }
}

/// A uniform number below `bound`, without the bias of a plain remainder.
fn below(bound: u64, rng: &mut ChaCha8Rng) -> u64 {
    let limit = u64::MAX - u64::MAX % bound;
    loop {
        let x = rng.next_u64();
        if x < limit {
            return x % bound;
        }
    }
}
