//! The work of linear cross-entropy on the CPU: tiles of logits, some rows by some of the vocabulary, each
//! used up while it is at hand.
//!
//! The softmax is built up tile by tile as in online softmax (Milakov and Gimelshein 2018,
//! arXiv:1805.02867): a row keeps its largest logit so far and the sum of exponentials below it, and the
//! gradient of hidden, `Σ exp(l − max) · head`, is accumulated with them and scaled down when a larger logit
//! comes. So two products are all that a frozen head costs, whatever the vocabulary. A trained head's
//! gradient wants the final sums: its tiles span the vocabulary where enough rows fit beside it, and are
//! made twice otherwise.
//!
//! A row's label is left out of the tiles and of the sum, and put in at the end: `p − 1` of a label that is
//! nearly certain would have no digits left.

use rayon::prelude::*;

use crate::cpu::exp::exp;
use crate::cpu::gemm::{Compute, Packed, Weight, outer, times, times_t};
use crate::cpu::matrix::{Into, MatMut, MatRef};
use crate::cpu::simd::{self, LANES, Level, level, simd_fn, sum_lanes};
use crate::cpu::storage::Fresh;

/// Floats of a tile (8 MiB): it lies in the cache between the product that makes it and the one that reads
/// it, and so do the head's rows that both read.
const TILE: usize = 2 << 20;
/// Floats of a tile that spans the vocabulary (32 MiB).
const WIDE_TILE: usize = 8 << 20;
/// Rows from which on such a tile is worth it: the head and its gradient are read once for each.
const WIDE_ROWS: usize = 48;
/// Most rows of a tile: the head is read once for each so many.
const ROWS: usize = 2048;
/// Rows of a tile that one task of the exponentials handles.
const TASK_ROWS: usize = 8;

/// What to compute.
#[derive(Clone, Copy, Debug)]
pub(super) struct Job {
    pub(super) smoothing: f64,
    pub(super) compute: Compute,
    pub(super) want_hidden: bool,
    pub(super) want_head: bool,
}

/// The labelled rows: which they are, and what they should predict.
pub(super) struct Labelled {
    pub(super) rows: Vec<usize>,
    targets: Vec<usize>,
}

impl Labelled {
    pub(super) fn of(labels: &[i64], rows: usize, vocabulary: usize) -> Self {
        assert_eq!(labels.len(), rows, "one label a row of hidden");
        let (rows, targets): (Vec<_>, Vec<_>) = labels
            .iter()
            .enumerate()
            .filter_map(|(row, label)| usize::try_from(*label).ok().map(|label| (row, label)))
            .unzip();
        assert!(
            targets.iter().all(|t| *t < vocabulary),
            "a label lies outside the vocabulary of {vocabulary}"
        );
        Self { rows, targets }
    }
}

/// What a pass over all tiles yields; the gradients are those of the summed loss, empty unless asked for.
pub(super) struct Outcome {
    /// Log-probability of each labelled row's label.
    pub(super) log_probs: Vec<f64>,
    /// Loss of each labelled row.
    pub(super) losses: Vec<f64>,
    pub(super) d_hidden: Vec<f32>,
    pub(super) d_head: Vec<f32>,
}

/// The length of a piece where `n` is cut into the fewest equal pieces of at most `most`.
fn piece(n: usize, most: usize) -> usize {
    n.div_ceil(n.div_ceil(most.max(1)).max(1)).max(1)
}

/// Rows and columns of a tile.
fn tile(count: usize, vocabulary: usize, want_head: bool) -> (usize, usize) {
    let wide_rows = WIDE_TILE / vocabulary.max(1);
    if want_head && wide_rows >= WIDE_ROWS.min(count) {
        return (piece(count, wide_rows), vocabulary.max(1));
    }
    let rows = piece(count, ROWS);
    (rows, piece(vocabulary, TILE / rows))
}

