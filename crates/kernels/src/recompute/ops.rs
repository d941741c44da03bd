//! The nodes that [`checkpoint_module`](super::checkpoint_module) puts into the graph.
//!
//! A node's number of parents is fixed when it is compiled, and a block's number of parameters is not. So
//! each parameter gets a node of its own, and these are chained by a token of one number that means
//! nothing: parameter → token → token → … → the block's node. That node's backward pass runs the block
//! again and leaves the parameters' gradients in a mailbox; the tokens' nodes, whose turn comes later as
//! they are nearer to the leaves, fetch them from there.

#![cfg_attr(feature = "ndarray", allow(deprecated))] // Burn 0.22 still has NdArray, and so have we

use std::collections::BTreeMap;
use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use burn::backend::autodiff::Autodiff;
use burn::backend::autodiff::checkpoint::{base::Checkpointer, strategy::CheckpointStrategy};
use burn::backend::autodiff::grads::Gradients;
use burn::backend::autodiff::ops::{Backward, Ops, OpsKind};
use burn::backend::tensor::FloatTensor;
use burn::backend::{
    Backend, BackendTensor, Dispatch, DispatchKindConversion, DispatchTensor, Flex,
    backend_extension,
};
use burn::tensor::Tensor;

/// Gradients on their way from a block's second run to its parameters.
#[derive(Clone, Default)]
pub struct Mailbox(Arc<Mutex<BTreeMap<usize, DispatchTensor>>>);

impl Mailbox {
    fn open(&self) -> MutexGuard<'_, BTreeMap<usize, DispatchTensor>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn put(&self, slot: usize, grad: DispatchTensor) {
        self.open().insert(slot, grad);
    }

    pub(super) fn slot(&self, slot: usize) -> Slot {
        Slot(self.clone(), slot)
    }
}

/// One parameter's place in a [`Mailbox`].
#[derive(Clone)]
pub struct Slot(Mailbox, usize);

impl Slot {
    fn take(&self) -> Option<DispatchTensor> {
        self.0.open().remove(&self.1)
    }
}

impl fmt::Debug for Slot {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Slot({})", self.1)
    }
}

type Rerun = dyn Fn(DispatchTensor) -> Option<DispatchTensor> + Send + Sync;

/// Runs a block again: from the gradient of its result to that of its input, if it has one. The
/// parameters' gradients go into a [`Mailbox`].
#[derive(Clone)]
pub struct Again(Arc<Rerun>);

impl Again {
    pub(super) fn new(
        run: impl Fn(DispatchTensor) -> Option<DispatchTensor> + Send + Sync + 'static,
    ) -> Self {
        Self(Arc::new(run))
    }
}

impl fmt::Debug for Again {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Again")
    }
}

/// The nodes as a backend extension. Without autodiff they hand on what they are given.
#[backend_extension(Flex, NdArray: cfg(feature = "ndarray"), Cube: cfg(feature = "cube"), Autodiff)]
pub trait CheckpointOps: Backend {
    /// The token, with `parameter` tied to it.
    fn enamel_checkpoint_join(
        token: FloatTensor<Self>,
        parameter: FloatTensor<Self>,
        slot: Slot,
    ) -> FloatTensor<Self>;

    /// y, which was made from x and from what is tied to the token.
    fn enamel_checkpoint(
        x: FloatTensor<Self>,
        token: FloatTensor<Self>,
        y: FloatTensor<Self>,
        again: Again,
    ) -> FloatTensor<Self>;

    /// The token; a backward pass from it begins with `grad` as y's gradient.
    fn enamel_checkpoint_seed(
        token: FloatTensor<Self>,
        y: FloatTensor<Self>,
        grad: FloatTensor<Self>,
    ) -> FloatTensor<Self>;
}

pub(super) fn join<const D: usize>(
    token: Tensor<1>,
    parameter: Tensor<D>,
    slot: Slot,
) -> Tensor<1> {
    Tensor::from_dispatch(<Dispatch as CheckpointOps>::enamel_checkpoint_join(
        token.into_dispatch(),
        parameter.into_dispatch(),
        slot,
    ))
}

pub(super) fn checkpoint<const D: usize>(
    x: Tensor<D>,
    token: Tensor<1>,
    y: Tensor<D>,
    again: Again,
) -> Tensor<D> {
    Tensor::from_dispatch(<Dispatch as CheckpointOps>::enamel_checkpoint(
        x.into_dispatch(),
        token.into_dispatch(),
        y.into_dispatch(),
        again,
    ))
}

/// A root for a backward pass in which y's gradient is `grad`, `[1]`. `Σ y·grad` would give the same
/// bits by way of another tensor of y's size.
pub(super) fn seeded<const D: usize>(y: Tensor<D>, grad: Tensor<D>) -> Tensor<1> {
    let token = Tensor::<1>::zeros([1], &y.device());
    Tensor::from_dispatch(<Dispatch as CheckpointOps>::enamel_checkpoint_seed(
        token.into_dispatch(),
        y.into_dispatch(),
        grad.into_dispatch(),
    ))
}

