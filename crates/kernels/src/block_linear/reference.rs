//! The fused operations as the separate ones that they stand for.

use burn::tensor::Tensor;

use super::{LowRank, Norm, Projection};
use crate::{linear, lora_linear, lora_linear_dropout, rms_norm, silu_mul};

pub(super) fn project(x: Tensor<2>, norm: Option<Norm>, projections: Vec<Projection>) -> Tensor<2> {
    let x = match norm {
        Some(Norm { weight, eps }) => rms_norm(x, weight, eps),
        None => x,
    };
    let mut ys: Vec<_> = projections
        .into_iter()
        .map(|projection| one(x.clone(), projection))
        .collect();
    if ys.len() == 1 {
        return ys.remove(0);
    }
    Tensor::cat(ys, 1)
}

pub(super) fn swiglu_project(gate_up: Tensor<2>, projections: Vec<Projection>) -> Tensor<2> {
    let inner = gate_up.dims()[1] / 2;
    let gate = gate_up.clone().narrow(1, 0, inner);
    let up = gate_up.narrow(1, inner, inner);
    project(silu_mul(gate, up), None, projections)
}

fn one(x: Tensor<2>, projection: Projection) -> Tensor<2> {
    let weight = projection.weight;
    let y = match projection.lora {
        Some(LowRank {
            a,
            b,
            scale,
            dropout,
        }) => match dropout {
            Some(dropout) => lora_linear_dropout(x, weight, a, b, scale, dropout),
            None => lora_linear(x, weight, a, b, scale),
        },
        None => linear(x, weight),
    };
    match projection.bias {
        Some(bias) => y + bias.unsqueeze(),
        None => y,
    }
}
