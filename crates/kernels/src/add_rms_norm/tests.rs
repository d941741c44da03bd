//! `add_rms_norm` against its reference.

use burn::tensor::Tensor;

use super::{add_rms_norm, reference};
use crate::check::property::{Case, Check, everything};
use crate::check::*;

/// A mean of up to 700 squares in another order, and a handful of rounded factors.
const TOLERANCE: f32 = 3e-6;

type Op = fn(Tensor<2>, Tensor<2>, Tensor<1>, f64) -> (Tensor<2>, Tensor<2>);

/// The option says which outputs are used: both, the sum, the normalised one.
fn call(op: Op, case: &Case, x: &[Tensor<2>]) -> Vec<Tensor<2>> {
    let weight = x[2].clone().reshape([x[2].dims()[1]]);
    let (sum, y) = op(x[0].clone(), x[1].clone(), weight, 1e-4);
    match case.options[0] {
        // An unused weight has a gradient on neither side.
        1 => vec![sum + x[2].clone().sum().mul_scalar(0.0).reshape([1, 1])],
        2 => vec![y],
        _ => vec![sum, y],
    }
}

#[test]
fn matches_reference_everywhere() {
    everything(&Check {
        name: "add_rms_norm",
        tolerance: TOLERANCE,
        case: |pick| {
            let (rows, n) = (pick.size(60), pick.size(700));
            let options = vec![pick.below(4)];
            Case::new(vec![[rows, n], [rows, n], [1, n]]).options(options)
        },
        ours: |case, x| call(add_rms_norm, case, &x),
        reference: |case, x| call(reference::add_rms_norm, case, &x),
        slopes: None,
        non_finite: true,
    });
}

/// A stack of layers as a model has them: every sum is used by the next sum and by its own norm. The
/// composition with the plain operations is the yardstick, on the same device.
#[test]
fn a_stack_of_layers_has_the_gradients_of_the_composition() {
    let stack = |op: Op| {
        let mut x = leaf(1, [12, 40], true, &flex());
        let first = x.clone();
        let weights: Vec<Tensor<1>> = (0..4).map(|i| leaf(10 + i, [40], true, &flex())).collect();
        let mut h = x.clone().mul_scalar(0.5);
        for w in &weights {
            let branch = h.clone().tanh();
            (x, h) = op(x, branch, w.clone(), 1e-5);
        }
        let g = backward(&h, 7);
        let outputs = floats(h);
        let leaves = weights.iter().map(|w| grad(w, &g));
        let grads: Vec<_> = std::iter::once(grad(&first, &g)).chain(leaves).collect();
        (outputs, grads)
    };
    let (got, got_grads) = stack(add_rms_norm);
    let (want, want_grads) = stack(reference::add_rms_norm);
    close("stack", &got, &want, 1e-5);
    close_grads("stack", &got_grads, &want_grads, 1e-5);
}

/// The sum is written over an addend only where nobody else looks.
#[test]
fn leaves_shared_inputs_alone() {
    let (x, branch) = (
        leaf(1, [3, 8], false, &flex()),
        leaf(2, [3, 8], false, &flex()),
    );
    let before = (floats(x.clone()), floats(branch.clone()));
    let w = leaf(3, [8], false, &flex());
    let (sum, _) = add_rms_norm(x.clone(), branch.clone(), w, 1e-5);
    assert_eq!((floats(x), floats(branch)), before);
    let want: Vec<f32> = before.0.iter().zip(&before.1).map(|(a, b)| a + b).collect();
    assert_eq!(floats(sum), want);
}

#[test]
fn threads_do_not_matter() {
    same_on_any_pool(|| {
        let (x, branch) = (
            leaf(1, [120, 577], true, &flex()),
            leaf(2, [120, 577], true, &flex()),
        );
        let w = leaf(3, [577], true, &flex());
        let (sum, y) = add_rms_norm(x.clone(), branch.clone(), w.clone(), 1e-5);
        let g = backward(&(sum.clone() + y.clone()), 4);
        let grads = [grad(&x, &g), grad(&branch, &g), grad(&w, &g)];
        [floats(sum), floats(y)]
            .into_iter()
            .chain(grads.into_iter().flatten())
            .collect()
    });
}
