//! The fused operations as a backend extension, and their node in the autodiff graph.

use burn::backend::autodiff::Autodiff;
use burn::backend::autodiff::checkpoint::{base::Checkpointer, strategy::CheckpointStrategy};
use burn::backend::autodiff::grads::Gradients;
use burn::backend::autodiff::ops::{Backward, NodeGuard, Ops, OpsKind};
use burn::backend::tensor::FloatTensor;
use burn::backend::{AutodiffBackend, Backend, Dispatch, Flex, TensorMetadata, backend_extension};
use burn::tensor::Tensor;

use super::backward::{Grads, Saved, SavedPart, backward};
use super::forward::{Kept, forward};
use super::operands::{Inputs, Operands, Source};
use super::{MOST_PROJECTIONS, Norm, Projection};
use crate::base_weight::Held;
use crate::cpu::gemm::Compute;

/// x, the residual, and a and b of each projection.
const PARENTS: usize = 2 + 2 * MOST_PROJECTIONS;

/// The operations as a backend extension.
#[backend_extension(Flex, Autodiff)]
pub trait BlockLinearOps: Backend {
    /// `[x̂ · wᵀ + bias + scale · (x̂ · aᵀ) · bᵀ, ...] + residual`, for x̂ made of x.
    fn enamel_block_linear(
        #[extension_type] inputs: Inputs<Self>,
        compute: Compute,
    ) -> FloatTensor<Self>;
}

/// What the node in the graph asks of its backend.
pub trait BlockLinearSteps: BlockLinearOps {
    /// The result, and what the backward pass may want.
    fn enamel_block_forward(
        operands: Operands<FloatTensor<Self>>,
        compute: Compute,
    ) -> (FloatTensor<Self>, Kept<FloatTensor<Self>>);

    /// The gradients of what is tracked; the residual's is `grad` itself.
    fn enamel_block_backward(
        saved: Saved<FloatTensor<Self>>,
        grad: FloatTensor<Self>,
    ) -> Grads<FloatTensor<Self>>;
}

fn run(operands: Operands<FloatTensor<Dispatch>>, compute: Compute) -> Tensor<2> {
    Tensor::from_dispatch(<Dispatch as BlockLinearOps>::enamel_block_linear(
        Inputs(operands),
        compute,
    ))
}

pub(super) fn project(
    x: Tensor<2>,
    norm: Option<Norm>,
    projections: Vec<Projection>,
    compute: Compute,
) -> Tensor<2> {
    run(
        Operands::new(x, Source::new(norm), None, projections),
        compute,
    )
}

pub(super) fn project_add(
    x: Tensor<2>,
    projections: Vec<Projection>,
    residual: Tensor<2>,
    compute: Compute,
) -> Tensor<2> {
    run(
        Operands::new(x, Source::Rows, Some(residual), projections),
        compute,
    )
}

pub(super) fn swiglu_project(
    gate_up: Tensor<2>,
    projections: Vec<Projection>,
    residual: Option<Tensor<2>>,
    compute: Compute,
) -> Tensor<2> {
    run(
        Operands::new(gate_up, Source::Gated, residual, projections),
        compute,
    )
}

impl BlockLinearOps for Flex {
    fn enamel_block_linear(inputs: Inputs<Self>, compute: Compute) -> FloatTensor<Self> {
        forward(inputs.0, compute).0
    }
}

impl BlockLinearSteps for Flex {
    fn enamel_block_forward(
        operands: Operands<FloatTensor<Self>>,
        compute: Compute,
    ) -> (FloatTensor<Self>, Kept<FloatTensor<Self>>) {
        forward(operands, compute)
    }

    fn enamel_block_backward(
        saved: Saved<FloatTensor<Self>>,
        grad: FloatTensor<Self>,
    ) -> Grads<FloatTensor<Self>> {
        backward(saved, grad)
    }
}

#[derive(Debug)]
struct BlockLinearStep;

impl<B: BlockLinearSteps> Backward<B, PARENTS> for BlockLinearStep {
    type State = Saved<FloatTensor<B>>;

    fn backward(self, ops: Ops<Self::State, PARENTS>, grads: &mut Gradients, _: &mut Checkpointer) {
        let grad = grads.consume::<B>(&ops.node);
        let mut nodes = ops.parents.into_iter();
        let (x_node, residual_node) = (nodes.next().flatten(), nodes.next().flatten());
        let own = B::enamel_block_backward(ops.state, grad.clone());
        let factors = own.factors.into_iter().flatten();
        for (node, gradient) in nodes.zip(factors) {
            if let (Some(node), Some(gradient)) = (node, gradient) {
                grads.register::<B>(node.id, gradient);
            }
        }
        // Last handles by now, so that a sum with another gradient is made in place.
        if let (Some(node), Some(gradient)) = (x_node, own.x) {
            grads.register::<B>(node.id, gradient);
        }
        if let Some(node) = residual_node {
            grads.register::<B>(node.id, grad);
        }
    }
}

