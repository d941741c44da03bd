//! Rows of an embedding table on Flex: the gradient goes into the one that the table already has.
//!
//! Burn's operation makes a table of zeros, copies it with the rows in it, and adds that to the gradient from a
//! tied head: twice the table's size for a moment, when all other gradients are there.

use burn::backend::autodiff::Autodiff;
use burn::backend::autodiff::checkpoint::{base::Checkpointer, strategy::CheckpointStrategy};
use burn::backend::autodiff::grads::Gradients;
use burn::backend::autodiff::ops::{Backward, Ops, OpsKind};
use burn::backend::ops::{IntTensorOps, ModuleOps};
use burn::backend::tensor::{FloatTensor, IntTensor};
use burn::backend::{Backend, Dispatch, Flex, TensorMetadata, backend_extension};
use burn::tensor::{Int, IntDType, Shape, Tensor};

use crate::cpu::storage::{dense, owned, values};
use crate::profile;

/// The operation as a backend extension.
#[backend_extension(Flex, Autodiff)]
pub trait EmbeddingOps: Backend {
    /// Rows of the table, `[batch, tokens, hidden]`.
    fn enamel_embedding(table: FloatTensor<Self>, ids: IntTensor<Self>) -> FloatTensor<Self>;

    /// Gradient of the table, `[vocabulary, hidden]`, added to `so_far`, which may be of zeros.
    fn enamel_embedding_backward(
        so_far: FloatTensor<Self>,
        ids: IntTensor<Self>,
        grad: FloatTensor<Self>,
    ) -> FloatTensor<Self>;
}

pub(super) fn embedding(table: Tensor<2>, ids: Tensor<2, Int>) -> Tensor<3> {
    Tensor::from_dispatch(<Dispatch as EmbeddingOps>::enamel_embedding(
        table.into_dispatch(),
        ids.into_dispatch(),
    ))
}

impl EmbeddingOps for Flex {
    fn enamel_embedding(table: FloatTensor<Self>, ids: IntTensor<Self>) -> FloatTensor<Self> {
        Self::embedding(table, ids)
    }

    fn enamel_embedding_backward(
        so_far: FloatTensor<Self>,
        ids: IntTensor<Self>,
        grad: FloatTensor<Self>,
    ) -> FloatTensor<Self> {
        let width = so_far.shape()[1];
        // In a training step this is the last handle: no allocation.
        let (mut sum, grad) = (owned(so_far), dense(grad));
        let ids = dense(Self::int_cast(ids, IntDType::I64));
        let _timer = profile::op(
            "embedding backward",
            values(&grad).len(),
            12 * values(&grad).len(),
        );
        let Some(ids) = ids.as_slice::<i64>() else {
            unreachable!("just cast");
        };
        // The tokens of one row of the table side by side, in the order of the text.
        let mut order: Vec<usize> = (0..ids.len()).collect();
        order.sort_by_key(|token| ids[*token]);
        let (grad, table) = (values(&grad), sum.storage_mut::<f32>());
        let mut row = vec![0.0; width];
        for tokens in order.chunk_by(|a, b| ids[*a] == ids[*b]) {
            row.fill(0.0);
            for token in tokens {
                add(&mut row, &grad[token * width..][..width]);
            }
            // The forward pass has read this row, so that it is there.
            add(&mut table[ids[tokens[0]] as usize * width..][..width], &row);
        }
        sum
    }
}

fn add(to: &mut [f32], from: &[f32]) {
    for (to, from) in to.iter_mut().zip(from) {
        *to += from;
    }
}

#[derive(Debug)]
struct EmbeddingStep;

impl<B: EmbeddingOps> Backward<B, 1> for EmbeddingStep {
    /// The table with its place in the graph, by which its gradient is found.
    type State = (FloatTensor<Autodiff<B>>, IntTensor<B>);

    fn backward(self, ops: Ops<Self::State, 1>, grads: &mut Gradients, _: &mut Checkpointer) {
        let grad = grads.consume::<B>(&ops.node);
        let (table, ids) = ops.state;
        let [Some(node)] = ops.parents else {
            return;
        };
        let so_far = grads.remove::<B>(&table).unwrap_or_else(|| {
            let like = table.primitive();
            let shape: Shape = like.shape();
            B::float_zeros(shape, &like.device(), like.dtype().into())
        });
        grads.register::<B>(node.id, B::enamel_embedding_backward(so_far, ids, grad));
    }
}

impl<B: EmbeddingOps, C: CheckpointStrategy> EmbeddingOps for Autodiff<B, C> {
    fn enamel_embedding(table: FloatTensor<Self>, ids: IntTensor<Self>) -> FloatTensor<Self> {
        let node = table.node();
        let rows = B::enamel_embedding(table.primitive().clone(), ids.clone());
        match EmbeddingStep
            .prepare::<C>([node])
            .compute_bound()
            .stateful()
        {
            OpsKind::Tracked(prep) => prep.finish((table, ids), rows),
            OpsKind::UnTracked(prep) => prep.finish(rows),
        }
    }

    fn enamel_embedding_backward(
        _: FloatTensor<Self>,
        _: IntTensor<Self>,
        _: FloatTensor<Self>,
    ) -> FloatTensor<Self> {
        unimplemented!("second-order gradients of embedding")
    }
}
