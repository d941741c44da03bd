//! RoPE on Flex: one pass, in place when the input has no other use. The backward is the rotation by
//! the opposite angle.

use burn::backend::autodiff::Autodiff;
use burn::backend::autodiff::checkpoint::{base::Checkpointer, strategy::CheckpointStrategy};
use burn::backend::autodiff::grads::Gradients;
use burn::backend::autodiff::ops::{Backward, Ops, OpsKind};
use burn::backend::tensor::FloatTensor;
use burn::backend::{Backend, Dispatch, Flex, backend_extension};
use burn::tensor::Tensor;
use rayon::prelude::*;

use crate::cpu::simd::{fma, level, simd_fn};
use crate::cpu::storage::{CHUNK, dense, owned, values};
use crate::profile;

/// The operation as a backend extension.
#[backend_extension(Flex, Autodiff)]
pub trait RopeOps: Backend {
    /// The rotation, or its inverse.
    fn enamel_rope(
        x: FloatTensor<Self>,
        cos: FloatTensor<Self>,
        sin: FloatTensor<Self>,
        inverse: bool,
    ) -> FloatTensor<Self>;
}

pub(super) fn rope(x: Tensor<4>, cos: Tensor<2>, sin: Tensor<2>) -> Tensor<4> {
    Tensor::from_dispatch(<Dispatch as RopeOps>::enamel_rope(
        x.into_dispatch(),
        cos.into_dispatch(),
        sin.into_dispatch(),
        false,
    ))
}

simd_fn! {
    /// All heads of one position: `y1 = x1·cos − x2·sign·sin`, `y2 = x2·cos + x1·sign·sin`.
    fn rotate<L>(heads: &mut [f32], cos: &[f32], sin: &[f32], sign: f32) {
        let half = cos.len();
        for head in heads.chunks_exact_mut(2 * half) {
            let (x1, x2) = head.split_at_mut(half);
            for (((x1, x2), c), s) in x1.iter_mut().zip(x2).zip(cos).zip(sin) {
                let (a, b, s) = (*x1, *x2, sign * s);
                *x1 = fma::<L>(a, *c, -(b * s));
                *x2 = fma::<L>(b, *c, a * s);
            }
        }
    }
}

impl RopeOps for Flex {
    fn enamel_rope(
        x: FloatTensor<Self>,
        cos: FloatTensor<Self>,
        sin: FloatTensor<Self>,
        inverse: bool,
    ) -> FloatTensor<Self> {
        let (mut x, cos, sin) = (owned(x), dense(cos), dense(sin));
        let [tokens, heads, dim] = [1, 2, 3].map(|i| x.layout().shape()[i]);
        let half = cos.layout().shape()[1];
        assert!(
            dim == 2 * half && cos.layout().shape()[0] == tokens,
            "cos and sin are [tokens, head_dim / 2]"
        );
        let (cos, sin, level) = (values(&cos), values(&sin), level());
        assert_eq!(cos.len(), sin.len(), "cos and sin have the same shape");
        let numbers = x.layout().num_elements();
        let name = if inverse { "rope backward" } else { "rope" };
        let _timer = profile::op(name, 3 * numbers, 8 * numbers);
        let sign = if inverse { -1.0 } else { 1.0 };
        let width = heads * dim;
        let turn = |position: usize, row: &mut [f32]| {
            let at = position % tokens * half;
            rotate(level, row, &cos[at..at + half], &sin[at..at + half], sign);
        };
        let values = x.storage_mut::<f32>();
        if values.len() <= CHUNK {
            if width > 0 {
                values
                    .chunks_exact_mut(width)
                    .enumerate()
                    .for_each(|(i, row)| turn(i, row));
            }
        } else {
            let task = (CHUNK / width).max(1);
            values
                .par_chunks_mut(task * width)
                .enumerate()
                .for_each(|(i, rows)| {
                    rows.chunks_exact_mut(width)
                        .enumerate()
                        .for_each(|(j, r)| turn(i * task + j, r));
                });
        }
        x
    }
}

#[derive(Debug)]
struct RopeStep;

impl<B: RopeOps> Backward<B, 1> for RopeStep {
    /// cos, sin, and which way the forward turned.
    type State = (FloatTensor<B>, FloatTensor<B>, bool);

    fn backward(self, ops: Ops<Self::State, 1>, grads: &mut Gradients, _: &mut Checkpointer) {
        let grad = grads.consume::<B>(&ops.node);
        let [x] = ops.parents;
        let (cos, sin, inverse) = ops.state;
        if let Some(node) = x {
            grads.register::<B>(node.id, B::enamel_rope(grad, cos, sin, !inverse));
        }
    }
}

impl<B: RopeOps, C: CheckpointStrategy> RopeOps for Autodiff<B, C> {
    fn enamel_rope(
        x: FloatTensor<Self>,
        cos: FloatTensor<Self>,
        sin: FloatTensor<Self>,
        inverse: bool,
    ) -> FloatTensor<Self> {
        let (x, x_node) = x.into_parts();
        let (cos, sin) = (cos.into_primitive(), sin.into_primitive());
        match RopeStep.prepare::<C>([x_node]).compute_bound().stateful() {
            OpsKind::Tracked(prep) => {
                let state = (cos.clone(), sin.clone(), inverse);
                prep.finish(state, B::enamel_rope(x, cos, sin, inverse))
            }
            OpsKind::UnTracked(prep) => prep.finish(B::enamel_rope(x, cos, sin, inverse)),
        }
    }
}
