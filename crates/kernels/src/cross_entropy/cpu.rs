//! Linear cross-entropy on Flex: labelled rows only, a chunk of logits at a time, and the gradients
//! taken while a chunk's logits are at hand. Nothing of the size of the logits is kept.

use std::sync::Arc;

use burn::backend::autodiff::Autodiff;
use burn::backend::autodiff::checkpoint::{base::Checkpointer, strategy::CheckpointStrategy};
use burn::backend::autodiff::grads::Gradients;
use burn::backend::autodiff::ops::{Backward, Ops, OpsKind};
use burn::backend::tensor::FloatTensor;
use burn::backend::{AutodiffBackend, Backend, Dispatch, Flex, backend_extension};
use burn::tensor::{Shape, Tensor};
use rayon::prelude::*;

use crate::cpu::exp::exp;
use crate::cpu::matrix::{Into, MatMut, MatRef, Threads, product, readable};
use crate::cpu::simd::{self, LANES, level, simd_fn, sum_lanes};
use crate::cpu::storage::{Fresh, dense, tensor, values};

/// Floats of one chunk's logits (64 MiB): many rows share each packing of the head, and the chunk
/// stays small beside a model whose vocabulary makes the logits large at all.
const CHUNK_LOGITS: usize = 16 << 20;

/// The operation as a backend extension.
#[backend_extension(Flex, Autodiff)]
pub trait CrossEntropyOps: Backend {
    /// The summed loss, `[1]`.
    fn enamel_cross_entropy(
        hidden: FloatTensor<Self>,
        head: FloatTensor<Self>,
        labels: Arc<Vec<i64>>,
    ) -> FloatTensor<Self>;

    /// The summed loss and its gradients for hidden and head; `[0]` in place of one not wanted.
    fn enamel_cross_entropy_with_grads(
        hidden: FloatTensor<Self>,
        head: FloatTensor<Self>,
        labels: Arc<Vec<i64>>,
        want_hidden: bool,
        want_head: bool,
    ) -> (FloatTensor<Self>, FloatTensor<Self>, FloatTensor<Self>);

    /// `saved · grad[0]`.
    fn enamel_scaled(saved: FloatTensor<Self>, grad: FloatTensor<Self>) -> FloatTensor<Self>;

    /// Log-probability of each row's label.
    fn enamel_token_log_probs(
        hidden: FloatTensor<Self>,
        head: FloatTensor<Self>,
        labels: Arc<Vec<i64>>,
    ) -> FloatTensor<Self>;
}

pub(super) fn linear_cross_entropy(
    hidden: Tensor<2>,
    head: Tensor<2>,
    labels: &[i64],
) -> Tensor<1> {
    Tensor::from_dispatch(<Dispatch as CrossEntropyOps>::enamel_cross_entropy(
        hidden.into_dispatch(),
        head.into_dispatch(),
        Arc::new(labels.to_vec()),
    ))
}

pub(super) fn token_log_probs(hidden: Tensor<2>, head: Tensor<2>, labels: &[i64]) -> Tensor<1> {
    Tensor::from_dispatch(<Dispatch as CrossEntropyOps>::enamel_token_log_probs(
        hidden.into_dispatch(),
        head.into_dispatch(),
        Arc::new(labels.to_vec()),
    ))
}

simd_fn! {
    /// The row's maximum and `Σ exp(x − max)`. With `keep`, the row becomes `exp(x − max)`.
    fn exponentials<L>(row: &mut [f32], keep: bool) -> (f32, f64) {
        /// Terms summed in f32 before they join the f64 total.
        const BLOCK: usize = 64 * LANES;
        let max = simd::max(row, f32::NEG_INFINITY);
        let mut total = 0.0f64;
        for block in row.chunks_mut(BLOCK) {
            let mut lanes = [0.0f32; LANES];
            let mut chunks = block.chunks_exact_mut(LANES);
            for x in &mut chunks {
                for i in 0..LANES {
                    let e = exp::<L>(x[i] - max);
                    lanes[i] += e;
                    if keep {
                        x[i] = e;
                    }
                }
            }
            for x in chunks.into_remainder() {
                let e = exp::<L>(*x - max);
                lanes[0] += e;
                if keep {
                    *x = e;
                }
            }
            total += f64::from(sum_lanes(lanes));
        }
        (max, total)
    }
}

/// The labelled rows: which they are, and what they should predict.
struct Labelled {
    rows: Vec<usize>,
    targets: Vec<usize>,
}