/// Bytes that a training pass over `rows` labelled rows allocates: the tile, the packed rows, their gradient
/// tile by tile, and the gradients of hidden and, where it is wanted, of the head.
pub fn loss_bytes(
    rows: usize,
    width: usize,
    vocabulary: usize,
    want_head: bool,
    head_is_bf16: bool,
) -> usize {
    let (tall, mut wide) = tile(rows, vocabulary, want_head);
    if head_is_bf16 {
        wide = wide.min(piece(vocabulary, TILE / width.max(1)));
    }
    let head = if want_head { vocabulary * width } else { 0 };
    size_of::<f32>() * (tall * wide + 2 * tall * width + rows * width + head)
}

/// A row on the way through the vocabulary.
#[derive(Clone, Copy)]
struct Row {
    target: usize,
    /// The label's logit.
    at_target: f32,
    /// The largest logit so far.
    max: f32,
    /// `Σ exp(l − max)` so far, without the label's.
    others: f64,
    /// By what the last tile made all before it smaller.
    shrink: f32,
}

impl Row {
    /// What is subtracted from the logits.
    fn shift(&self) -> f32 {
        // A row without any number in it has none to subtract.
        if self.max == f32::NEG_INFINITY {
            0.0
        } else {
            self.max
        }
    }

    /// `Σ exp(l − max)` with the label's.
    fn sum(&self) -> f64 {
        (f64::from(self.at_target) - f64::from(self.shift())).exp() + self.others
    }
}

simd_fn! {
    /// `Σ exp(x − shift)`. With `keep`, x becomes `exp(x − shift)`.
    fn exponentials<L>(x: &mut [f32], shift: f32, keep: bool) -> f64 {
        /// Terms summed in f32 before they join the f64 total.
        const BLOCK: usize = 64 * LANES;
        let mut total = 0.0f64;
        for block in x.chunks_mut(BLOCK) {
            let mut lanes = [0.0f32; LANES];
            let mut chunks = block.chunks_exact_mut(LANES);
            for x in &mut chunks {
                for i in 0..LANES {
                    let e = exp::<L>(x[i] - shift);
                    lanes[i] += e;
                    if keep {
                        x[i] = e;
                    }
                }
            }
            for x in chunks.into_remainder() {
                let e = exp::<L>(*x - shift);
                lanes[0] += e;
                if keep {
                    *x = e;
                }
            }
            total += f64::from(sum_lanes(lanes));
        }
        total
    }
}

simd_fn! {
    /// The largest of x and `floor`.
    fn largest<L>(x: &[f32], floor: f32) -> f32 {
        simd::max(x, floor)
    }
}

/// Takes a row's part of a tile in, whose first column is `from`. With `keep`, the part becomes
/// `exp(l − max)`, with 0 for the label.
fn absorb(level: Level, row: &mut Row, logits: &mut [f32], from: usize, keep: bool) {
    let at = row.target.checked_sub(from);
    let mut max = row.max;
    if let Some(own) = at.and_then(|at| logits.get_mut(at)) {
        row.at_target = std::mem::replace(own, f32::NEG_INFINITY);
        if row.at_target > max {
            max = row.at_target;
        }
    }
    max = largest(level, logits, max);
    if max > row.max {
        let by = (f64::from(row.max) - f64::from(max)).exp();
        row.others *= by;
        row.shrink = by as f32;
        row.max = max;
    }
    row.others += exponentials(level, logits, row.shift(), keep);
}

/// Some rows of a head.
fn part<'a>(head: Weight<'a>, from: usize, count: usize) -> Weight<'a> {
    match head {
        Weight::F32(w) => Weight::F32(w.rows_from(from, count)),
        Weight::Bf16 { data, width, .. } => Weight::Bf16 {
            data: &data[from * width..(from + count) * width],
            out: count,
            width,
        },
        Weight::Packed {
            data,
            first,
            reading,
            ..
        } => Weight::Packed {
            data,
            first: first + from,
            out: count,
            reading,
        },
    }
}

