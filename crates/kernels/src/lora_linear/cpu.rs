//! Linear and LoRA linear on Flex: products accumulate into their destination, so that no sum, no
//! scaled copy and no `w + scale · b·a` exists. A frozen weight costs its input gradient only.

use burn::backend::autodiff::Autodiff;
use burn::backend::autodiff::NodeId;
use burn::backend::autodiff::checkpoint::{base::Checkpointer, strategy::CheckpointStrategy};
use burn::backend::autodiff::grads::Gradients;
use burn::backend::autodiff::ops::{Backward, Ops, OpsKind};
use burn::backend::flex::FlexTensor;
use burn::backend::tensor::FloatTensor;
use burn::backend::{Backend, Dispatch, Flex, backend_extension};
use burn::tensor::{Shape, Tensor};

use crate::cpu::matrix::{Into, MatMut, MatRef, Threads, product, readable};
use crate::cpu::storage::Fresh;

/// The operations as a backend extension.
#[backend_extension(Flex, Autodiff)]
pub trait LinearOps: Backend {
    /// `x · wᵀ`.
    fn enamel_linear(x: FloatTensor<Self>, w: FloatTensor<Self>) -> FloatTensor<Self>;

    /// `x · wᵀ + scale · (x · aᵀ) · bᵀ`.
    fn enamel_lora(
        x: FloatTensor<Self>,
        w: FloatTensor<Self>,
        a: FloatTensor<Self>,
        b: FloatTensor<Self>,
        scale: f64,
    ) -> FloatTensor<Self>;

    /// [`Self::enamel_lora`] and `x · aᵀ`.
    fn enamel_lora_with_low(
        x: FloatTensor<Self>,
        w: FloatTensor<Self>,
        a: FloatTensor<Self>,
        b: FloatTensor<Self>,
        scale: f64,
    ) -> (FloatTensor<Self>, FloatTensor<Self>);

    /// `scale · g · w`.
    fn enamel_times(g: FloatTensor<Self>, w: FloatTensor<Self>, scale: f64) -> FloatTensor<Self>;

    /// `g · w + low · a`.
    fn enamel_times_sum(
        g: FloatTensor<Self>,
        w: FloatTensor<Self>,
        low: FloatTensor<Self>,
        a: FloatTensor<Self>,
    ) -> FloatTensor<Self>;

    /// `scale · gᵀ · x`.
    fn enamel_outer(g: FloatTensor<Self>, x: FloatTensor<Self>, scale: f64) -> FloatTensor<Self>;
}

pub(super) fn linear(x: Tensor<2>, w: Tensor<2>) -> Tensor<2> {
    let y = <Dispatch as LinearOps>::enamel_linear(x.into_dispatch(), w.into_dispatch());
    Tensor::from_dispatch(y)
}

pub(super) fn lora_linear(
    x: Tensor<2>,
    w: Tensor<2>,
    a: Tensor<2>,
    b: Tensor<2>,
    scale: f64,
) -> Tensor<2> {
    Tensor::from_dispatch(<Dispatch as LinearOps>::enamel_lora(
        x.into_dispatch(),
        w.into_dispatch(),
        a.into_dispatch(),
        b.into_dispatch(),
        scale,
    ))
}

pub(crate) fn dims(t: &FlexTensor) -> (usize, usize) {
    (t.layout().shape()[0], t.layout().shape()[1])
}

/// A fresh `[rows, cols]` result: the first product sets it, a second one is added.
pub(super) fn sum_of(
    rows: usize,
    cols: usize,
    scale: f64,
    first: (MatRef<'_>, MatRef<'_>),
    second: Option<(MatRef<'_>, MatRef<'_>, f64)>,
) -> FlexTensor {
    let mut out = Fresh::new(rows * cols);
    // SAFETY: the buffer has that many elements, and the first product sets all of them.
    unsafe {
        let mut dst = MatMut::raw(out.as_mut_ptr(), rows, cols, cols);
        product(
            &mut dst,
            Into::Set,
            scale as f32,
            first.0,
            first.1,
            Threads::All,
        );
        if let Some((a, b, scale)) = second {
            product(&mut dst, Into::Add, scale as f32, a, b, Threads::All);
        }
        out.into_tensor(Shape::from(vec![rows, cols]))
    }
}

impl LinearOps for Flex {
    fn enamel_linear(x: FloatTensor<Self>, w: FloatTensor<Self>) -> FloatTensor<Self> {
        let (x, w) = (readable(x), readable(w));
        let (rows, out) = (dims(&x).0, dims(&w).0);
        sum_of(rows, out, 1.0, (MatRef::of(&x), MatRef::of(&w).t()), None)
    }

    fn enamel_lora(
        x: FloatTensor<Self>,
        w: FloatTensor<Self>,
        a: FloatTensor<Self>,
        b: FloatTensor<Self>,
        scale: f64,
    ) -> FloatTensor<Self> {
        Self::enamel_lora_with_low(x, w, a, b, scale).0
    }

    fn enamel_lora_with_low(
        x: FloatTensor<Self>,
        w: FloatTensor<Self>,
        a: FloatTensor<Self>,
        b: FloatTensor<Self>,
        scale: f64,
    ) -> (FloatTensor<Self>, FloatTensor<Self>) {
        let (x, w, a, b) = (readable(x), readable(w), readable(a), readable(b));
        let (rows, out, rank) = (dims(&x).0, dims(&w).0, dims(&a).0);
        let low = sum_of(rows, rank, 1.0, (MatRef::of(&x), MatRef::of(&a).t()), None);
        let y = sum_of(
            rows,
            out,
            1.0,
            (MatRef::of(&x), MatRef::of(&w).t()),
            Some((MatRef::of(&low), MatRef::of(&b).t(), scale)),
        );
        (y, low)
    }

