//! `kron_linear` against its reference and against the Kronecker product itself.

use burn::tensor::{Device, Tensor};

use super::{kron, kron_linear, reference};
use crate::check::property::{Case, Check, everything};
use crate::check::*;

/// Sums of up to 1500 products in another order.
const TOLERANCE: f32 = 3e-6;

type Op = fn(Tensor<2>, Tensor<2>, Tensor<2>, Tensor<2>, f64) -> Tensor<2>;
type Outcome = (Vec<f32>, Vec<Option<Vec<f32>>>);

/// Rows, then l, m, k, n.
type Size = [usize; 5];

fn run_scaled(op: Op, device: &Device, size: Size, tracked: [bool; 4], scale: f64) -> Outcome {
    let [rows, l, m, k, n] = size;
    let inputs = [
        leaf(1, [rows, m * n], tracked[0], device),
        leaf(2, [l * k, m * n], tracked[1], device),
        leaf(4, [l, m], tracked[2], device),
        leaf(5, [k, n], tracked[3], device),
    ];
    let [x, w, w1, w2] = inputs.clone();
    let y = op(x, w, w1, w2, scale);
    let mut grads = vec![None; 4];
    if tracked != [false; 4] {
        let g = backward(&y, 3);
        grads = inputs.iter().map(|t| grad(t, &g)).collect();
    }
    (floats(y), grads)
}

fn run(op: Op, device: &Device, size: Size, tracked: [bool; 4]) -> Outcome {
    run_scaled(op, device, size, tracked, 0.75)
}

fn same(what: &str, got: &Outcome, want: &Outcome) {
    close(what, &got.0, &want.0, TOLERANCE);
    close_grads(what, &got.1, &want.1, TOLERANCE);
}

fn mask(bits: usize) -> [bool; 4] {
    std::array::from_fn(|i| bits >> i & 1 == 1)
}

#[test]
fn matches_reference_for_every_mask() {
    // Both orders of association, one row and more than a chunk of them.
    for size in [
        [1, 2, 3, 5, 4],
        [70, 5, 3, 7, 11],
        [67, 9, 12, 6, 4],
        [9, 3, 8, 4, 16],
    ] {
        for bits in 0..16 {
            let got = run(kron_linear, &flex(), size, mask(bits));
            let want = run(reference::kron_linear, &ndarray(), size, mask(bits));
            same(&format!("{size:?} {bits:04b}"), &got, &want);
        }
    }
}

#[test]
fn matches_reference_when_an_axis_has_one_element() {
    for axis in 1..5 {
        for mut size in [[1, 5, 4, 3, 6], [33, 6, 9, 17, 2]] {
            size[axis] = 1;
            let got = run(kron_linear, &flex(), size, [true; 4]);
            let want = run(reference::kron_linear, &ndarray(), size, [true; 4]);
            same(&format!("{size:?}"), &got, &want);
        }
    }
    let size = [3, 1, 1, 1, 1];
    let got = run(kron_linear, &flex(), size, [true; 4]);
    same(
        "ones",
        &got,
        &run(reference::kron_linear, &ndarray(), size, [true; 4]),
    );
}

/// Every width and height of a tile and their remainders, and several tasks of a backward.
#[test]
fn matches_reference_at_real_sizes() {
    for size in [
        [65, 24, 24, 24, 24],
        [40, 32, 24, 48, 24],
        [40, 24, 32, 24, 48],
        [100, 12, 24, 16, 24],
        [3, 7, 13, 79, 61],
        [2300, 2, 3, 5, 4],
    ] {
        let got = run(kron_linear, &flex(), size, [true; 4]);
        let want = run(reference::kron_linear, &ndarray(), size, [true; 4]);
        same(&format!("{size:?}"), &got, &want);
    }
}

/// A second factor that goes through the general product, on either side.
#[test]
fn matches_reference_with_a_large_second_factor() {
    for size in [[21, 2, 3, 130, 150], [5, 3, 2, 300, 70]] {
        let got = run(kron_linear, &flex(), size, [true; 4]);
        let want = run(reference::kron_linear, &ndarray(), size, [true; 4]);
        same(&format!("{size:?}"), &got, &want);
    }
}