impl Labelled {
    fn of(labels: &[i64], rows: usize, vocabulary: usize) -> Self {
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

    /// Rows a chunk: as many as fit the budget, evenly over the chunks.
    fn chunk(&self, vocabulary: usize) -> usize {
        let most = (CHUNK_LOGITS / vocabulary.max(1)).max(1);
        let chunks = self.rows.len().div_ceil(most).max(1);
        self.rows.len().div_ceil(chunks).max(1)
    }
}

/// What a pass over all chunks yields; the gradients are empty unless asked for.
struct Outcome {
    log_probs: Vec<f64>,
    d_hidden: Vec<f32>,
    d_head: Vec<f32>,
}

/// `d_hidden` and `d_head` are those of the summed loss.
fn pass(
    hidden: &[f32],
    width: usize,
    head: MatRef<'_>,
    vocabulary: usize,
    labelled: &Labelled,
    want_hidden: bool,
    want_head: bool,
) -> Outcome {
    let level = level();
    let count = labelled.rows.len();
    let keep = want_hidden || want_head;
    let mut outcome = Outcome {
        log_probs: Vec::with_capacity(count),
        d_hidden: if want_hidden {
            vec![0.0; hidden.len()]
        } else {
            Vec::new()
        },
        d_head: if want_head {
            vec![0.0; vocabulary * width]
        } else {
            Vec::new()
        },
    };
    let chunk = labelled.chunk(vocabulary);
    let mut logits = Fresh::new(chunk.min(count) * vocabulary);
    let mut inputs = Vec::with_capacity(chunk * width);
    let mut d_inputs = vec![
        0.0f32;
        if want_hidden {
            chunk.min(count) * width
        } else {
            0
        }
    ];

    for (rows, targets) in labelled
        .rows
        .chunks(chunk)
        .zip(labelled.targets.chunks(chunk))
    {
        let n = rows.len();
        inputs.clear();
        for row in rows {
            inputs.extend_from_slice(&hidden[row * width..(row + 1) * width]);
        }
        // SAFETY: the buffer holds `n` rows, and the product sets each before any is read.
        let logits: &mut [f32] = unsafe {
            let mut dst = MatMut::raw(logits.as_mut_ptr(), n, vocabulary, vocabulary);
            let inputs = MatRef::rows_of(&inputs, n, width);
            product(&mut dst, Into::Set, 1.0, inputs, head.t(), Threads::All);
            std::slice::from_raw_parts_mut(logits.as_mut_ptr(), n * vocabulary)
        };
        // Per row: log-probability, 1 / Σ exp. The row itself becomes Σ·(softmax − one-hot), so
        // that the normalisation is a factor on the narrow side of the products below.
        let results: Vec<(f64, f32)> = logits
            .par_chunks_mut(vocabulary)
            .zip(targets)
            .map(|(row, target)| {
                let at_target = row[*target];
                let (max, sum) = exponentials(level, row, keep);
                if keep {
                    row[*target] = (f64::from(row[*target]) - sum) as f32;
                }
                let log_prob = f64::from(at_target) - f64::from(max) - sum.ln();
                (log_prob, sum.recip() as f32)
            })
            .collect();
        let errors = MatRef::rows_of(logits, n, vocabulary);
        if want_hidden {
            let mut dst = MatMut::rows_of(&mut d_inputs, n, width);
            product(&mut dst, Into::Set, 1.0, errors, head, Threads::All);
            for ((row, d), (_, scale)) in
                rows.iter().zip(d_inputs.chunks_exact(width)).zip(&results)
            {
                let out = &mut outcome.d_hidden[row * width..(row + 1) * width];
                out.iter_mut().zip(d).for_each(|(o, d)| *o = d * scale);
            }
        }
        if want_head {
            for (input, (_, scale)) in inputs.chunks_exact_mut(width).zip(&results) {
                input.iter_mut().for_each(|x| *x *= scale);
            }
            let mut dst = MatMut::rows_of(&mut outcome.d_head, vocabulary, width);
            let inputs = MatRef::rows_of(&inputs, n, width);
            product(&mut dst, Into::Add, 1.0, errors.t(), inputs, Threads::All);
        }
        outcome.log_probs.extend(results.iter().map(|(p, _)| *p));
    }
    outcome
}

fn loss_of(log_probs: &[f64]) -> Vec<f32> {
    vec![(-log_probs.iter().sum::<f64>()) as f32]
}

impl CrossEntropyOps for Flex {
    fn enamel_cross_entropy(
        hidden: FloatTensor<Self>,
        head: FloatTensor<Self>,
        labels: Arc<Vec<i64>>,
    ) -> FloatTensor<Self> {
        Self::enamel_cross_entropy_with_grads(hidden, head, labels, false, false).0
    }

    fn enamel_cross_entropy_with_grads(
        hidden: FloatTensor<Self>,
        head: FloatTensor<Self>,
        labels: Arc<Vec<i64>>,
        want_hidden: bool,
        want_head: bool,
    ) -> (FloatTensor<Self>, FloatTensor<Self>, FloatTensor<Self>) {
        let (hidden, head) = (dense(hidden), readable(head));
        let shape = hidden.layout().shape().clone();
        let head_shape = head.layout().shape().clone();
        let (rows, width, vocabulary) = (shape[0], shape[1], head_shape[0]);
        let labelled = Labelled::of(&labels, rows, vocabulary);
        let out = pass(
            values(&hidden),
            width,
            MatRef::of(&head),
            vocabulary,
            &labelled,
            want_hidden,
            want_head,
        );
        let nothing = Shape::from(vec![0]);
        (
            tensor(loss_of(&out.log_probs), Shape::from(vec![1])),
            tensor(
                out.d_hidden,
                if want_hidden { shape } else { nothing.clone() },
            ),
            tensor(out.d_head, if want_head { head_shape } else { nothing }),
        )
    }