/// A tensor of the inner backend and whether it is tracked.
type Input<B> = (FloatTensor<B>, bool);

/// Rows and columns.
fn dims<B: Backend>(weight: &Held<Input<B>>) -> [usize; 2] {
    match weight {
        Held::Dense((tensor, _)) => [tensor.shape()[0], tensor.shape()[1]],
        Held::Packed(packed) => packed.dims(),
    }
}

/// What is to be kept of the operands before they are used up.
fn saved<B: Backend>(operands: &Operands<Input<B>>, compute: Compute) -> Saved<FloatTensor<B>> {
    let handle = |t: &Input<B>| t.0.clone();
    let wants_x = operands.x.1;
    let parts = operands.parts.iter().map(|part| {
        let lora = part.lora.as_ref();
        let wants = lora.map_or([false; 2], |lora| [lora.a.1, lora.b.1]);
        SavedPart {
            weight: wants_x.then(|| part.weight.clone().map(|t| t.0)),
            a: lora.filter(|_| wants_x).map(|lora| handle(&lora.a)),
            b: lora
                .filter(|_| wants_x || wants[0])
                .map(|lora| handle(&lora.b)),
            scale: lora.map_or(1.0, |lora| lora.scale),
            dropout: lora.and_then(|lora| lora.dropout),
            out: dims::<B>(&part.weight)[0],
            rank: lora.map_or(0, |lora| lora.a.0.shape()[0]),
            wants,
        }
    });
    let parts: Vec<_> = parts.collect();
    let source = match &operands.source {
        Source::Rows => Source::Rows,
        Source::Normed { weight, eps } => Source::Normed {
            weight: handle(weight),
            eps: *eps,
        },
        Source::Gated => Source::Gated,
    };
    let undone = wants_x && !matches!(source, Source::Rows);
    let uses_x = undone || parts.iter().any(|part| part.wants[0]);
    Saved {
        x: uses_x.then(|| handle(&operands.x)),
        source,
        inverse: None,
        low: None,
        width: operands
            .parts
            .first()
            .map_or(0, |part| dims::<B>(&part.weight)[1]),
        parts,
        wants_x,
        adds: operands.residual.is_some(),
        compute,
    }
}

/// The result and all that its backward pass will use.
pub(super) fn forward_saving<B: BlockLinearSteps>(
    operands: Operands<Input<B>>,
    compute: Compute,
) -> (FloatTensor<B>, Saved<FloatTensor<B>>) {
    let mut saved = saved::<B>(&operands, compute);
    let wants_b = saved.parts.iter().any(|part| part.wants[1]);
    let (y, kept) = B::enamel_block_forward(operands.map(|t| t.0), compute);
    saved.inverse = kept.inverse.filter(|_| saved.x.is_some());
    saved.low = kept.low.filter(|_| wants_b);
    (y, saved)
}

impl<B: BlockLinearSteps, C: CheckpointStrategy> BlockLinearOps for Autodiff<B, C> {
    fn enamel_block_linear(inputs: Inputs<Self>, compute: Compute) -> FloatTensor<Self> {
        let spare = Self::from_inner(inputs.0.x.primitive().clone());
        let mut nodes: Vec<NodeGuard> = vec![inputs.0.x.node()];
        nodes.push(inputs.0.residual.as_ref().unwrap_or(&spare).node());
        for part in &inputs.0.parts {
            let [a, b] = match &part.lora {
                Some(lora) => [&lora.a, &lora.b],
                None => [&spare; 2],
            };
            nodes.extend([a.node(), b.node()]);
        }
        let mut nodes = nodes.into_iter();
        let nodes: [NodeGuard; PARENTS] =
            std::array::from_fn(|_| nodes.next().unwrap_or_else(|| spare.node()));
        drop(spare);

        let operands = inputs.0.map(|t| {
            let tracked = t.is_tracked();
            (t.into_primitive(), tracked)
        });
        match BlockLinearStep
            .prepare::<C>(nodes)
            .compute_bound()
            .stateful()
        {
            OpsKind::Tracked(prep) => {
                let (y, saved) = forward_saving::<B>(operands, compute);
                prep.finish(saved, y)
            }
            OpsKind::UnTracked(prep) => prep.finish(B::enamel_block_linear(
                Inputs(operands.map(|t| t.0)),
                compute,
            )),
        }
    }
}
