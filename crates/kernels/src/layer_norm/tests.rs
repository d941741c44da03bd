//! `layer_norm` against its reference.

use burn::tensor::Tensor;

use super::{layer_norm, reference};
use crate::check::property::{Case, Check, everything};
use crate::check::*;

/// Means of up to 700 numbers in another order, and a handful of rounded factors.
const TOLERANCE: f32 = 5e-6;

type Op = fn(Tensor<2>, Tensor<1>, Option<Tensor<1>>, f64) -> Tensor<2>;

/// Inputs 1 and 2 are weight and bias; the option says whether there is one.
fn call(op: Op, case: &Case, x: &[Tensor<2>]) -> Vec<Tensor<2>> {
    let n = x[0].dims()[1];
    let flat = |t: &Tensor<2>| t.clone().reshape([n]);
    let bias = (case.options[0] > 0).then(|| flat(&x[2]));
    // An unused input would have a gradient on neither side: its share is zero here.
    let y = op(x[0].clone(), flat(&x[1]), bias, 1e-3);
    vec![y + x[2].clone().sum().mul_scalar(0.0).reshape([1, 1])]
}

#[test]
fn matches_reference_everywhere() {
    everything(&Check {
        name: "layer_norm",
        tolerance: TOLERANCE,
        case: |pick| {
            let (rows, n) = (pick.size(60), pick.size(700));
            let options = vec![pick.below(3)];
            Case::new(vec![[rows, n], [1, n], [1, n]]).options(options)
        },
        ours: |case, x| call(layer_norm, case, &x),
        reference: |case, x| call(reference::layer_norm, case, &x),
        slopes: None,
        non_finite: true,
    });
}

/// The mean goes first, so that a row far from zero keeps its digits.
#[test]
fn a_row_far_from_zero_is_normalised() {
    let x = tensor(vec![1000.0, 1001.0, 1002.0, 1003.0], [1, 4], false, &flex());
    let w = tensor(vec![1.0; 4], [4], false, &flex());
    let y = floats(layer_norm(x, w, None, 0.0));
    let inverse = 1.25f32.sqrt().recip();
    let want = [-1.5, -0.5, 0.5, 1.5].map(|d| d * inverse);
    close("far from zero", &y, &want, 1e-6);
}

#[test]
fn any_rank() {
    let x = leaf(1, [2, 3, 4, 8], true, &flex());
    let w = leaf(2, [8], true, &flex());
    let y = layer_norm(x.clone(), w.clone(), None, 1e-5);
    let want = reference::layer_norm(x.clone().reshape([24, 8]), w, None, 1e-5);
    close("rank 4", &floats(y), &floats(want), TOLERANCE);
}

#[test]
fn threads_do_not_matter() {
    same_on_any_pool(|| {
        let x = leaf(1, [120, 577], true, &flex());
        let (w, b) = (leaf(2, [577], true, &flex()), leaf(3, [577], true, &flex()));
        let y = layer_norm(x.clone(), w.clone(), Some(b.clone()), 1e-5);
        let g = backward(&y, 4);
        let grads = [grad(&x, &g), grad(&w, &g), grad(&b, &g)];
        std::iter::once(floats(y))
            .chain(grads.into_iter().flatten())
            .collect()
    });
}
