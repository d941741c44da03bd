//! Linear cross-entropy on Flex: the gradients are taken in the forward pass, while logits are at hand, and
//! only scaled in the backward. Nothing of the size of the logits is kept.

use std::sync::Arc;

use burn::backend::autodiff::Autodiff;
use burn::backend::autodiff::checkpoint::{base::Checkpointer, strategy::CheckpointStrategy};
use burn::backend::autodiff::grads::Gradients;
use burn::backend::autodiff::ops::{Backward, Ops, OpsKind};
use burn::backend::flex::FlexTensor;
use burn::backend::tensor::FloatTensor;
use burn::backend::{AutodiffBackend, Backend, Dispatch, Flex, backend_extension};
use burn::tensor::{DType, Shape, Tensor};
use rayon::prelude::*;

use super::LossSpec;
use super::pass::{Job, Labelled, Outcome, pass};
use crate::cpu::gemm::Weight;
use crate::cpu::matrix::readable;
use crate::cpu::storage::{CHUNK, dense, owned, tensor, values};
use crate::profile;

/// The operation as a backend extension.
#[backend_extension(Flex, Autodiff)]
pub trait CrossEntropyOps: Backend {
    /// The summed loss, `[1]`.
    fn enamel_cross_entropy(
        hidden: FloatTensor<Self>,
        head: FloatTensor<Self>,
        labels: Arc<Vec<i64>>,
        spec: LossSpec,
    ) -> FloatTensor<Self>;

    /// The summed loss and its gradients for hidden and head; `[0]` in place of one not wanted.
    fn enamel_cross_entropy_with_grads(
        hidden: FloatTensor<Self>,
        head: FloatTensor<Self>,
        labels: Arc<Vec<i64>>,
        spec: LossSpec,
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
    spec: LossSpec,
) -> Tensor<1> {
    Tensor::from_dispatch(<Dispatch as CrossEntropyOps>::enamel_cross_entropy(
        hidden.into_dispatch(),
        head.into_dispatch(),
        Arc::new(labels.to_vec()),
        spec,
    ))
}

pub(super) fn token_log_probs(hidden: Tensor<2>, head: Tensor<2>, labels: &[i64]) -> Tensor<1> {
    Tensor::from_dispatch(<Dispatch as CrossEntropyOps>::enamel_token_log_probs(
        hidden.into_dispatch(),
        head.into_dispatch(),
        Arc::new(labels.to_vec()),
    ))
}

/// Runs the pass for tensors as they come.
fn run(
    name: &'static str,
    hidden: FlexTensor,
    head: FlexTensor,
    labels: &[i64],
    spec: LossSpec,
    [want_hidden, want_head]: [bool; 2],
) -> (Outcome, Labelled) {
    let hidden = dense(hidden);
    let head = match head.dtype() {
        DType::BF16 => dense(head),
        _ => readable(head),
    };
    let (rows, width) = (hidden.layout().shape()[0], hidden.layout().shape()[1]);
    let head = Weight::of(&head);
    let labelled = Labelled::of(labels, rows, head.out());
    let product = labelled.rows.len() * width * head.out();
    let products = 1 + usize::from(want_hidden) + usize::from(want_head);
    let bytes = 4 * (rows + head.out()) * width;
    let _timer = profile::op(name, 2 * product * products, bytes);
    let job = Job {
        smoothing: spec.label_smoothing,
        compute: spec.compute,
        want_hidden,
        want_head,
    };
    let outcome = pass(values(&hidden), width, head, &labelled, job);
    (outcome, labelled)
}

impl CrossEntropyOps for Flex {
    fn enamel_cross_entropy(
        hidden: FloatTensor<Self>,
        head: FloatTensor<Self>,
        labels: Arc<Vec<i64>>,
        spec: LossSpec,
    ) -> FloatTensor<Self> {
        Self::enamel_cross_entropy_with_grads(hidden, head, labels, spec, false, false).0
    }

    fn enamel_cross_entropy_with_grads(
        hidden: FloatTensor<Self>,
        head: FloatTensor<Self>,
        labels: Arc<Vec<i64>>,
        spec: LossSpec,
        want_hidden: bool,
        want_head: bool,
    ) -> (FloatTensor<Self>, FloatTensor<Self>, FloatTensor<Self>) {
        let (shape, head_shape) = (
            hidden.layout().shape().clone(),
            head.layout().shape().clone(),
        );
        let wanted = [want_hidden, want_head];
        let name = if want_hidden || want_head {
            "linear_cross_entropy with gradients"
        } else {
            "linear_cross_entropy"
        };
        let (out, _) = run(name, hidden, head, &labels, spec, wanted);
        let of = |values: Vec<f32>, wanted: bool, shape| {
            let shape = if wanted { shape } else { Shape::from(vec![0]) };
            tensor(values, shape)
        };
        let loss = out.losses.iter().sum::<f64>() as f32;
        (
            tensor(vec![loss], Shape::from(vec![1])),
            of(out.d_hidden, want_hidden, shape),
            of(out.d_head, want_head, head_shape),
        )
    }

    fn enamel_scaled(saved: FloatTensor<Self>, grad: FloatTensor<Self>) -> FloatTensor<Self> {
        let grad = dense(grad);
        let factor = values(&grad).first().copied().unwrap_or(0.0);
        let saved = dense(saved);
        if factor == 1.0 {
            return saved;
        }
        let mut scaled = owned(saved);
        let numbers = scaled.storage_mut::<f32>();
        let _timer = profile::op(
            "linear_cross_entropy backward",
            numbers.len(),
            8 * numbers.len(),
        );
        numbers
            .par_chunks_mut(CHUNK)
            .for_each(|x| x.iter_mut().for_each(|x| *x *= factor));
        scaled
    }

    fn enamel_token_log_probs(
        hidden: FloatTensor<Self>,
        head: FloatTensor<Self>,
        labels: Arc<Vec<i64>>,
    ) -> FloatTensor<Self> {
        let rows = hidden.layout().shape()[0];
        let spec = LossSpec::default();
        let (out, labelled) = run("token_log_probs", hidden, head, &labels, spec, [false; 2]);
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
        spec: LossSpec,
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
                    spec,
                    want_hidden,
                    want_head,
                );
                prep.finish((d_hidden, d_head), loss)
            }
            OpsKind::UnTracked(prep) => {
                prep.finish(B::enamel_cross_entropy(hidden, head, labels, spec))
            }
        }
    }

    fn enamel_cross_entropy_with_grads(
        _: FloatTensor<Self>,
        _: FloatTensor<Self>,
        _: Arc<Vec<i64>>,
        _: LossSpec,
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
