//! Khatri-Rao products against their references.

use burn::tensor::{Device, Tensor};

use super::{khatri_rao_columns, khatri_rao_rows, reference};
use crate::check::property::{Case, Check, everything};
use crate::check::*;

/// A product is rounded once in either; sums of a gradient have up to 23 terms in another order.
const TOLERANCE: f32 = 1e-6;

type Op = fn(Tensor<2>, Tensor<2>) -> Tensor<2>;
type Outcome = (Vec<f32>, Vec<Option<Vec<f32>>>);

/// Each operation, its reference, and whether the common axis is the second.
const OPS: [(Op, Op, bool); 2] = [
    (khatri_rao_rows, reference::rows, false),
    (khatri_rao_columns, reference::columns, true),
];

/// The common axis, then the others'. Rows of 4, 8 and 16 have code of their own; the last of each
/// need several tasks.
const SIZES: [[usize; 3]; 9] = [
    [1, 1, 1],
    [1, 8, 8],
    [37, 8, 8],
    [5, 3, 7],
    [33, 4, 4],
    [7, 2, 16],
    [259, 23, 5],
    [1030, 8, 8],
    [517, 16, 16],
];

fn run(op: Op, columns: bool, device: &Device, size: [usize; 3], tracked: [bool; 2]) -> Outcome {
    let [n, l, k] = size;
    let shape = |m| if columns { [m, n] } else { [n, m] };
    let a = leaf(1, shape(l), tracked[0], device);
    let b = leaf(2, shape(k), tracked[1], device);
    let y = op(a.clone(), b.clone());
    assert_eq!(y.dims(), shape(l * k));
    let mut grads = vec![None, None];
    if tracked != [false, false] {
        let g = backward(&y, 3);
        grads = vec![grad(&a, &g), grad(&b, &g)];
    }
    (floats(y), grads)
}

#[test]
fn matches_reference() {
    for (op, reference, columns) in OPS {
        for size in SIZES {
            for tracked in [[true, true], [true, false], [false, true], [false, false]] {
                let got = run(op, columns, &flex(), size, tracked);
                let want = run(reference, columns, &ndarray(), size, tracked);
                let what = format!("{size:?} {tracked:?} {columns}");
                close(&what, &got.0, &want.0, 0.0);
                close_grads(&what, &got.1, &want.1, TOLERANCE);
            }
        }
    }
}

#[test]
fn the_second_factors_number_runs_faster() {
    let a = tensor(vec![1.0, 2.0], [1, 2], false, &flex());
    let b = tensor(vec![1.0, 3.0, 5.0], [1, 3], false, &flex());
    let want = [1.0, 3.0, 5.0, 2.0, 6.0, 10.0];
    assert_eq!(floats(khatri_rao_rows(a.clone(), b.clone())), want);
    let product = khatri_rao_columns(a.transpose(), b.transpose());
    assert_eq!(product.dims(), [6, 1]);
    assert_eq!(floats(product), want);
}

/// `(A·B) ∘ (C·D) = (A ∗ C)·(B ∗ D)`, which is what they are for.
#[test]
fn an_elementwise_product_of_products_is_a_product_of_them() {
    let [a, c] = [1, 2].map(|seed| leaf::<2>(seed, [9, 4], false, &flex()));
    let [b, d] = [3, 4].map(|seed| leaf::<2>(seed, [4, 7], false, &flex()));
    let want = a.clone().matmul(b.clone()) * c.clone().matmul(d.clone());
    let got = khatri_rao_rows(a, c).matmul(khatri_rao_columns(b, d));
    close("identity", &floats(got), &floats(want), 3e-6);
}

/// Transposed and narrowed inputs; the incoming gradient is a transposed view as well.
#[test]
fn reads_views() {
    for (op, reference, _) in OPS {
        let [got, want] = [(op, flex()), (reference, ndarray())].map(|(op, device)| {
            let a = leaf(1, [8, 12], true, &device);
            let b = leaf(2, [12, 20], true, &device);
            let y = op(a.clone().transpose(), b.clone().narrow(1, 5, 8));
            let g = backward(&y.clone().transpose(), 3);
            (floats(y), vec![grad(&a, &g), grad(&b, &g)])
        });
        close("views", &got.0, &want.0, 0.0);
        close_grads("views", &got.1, &want.1, TOLERANCE);
    }
}

