//! Attention as a backend extension, and its place in the autodiff graph.

use std::sync::Arc;

use burn::backend::autodiff::Autodiff;
use burn::backend::autodiff::checkpoint::{base::Checkpointer, strategy::CheckpointStrategy};
use burn::backend::autodiff::grads::Gradients;
use burn::backend::autodiff::ops::{Backward, Ops, OpsKind};
use burn::backend::tensor::FloatTensor;
use burn::backend::{Backend, Dispatch, backend_extension};
use burn::tensor::Tensor;

use super::AttentionSpec;

/// The operation as a backend extension.
#[backend_extension(Flex, Autodiff)]
pub trait AttentionOps: Backend {
    /// The attention's output.
    fn enamel_attention(
        q: FloatTensor<Self>,
        k: FloatTensor<Self>,
        v: FloatTensor<Self>,
        spec: Arc<AttentionSpec>,
    ) -> FloatTensor<Self>;

    /// The output and each query's `log Σ exp(score)`, `[batch, heads, tokens]`.
    fn enamel_attention_with_sums(
        q: FloatTensor<Self>,
        k: FloatTensor<Self>,
        v: FloatTensor<Self>,
        spec: Arc<AttentionSpec>,
    ) -> (FloatTensor<Self>, FloatTensor<Self>);

    /// Gradients of q, k and v.
    fn enamel_attention_backward(
        q: FloatTensor<Self>,
        k: FloatTensor<Self>,
        v: FloatTensor<Self>,
        out: FloatTensor<Self>,
        log_sums: FloatTensor<Self>,
        grad: FloatTensor<Self>,
        spec: Arc<AttentionSpec>,
    ) -> (FloatTensor<Self>, FloatTensor<Self>, FloatTensor<Self>);
}

pub(super) fn attention(
    q: Tensor<4>,
    k: Tensor<4>,
    v: Tensor<4>,
    spec: &AttentionSpec,
) -> Tensor<4> {
    Tensor::from_dispatch(<Dispatch as AttentionOps>::enamel_attention(
        q.into_dispatch(),
        k.into_dispatch(),
        v.into_dispatch(),
        Arc::new(spec.clone()),
    ))
}

/// What the backward needs. Scores are computed again from q, k and the log-sums.
#[derive(Clone, Debug)]
struct AttentionState<B: Backend> {
    q: FloatTensor<B>,
    k: FloatTensor<B>,
    v: FloatTensor<B>,
    out: FloatTensor<B>,
    log_sums: FloatTensor<B>,
    spec: Arc<AttentionSpec>,
}

#[derive(Debug)]
struct AttentionStep;

impl<B: AttentionOps> Backward<B, 3> for AttentionStep {
    type State = AttentionState<B>;

    fn backward(self, ops: Ops<Self::State, 3>, grads: &mut Gradients, _: &mut Checkpointer) {
        let grad = grads.consume::<B>(&ops.node);
        let AttentionState {
            q,
            k,
            v,
            out,
            log_sums,
            spec,
        } = ops.state;
        let (dq, dk, dv) = B::enamel_attention_backward(q, k, v, out, log_sums, grad, spec);
        for (node, grad) in ops.parents.into_iter().zip([dq, dk, dv]) {
            if let Some(node) = node {
                grads.register::<B>(node.id, grad);
            }
        }
    }
}

impl<B: AttentionOps, C: CheckpointStrategy> AttentionOps for Autodiff<B, C> {
    fn enamel_attention(
        q: FloatTensor<Self>,
        k: FloatTensor<Self>,
        v: FloatTensor<Self>,
        spec: Arc<AttentionSpec>,
    ) -> FloatTensor<Self> {
        let (q, q_node) = q.into_parts();
        let (k, k_node) = k.into_parts();
        let (v, v_node) = v.into_parts();
        match AttentionStep
            .prepare::<C>([q_node, k_node, v_node])
            .compute_bound()
            .stateful()
        {
            OpsKind::Tracked(prep) => {
                let (out, log_sums) =
                    B::enamel_attention_with_sums(q.clone(), k.clone(), v.clone(), spec.clone());
                prep.finish(
                    AttentionState {
                        q,
                        k,
                        v,
                        out: out.clone(),
                        log_sums,
                        spec,
                    },
                    out,
                )
            }
            OpsKind::UnTracked(prep) => prep.finish(B::enamel_attention(q, k, v, spec)),
        }
    }

    fn enamel_attention_with_sums(
        _: FloatTensor<Self>,
        _: FloatTensor<Self>,
        _: FloatTensor<Self>,
        _: Arc<AttentionSpec>,
    ) -> (FloatTensor<Self>, FloatTensor<Self>) {
        unimplemented!("second-order gradients of attention")
    }

    fn enamel_attention_backward(
        _: FloatTensor<Self>,
        _: FloatTensor<Self>,
        _: FloatTensor<Self>,
        _: FloatTensor<Self>,
        _: FloatTensor<Self>,
        _: FloatTensor<Self>,
        _: Arc<AttentionSpec>,
    ) -> (FloatTensor<Self>, FloatTensor<Self>, FloatTensor<Self>) {
        unimplemented!("second-order gradients of attention")
    }
}
