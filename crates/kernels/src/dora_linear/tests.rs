//! `dora_linear` against its reference and against the weights themselves.

use burn::tensor::{Device, Tensor};

use super::{dora_linear, reference};
use crate::check::property::{Case, Check, everything};
use crate::check::*;

/// Sums of up to 300 products in another order, and a length of as many squares.
const TOLERANCE: f32 = 5e-6;

const SCALE: f64 = 0.75;

/// x, w, a, b, magnitude.
type Inputs = (Tensor<2>, Tensor<2>, Tensor<2>, Tensor<2>, Tensor<1>);
type Op = fn(Tensor<2>, Tensor<2>, Tensor<2>, Tensor<2>, Tensor<1>, Tensor<1>, f64) -> Tensor<2>;
type Outcome = (Vec<f32>, Vec<Option<Vec<f32>>>);

fn inputs(device: &Device, [m, k, n, r]: [usize; 4], tracked: [bool; 5]) -> Inputs {
    (
        leaf(1, [m, k], tracked[0], device),
        leaf(2, [n, k], tracked[1], device),
        leaf(4, [r, k], tracked[2], device),
        leaf(5, [n, r], tracked[3], device),
        leaf(6, [n], tracked[4], device),
    )
}

/// Squared lengths of the rows, out of the graph.
fn squares(w: &Tensor<2>) -> Tensor<1> {
    let ([n, k], values) = (w.dims(), floats(w.clone()));
    let of = |row: usize| inner(&values[row * k..][..k], &values[row * k..][..k]) as f32;
    tensor((0..n).map(of).collect(), [n], false, &w.device())
}

fn outcome(op: Op, (x, w, a, b, m): Inputs, any: bool) -> Outcome {
    let base = squares(&w);
    let y = op(
        x.clone(),
        w.clone(),
        a.clone(),
        b.clone(),
        m.clone(),
        base,
        SCALE,
    );
    let mut grads = vec![None; 5];
    if any {
        let g = backward(&y, 3);
        grads = [&x, &w, &a, &b].iter().map(|t| grad(t, &g)).collect();
        grads.push(grad(&m, &g));
    }
    (floats(y), grads)
}

fn run(op: Op, device: &Device, size: [usize; 4], tracked: [bool; 5]) -> Outcome {
    outcome(op, inputs(device, size, tracked), tracked != [false; 5])
}

fn same(what: &str, got: &Outcome, want: &Outcome) {
    close(what, &got.0, &want.0, TOLERANCE);
    close_grads(what, &got.1, &want.1, TOLERANCE);
}

#[test]
fn matches_reference_for_every_mask() {
    for size in [[1, 6, 5, 1], [1, 70, 33, 8], [67, 300, 131, 16]] {
        for bits in 0..32 {
            let tracked = std::array::from_fn(|i| bits >> i & 1 == 1);
            let got = run(dora_linear, &flex(), size, tracked);
            let want = run(reference::dora_linear, &ndarray(), size, tracked);
            same(&format!("{size:?} {bits:05b}"), &got, &want);
        }
    }
}

/// More columns than one task of the lengths has, and a row longer than a task's elements. With enough
/// inputs that in no row base and adapter nearly cancel, where the squares would lose their digits.
#[test]
fn wide_outputs_match_reference() {
    for size in [[3, 24, 2051, 3], [2, 24, 17_000, 1]] {
        let got = run(dora_linear, &flex(), size, [true; 5]);
        let want = run(reference::dora_linear, &ndarray(), size, [true; 5]);
        same(&format!("{size:?}"), &got, &want);
    }
}

/// The definition, with the sum of the weights formed.
#[test]
fn every_row_of_the_sum_has_the_learnt_length() {
    let (x, w, a, b, m) = inputs(&flex(), [7, 40, 19, 4], [false; 5]);
    let sum = w.clone() + b.clone().matmul(a.clone()).mul_scalar(SCALE);
    let lengths = (sum.clone() * sum.clone()).sum_dim(1).sqrt();
    let weight = sum / lengths * m.clone().unsqueeze_dim(1);
    let want = x.clone().matmul(weight.transpose());
    let base = squares(&w);
    let got = dora_linear(x, w, a, b, m, base, SCALE);
    close("merged", &floats(got), &floats(want), TOLERANCE);
}

/// Transposed and narrowed inputs; the incoming gradient is a transposed view as well.
#[test]
fn reads_views() {
    let ops: [(Op, Device); 2] = [(dora_linear, flex()), (reference::dora_linear, ndarray())];
    let [got, want] = ops.map(|(op, device)| {
        let x = leaf(1, [20, 9], true, &device);
        let w = leaf::<2>(2, [20, 30], false, &device).transpose();
        let a = leaf(4, [20, 3], true, &device);
        let b = leaf(5, [30, 8], true, &device);
        let m = leaf(6, [40], true, &device);
        let y = op(
            x.clone().transpose(),
            w.clone(),
            a.clone().transpose(),
            b.clone().narrow(1, 2, 3),
            m.clone().narrow(0, 5, 30),
            squares(&w),
            SCALE,
        );
        let g = backward(&y.clone().transpose(), 3);
        let grads = [&x, &a, &b].into_iter().map(|t| grad(t, &g));
        (floats(y), grads.chain([grad(&m, &g)]).collect())
    });
    same("views", &got, &want);
}