    fn enamel_times(g: FloatTensor<Self>, w: FloatTensor<Self>, scale: f64) -> FloatTensor<Self> {
        let (g, w) = (readable(g), readable(w));
        sum_of(
            dims(&g).0,
            dims(&w).1,
            scale,
            (MatRef::of(&g), MatRef::of(&w)),
            None,
        )
    }

    fn enamel_times_sum(
        g: FloatTensor<Self>,
        w: FloatTensor<Self>,
        low: FloatTensor<Self>,
        a: FloatTensor<Self>,
    ) -> FloatTensor<Self> {
        let (g, w, low, a) = (readable(g), readable(w), readable(low), readable(a));
        sum_of(
            dims(&g).0,
            dims(&w).1,
            1.0,
            (MatRef::of(&g), MatRef::of(&w)),
            Some((MatRef::of(&low), MatRef::of(&a), 1.0)),
        )
    }

    fn enamel_outer(g: FloatTensor<Self>, x: FloatTensor<Self>, scale: f64) -> FloatTensor<Self> {
        let (g, x) = (readable(g), readable(x));
        sum_of(
            dims(&g).1,
            dims(&x).1,
            scale,
            (MatRef::of(&g).t(), MatRef::of(&x)),
            None,
        )
    }
}

#[derive(Debug)]
struct LinearStep;

impl<B: LinearOps> Backward<B, 2> for LinearStep {
    /// x if w is tracked, w if x is.
    type State = (Option<FloatTensor<B>>, Option<FloatTensor<B>>);

    fn backward(self, ops: Ops<Self::State, 2>, grads: &mut Gradients, _: &mut Checkpointer) {
        let grad = grads.consume::<B>(&ops.node);
        let [x_node, w_node] = ops.parents;
        let (x, w) = ops.state;
        if let (Some(node), Some(x)) = (w_node, x) {
            grads.register::<B>(node.id, B::enamel_outer(grad.clone(), x, 1.0));
        }
        if let (Some(node), Some(w)) = (x_node, w) {
            grads.register::<B>(node.id, B::enamel_times(grad, w, 1.0));
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
        } = self;
        if let (Some(node), Some(low)) = (b_node, low) {
            grads.register::<B>(node, B::enamel_outer(grad.clone(), low, scale));
        }
        if let (Some(node), Some(x)) = (w_node, x.clone()) {
            grads.register::<B>(node, B::enamel_outer(grad.clone(), x, 1.0));
        }
        // b is kept when a or x is tracked; both gradients go through the narrow side.
        let Some(b) = b else { return };
        let d_low = B::enamel_times(grad.clone(), b, scale);
        if let (Some(node), Some(x)) = (a_node, x) {
            grads.register::<B>(node, B::enamel_outer(d_low.clone(), x, 1.0));
        }
        if let (Some(node), Some(w), Some(a)) = (x_node, w, a) {
            grads.register::<B>(node, B::enamel_times_sum(grad, w, d_low, a));
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
    fn enamel_linear(x: FloatTensor<Self>, w: FloatTensor<Self>) -> FloatTensor<Self> {
        let (dx, dw) = (x.is_tracked(), w.is_tracked());
        let (x, x_node) = x.into_parts();
        let (w, w_node) = w.into_parts();
        match LinearStep
            .prepare::<C>([x_node, w_node])
            .compute_bound()
            .stateful()
        {
            OpsKind::Tracked(prep) => {
                let state = (dw.then(|| x.clone()), dx.then(|| w.clone()));
                prep.finish(state, B::enamel_linear(x, w))
            }
            OpsKind::UnTracked(prep) => prep.finish(B::enamel_linear(x, w)),
        }
    }

    fn enamel_lora(
        x: FloatTensor<Self>,
        w: FloatTensor<Self>,
        a: FloatTensor<Self>,
        b: FloatTensor<Self>,
        scale: f64,
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
                };
                let (y, low) = B::enamel_lora_with_low(x, w, a, b, scale);
                state.low = db.then_some(low);
                prep.finish(state, y)
            }
            OpsKind::UnTracked(prep) => prep.finish(B::enamel_lora(x, w, a, b, scale)),
        }
    }

    fn enamel_lora_with_low(
        _: FloatTensor<Self>,
        _: FloatTensor<Self>,
        _: FloatTensor<Self>,
        _: FloatTensor<Self>,
        _: f64,
    ) -> (FloatTensor<Self>, FloatTensor<Self>) {
        unimplemented!("second-order gradients of lora_linear")
    }

    fn enamel_times(_: FloatTensor<Self>, _: FloatTensor<Self>, _: f64) -> FloatTensor<Self> {
        unimplemented!("second-order gradients of linear")
    }

    fn enamel_times_sum(
        _: FloatTensor<Self>,
        _: FloatTensor<Self>,
        _: FloatTensor<Self>,
        _: FloatTensor<Self>,
    ) -> FloatTensor<Self> {
        unimplemented!("second-order gradients of lora_linear")
    }

    fn enamel_outer(_: FloatTensor<Self>, _: FloatTensor<Self>, _: f64) -> FloatTensor<Self> {
        unimplemented!("second-order gradients of linear")
    }
}
