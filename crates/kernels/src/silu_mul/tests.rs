//! `silu_mul` against its reference.

use burn::tensor::Device;

use super::{reference, silu_mul};
use crate::check::property::{Case, Check, everything};
use crate::check::*;

/// One fused pass against about six rounded operations: a few units in the last place.
const TOLERANCE: f32 = 2e-6;

type Op = fn(burn::tensor::Tensor<2>, burn::tensor::Tensor<2>) -> burn::tensor::Tensor<2>;

fn run(
    op: Op,
    device: &Device,
    shape: [usize; 2],
    tracked: [bool; 2],
) -> (Vec<f32>, Vec<Option<Vec<f32>>>) {
    let scale = |t: burn::tensor::Tensor<2>| t.mul_scalar(9.0);
    let (gate, up) = (
        leaf(1, shape, tracked[0], device),
        leaf(2, shape, tracked[1], device),
    );
    let y = op(scale(gate.clone()), up.clone());
    let mut grads = vec![None, None];
    if tracked != [false, false] {
        let g = backward(&y, 3);
        grads = vec![grad(&gate, &g), grad(&up, &g)];
    }
    (floats(y), grads)
}

#[test]
fn matches_reference() {
    // One element, odd sizes, and enough for several chunks with a remainder.
    for shape in [[1, 1], [3, 37], [130, 517]] {
        for tracked in [[true, true], [true, false], [false, true], [false, false]] {
            let (got, got_grads) = run(silu_mul, &flex(), shape, tracked);
            let (want, want_grads) = run(reference::silu_mul, &ndarray(), shape, tracked);
            close("silu_mul", &got, &want, TOLERANCE);
            close_grads("silu_mul", &got_grads, &want_grads, TOLERANCE);
        }
    }
}

#[test]
fn matches_reference_everywhere() {
    everything(&Check {
        name: "silu_mul",
        tolerance: TOLERANCE,
        case: |pick| {
            let shape = [pick.size(40), pick.size(600)];
            Case::new(vec![shape; 2]).scaled(0, 6.0)
        },
        ours: |_, x| vec![silu_mul(x[0].clone(), x[1].clone())],
        reference: |_, x| vec![reference::silu_mul(x[0].clone(), x[1].clone())],
        slopes: None,
        non_finite: true,
    });
}

#[test]
fn reads_views() {
    let ops: [(Op, Device); 2] = [(silu_mul, flex()), (reference::silu_mul, ndarray())];
    let [got, want] = ops.map(|(op, device)| {
        let gate = leaf(1, [24, 10], true, &device);
        let up = leaf(2, [10, 40], true, &device);
        let y = op(gate.clone().transpose(), up.clone().narrow(1, 5, 24));
        let g = backward(&y, 3);
        (floats(y), vec![grad(&gate, &g), grad(&up, &g)])
    });
    close("views", &got.0, &want.0, TOLERANCE);
    close_grads("views", &got.1, &want.1, TOLERANCE);
}

#[test]
fn not_a_number_passes() {
    let x = tensor(
        vec![f32::NAN, 1.0, f32::INFINITY, 2.0],
        [1, 4],
        false,
        &flex(),
    );
    let u = tensor(vec![1.0, f32::NAN, 1.0, 1.0], [1, 4], false, &flex());
    let y = floats(silu_mul(x, u));
    assert!(y[0].is_nan() && y[1].is_nan() && y[2] == f32::INFINITY && y[3].is_finite());
}

#[test]
fn threads_do_not_matter() {
    same_on_any_pool(|| {
        let (y, g) = run(silu_mul, &flex(), [130, 517], [true, true]);
        std::iter::once(y).chain(g.into_iter().flatten()).collect()
    });
}