/// The map is a polynomial of degree two along any line: the central difference is exact.
#[test]
fn gradients_agree_with_finite_differences() {
    let (n, l, k) = (6, 5, 8);
    for (op, _, columns) in OPS {
        let shape = |m| if columns { [m, n] } else { [n, m] };
        let (at, direction) = (noise(1, n * (l + k)), noise(2, n * (l + k)));
        let parts = |values: &[f32], tracked| {
            let (a, b) = values.split_at(n * l);
            (
                tensor::<2>(a.to_vec(), shape(l), tracked, &flex()),
                tensor::<2>(b.to_vec(), shape(k), tracked, &flex()),
            )
        };
        let (a, b) = parts(&at, true);
        let g = backward(&op(a.clone(), b.clone()), 3);
        let gradient = [grad(&a, &g).unwrap(), grad(&b, &g).unwrap()].concat();
        let weights = noise(3, n * l * k);
        let want = slope(&at, &direction, 0.25, |values| {
            let (a, b) = parts(&values, false);
            inner(&floats(op(a, b)), &weights)
        });
        let got = inner(&gradient, &direction);
        assert!(
            (got - want).abs() < 1e-4 * want.abs().max(1.0),
            "{got} {want}"
        );
    }
}

#[test]
fn not_a_number_passes() {
    for (op, _, _) in OPS {
        let a = tensor(vec![f32::NAN], [1, 1], false, &flex());
        let b = tensor(vec![f32::INFINITY], [1, 1], false, &flex());
        assert!(floats(op(a, b.clone()))[0].is_nan());
        assert_eq!(floats(op(b.clone(), b)), [f32::INFINITY]);
    }
}

#[test]
fn an_empty_axis_gives_an_empty_product_and_zero_gradients() {
    for (op, _, columns) in OPS {
        for size in [[0, 3, 8], [4, 0, 8], [4, 3, 0]] {
            let (y, grads) = run(op, columns, &flex(), size, [true, true]);
            assert!(y.is_empty());
            assert!(grads.iter().flatten().flatten().all(|g| *g == 0.0));
        }
    }
}

#[test]
#[should_panic(expected = "as many rows")]
fn factors_of_another_size_are_refused() {
    let [a, b] = [[2, 3], [3, 3]].map(|shape| leaf::<2>(1, shape, false, &flex()));
    khatri_rao_rows(a, b);
}

#[test]
fn threads_do_not_matter() {
    for (op, _, columns) in OPS {
        same_on_any_pool(|| {
            let (y, g) = run(op, columns, &flex(), [1030, 8, 8], [true, true]);
            std::iter::once(y).chain(g.into_iter().flatten()).collect()
        });
    }
}

#[test]
fn matches_reference_everywhere() {
    everything(&Check {
        name: "khatri_rao_rows",
        tolerance: 2e-6,
        case: |pick| {
            let [n, l, k] = [pick.size(300), pick.size(20), pick.size(20)];
            Case::new(vec![[n, l], [n, k]])
        },
        ours: |_, x| vec![khatri_rao_rows(x[0].clone(), x[1].clone())],
        reference: |_, x| vec![reference::rows(x[0].clone(), x[1].clone())],
        slopes: None,
        non_finite: true,
    });
    everything(&Check {
        name: "khatri_rao_columns",
        tolerance: 2e-6,
        case: |pick| {
            let [n, l, k] = [pick.size(600), pick.size(20), pick.size(20)];
            Case::new(vec![[l, n], [k, n]])
        },
        ours: |_, x| vec![khatri_rao_columns(x[0].clone(), x[1].clone())],
        reference: |_, x| vec![reference::columns(x[0].clone(), x[1].clone())],
        slopes: None,
        non_finite: true,
    });
}