#[test]
fn equals_a_linear_map_with_the_product_added_to_its_weight() {
    let op: Op = |x, w, w1, w2, s| x.matmul((w + kron(w1, w2).mul_scalar(s)).transpose());
    for size in [[1, 2, 3, 5, 4], [70, 5, 3, 7, 11]] {
        let got = run(kron_linear, &flex(), size, [true; 4]);
        same("merged", &got, &run(op, &ndarray(), size, [true; 4]));
    }
}

#[test]
fn the_product_has_the_second_factor_inside() {
    let w1 = tensor(vec![1.0, 2.0], [1, 2], false, &flex());
    let w2 = tensor(vec![1.0, 3.0, 5.0, 7.0], [2, 2], false, &flex());
    let product = kron(w1, w2);
    assert_eq!(product.dims(), [2, 4]);
    assert_eq!(floats(product), [1.0, 3.0, 2.0, 6.0, 5.0, 7.0, 10.0, 14.0]);
}

#[test]
fn a_scale_of_zero_leaves_the_base_and_no_gradient_of_the_factors() {
    let size = [7, 2, 3, 5, 4];
    let got = run_scaled(kron_linear, &flex(), size, [true; 4], 0.0);
    let want = run_scaled(reference::kron_linear, &ndarray(), size, [true; 4], 0.0);
    same("zero", &got, &want);
    for factor in &got.1[2..] {
        assert!(factor.iter().flatten().all(|x| *x == 0.0));
    }
}

/// Transposed, narrowed and broadcast inputs; the incoming gradient is a transposed view as well.
#[test]
fn reads_views() {
    let ops: [(Op, Device); 2] = [(kron_linear, flex()), (reference::kron_linear, ndarray())];
    let [got, want] = ops.map(|(op, device)| {
        let x = leaf(1, [12, 9], true, &device);
        let w = leaf(2, [12, 20], false, &device);
        let w1 = leaf(4, [3, 5], true, &device);
        let w2 = leaf(5, [1, 4], true, &device);
        let y = op(
            x.clone().transpose(),
            w.transpose().narrow(0, 7, 10),
            w1.clone().transpose(),
            w2.clone().expand([2, 4]),
            2.0,
        );
        let g = backward(&y.clone().transpose(), 3);
        (floats(y), vec![grad(&x, &g), grad(&w1, &g), grad(&w2, &g)])
    });
    same("views", &got, &want);
}

/// With the frozen weight on the plain device, as a loaded base model has it.
#[test]
fn a_frozen_weight_needs_no_autodiff_device() {
    let x = leaf(1, [4, 6], true, &flex());
    let w = leaf(2, [10, 6], false, &Device::flex());
    let (w1, w2) = (
        leaf(4, [2, 3], true, &flex()),
        leaf(5, [5, 2], true, &flex()),
    );
    let y = kron_linear(x.clone(), w, w1.clone(), w2.clone(), 0.75);
    let g = backward(&y, 3);
    let grads = vec![grad(&x, &g), None, grad(&w1, &g), grad(&w2, &g)];
    let tracked = [true, false, true, true];
    let want = run(reference::kron_linear, &ndarray(), [4, 2, 3, 5, 2], tracked);
    same("plain weight", &(floats(y), grads), &want);
}

/// Along a random direction of all inputs together. The map is a polynomial of degree three in it,
/// so that the central difference is off by the cubic term alone.
#[test]
fn gradients_agree_with_finite_differences() {
    let [rows, l, m, k, n] = [5, 4, 3, 2, 6];
    let shapes = [[rows, m * n], [l * k, m * n], [l, m], [k, n]];
    let lengths = shapes.map(|[a, b]| a * b);
    let total: usize = lengths.iter().sum();
    let (at, direction) = (noise(1, total), noise(2, total));
    let parts = |values: &[f32], tracked: bool| {
        let mut from = 0;
        [0, 1, 2, 3].map(|i| {
            let part = values[from..from + lengths[i]].to_vec();
            from += lengths[i];
            tensor::<2>(part, shapes[i], tracked, &flex())
        })
    };
    let inputs = parts(&at, true);
    let [x, w, w1, w2] = inputs.clone();
    let g = backward(&kron_linear(x, w, w1, w2, 1.5), 3);
    let gradient: Vec<f32> = inputs.iter().flat_map(|t| grad(t, &g).unwrap()).collect();
    let weights = noise(3, rows * l * k);
    let want = slope(&at, &direction, 1e-2, |values| {
        let [x, w, w1, w2] = parts(&values, false);
        inner(&floats(kron_linear(x, w, w1, w2, 1.5)), &weights)
    });
    let got = inner(&gradient, &direction);
    assert!(
        (got - want).abs() < 2e-3 * want.abs().max(1.0),
        "{got} {want}"
    );
}