/// `to = to + factor · row`, for a row of a head.
fn add_row(head: Weight<'_>, row: usize, factor: f32, to: &mut [f32]) {
    match head {
        Weight::F32(w) => match w.line(row) {
            Some(line) => to.iter_mut().zip(line).for_each(|(t, w)| *t += factor * w),
            None => {
                for (j, t) in to.iter_mut().enumerate() {
                    *t += factor * w.get(row, j);
                }
            }
        },
        Weight::Bf16 { data, width, .. } => {
            let line = &data[row * width..][..width];
            to.iter_mut()
                .zip(line)
                .for_each(|(t, w)| *t += factor * w.to_f32());
        }
        Weight::Packed { .. } => {
            let mut line = vec![0.0; to.len()];
            head.read(row, 0, &mut line);
            to.iter_mut().zip(line).for_each(|(t, w)| *t += factor * w);
        }
    }
}

/// The sum of a head's rows: in f32 for some at a time, the parts in f64.
fn column_sums(head: Weight<'_>) -> Vec<f64> {
    const ROWS_A_TASK: usize = 256;
    let (out, width) = (head.out(), head.width());
    let parts: Vec<Vec<f32>> = (0..out.div_ceil(ROWS_A_TASK))
        .into_par_iter()
        .map(|i| {
            let mut sums = vec![0.0f32; width];
            for row in i * ROWS_A_TASK..out.min((i + 1) * ROWS_A_TASK) {
                add_row(head, row, 1.0, &mut sums);
            }
            sums
        })
        .collect();
    let mut sums = vec![0.0f64; width];
    for part in parts {
        sums.iter_mut()
            .zip(part)
            .for_each(|(s, p)| *s += f64::from(p));
    }
    sums
}

/// Loss and gradients of the labelled rows of `hidden`.
pub(super) fn pass(
    hidden: &[f32],
    width: usize,
    head: Weight<'_>,
    labelled: &Labelled,
    job: Job,
) -> Outcome {
    let (vocabulary, count) = (head.out(), labelled.rows.len());
    let length = |wanted: bool, n: usize| if wanted { n } else { 0 };
    let mut outcome = Outcome {
        log_probs: Vec::with_capacity(count),
        losses: Vec::with_capacity(count),
        d_hidden: vec![0.0; length(job.want_hidden, hidden.len())],
        d_head: vec![0.0; length(job.want_head, vocabulary * width)],
    };
    if count == 0 {
        return outcome;
    }
    let (rows, mut columns) = tile(count, vocabulary, job.want_head);
    if let Weight::Bf16 { .. } = head {
        // As much of it as a product may widen at a time.
        columns = columns.min(piece(vocabulary, TILE / width.max(1)));
    }
    let mut memory = Memory {
        tile: Fresh::new(rows * columns),
        d_rows: Fresh::new(length(job.want_hidden, rows * width)),
        columns,
    };
    let whole = (job.smoothing > 0.0).then(|| column_sums(head));
    for (rows, targets) in labelled
        .rows
        .chunks(rows)
        .zip(labelled.targets.chunks(rows))
    {
        let strip = Strip {
            hidden,
            width,
            head,
            rows,
            job,
            whole: whole.as_deref(),
        };
        strip.run(targets, &mut memory, &mut outcome);
    }
    outcome
}

/// Buffers that all tiles use.
struct Memory {
    tile: Fresh,
    /// Gradient of the rows at hand.
    d_rows: Fresh,
    /// Of a tile.
    columns: usize,
}

/// The rows of one row of tiles.
struct Strip<'a> {
    hidden: &'a [f32],
    width: usize,
    head: Weight<'a>,
    rows: &'a [usize],
    job: Job,
    /// Sum of the head's rows, for smoothing.
    whole: Option<&'a [f64]>,
}

