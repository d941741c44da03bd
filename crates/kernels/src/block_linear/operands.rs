//! What the fused operations read, over any kind of tensor, and how it crosses the dispatch boundary.

use burn::backend::tensor::FloatTensor;
use burn::backend::{
    Backend, BackendTensor, Dispatch, DispatchAutodiffContext, DispatchTensor, DispatchTensorKind,
    ExtensionType,
};
use burn::tensor::Tensor;

use super::{Norm, Projection};
use crate::base_weight::Held;
use crate::cpu::dropout::Dropout;

/// What the projections multiply, made of the operand x.
#[derive(Clone, Debug)]
pub enum Source<T> {
    /// x itself.
    Rows,
    /// x normalised; `[in]`.
    Normed {
        /// The norm's weight.
        weight: T,
        /// Added to the mean square.
        eps: f64,
    },
    /// `silu(gate) · up` of the halves of x's rows.
    Gated,
}

/// A projection's tensors.
#[derive(Clone, Debug)]
pub struct Part<T> {
    /// `[out, in]`
    pub weight: Held<T>,
    /// `[out]`
    pub bias: Option<T>,
    /// The adapter.
    pub lora: Option<Factors<T>>,
}

/// An adapter's tensors.
#[derive(Clone, Debug)]
pub struct Factors<T> {
    /// `[r, in]`
    pub a: T,
    /// `[out, r]`
    pub b: T,
    /// In front of their product.
    pub scale: f64,
    /// On the adapter's input.
    pub dropout: Option<Dropout>,
}

/// All tensors of a call.
#[derive(Clone, Debug)]
pub struct Operands<T> {
    /// `[rows, in]`, or `[rows, 2 · in]` where it is gated.
    pub x: T,
    /// What is made of it.
    pub source: Source<T>,
    /// `[rows, Σ out]`
    pub residual: Option<T>,
    /// At least one.
    pub parts: Vec<Part<T>>,
}

impl<T> Operands<T> {
    /// The same of what `f` makes of each tensor.
    pub fn map<U>(self, mut f: impl FnMut(T) -> U) -> Operands<U> {
        Operands {
            x: f(self.x),
            source: match self.source {
                Source::Rows => Source::Rows,
                Source::Normed { weight, eps } => Source::Normed {
                    weight: f(weight),
                    eps,
                },
                Source::Gated => Source::Gated,
            },
            residual: self.residual.map(&mut f),
            parts: self
                .parts
                .into_iter()
                .map(|part| Part {
                    weight: part.weight.map(&mut f),
                    bias: part.bias.map(&mut f),
                    lora: part.lora.map(|lora| Factors {
                        a: f(lora.a),
                        b: f(lora.b),
                        scale: lora.scale,
                        dropout: lora.dropout,
                    }),
                })
                .collect(),
        }
    }
}

impl Operands<DispatchTensor> {
    /// From tensors.
    pub(super) fn new(
        x: Tensor<2>,
        source: Source<DispatchTensor>,
        residual: Option<Tensor<2>>,
        projections: Vec<Projection>,
    ) -> Self {
        let part = |projection: Projection| Part {
            weight: projection.weight.map(Tensor::into_dispatch),
            bias: projection.bias.map(Tensor::into_dispatch),
            lora: projection.lora.map(|lora| Factors {
                a: lora.a.into_dispatch(),
                b: lora.b.into_dispatch(),
                scale: lora.scale,
                dropout: lora.dropout,
            }),
        };
        Self {
            x: x.into_dispatch(),
            source,
            residual: residual.map(Tensor::into_dispatch),
            parts: projections.into_iter().map(part).collect(),
        }
    }
}

impl Source<DispatchTensor> {
    pub(super) fn new(norm: Option<Norm>) -> Self {
        norm.map_or(Self::Rows, |Norm { weight, eps }| Self::Normed {
            weight: weight.into_dispatch(),
            eps,
        })
    }
}

/// [`Operands`] as an argument of a backend extension.
#[derive(Clone, Debug)]
pub struct Inputs<B: Backend>(pub Operands<FloatTensor<B>>);

impl<B: Backend> ExtensionType<B> for Inputs<B> {
    type Target = Inputs<Dispatch>;

    fn map_to_dispatch<F>(self, map_kind: F, autodiff: DispatchAutodiffContext) -> Self::Target
    where
        F: Fn(BackendTensor<B>) -> DispatchTensorKind,
    {
        Inputs(self.0.map(|tensor| DispatchTensor {
            kind: map_kind(BackendTensor::Float(tensor)),
            autodiff,
        }))
    }

    fn map_from_dispatch<F>(target: Self::Target, unwrap_kind: F) -> Self
    where
        F: Fn(DispatchTensor) -> BackendTensor<B>,
    {
        Inputs(target.0.map(|tensor| unwrap_kind(tensor).float()))
    }

    fn routing_tensor(target: &Self::Target) -> Option<&DispatchTensor> {
        Some(&target.0.x)
    }

    fn routing_float_tensor(target: &Self::Target) -> Option<&DispatchTensor> {
        Some(&target.0.x)
    }

    fn autodiff_context(target: &Self::Target) -> DispatchAutodiffContext {
        let operands = &target.0;
        let norm = match &operands.source {
            Source::Normed { weight, .. } => Some(weight),
            Source::Rows | Source::Gated => None,
        };
        let parts = operands.parts.iter().flat_map(|part| {
            let lora = part.lora.iter().flat_map(|lora| [&lora.a, &lora.b]);
            part.weight
                .tensor()
                .into_iter()
                .chain(&part.bias)
                .chain(lora)
        });
        std::iter::once(&operands.x)
            .chain(norm)
            .chain(&operands.residual)
            .chain(parts)
            .fold(DispatchAutodiffContext::Disabled, |context, tensor| {
                context.merge(tensor.autodiff)
            })
    }
}
