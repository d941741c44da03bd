//! Linear and LoRA linear on Flex: x is packed once for the weight and the adapter, and products
//! accumulate into their destination, so that no sum and no `w + scale · b·a` exists. A frozen weight, f32
//! or bf16, costs its input gradient only.

use burn::backend::autodiff::Autodiff;
use burn::backend::autodiff::NodeId;
use burn::backend::autodiff::checkpoint::{base::Checkpointer, strategy::CheckpointStrategy};
use burn::backend::autodiff::grads::Gradients;
use burn::backend::autodiff::ops::{Backward, Ops, OpsKind};
use burn::backend::flex::FlexTensor;
use burn::backend::tensor::FloatTensor;
use burn::backend::{Backend, Dispatch, Flex, backend_extension};
use burn::tensor::Tensor;

use crate::cpu::gemm::{Compute, Packed, Weight, outer, times, times_t};
use crate::cpu::half::held;
use crate::cpu::matrix::{Into, MatRef, dims, filled, readable};

/// The operations as a backend extension. w may be bf16, all else is f32.
#[backend_extension(Flex, Autodiff)]
pub trait LinearOps: Backend {
    /// `x · wᵀ`.
    fn enamel_linear(
        x: FloatTensor<Self>,
        w: FloatTensor<Self>,
        compute: Compute,
    ) -> FloatTensor<Self>;

    /// `x · wᵀ + scale · (x · aᵀ) · bᵀ`.
    fn enamel_lora(
        x: FloatTensor<Self>,
        w: FloatTensor<Self>,
        a: FloatTensor<Self>,
        b: FloatTensor<Self>,
        scale: f64,
        compute: Compute,
    ) -> FloatTensor<Self>;

    /// [`Self::enamel_lora`] and `x · aᵀ`.
    fn enamel_lora_with_low(
        x: FloatTensor<Self>,
        w: FloatTensor<Self>,
        a: FloatTensor<Self>,
        b: FloatTensor<Self>,
        scale: f64,
        compute: Compute,
    ) -> (FloatTensor<Self>, FloatTensor<Self>);

    /// `scale · g · w`.
    fn enamel_times(
        g: FloatTensor<Self>,
        w: FloatTensor<Self>,
        scale: f64,
        compute: Compute,
    ) -> FloatTensor<Self>;

    /// `g · w + low · a`.
    fn enamel_times_sum(
        g: FloatTensor<Self>,
        w: FloatTensor<Self>,
        low: FloatTensor<Self>,
        a: FloatTensor<Self>,
        compute: Compute,
    ) -> FloatTensor<Self>;

    /// `scale · gᵀ · x`.
    fn enamel_outer(g: FloatTensor<Self>, x: FloatTensor<Self>, scale: f64) -> FloatTensor<Self>;
}

pub(super) fn linear(x: Tensor<2>, w: Tensor<2>, compute: Compute) -> Tensor<2> {
    let y = <Dispatch as LinearOps>::enamel_linear(x.into_dispatch(), w.into_dispatch(), compute);
    Tensor::from_dispatch(y)
}

pub(super) fn lora_linear(
    x: Tensor<2>,
    w: Tensor<2>,
    a: Tensor<2>,
    b: Tensor<2>,
    scale: f64,
    compute: Compute,
) -> Tensor<2> {
    Tensor::from_dispatch(<Dispatch as LinearOps>::enamel_lora(
        x.into_dispatch(),
        w.into_dispatch(),
        a.into_dispatch(),
        b.into_dispatch(),
        scale,
        compute,
    ))
}

/// Profile's figures of products of `rows` rows with these weights: floating-point operations, and bytes
/// with each operand and result counted once.
fn cost(rows: usize, weights: &[&FlexTensor]) -> (usize, usize) {
    let (mut flops, mut bytes) = (0, 0);
    for w in weights {
        let (out, width) = dims(w);
        flops += 2 * rows * out * width;
        bytes += out * width * w.dtype().size() + 4 * rows * (out + width);
    }
    (flops, bytes)
}

impl LinearOps for Flex {
    fn enamel_linear(
        x: FloatTensor<Self>,
        w: FloatTensor<Self>,
        compute: Compute,
    ) -> FloatTensor<Self> {
        let (rows, out) = (dims(&x).0, dims(&w).0);
        let (flops, bytes) = cost(rows, &[&w]);
        let _timer = crate::profile::op("linear", flops, bytes);
        let w = held(w);
        let x = readable(x);
        let x = Packed::of(MatRef::of(&x), 1.0, compute);
        filled(rows, out, |y| {
            times_t(y, Into::Set, &[(&x, Weight::of(&w))])
        })
    }

    fn enamel_lora(
        x: FloatTensor<Self>,
        w: FloatTensor<Self>,
        a: FloatTensor<Self>,
        b: FloatTensor<Self>,
        scale: f64,
        compute: Compute,
    ) -> FloatTensor<Self> {
        Self::enamel_lora_with_low(x, w, a, b, scale, compute).0
    }

