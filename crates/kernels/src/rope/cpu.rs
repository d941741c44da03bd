//! RoPE on Flex: one pass, in place when the input has no other use. The backward is the rotation by
//! the opposite angle.

use burn::backend::autodiff::Autodiff;
use burn::backend::autodiff::checkpoint::{base::Checkpointer, strategy::CheckpointStrategy};
use burn::backend::autodiff::grads::Gradients;
use burn::backend::autodiff::ops::{Backward, Ops, OpsKind};
use burn::backend::flex::FlexTensor;
use burn::backend::tensor::FloatTensor;
use burn::backend::{Backend, Dispatch, Flex, backend_extension};
use burn::tensor::Tensor;
use rayon::prelude::*;

use crate::cpu::simd::{Level, fma, level, simd_fn};
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

/// Cosines and sines by position, and which way to turn.
#[derive(Clone, Copy)]
pub(crate) struct Turn<'a> {
    cos: &'a [f32],
    sin: &'a [f32],
    half: usize,
    positions: usize,
    sign: f32,
}

impl<'a> Turn<'a> {
    /// Of tables made [`dense`], for `rows` rows of which each batch row has `tokens`, and heads of
    /// `dim`.
    pub(crate) fn new(
        cos: &'a FlexTensor,
        sin: &'a FlexTensor,
        [rows, tokens, dim]: [usize; 3],
        inverse: bool,
    ) -> Self {
        let shape = cos.layout().shape();
        let (positions, half) = (shape[0], shape[1]);
        assert!(
            dim == 2 * half && (positions == tokens || positions == rows),
            "cos is [{positions}, {half}], not [tokens, head_dim / 2] of {tokens} tokens (or all {rows} \
             rows) and heads of {dim}"
        );
        let (cos, sin) = (values(cos), values(sin));
        assert_eq!(cos.len(), sin.len(), "cos and sin have the same shape");
        let sign = if inverse { -1.0 } else { 1.0 };
        Self {
            cos,
            sin,
            half,
            positions,
            sign,
        }
    }

    /// Turns heads of one row, of all the batch's.
    pub(crate) fn heads(&self, level: Level, row: usize, heads: &mut [f32]) {
        let at = row % self.positions * self.half;
        let (cos, sin) = (&self.cos[at..at + self.half], &self.sin[at..at + self.half]);
        rotate(level, heads, cos, sin, self.sign);
    }

    /// Turns the first `turned` elements of each row of `width`.
    pub(crate) fn rows(&self, level: Level, values: &mut [f32], width: usize, turned: usize) {
        if width == 0 || turned == 0 {
            return;
        }
        let task = (CHUNK / width).max(1);
        let some = |(i, rows): (usize, &mut [f32])| {
            for (j, row) in rows.chunks_exact_mut(width).enumerate() {
                self.heads(level, i * task + j, &mut row[..turned]);
            }
        };
        if values.len() <= CHUNK {
            values.chunks_mut(task * width).enumerate().for_each(some);
        } else {
            values
                .par_chunks_mut(task * width)
                .enumerate()
                .for_each(some);
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
        let [batch, tokens, heads, dim] = [0, 1, 2, 3].map(|i| x.layout().shape()[i]);
        let elements = batch * tokens * heads * dim;
        let name = if inverse { "rope backward" } else { "rope" };
        let _timer = profile::op(name, 3 * elements, 8 * elements);
        let turn = Turn::new(&cos, &sin, [batch * tokens, tokens, dim], inverse);
        let width = heads * dim;
        turn.rows(level(), x.storage_mut::<f32>(), width, width);
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
