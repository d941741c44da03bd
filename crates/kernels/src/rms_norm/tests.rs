//! `rms_norm` against its reference.

use burn::tensor::{Device, Tensor};

use super::{reference, rms_norm};
use crate::check::property::{Case, Check, everything};
use crate::check::*;

/// A mean of up to 577 squares in another order, and a handful of rounded factors.
const TOLERANCE: f32 = 3e-6;

type Op = fn(Tensor<3>, Tensor<1>, f64) -> Tensor<3>;
type Outcome = (Vec<f32>, Vec<Option<Vec<f32>>>);

fn run(op: Op, device: &Device, shape: [usize; 3], tracked: [bool; 2]) -> Outcome {
    let x = leaf(1, shape, tracked[0], device);
    let weight = leaf(2, [shape[2]], tracked[1], device);
    let y = op(x.clone(), weight.clone(), 1e-5);
    let mut grads = vec![None, None];
    if tracked != [false; 2] {
        let g = backward(&y, 3);
        grads = vec![grad(&x, &g), grad(&weight, &g)];
    }
    (floats(y), grads)
}

#[test]
fn matches_reference() {
    for shape in [[1, 1, 1], [1, 1, 64], [2, 3, 37], [2, 60, 577]] {
        for tracked in [[true, true], [true, false], [false, true], [false, false]] {
            let (got, got_grads) = run(rms_norm, &flex(), shape, tracked);
            let (want, want_grads) = run(reference::rms_norm, &ndarray(), shape, tracked);
            close("rms_norm", &got, &want, TOLERANCE);
            close_grads("rms_norm", &got_grads, &want_grads, TOLERANCE);
        }
    }
}

#[test]
fn matches_reference_everywhere() {
    fn call(op: Op, x: &[Tensor<2>]) -> Vec<Tensor<2>> {
        let [rows, n] = x[0].dims();
        let y = op(
            x[0].clone().reshape([1, rows, n]),
            x[1].clone().reshape([n]),
            1e-4,
        );
        vec![y.reshape([rows, n])]
    }
    everything(&Check {
        name: "rms_norm",
        tolerance: TOLERANCE,
        case: |pick| {
            let (rows, n) = (pick.size(60), pick.size(700));
            Case::new(vec![[rows, n], [1, n]])
        },
        ours: |_, x| call(rms_norm, &x),
        reference: |_, x| call(reference::rms_norm, &x),
        slopes: None,
        non_finite: true,
    });
}

#[test]
fn reads_views() {
    let ops: [(Op, Device); 2] = [(rms_norm, flex()), (reference::rms_norm, ndarray())];
    let [got, want] = ops.map(|(op, device)| {
        let x = leaf(1, [30, 4, 5], true, &device);
        let weight = leaf(2, [40], true, &device);
        let y = op(
            x.clone().permute([2, 1, 0]),
            weight.clone().narrow(0, 7, 30),
            1e-6,
        );
        let g = backward(&y.clone().swap_dims(0, 2), 3);
        (floats(y), vec![grad(&x, &g), grad(&weight, &g)])
    });
    close("views", &got.0, &want.0, TOLERANCE);
    close_grads("views", &got.1, &want.1, TOLERANCE);
}

/// The backward works in place on its gradient: a second use of x must not see that.
#[test]
fn other_uses_of_a_gradient_are_untouched() {
    let x = leaf(1, [1, 3, 8], true, &flex());
    let w = leaf(2, [8], false, &flex());
    let both = |op: Op| {
        let y = op(x.clone(), w.clone(), 1e-5);
        let g = (y.clone() + y + x.clone()).sum().backward();
        grad(&x, &g)
    };
    close_grads(
        "sum",
        &[both(rms_norm)],
        &[both(reference::rms_norm)],
        TOLERANCE,
    );
}

#[test]
fn zeros_and_not_a_number() {
    let w = || tensor(vec![1.0; 2], [2], false, &flex());
    let x = tensor(vec![0.0, 0.0, f32::NAN, 1.0], [1, 2, 2], false, &flex());
    let y = floats(rms_norm(x, w(), 1e-5));
    assert_eq!(y[..2], [0.0, 0.0]);
    assert!(y[2].is_nan() && y[3].is_nan());
}

#[test]
fn threads_do_not_matter() {
    same_on_any_pool(|| {
        let (y, g) = run(rms_norm, &flex(), [2, 60, 577], [true; 2]);
        std::iter::once(y).chain(g.into_iter().flatten()).collect()
    });
}