    fn enamel_lora_with_low(
        x: FloatTensor<Self>,
        w: FloatTensor<Self>,
        a: FloatTensor<Self>,
        b: FloatTensor<Self>,
        scale: f64,
        compute: Compute,
    ) -> (FloatTensor<Self>, FloatTensor<Self>) {
        let (rows, out, rank) = (dims(&x).0, dims(&w).0, dims(&a).0);
        let (flops, bytes) = cost(rows, &[&w, &a, &b]);
        let _timer = crate::profile::op("lora", flops, bytes);
        let (w, a, b) = (held(w), readable(a), readable(b));
        let scale = scale as f32;
        let x = readable(x);
        let input = Packed::of(MatRef::of(&x), 1.0, compute);
        let low = filled(rows, rank, |low| {
            times_t(low, Into::Set, &[(&input, Weight::of(&a))])
        });
        let scaled = Packed::of(MatRef::of(&low), scale, compute);
        let y = filled(rows, out, |y| {
            let terms = [(&input, Weight::of(&w)), (&scaled, Weight::of(&b))];
            times_t(y, Into::Set, &terms);
        });
        (y, low)
    }

    fn enamel_times(
        g: FloatTensor<Self>,
        w: FloatTensor<Self>,
        scale: f64,
        compute: Compute,
    ) -> FloatTensor<Self> {
        let (rows, width) = (dims(&g).0, dims(&w).1);
        let (flops, bytes) = cost(rows, &[&w]);
        let _timer = crate::profile::op("linear backward", flops, bytes);
        let (g, w) = (readable(g), held(w));
        let mut result = filled(rows, width, |dst| {
            let terms = [(MatRef::of(&g), Weight::of(&w))];
            times(dst, Into::Set, &terms, compute);
        });
        if scale != 1.0 {
            let scale = scale as f32;
            result
                .storage_mut::<f32>()
                .iter_mut()
                .for_each(|v| *v *= scale);
        }
        result
    }

    fn enamel_times_sum(
        g: FloatTensor<Self>,
        w: FloatTensor<Self>,
        low: FloatTensor<Self>,
        a: FloatTensor<Self>,
        compute: Compute,
    ) -> FloatTensor<Self> {
        let (rows, width) = (dims(&g).0, dims(&w).1);
        let (flops, bytes) = cost(rows, &[&w, &a]);
        let _timer = crate::profile::op("lora backward", flops, bytes);
        let (g, w, low, a) = (readable(g), held(w), readable(low), readable(a));
        filled(rows, width, |dst| {
            let terms = [
                (MatRef::of(&g), Weight::of(&w)),
                (MatRef::of(&low), Weight::of(&a)),
            ];
            times(dst, Into::Set, &terms, compute);
        })
    }

    fn enamel_outer(g: FloatTensor<Self>, x: FloatTensor<Self>, scale: f64) -> FloatTensor<Self> {
        let ((rows, p), q) = (dims(&g), dims(&x).1);
        let bytes = 4 * (rows * (p + q) + p * q);
        let _timer = crate::profile::op("weight gradient", 2 * rows * p * q, bytes);
        let (g, x) = (readable(g), readable(x));
        filled(p, q, |dst| {
            outer(dst, Into::Set, scale as f32, MatRef::of(&g), MatRef::of(&x));
        })
    }
}

#[derive(Debug)]
struct LinearStep;

impl<B: LinearOps> Backward<B, 2> for LinearStep {
    /// x if w is tracked, w if x is.
    type State = (Option<FloatTensor<B>>, Option<FloatTensor<B>>, Compute);

    fn backward(self, ops: Ops<Self::State, 2>, grads: &mut Gradients, _: &mut Checkpointer) {
        let grad = grads.consume::<B>(&ops.node);
        let [x_node, w_node] = ops.parents;
        let (x, w, compute) = ops.state;
        if let (Some(node), Some(x)) = (w_node, x) {
            grads.register::<B>(node.id, B::enamel_outer(grad.clone(), x, 1.0));
        }
        if let (Some(node), Some(w)) = (x_node, w) {
            grads.register::<B>(node.id, B::enamel_times(grad, w, 1.0, compute));
        }
    }
}

/// What the backward of a LoRA linear needs, each only if some tracked parent's gradient uses it.
#[derive(Clone, Debug)]
pub(crate) struct LoraState<B: Backend> {
    pub(crate) x: Option<FloatTensor<B>>,
    pub(crate) w: Option<FloatTensor<B>>,
    pub(crate) a: Option<FloatTensor<B>>,
    pub(crate) b: Option<FloatTensor<B>>,
    pub(crate) low: Option<FloatTensor<B>>,
    pub(crate) scale: f64,
    pub(crate) compute: Compute,
}