#[test]
fn not_a_number_and_infinity_pass_as_in_the_reference() {
    let kind = |x: &f32| (x.is_nan(), x.is_infinite().then_some(*x));
    for bad in [f32::NAN, f32::INFINITY] {
        for place in 0..4 {
            let [got, want] = [
                (kron_linear as Op, flex()),
                (reference::kron_linear as Op, ndarray()),
            ]
            .map(|(op, device)| {
                // Positive numbers: infinities of both signs would meet in an order of their own.
                let shapes = [[3, 6], [10, 6], [2, 3], [5, 2]];
                let mut seed = 0;
                let inputs = shapes.map(|shape: [usize; 2]| {
                    seed += 1;
                    let mut values = noise(seed, shape[0] * shape[1]);
                    values.iter_mut().for_each(|x| *x = x.abs() + 0.1);
                    if seed as usize == place + 1 {
                        values[1] = bad;
                    }
                    tensor(values, shape, true, &device)
                });
                let [x, w, w1, w2] = inputs.clone();
                let y = op(x, w, w1, w2, 0.5);
                let g = y.clone().sum().backward();
                let mut all = floats(y);
                all.extend(inputs.iter().flat_map(|t| grad(t, &g).unwrap()));
                all.iter().map(kind).collect::<Vec<_>>()
            });
            assert!(got.iter().any(|k| k.0 || k.1.is_some()));
            assert_eq!(got, want, "{bad} in input {place}");
        }
    }
}

#[test]
fn no_rows_give_no_rows_and_zero_gradients() {
    let (y, grads) = run(kron_linear, &flex(), [0, 2, 3, 5, 4], [true; 4]);
    assert!(y.is_empty());
    assert!(grads[0].as_ref().unwrap().is_empty());
    for g in &grads[1..] {
        assert!(g.as_ref().unwrap().iter().all(|x| *x == 0.0));
    }
}

#[test]
#[should_panic(expected = "do not fit")]
fn factors_of_another_size_are_refused() {
    run(
        |x, w, w1, _, s| {
            let w2 = leaf(9, [5, 3], false, &x.device());
            kron_linear(x, w, w1, w2, s)
        },
        &flex(),
        [2, 2, 3, 5, 4],
        [false; 4],
    );
}

#[test]
fn threads_do_not_matter() {
    for size in [
        [1, 24, 24, 24, 24],
        [130, 24, 24, 24, 24],
        [200, 32, 24, 48, 24],
        [2300, 2, 3, 5, 4],
    ] {
        same_on_any_pool(|| {
            let (y, g) = run(kron_linear, &flex(), size, [true; 4]);
            std::iter::once(y).chain(g.into_iter().flatten()).collect()
        });
    }
}

#[test]
fn matches_reference_everywhere() {
    type Kron = fn(Tensor<2>, Tensor<2>, Tensor<2>, Tensor<2>, f64) -> Tensor<2>;
    fn call(op: Kron, x: &[Tensor<2>]) -> Vec<Tensor<2>> {
        let [x, w, w1, w2] = [0, 1, 2, 3].map(|i| x[i].clone());
        vec![op(x, w, w1, w2, 0.75)]
    }
    everything(&Check {
        name: "kron_linear",
        tolerance: 5e-6,
        case: |pick| {
            let rows = pick.size(80);
            let [l, m, k, n] = [12, 12, 24, 24].map(|most| pick.size(most));
            Case::new(vec![[rows, m * n], [l * k, m * n], [l, m], [k, n]])
        },
        ours: |_, x| call(kron_linear, &x),
        reference: |_, x| call(reference::kron_linear, &x),
        slopes: None,
        non_finite: true,
    });
}