macro_rules! handed_on {
    ($backend:ty) => {
        impl CheckpointOps for $backend {
            fn enamel_checkpoint_join(
                token: FloatTensor<Self>,
                _: FloatTensor<Self>,
                _: Slot,
            ) -> FloatTensor<Self> {
                token
            }

            fn enamel_checkpoint(
                _: FloatTensor<Self>,
                _: FloatTensor<Self>,
                y: FloatTensor<Self>,
                _: Again,
            ) -> FloatTensor<Self> {
                y
            }

            fn enamel_checkpoint_seed(
                token: FloatTensor<Self>,
                _: FloatTensor<Self>,
                _: FloatTensor<Self>,
            ) -> FloatTensor<Self> {
                token
            }
        }
    };
}

handed_on!(Flex);
#[cfg(feature = "ndarray")]
handed_on!(burn::backend::NdArray);
#[cfg(feature = "cube")]
handed_on!(burn::backend::Cube);

/// A backend's tensor as any backend's.
fn lifted<B: Backend>(tensor: FloatTensor<B>) -> DispatchTensor
where
    DispatchTensor: DispatchKindConversion<B>,
{
    <DispatchTensor as DispatchKindConversion<B>>::from_backend(BackendTensor::Float(tensor))
}

/// The reverse, on the backend that the tensor was computed on.
fn lowered<B: Backend>(tensor: DispatchTensor) -> FloatTensor<B>
where
    DispatchTensor: DispatchKindConversion<B>,
{
    match <DispatchTensor as DispatchKindConversion<B>>::try_into_backend(tensor) {
        Ok(tensor) => tensor.float(),
        Err(_) => unreachable!("a gradient is on the device of what it is the gradient of"),
    }
}

#[derive(Debug)]
struct JoinStep;

impl<B: CheckpointOps> Backward<B, 2> for JoinStep
where
    DispatchTensor: DispatchKindConversion<B>,
{
    type State = Slot;

    fn backward(self, ops: Ops<Self::State, 2>, grads: &mut Gradients, _: &mut Checkpointer) {
        let token_grad = grads.consume::<B>(&ops.node);
        let [token, parameter] = ops.parents;
        if let (Some(node), Some(grad)) = (parameter, ops.state.take()) {
            grads.register::<B>(node.id, lowered::<B>(grad));
        }
        if let Some(node) = token {
            grads.register::<B>(node.id, token_grad);
        }
    }
}

#[derive(Debug)]
struct CheckpointStep;

impl<B: CheckpointOps> Backward<B, 2> for CheckpointStep
where
    DispatchTensor: DispatchKindConversion<B>,
{
    /// The token's value, which serves as its gradient too.
    type State = (Again, FloatTensor<B>);

    fn backward(self, ops: Ops<Self::State, 2>, grads: &mut Gradients, _: &mut Checkpointer) {
        let grad = grads.consume::<B>(&ops.node);
        let (again, token_grad) = ops.state;
        let [x, token] = ops.parents;
        let x_grad = (again.0)(lifted::<B>(grad));
        if let (Some(node), Some(grad)) = (x, x_grad) {
            grads.register::<B>(node.id, lowered::<B>(grad));
        }
        if let Some(node) = token {
            grads.register::<B>(node.id, token_grad);
        }
    }
}

#[derive(Debug)]
struct SeedStep;

impl<B: CheckpointOps> Backward<B, 1> for SeedStep {
    type State = FloatTensor<B>;

    fn backward(self, ops: Ops<Self::State, 1>, grads: &mut Gradients, _: &mut Checkpointer) {
        let _ = grads.consume::<B>(&ops.node);
        if let [Some(y)] = ops.parents {
            grads.register::<B>(y.id, ops.state);
        }
    }
}

impl<B: CheckpointOps, C: CheckpointStrategy> CheckpointOps for Autodiff<B, C>
where
    DispatchTensor: DispatchKindConversion<B>,
{
    fn enamel_checkpoint_join(
        token: FloatTensor<Self>,
        parameter: FloatTensor<Self>,
        slot: Slot,
    ) -> FloatTensor<Self> {
        let parameter = parameter.node();
        let (token, token_node) = token.into_parts();
        let prep = <JoinStep as Backward<B, 2>>::prepare::<C>(JoinStep, [token_node, parameter]);
        match prep.compute_bound().stateful() {
            OpsKind::Tracked(prep) => prep.finish(slot, token),
            OpsKind::UnTracked(prep) => prep.finish(token),
        }
    }

    fn enamel_checkpoint(
        x: FloatTensor<Self>,
        token: FloatTensor<Self>,
        y: FloatTensor<Self>,
        again: Again,
    ) -> FloatTensor<Self> {
        let x = x.node();
        let (token, token_node) = token.into_parts();
        let prep =
            <CheckpointStep as Backward<B, 2>>::prepare::<C>(CheckpointStep, [x, token_node]);
        match prep.compute_bound().stateful() {
            OpsKind::Tracked(prep) => prep.finish((again, token), y.into_primitive()),
            OpsKind::UnTracked(prep) => prep.finish(y.into_primitive()),
        }
    }

    fn enamel_checkpoint_seed(
        token: FloatTensor<Self>,
        y: FloatTensor<Self>,
        grad: FloatTensor<Self>,
    ) -> FloatTensor<Self> {
        let y = y.node();
        let token = token.into_primitive();
        match SeedStep.prepare::<C>([y]).compute_bound().stateful() {
            OpsKind::Tracked(prep) => prep.finish(grad.into_primitive(), token),
            OpsKind::UnTracked(prep) => prep.finish(token),
        }
    }
}
