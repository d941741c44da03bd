//! Attention on the projections of q, k and v side by side, rotated in place: as a backend extension, on
//! Flex, and in the autodiff graph.

use std::sync::Arc;

use burn::backend::autodiff::Autodiff;
use burn::backend::autodiff::checkpoint::{base::Checkpointer, strategy::CheckpointStrategy};
use burn::backend::autodiff::grads::Gradients;
use burn::backend::autodiff::ops::{Backward, Ops, OpsKind};
use burn::backend::flex::FlexTensor;
use burn::backend::tensor::FloatTensor;
use burn::backend::{Backend, Dispatch, Flex, backend_extension};
use burn::tensor::{Shape, Tensor};

use super::AttentionSpec;
use super::backward::{Gradient, Saved, backward_into};
use super::cpu::forward;
use super::problem::{Inputs, Problem};
use crate::cpu::heads::Heads;
use crate::cpu::simd::level;
use crate::cpu::storage::Shared;
use crate::cpu::storage::{Fresh, dense, owned, values};
use crate::rope::cpu::Turn;

/// The operation as a backend extension.
#[backend_extension(Flex, Autodiff)]
pub trait AttentionQkvOps: Backend {
    /// The attention's output `[batch, tokens, heads·head_dim]`.
    fn enamel_attention_qkv(
        qkv: FloatTensor<Self>,
        cos: FloatTensor<Self>,
        sin: FloatTensor<Self>,
        heads: usize,
        kv_heads: usize,
        spec: Arc<AttentionSpec>,
    ) -> FloatTensor<Self>;

    /// The output, qkv with q and k rotated, and each query's `log Σ exp(score)`,
    /// `[batch, heads, tokens]`.
    fn enamel_attention_qkv_saving(
        qkv: FloatTensor<Self>,
        cos: FloatTensor<Self>,
        sin: FloatTensor<Self>,
        heads: usize,
        kv_heads: usize,
        spec: Arc<AttentionSpec>,
    ) -> (FloatTensor<Self>, FloatTensor<Self>, FloatTensor<Self>);

    /// The gradient of qkv as it was before the rotation.
    #[allow(clippy::too_many_arguments)]
    fn enamel_attention_qkv_backward(
        rotated: FloatTensor<Self>,
        cos: FloatTensor<Self>,
        sin: FloatTensor<Self>,
        out: FloatTensor<Self>,
        log_sums: FloatTensor<Self>,
        grad: FloatTensor<Self>,
        heads: usize,
        kv_heads: usize,
        spec: Arc<AttentionSpec>,
    ) -> FloatTensor<Self>;
}

pub(super) fn attention_qkv(
    qkv: Tensor<3>,
    cos: Tensor<2>,
    sin: Tensor<2>,
    heads: usize,
    kv_heads: usize,
    spec: &AttentionSpec,
) -> Tensor<3> {
    Tensor::from_dispatch(<Dispatch as AttentionQkvOps>::enamel_attention_qkv(
        qkv.into_dispatch(),
        cos.into_dispatch(),
        sin.into_dispatch(),
        heads,
        kv_heads,
        Arc::new(spec.clone()),
    ))
}

/// The parts of a qkv whose elements lie in order.
fn parts<'a>(
    qkv: &'a FlexTensor,
    heads: usize,
    kv_heads: usize,
    spec: &'a AttentionSpec,
) -> (Problem<'a>, Inputs<'a>) {
    let [batch, tokens, width] = [0, 1, 2].map(|i| qkv.layout().shape()[i]);
    let count = heads + 2 * kv_heads;
    assert!(
        count > 0 && width.is_multiple_of(count),
        "qkv is {width} wide, which is not a multiple of {heads} + 2·{kv_heads} heads"
    );
    let dim = width / count;
    let kv = [batch, tokens, kv_heads, dim];
    let p = Problem::new([batch, tokens, heads, dim], kv, kv, spec);
    let data = values(qkv);
    let part = |head: usize| Heads::within(data, head * dim, [tokens * width, width, dim], dim);
    let inputs = Inputs {
        q: part(0),
        k: part(heads),
        v: part(heads + kv_heads),
    };
    (p, inputs)
}

impl AttentionQkvOps for Flex {
    fn enamel_attention_qkv(
        qkv: FloatTensor<Self>,
        cos: FloatTensor<Self>,
        sin: FloatTensor<Self>,
        heads: usize,
        kv_heads: usize,
        spec: Arc<AttentionSpec>,
    ) -> FloatTensor<Self> {
        Self::enamel_attention_qkv_saving(qkv, cos, sin, heads, kv_heads, spec).0
    }

    fn enamel_attention_qkv_saving(
        qkv: FloatTensor<Self>,
        cos: FloatTensor<Self>,
        sin: FloatTensor<Self>,
        heads: usize,
        kv_heads: usize,
        spec: Arc<AttentionSpec>,
    ) -> (FloatTensor<Self>, FloatTensor<Self>, FloatTensor<Self>) {
        let (mut qkv, cos, sin) = (owned(qkv), dense(cos), dense(sin));
        let (p, _) = parts(&qkv, heads, kv_heads, &spec);
        let (rows, turned) = (p.batch * p.tokens, (heads + kv_heads) * p.dim);
        let (shape, sums_shape, width) = (
            Shape::from(vec![p.batch, p.tokens, heads * p.dim]),
            Shape::from(vec![p.batch, heads, p.tokens]),
            turned + kv_heads * p.dim,
        );
        {
            let _timer = crate::profile::op("rope", 3 * rows * turned, 8 * rows * turned);
            let turn = Turn::new(&cos, &sin, [rows, p.tokens, p.dim], false);
            turn.rows(level(), qkv.storage_mut::<f32>(), width, turned);
        }
        let (p, inputs) = parts(&qkv, heads, kv_heads, &spec);
        let (out, log_sums) = forward(p, inputs);
        // SAFETY: every query of every head has its row and its log-sum.
        let (out, log_sums) = unsafe { (out.into_tensor(shape), log_sums.into_tensor(sums_shape)) };
        (out, qkv, log_sums)
    }