impl<B: LinearOps> LoraState<B> {
    /// Registers the gradients of x, w, a and b, where they have a node, for `grad` of the output.
    pub(crate) fn backward(
        self,
        grad: FloatTensor<B>,
        nodes: [Option<NodeId>; 4],
        grads: &mut Gradients,
    ) {
        let [x_node, w_node, a_node, b_node] = nodes;
        let Self {
            x,
            w,
            a,
            b,
            low,
            scale,
            compute,
        } = self;
        if let (Some(node), Some(low)) = (b_node, low) {
            grads.register::<B>(node, B::enamel_outer(grad.clone(), low, scale));
        }
        if let (Some(node), Some(x)) = (w_node, x.clone()) {
            grads.register::<B>(node, B::enamel_outer(grad.clone(), x, 1.0));
        }
        // b is kept when a or x is tracked; both gradients go through the narrow side.
        let Some(b) = b else { return };
        let d_low = B::enamel_times(grad.clone(), b, scale, compute);
        if let (Some(node), Some(x)) = (a_node, x) {
            grads.register::<B>(node, B::enamel_outer(d_low.clone(), x, 1.0));
        }
        if let (Some(node), Some(w), Some(a)) = (x_node, w, a) {
            grads.register::<B>(node, B::enamel_times_sum(grad, w, d_low, a, compute));
        }
    }
}

#[derive(Debug)]
struct LoraStep;

impl<B: LinearOps> Backward<B, 4> for LoraStep {
    type State = LoraState<B>;

    fn backward(self, ops: Ops<Self::State, 4>, grads: &mut Gradients, _: &mut Checkpointer) {
        let grad = grads.consume::<B>(&ops.node);
        let nodes = ops.parents.map(|node| node.map(|n| n.id));
        ops.state.backward(grad, nodes, grads);
    }
}

impl<B: LinearOps, C: CheckpointStrategy> LinearOps for Autodiff<B, C> {
    fn enamel_linear(
        x: FloatTensor<Self>,
        w: FloatTensor<Self>,
        compute: Compute,
    ) -> FloatTensor<Self> {
        let (dx, dw) = (x.is_tracked(), w.is_tracked());
        let (x, x_node) = x.into_parts();
        let (w, w_node) = w.into_parts();
        match LinearStep
            .prepare::<C>([x_node, w_node])
            .compute_bound()
            .stateful()
        {
            OpsKind::Tracked(prep) => {
                let state = (dw.then(|| x.clone()), dx.then(|| w.clone()), compute);
                prep.finish(state, B::enamel_linear(x, w, compute))
            }
            OpsKind::UnTracked(prep) => prep.finish(B::enamel_linear(x, w, compute)),
        }
    }

    fn enamel_lora(
        x: FloatTensor<Self>,
        w: FloatTensor<Self>,
        a: FloatTensor<Self>,
        b: FloatTensor<Self>,
        scale: f64,
        compute: Compute,
    ) -> FloatTensor<Self> {
        let [dx, dw, da, db] = [&x, &w, &a, &b].map(|t| t.is_tracked());
        let (x, x_node) = x.into_parts();
        let (w, w_node) = w.into_parts();
        let (a, a_node) = a.into_parts();
        let (b, b_node) = b.into_parts();
        let nodes = [x_node, w_node, a_node, b_node];
        match LoraStep.prepare::<C>(nodes).compute_bound().stateful() {
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
                let (y, low) = B::enamel_lora_with_low(x, w, a, b, scale, compute);
                state.low = db.then_some(low);
                prep.finish(state, y)
            }
            OpsKind::UnTracked(prep) => prep.finish(B::enamel_lora(x, w, a, b, scale, compute)),
        }
    }

    fn enamel_lora_with_low(
        _: FloatTensor<Self>,
        _: FloatTensor<Self>,
        _: FloatTensor<Self>,
        _: FloatTensor<Self>,
        _: f64,
        _: Compute,
    ) -> (FloatTensor<Self>, FloatTensor<Self>) {
        unimplemented!("second-order gradients of lora_linear")
    }

    fn enamel_times(
        _: FloatTensor<Self>,
        _: FloatTensor<Self>,
        _: f64,
        _: Compute,
    ) -> FloatTensor<Self> {
        unimplemented!("second-order gradients of linear")
    }

    fn enamel_times_sum(
        _: FloatTensor<Self>,
        _: FloatTensor<Self>,
        _: FloatTensor<Self>,
        _: FloatTensor<Self>,
        _: Compute,
    ) -> FloatTensor<Self> {
        unimplemented!("second-order gradients of lora_linear")
    }

    fn enamel_outer(_: FloatTensor<Self>, _: FloatTensor<Self>, _: f64) -> FloatTensor<Self> {
        unimplemented!("second-order gradients of linear")
    }
}