    fn enamel_scaled(saved: FloatTensor<Self>, grad: FloatTensor<Self>) -> FloatTensor<Self> {
        let grad = dense(grad);
        let factor = values(&grad).first().copied().unwrap_or(0.0);
        let mut saved = dense(saved);
        let shape = saved.layout().shape().clone();
        if saved.layout().start_offset() == 0
            && let Some(v) = saved.try_storage_mut::<f32>()
        {
            v.iter_mut().for_each(|x| *x *= factor);
            return saved;
        }
        tensor(values(&saved).iter().map(|x| x * factor).collect(), shape)
    }

    fn enamel_token_log_probs(
        hidden: FloatTensor<Self>,
        head: FloatTensor<Self>,
        labels: Arc<Vec<i64>>,
    ) -> FloatTensor<Self> {
        let (hidden, head) = (dense(hidden), readable(head));
        let (rows, width) = (hidden.layout().shape()[0], hidden.layout().shape()[1]);
        let vocabulary = head.layout().shape()[0];
        let labelled = Labelled::of(&labels, rows, vocabulary);
        let head = MatRef::of(&head);
        let out = pass(
            values(&hidden),
            width,
            head,
            vocabulary,
            &labelled,
            false,
            false,
        );
        let mut result = vec![0.0f32; rows];
        for (row, p) in labelled.rows.iter().zip(out.log_probs) {
            result[*row] = p as f32;
        }
        tensor(result, Shape::from(vec![rows]))
    }
}

#[derive(Debug)]
struct CrossEntropyStep;

impl<B: CrossEntropyOps> Backward<B, 2> for CrossEntropyStep {
    /// Gradients of hidden and head for an incoming gradient of one.
    type State = (FloatTensor<B>, FloatTensor<B>);

    fn backward(self, ops: Ops<Self::State, 2>, grads: &mut Gradients, _: &mut Checkpointer) {
        let grad = grads.consume::<B>(&ops.node);
        let [hidden, head] = ops.parents;
        let (d_hidden, d_head) = ops.state;
        if let Some(node) = hidden {
            grads.register::<B>(node.id, B::enamel_scaled(d_hidden, grad.clone()));
        }
        if let Some(node) = head {
            grads.register::<B>(node.id, B::enamel_scaled(d_head, grad));
        }
    }
}

impl<B: CrossEntropyOps, C: CheckpointStrategy> CrossEntropyOps for Autodiff<B, C> {
    fn enamel_cross_entropy(
        hidden: FloatTensor<Self>,
        head: FloatTensor<Self>,
        labels: Arc<Vec<i64>>,
    ) -> FloatTensor<Self> {
        let (want_hidden, want_head) = (hidden.is_tracked(), head.is_tracked());
        let (hidden, hidden_node) = hidden.into_parts();
        let (head, head_node) = head.into_parts();
        match CrossEntropyStep
            .prepare::<C>([hidden_node, head_node])
            .compute_bound()
            .stateful()
        {
            OpsKind::Tracked(prep) => {
                let (loss, d_hidden, d_head) = B::enamel_cross_entropy_with_grads(
                    hidden,
                    head,
                    labels,
                    want_hidden,
                    want_head,
                );
                prep.finish((d_hidden, d_head), loss)
            }
            OpsKind::UnTracked(prep) => prep.finish(B::enamel_cross_entropy(hidden, head, labels)),
        }
    }

    fn enamel_cross_entropy_with_grads(
        _: FloatTensor<Self>,
        _: FloatTensor<Self>,
        _: Arc<Vec<i64>>,
        _: bool,
        _: bool,
    ) -> (FloatTensor<Self>, FloatTensor<Self>, FloatTensor<Self>) {
        unimplemented!("second-order gradients of linear_cross_entropy")
    }

    fn enamel_scaled(_: FloatTensor<Self>, _: FloatTensor<Self>) -> FloatTensor<Self> {
        unimplemented!("second-order gradients of linear_cross_entropy")
    }

    fn enamel_token_log_probs(
        hidden: FloatTensor<Self>,
        head: FloatTensor<Self>,
        labels: Arc<Vec<i64>>,
    ) -> FloatTensor<Self> {
        let (hidden, head) = (hidden.into_primitive(), head.into_primitive());
        <Self as AutodiffBackend>::from_inner(B::enamel_token_log_probs(hidden, head, labels))
    }
}