    fn enamel_attention_qkv_backward(
        rotated: FloatTensor<Self>,
        cos: FloatTensor<Self>,
        sin: FloatTensor<Self>,
        out: FloatTensor<Self>,
        log_sums: FloatTensor<Self>,
        grad: FloatTensor<Self>,
        heads: usize,
        kv_heads: usize,
        spec: Arc<AttentionSpec>,
    ) -> FloatTensor<Self> {
        let (qkv, cos, sin) = (dense(rotated), dense(cos), dense(sin));
        let (out, grad, log_sums) = (dense(out), dense(grad), dense(log_sums));
        let (p, inputs) = parts(&qkv, heads, kv_heads, &spec);
        let turn = Turn::new(&cos, &sin, [p.batch * p.tokens, p.tokens, p.dim], true);
        let row = heads * p.dim;
        let by_heads = |data| Heads::within(data, 0, [p.tokens * row, row, p.dim], p.dim);
        let saved = Saved {
            out: by_heads(values(&out)),
            grad: by_heads(values(&grad)),
            log_sums: values(&log_sums),
        };
        let width = row + 2 * kv_heads * p.dim;
        let mut d_qkv = Fresh::new(p.batch * p.tokens * width);
        let at = d_qkv.as_mut_ptr();
        let part = |head: usize| Gradient {
            at: Shared(at.wrapping_add(head * p.dim)),
            strides: [p.tokens * width, width, p.dim],
        };
        let gradients = [part(0), part(heads), part(heads + kv_heads)];
        backward_into(p, inputs, saved, gradients, Some(turn));
        // SAFETY: the heads of q, k and v, of which all rows are written, make up every row.
        unsafe { d_qkv.into_tensor(qkv.layout().shape().clone()) }
    }
}

/// What the backward needs. Scores are computed again from qkv and the log-sums.
#[derive(Clone, Debug)]
struct QkvState<B: Backend> {
    rotated: FloatTensor<B>,
    cos: FloatTensor<B>,
    sin: FloatTensor<B>,
    out: FloatTensor<B>,
    log_sums: FloatTensor<B>,
    heads: usize,
    kv_heads: usize,
    spec: Arc<AttentionSpec>,
}

#[derive(Debug)]
struct QkvStep;

impl<B: AttentionQkvOps> Backward<B, 1> for QkvStep {
    type State = QkvState<B>;

    fn backward(self, ops: Ops<Self::State, 1>, grads: &mut Gradients, _: &mut Checkpointer) {
        let grad = grads.consume::<B>(&ops.node);
        let [qkv] = ops.parents;
        let s = ops.state;
        if let Some(node) = qkv {
            let d_qkv = B::enamel_attention_qkv_backward(
                s.rotated, s.cos, s.sin, s.out, s.log_sums, grad, s.heads, s.kv_heads, s.spec,
            );
            grads.register::<B>(node.id, d_qkv);
        }
    }
}

impl<B: AttentionQkvOps, C: CheckpointStrategy> AttentionQkvOps for Autodiff<B, C> {
    fn enamel_attention_qkv(
        qkv: FloatTensor<Self>,
        cos: FloatTensor<Self>,
        sin: FloatTensor<Self>,
        heads: usize,
        kv_heads: usize,
        spec: Arc<AttentionSpec>,
    ) -> FloatTensor<Self> {
        let (qkv, node) = qkv.into_parts();
        let (cos, sin) = (cos.into_primitive(), sin.into_primitive());
        match QkvStep.prepare::<C>([node]).compute_bound().stateful() {
            OpsKind::Tracked(prep) => {
                let (out, rotated, log_sums) = B::enamel_attention_qkv_saving(
                    qkv,
                    cos.clone(),
                    sin.clone(),
                    heads,
                    kv_heads,
                    spec.clone(),
                );
                let state = QkvState {
                    rotated,
                    cos,
                    sin,
                    out: out.clone(),
                    log_sums,
                    heads,
                    kv_heads,
                    spec,
                };
                prep.finish(state, out)
            }
            OpsKind::UnTracked(prep) => {
                let out = B::enamel_attention_qkv(qkv, cos, sin, heads, kv_heads, spec);
                prep.finish(out)
            }
        }
    }

    fn enamel_attention_qkv_saving(
        _: FloatTensor<Self>,
        _: FloatTensor<Self>,
        _: FloatTensor<Self>,
        _: usize,
        _: usize,
        _: Arc<AttentionSpec>,
    ) -> (FloatTensor<Self>, FloatTensor<Self>, FloatTensor<Self>) {
        unimplemented!("second-order gradients of attention")
    }

    fn enamel_attention_qkv_backward(
        _: FloatTensor<Self>,
        _: FloatTensor<Self>,
        _: FloatTensor<Self>,
        _: FloatTensor<Self>,
        _: FloatTensor<Self>,
        _: FloatTensor<Self>,
        _: usize,
        _: usize,
        _: Arc<AttentionSpec>,
    ) -> FloatTensor<Self> {
        unimplemented!("second-order gradients of attention")
    }
}
