//! LoRA linear with dropout on the adapter's input, on Flex. Only x is kept, as without dropout: the
//! mask and the dropped input are made again in the backward.

use burn::backend::autodiff::Autodiff;
use burn::backend::autodiff::checkpoint::{base::Checkpointer, strategy::CheckpointStrategy};
use burn::backend::autodiff::grads::Gradients;
use burn::backend::autodiff::ops::{Backward, Ops, OpsKind};
use burn::backend::tensor::FloatTensor;
use burn::backend::{Dispatch, Flex, backend_extension};
use burn::tensor::Tensor;

use super::cpu::{LinearOps, LoraState};
use crate::cpu::dropout::{Dropout, dropped, dropped_sum};
use crate::cpu::gemm::{Compute, Packed, Weight, times_t};
use crate::cpu::half::held;
use crate::cpu::matrix::{Into, MatRef, dims, filled, readable};

/// The operation as a backend extension.
#[backend_extension(Flex, Autodiff)]
pub trait DroppedLoraOps: LinearOps {
    /// `x · wᵀ + scale · (drop(x) · aᵀ) · bᵀ`.
    fn enamel_lora_dropped(
        x: FloatTensor<Self>,
        w: FloatTensor<Self>,
        a: FloatTensor<Self>,
        b: FloatTensor<Self>,
        scale: f64,
        dropout: Dropout,
        compute: Compute,
    ) -> FloatTensor<Self>;

    /// [`Self::enamel_lora_dropped`] and `drop(x) · aᵀ`.
    fn enamel_lora_dropped_with_low(
        x: FloatTensor<Self>,
        w: FloatTensor<Self>,
        a: FloatTensor<Self>,
        b: FloatTensor<Self>,
        scale: f64,
        dropout: Dropout,
        compute: Compute,
    ) -> (FloatTensor<Self>, FloatTensor<Self>);

    /// `drop(x)`.
    fn enamel_dropped(x: FloatTensor<Self>, dropout: Dropout) -> FloatTensor<Self>;

    /// `sum + drop(x)`.
    fn enamel_dropped_sum(
        sum: FloatTensor<Self>,
        x: FloatTensor<Self>,
        dropout: Dropout,
    ) -> FloatTensor<Self>;
}

pub(super) fn lora_linear_dropout(
    x: Tensor<2>,
    w: Tensor<2>,
    a: Tensor<2>,
    b: Tensor<2>,
    scale: f64,
    dropout: Dropout,
    compute: Compute,
) -> Tensor<2> {
    Tensor::from_dispatch(<Dispatch as DroppedLoraOps>::enamel_lora_dropped(
        x.into_dispatch(),
        w.into_dispatch(),
        a.into_dispatch(),
        b.into_dispatch(),
        scale,
        dropout,
        compute,
    ))
}

impl DroppedLoraOps for Flex {
    fn enamel_lora_dropped(
        x: FloatTensor<Self>,
        w: FloatTensor<Self>,
        a: FloatTensor<Self>,
        b: FloatTensor<Self>,
        scale: f64,
        dropout: Dropout,
        compute: Compute,
    ) -> FloatTensor<Self> {
        Self::enamel_lora_dropped_with_low(x, w, a, b, scale, dropout, compute).0
    }

    fn enamel_lora_dropped_with_low(
        x: FloatTensor<Self>,
        w: FloatTensor<Self>,
        a: FloatTensor<Self>,
        b: FloatTensor<Self>,
        scale: f64,
        dropout: Dropout,
        compute: Compute,
    ) -> (FloatTensor<Self>, FloatTensor<Self>) {
        let (x, w, a, b) = (readable(x), held(w), readable(a), readable(b));
        let (rows, out, rank) = (dims(&x).0, dims(&w).0, dims(&a).0);
        let kept = dropped(x.clone(), dropout);
        let kept = Packed::of(MatRef::of(&kept), 1.0, compute);
        let low = filled(rows, rank, |low| {
            times_t(low, Into::Set, &[(&kept, Weight::of(&a))])
        });
        drop(kept);
        let scaled = Packed::of(MatRef::of(&low), scale as f32, compute);
        let input = Packed::of(MatRef::of(&x), 1.0, compute);
        let y = filled(rows, out, |y| {
            let terms = [(&input, Weight::of(&w)), (&scaled, Weight::of(&b))];
            times_t(y, Into::Set, &terms);
        });
        (y, low)
    }