/// With the frozen weight on the plain device, as a loaded base model has it.
#[test]
fn a_frozen_weight_needs_no_autodiff_device() {
    let (tracked, size) = ([true, false, true, true, true], [4, 6, 10, 2]);
    let (x, _, a, b, m) = inputs(&flex(), size, tracked);
    let w = leaf(2, [10, 6], false, &Device::flex());
    let got = outcome(dora_linear, (x, w, a, b, m), true);
    let want = run(reference::dora_linear, &ndarray(), size, tracked);
    same("plain weight", &got, &want);
}

/// x and the magnitude alone: the lengths are constants by definition, so that differences in a and b
/// would not agree.
#[test]
fn gradients_of_input_and_magnitude_agree_with_finite_differences() {
    let size @ [m, k, n, _] = [5, 12, 7, 3];
    let (x, w, a, b, magnitude) = inputs(&flex(), size, [true, false, false, false, true]);
    let base = squares(&w);
    let of = |x, magnitude| {
        let (w, a, b) = (w.clone(), a.clone(), b.clone());
        dora_linear(x, w, a, b, magnitude, base.clone(), SCALE)
    };
    let g = backward(&of(x.clone(), magnitude.clone()), 3);
    let gradient = [grad(&x, &g).unwrap(), grad(&magnitude, &g).unwrap()].concat();
    let (at, direction) = ([floats(x), floats(magnitude)].concat(), noise(8, m * k + n));
    let weights = noise(3, m * n);
    let want = slope(&at, &direction, 0.25, |values| {
        let (x, magnitude) = values.split_at(m * k);
        let x = tensor(x.to_vec(), [m, k], false, &flex());
        let magnitude = tensor(magnitude.to_vec(), [n], false, &flex());
        inner(&floats(of(x, magnitude)), &weights)
    });
    let got = inner(&gradient, &direction);
    assert!(
        (got - want).abs() < 1e-4 * want.abs().max(1.0),
        "{got} {want}"
    );
}

/// A magnitude of zero silences an output, whose magnitude still has a gradient.
#[test]
fn a_magnitude_of_zero_can_grow_again() {
    let [got, want] = [
        (dora_linear as Op, flex()),
        (reference::dora_linear as Op, ndarray()),
    ]
    .map(|(op, device)| {
        let (x, w, a, b, _) = inputs(&device, [4, 6, 5, 2], [true; 5]);
        let m = tensor(vec![1.0, 0.0, 2.0, 0.0, -1.0], [5], true, &device);
        outcome(op, (x, w, a, b, m), true)
    });
    same("zero", &got, &want);
    assert!(got.0.chunks(5).all(|y| y[1] == 0.0 && y[3] == 0.0));
    assert!(got.1[4].iter().flatten().all(|g| *g != 0.0));
}

#[test]
fn not_a_number_passes() {
    let (x, w, a, b, _) = inputs(&flex(), [2, 6, 5, 2], [false; 5]);
    let base = squares(&w);
    let m = tensor(vec![1.0, f32::NAN, 1.0, 1.0, 1.0], [5], false, &flex());
    let y = floats(dora_linear(x, w, a, b, m, base, SCALE));
    assert!(
        y.iter()
            .enumerate()
            .all(|(i, y)| y.is_nan() == (i % 5 == 1))
    );
}

#[test]
fn no_rows_give_no_rows_and_zero_gradients() {
    let (y, grads) = run(dora_linear, &flex(), [0, 6, 5, 2], [true; 5]);
    assert!(y.is_empty());
    assert!(grads[0].as_ref().unwrap().is_empty());
    for g in &grads[1..] {
        assert!(g.as_ref().unwrap().iter().all(|x| *x == 0.0));
    }
}

#[test]
#[should_panic(expected = "do not fit")]
fn a_magnitude_of_another_size_is_refused() {
    let (x, w, a, b, _) = inputs(&flex(), [2, 6, 5, 2], [false; 5]);
    let base = squares(&w);
    let m = leaf(6, [4], false, &flex());
    dora_linear(x, w, a, b, m, base, SCALE);
}

#[test]
fn threads_do_not_matter() {
    for size in [[3, 300, 517, 8], [130, 300, 517, 8]] {
        same_on_any_pool(|| {
            let (y, g) = run(dora_linear, &flex(), size, [true; 5]);
            std::iter::once(y).chain(g.into_iter().flatten()).collect()
        });
    }
}

/// The lengths are constants in the backward, so only the gradients of x and the magnitude are slopes.
#[test]
fn matches_reference_everywhere() {
    type Dora =
        fn(Tensor<2>, Tensor<2>, Tensor<2>, Tensor<2>, Tensor<1>, Tensor<1>, f64) -> Tensor<2>;
    fn call(op: Dora, x: &[Tensor<2>]) -> Vec<Tensor<2>> {
        let n = x[1].dims()[0];
        let w = x[1].clone().detach().set_require_grad(false);
        let squares = (w.clone() * w).sum_dim(1).reshape([n]);
        let [x, w, a, b, m] = [0, 1, 2, 3, 4].map(|i| x[i].clone());
        vec![op(x, w, a, b, m.reshape([n]), squares, 0.75)]
    }
    everything(&Check {
        name: "dora_linear",
        // Short rows are divided by their length.
        tolerance: 1e-5,
        case: |pick| {
            let [m, k, n] = [pick.size(60), 3 + pick.size(200), pick.size(200)];
            let r = pick.size(20);
            Case::new(vec![[m, k], [n, k], [r, k], [n, r], [1, n]])
        },
        ours: |_, x| call(dora_linear, &x),
        reference: |_, x| call(reference::dora_linear, &x),
        slopes: Some(&[0, 4]),
        non_finite: true,
    });
}