impl Strip<'_> {
    fn input(&self, i: usize) -> &[f32] {
        &self.hidden[self.rows[i] * self.width..][..self.width]
    }

    fn run(&self, targets: &[usize], memory: &mut Memory, outcome: &mut Outcome) {
        let (n, width, vocabulary) = (self.rows.len(), self.width, self.head.out());
        let Job {
            smoothing,
            compute,
            want_hidden,
            want_head,
        } = self.job;
        let (level, columns) = (level(), memory.columns);
        let packed = Packed::new(n, width, compute, |i, row| {
            row.copy_from_slice(self.input(i))
        });
        let mut rows: Vec<Row> = targets
            .iter()
            .map(|target| Row {
                target: *target,
                at_target: f32::NAN,
                max: f32::NEG_INFINITY,
                others: 0.0,
                shrink: 1.0,
            })
            .collect();
        let once = columns >= vocabulary;
        let keep = want_hidden || (want_head && once);
        for from in (0..vocabulary).step_by(columns) {
            let wide = columns.min(vocabulary - from);
            let head = part(self.head, from, wide);
            let tile = product_of(&mut memory.tile, &packed, head, n, wide);
            tile.par_chunks_mut(TASK_ROWS * wide)
                .zip(rows.par_chunks_mut(TASK_ROWS))
                .for_each(|(tile, rows)| {
                    for (logits, row) in tile.chunks_exact_mut(wide).zip(rows) {
                        row.shrink = 1.0;
                        absorb(level, row, logits, from, keep);
                    }
                });
            if want_hidden {
                let into = if from == 0 { Into::Set } else { Into::Add };
                // SAFETY: the buffer holds `n` rows, and the first product sets each.
                let mut dst = unsafe { MatMut::raw(memory.d_rows.as_mut_ptr(), n, width, width) };
                if into == Into::Add {
                    // SAFETY: the first product has set them.
                    let d = unsafe {
                        std::slice::from_raw_parts_mut(memory.d_rows.as_mut_ptr(), n * width)
                    };
                    for (d, row) in d.chunks_exact_mut(width).zip(&rows) {
                        if row.shrink != 1.0 {
                            d.iter_mut().for_each(|d| *d *= row.shrink);
                        }
                    }
                }
                let errors = MatRef::rows_of(tile, n, wide);
                times(&mut dst, into, &[(errors, head)], compute);
            }
        }

        // Of each row one over the sum, and how much of the label's row of the head the gradient has.
        let uniform = smoothing / vocabulary as f64;
        let results: Vec<(f32, f32)> = rows
            .iter()
            .enumerate()
            .map(|(i, row)| {
                let sum = row.sum();
                let all = f64::from(row.shift()) + sum.ln();
                let log_prob = f64::from(row.at_target) - all;
                outcome.log_probs.push(log_prob);
                outcome.losses.push(match self.whole {
                    Some(whole) => {
                        let dot = self.input(i).iter().zip(whole);
                        let logits: f64 = dot.map(|(x, w)| f64::from(*x) * w).sum();
                        (smoothing - 1.0) * log_prob + smoothing * all - uniform * logits
                    }
                    None => -log_prob,
                });
                // `p − (1 − smoothing)`, from what the others have.
                let label = smoothing - row.others / sum;
                (sum.recip() as f32, label as f32)
            })
            .collect();
        if want_hidden {
            self.finish_hidden(&rows, &results, memory, &mut outcome.d_hidden);
        }
        if want_head {
            self.add_head(
                &mut rows,
                &results,
                once,
                &packed,
                memory,
                &mut outcome.d_head,
            );
        }
    }

    /// `d_hidden = accumulated / Σ + label · head[target] − smoothing / vocabulary · Σ head`.
    fn finish_hidden(
        &self,
        rows: &[Row],
        results: &[(f32, f32)],
        memory: &mut Memory,
        d_hidden: &mut [f32],
    ) {
        let (n, width) = (self.rows.len(), self.width);
        let uniform = self.job.smoothing / self.head.out() as f64;
        // SAFETY: the products have set these rows.
        let d = unsafe { std::slice::from_raw_parts(memory.d_rows.as_mut_ptr(), n * width) };
        for (i, d) in d.chunks_exact(width).enumerate() {
            let (scale, label) = results[i];
            let out = &mut d_hidden[self.rows[i] * width..][..width];
            out.iter_mut().zip(d).for_each(|(out, d)| *out = d * scale);
            add_row(self.head, rows[i].target, label, out);
            if let Some(whole) = self.whole {
                for (out, w) in out.iter_mut().zip(whole) {
                    *out -= (uniform * w) as f32;
                }
            }
        }
    }

    /// `d_head += (exp(l − max))ᵀ · hidden / Σ`, and what label and smoothing add.
    fn add_head(
        &self,
        rows: &mut [Row],
        results: &[(f32, f32)],
        once: bool,
        packed: &Packed,
        memory: &mut Memory,
        d_head: &mut [f32],
    ) {
        let (n, width, vocabulary) = (self.rows.len(), self.width, self.head.out());
        let (level, columns) = (level(), memory.columns);
        let mut inputs = vec![0.0f32; n * width];
        for (i, (input, (scale, _))) in inputs.chunks_exact_mut(width).zip(results).enumerate() {
            for (to, x) in input.iter_mut().zip(self.input(i)) {
                *to = x * scale;
            }
        }
        let inputs = MatRef::rows_of(&inputs, n, width);
        for from in (0..vocabulary).step_by(columns) {
            let wide = columns.min(vocabulary - from);
            let tile = if once {
                // SAFETY: the one tile there was has been set.
                unsafe { std::slice::from_raw_parts_mut(memory.tile.as_mut_ptr(), n * wide) }
            } else {
                let head = part(self.head, from, wide);
                let tile = product_of(&mut memory.tile, packed, head, n, wide);
                tile.par_chunks_mut(TASK_ROWS * wide)
                    .zip(rows.par_chunks_mut(TASK_ROWS))
                    .for_each(|(tile, rows)| {
                        // The maxima are final: nothing is scaled any more.
                        for (logits, row) in tile.chunks_exact_mut(wide).zip(rows) {
                            absorb(level, row, logits, from, true);
                        }
                    });
                tile
            };
            let d = &mut d_head[from * width..(from + wide) * width];
            let mut dst = MatMut::rows_of(d, wide, width);
            outer(
                &mut dst,
                Into::Add,
                1.0,
                MatRef::rows_of(tile, n, wide),
                inputs,
            );
        }
        for (i, (row, (_, label))) in rows.iter().zip(results).enumerate() {
            let d = &mut d_head[row.target * width..][..width];
            for (d, x) in d.iter_mut().zip(self.input(i)) {
                *d += label * x;
            }
        }
        if self.job.smoothing > 0.0 {
            let uniform = self.job.smoothing / vocabulary as f64;
            let mut sum = vec![0.0f64; width];
            for i in 0..n {
                let input = self.input(i).iter();
                sum.iter_mut()
                    .zip(input)
                    .for_each(|(s, x)| *s += f64::from(*x));
            }
            let sum: Vec<f32> = sum.iter().map(|s| (uniform * s) as f32).collect();
            d_head.par_chunks_mut(width).for_each(|d| {
                d.iter_mut().zip(&sum).for_each(|(d, s)| *d -= s);
            });
        }
    }
}

/// `packed · headᵀ` in a buffer that holds it.
fn product_of<'a>(
    tile: &'a mut Fresh,
    packed: &Packed,
    head: Weight<'_>,
    n: usize,
    wide: usize,
) -> &'a mut [f32] {
    assert!(
        n * wide <= tile.slots().len(),
        "a tile larger than its buffer"
    );
    // SAFETY: the buffer holds the tile, and the product sets it before it is read.
    unsafe {
        let mut dst = MatMut::raw(tile.as_mut_ptr(), n, wide, wide);
        times_t(&mut dst, Into::Set, &[(packed, head)]);
        std::slice::from_raw_parts_mut(tile.as_mut_ptr(), n * wide)
    }
}