    fn enamel_dropped(x: FloatTensor<Self>, dropout: Dropout) -> FloatTensor<Self> {
        dropped(x, dropout)
    }

    fn enamel_dropped_sum(
        sum: FloatTensor<Self>,
        x: FloatTensor<Self>,
        dropout: Dropout,
    ) -> FloatTensor<Self> {
        dropped_sum(sum, x, dropout)
    }
}

#[derive(Debug)]
struct DroppedLoraStep;

impl<B: DroppedLoraOps> Backward<B, 4> for DroppedLoraStep {
    type State = (LoraState<B>, Dropout);

    fn backward(self, ops: Ops<Self::State, 4>, grads: &mut Gradients, _: &mut Checkpointer) {
        let grad = grads.consume::<B>(&ops.node);
        let [x_node, w_node, a_node, b_node] = ops.parents;
        let (
            LoraState {
                x,
                w,
                a,
                b,
                low,
                scale,
                compute,
            },
            dropout,
        ) = ops.state;
        if let (Some(node), Some(low)) = (b_node, low) {
            grads.register::<B>(node.id, B::enamel_outer(grad.clone(), low, scale));
        }
        if let (Some(node), Some(x)) = (w_node, x.clone()) {
            grads.register::<B>(node.id, B::enamel_outer(grad.clone(), x, 1.0));
        }
        // b is kept when a or x is tracked; both gradients go through the narrow side.
        let Some(b) = b else { return };
        let d_low = B::enamel_times(grad.clone(), b, scale, compute);
        if let (Some(node), Some(x)) = (a_node, x) {
            let input = B::enamel_dropped(x, dropout);
            grads.register::<B>(node.id, B::enamel_outer(d_low.clone(), input, 1.0));
        }
        if let (Some(node), Some(w), Some(a)) = (x_node, w, a) {
            let base = B::enamel_times(grad, w, 1.0, compute);
            let adapter = B::enamel_times(d_low, a, 1.0, compute);
            grads.register::<B>(node.id, B::enamel_dropped_sum(base, adapter, dropout));
        }
    }
}

impl<B: DroppedLoraOps, C: CheckpointStrategy> DroppedLoraOps for Autodiff<B, C> {
    fn enamel_lora_dropped(
        x: FloatTensor<Self>,
        w: FloatTensor<Self>,
        a: FloatTensor<Self>,
        b: FloatTensor<Self>,
        scale: f64,
        dropout: Dropout,
        compute: Compute,
    ) -> FloatTensor<Self> {
        let [dx, dw, da, db] = [&x, &w, &a, &b].map(|t| t.is_tracked());
        let (x, x_node) = x.into_parts();
        let (w, w_node) = w.into_parts();
        let (a, a_node) = a.into_parts();
        let (b, b_node) = b.into_parts();
        let nodes = [x_node, w_node, a_node, b_node];
        match DroppedLoraStep
            .prepare::<C>(nodes)
            .compute_bound()
            .stateful()
        {
            OpsKind::Tracked(prep) => {
                let mut state = LoraState {
                    x: (da || dw).then(|| x.clone()),
                    w: dx.then(|| w.clone()),
                    a: dx.then(|| a.clone()),
                    b: (da || dx).then(|| b.clone()),
                    low: None,
                    scale,
                    compute,
                };
                let (y, low) = B::enamel_lora_dropped_with_low(x, w, a, b, scale, dropout, compute);
                state.low = db.then_some(low);
                prep.finish((state, dropout), y)
            }
            OpsKind::UnTracked(prep) => {
                prep.finish(B::enamel_lora_dropped(x, w, a, b, scale, dropout, compute))
            }
        }
    }

    fn enamel_lora_dropped_with_low(
        _: FloatTensor<Self>,
        _: FloatTensor<Self>,
        _: FloatTensor<Self>,
        _: FloatTensor<Self>,
        _: f64,
        _: Dropout,
        _: Compute,
    ) -> (FloatTensor<Self>, FloatTensor<Self>) {
        unimplemented!("second-order gradients of lora_linear_dropout")
    }

    fn enamel_dropped(_: FloatTensor<Self>, _: Dropout) -> FloatTensor<Self> {
        unimplemented!("second-order gradients of lora_linear_dropout")
    }

    fn enamel_dropped_sum(
        _: FloatTensor<Self>,
        _: FloatTensor<Self>,
        _: Dropout,
    ) -> FloatTensor<Self> {
        unimplemented!("second-order gradients of lora_linear_dropout")
    }
}
