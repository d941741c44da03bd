//! `linear` and `lora_linear` against their references.

use burn::tensor::{Device, Tensor};

use super::{Dropout, linear, lora_linear, lora_linear_dropout, reference};
use crate::check::property::{Case, Check, everything};
use crate::check::*;
use crate::{BaseWeight, Compute, HostValues, dora_linear, kron_linear};

/// Sums of up to 300 products in another order.
const TOLERANCE: f32 = 3e-6;

type Linear = fn(Tensor<2>, Tensor<2>) -> Tensor<2>;
type Lora = fn(Tensor<2>, Tensor<2>, Tensor<2>, Tensor<2>, f64) -> Tensor<2>;
type Outcome = (Vec<f32>, Vec<Option<Vec<f32>>>);

fn run_linear(op: Linear, device: &Device, [m, k, n]: [usize; 3], tracked: [bool; 2]) -> Outcome {
    let (x, w) = (
        leaf(1, [m, k], tracked[0], device),
        leaf(2, [n, k], tracked[1], device),
    );
    let y = op(x.clone(), w.clone());
    let mut grads = vec![None, None];
    if tracked != [false; 2] {
        let g = backward(&y, 3);
        grads = vec![grad(&x, &g), grad(&w, &g)];
    }
    (floats(y), grads)
}

fn run_lora(op: Lora, device: &Device, [m, k, n, r]: [usize; 4], tracked: [bool; 4]) -> Outcome {
    let (x, w) = (
        leaf(1, [m, k], tracked[0], device),
        leaf(2, [n, k], tracked[1], device),
    );
    let (a, b) = (
        leaf(4, [r, k], tracked[2], device),
        leaf(5, [n, r], tracked[3], device),
    );
    let y = op(x.clone(), w.clone(), a.clone(), b.clone(), 0.75);
    let mut grads = vec![None; 4];
    if tracked != [false; 4] {
        let g = backward(&y, 3);
        grads = [&x, &w, &a, &b].iter().map(|t| grad(t, &g)).collect();
    }
    (floats(y), grads)
}

fn mask<const N: usize>(bits: usize) -> [bool; N] {
    std::array::from_fn(|i| bits >> i & 1 == 1)
}

#[test]
fn linear_matches_reference() {
    // Up to 4 rows take the dot-product path; [3, 300, 517] needs several of its tasks.
    for size in [
        [1, 1, 1],
        [1, 70, 33],
        [5, 3, 90],
        [3, 300, 517],
        [67, 300, 131],
    ] {
        for bits in 0..4 {
            let (got, got_grads) = run_linear(linear, &flex(), size, mask(bits));
            let (want, want_grads) = run_linear(reference::linear, &ndarray(), size, mask(bits));
            close("linear", &got, &want, TOLERANCE);
            close_grads("linear", &got_grads, &want_grads, TOLERANCE);
        }
    }
}

#[test]
fn lora_matches_reference_for_every_mask() {
    for size in [[1, 6, 5, 1], [1, 70, 33, 8], [67, 300, 131, 16]] {
        for bits in 0..16 {
            let (got, got_grads) = run_lora(lora_linear, &flex(), size, mask(bits));
            let (want, want_grads) = run_lora(reference::lora_linear, &ndarray(), size, mask(bits));
            close("lora_linear", &got, &want, TOLERANCE);
            close_grads("lora_linear", &got_grads, &want_grads, TOLERANCE);
        }
    }
}

const DROPOUT: Dropout = Dropout {
    probability: 0.3,
    seed: 11,
};

#[test]
fn dropout_matches_reference_for_every_mask() {
    let ours: Lora = |x, w, a, b, s| lora_linear_dropout(x, w, a, b, s, DROPOUT);
    let theirs: Lora = |x, w, a, b, s| reference::lora_linear_dropout(x, w, a, b, s, DROPOUT);
    for size in [[1, 6, 5, 1], [67, 300, 131, 16]] {
        for bits in 0..16 {
            let (got, got_grads) = run_lora(ours, &flex(), size, mask(bits));
            let (want, want_grads) = run_lora(theirs, &ndarray(), size, mask(bits));
            close("lora_linear_dropout", &got, &want, TOLERANCE);
            close_grads("lora_linear_dropout", &got_grads, &want_grads, TOLERANCE);
        }
    }
}

#[test]
fn linear_matches_reference_everywhere() {
    everything(&Check {
        name: "linear",
        tolerance: TOLERANCE,
        case: |pick| {
            let [m, k, n] = [pick.size(70), pick.size(300), pick.size(300)];
            Case::new(vec![[m, k], [n, k]])
        },
        ours: |_, x| vec![linear(x[0].clone(), x[1].clone())],
        reference: |_, x| vec![reference::linear(x[0].clone(), x[1].clone())],
        slopes: None,
        non_finite: true,
    });
}

/// The option says whether there is dropout.
#[test]
fn lora_matches_reference_everywhere() {
    fn call(ops: [Lora; 2], case: &Case, x: &[Tensor<2>]) -> Vec<Tensor<2>> {
        let [x, w, a, b] = [0, 1, 2, 3].map(|i| x[i].clone());
        vec![ops[case.options[0]](x, w, a, b, 0.75)]
    }
    everything(&Check {
        name: "lora_linear",
        tolerance: 2.0 * TOLERANCE,
        case: |pick| {
            let [m, k, n] = [pick.size(70), pick.size(300), pick.size(300)];
            let r = pick.size(20);
            let options = vec![pick.below(2)];
            Case::new(vec![[m, k], [n, k], [r, k], [n, r]]).options(options)
        },
        ours: |case, x| {
            let dropped: Lora = |x, w, a, b, s| lora_linear_dropout(x, w, a, b, s, DROPOUT);
            call([lora_linear, dropped], case, &x)
        },
        reference: |case, x| {
            let dropped: Lora =
                |x, w, a, b, s| reference::lora_linear_dropout(x, w, a, b, s, DROPOUT);
            call([reference::lora_linear, dropped], case, &x)
        },
        slopes: None,
        non_finite: true,
    });
}

/// The input is masked in a copy, a transposed one in the logical order.
#[test]
fn dropout_leaves_its_input_alone() {
    let x = leaf(1, [9, 20], false, &flex());
    let before = floats(x.clone());
    let [w, a] = [2, 4].map(|seed| leaf(seed, [5, 9], false, &flex()));
    let b = leaf(5, [5, 5], false, &flex());
    let run = |x| lora_linear_dropout(x, w.clone(), a.clone(), b.clone(), 2.0, DROPOUT);
    let view = floats(run(x.clone().transpose()));
    let rows = x
        .clone()
        .transpose()
        .into_data()
        .try_to_vec::<f32>()
        .unwrap();
    close(
        "view",
        &view,
        &floats(run(tensor(rows, [20, 9], false, &flex()))),
        TOLERANCE,
    );
    assert_eq!(floats(x), before);
}

/// Transposed, narrowed and broadcast inputs; the incoming gradient is a transposed view as well.
#[test]
fn reads_views() {
    let ops: [(Lora, Device); 2] = [(lora_linear, flex()), (reference::lora_linear, ndarray())];
    let [got, want] = ops.map(|(op, device)| {
        let x = leaf(1, [20, 9], true, &device);
        let w = leaf(2, [20, 40], false, &device);
        let a = leaf(4, [5, 30], true, &device);
        let b = leaf(5, [1, 5], true, &device);
        let y = op(
            x.clone().transpose(),
            w.transpose().narrow(0, 7, 11),
            a.clone().narrow(1, 3, 20),
            b.clone().expand([11, 5]),
            2.0,
        );
        let g = backward(&y.clone().transpose(), 3);
        (floats(y), vec![grad(&x, &g), grad(&a, &g), grad(&b, &g)])
    });
    close("views", &got.0, &want.0, TOLERANCE);
    close_grads("views", &got.1, &want.1, TOLERANCE);
}

/// With the frozen inputs on the plain device, as a loaded base model has them.
#[test]
fn frozen_weights_need_no_autodiff_device() {
    let x = leaf(1, [4, 6], true, &flex());
    let y = linear(x.clone(), leaf(2, [5, 6], false, &Device::flex()));
    let g = backward(&y, 3);
    let (want, want_grads) = run_linear(reference::linear, &ndarray(), [4, 6, 5], [true, false]);
    close("output", &floats(y), &want, TOLERANCE);
    close_grads("output", &[grad(&x, &g), None], &want_grads, TOLERANCE);
}

#[test]
fn not_a_number_passes() {
    let x = tensor(vec![f32::NAN, 1.0], [1, 2], false, &flex());
    let y = linear(x, leaf(2, [3, 2], false, &flex()));
    assert!(floats(y).iter().all(|x| x.is_nan()));
}

#[test]
fn threads_do_not_matter() {
    for rows in [1, 130] {
        same_on_any_pool(|| {
            let (y, g) = run_lora(lora_linear, &flex(), [rows, 576, 192, 16], [true; 4]);
            std::iter::once(y).chain(g.into_iter().flatten()).collect()
        });
    }
}

/// Every operation that reads a base weight: x and its small parameters tracked, w rounded to bf16.
#[derive(Clone, Copy, Debug)]
enum Op {
    Linear,
    Lora,
    Dropped,
    Dora,
    Kron,
}

const OPS: [Op; 5] = [Op::Linear, Op::Lora, Op::Dropped, Op::Dora, Op::Kron];

fn run_on(
    op: Op,
    device: &Device,
    rows: usize,
    weight: impl Fn(HostValues) -> BaseWeight,
) -> Outcome {
    const R: usize = 8;
    let (k, n) = (300, 132);
    let x = leaf(1, [rows, k], true, device);
    let w = weight(HostValues::F32(noise(2, n * k)).rounded());
    let (a, b) = (leaf(4, [R, k], true, device), leaf(5, [n, R], true, device));
    let (w1, w2) = (
        leaf(6, [12, 15], true, device),
        leaf(7, [11, 20], true, device),
    );
    let length = leaf(8, [n], true, device);
    let squares = tensor(vec![120.0; n], [n], false, device);
    let (y, inputs) = match op {
        Op::Linear => (linear(x.clone(), w), vec![x]),
        Op::Lora => (
            lora_linear(x.clone(), w, a.clone(), b.clone(), 0.75),
            vec![x, a, b],
        ),
        Op::Dropped => (
            lora_linear_dropout(x.clone(), w, a.clone(), b.clone(), 0.75, DROPOUT),
            vec![x, a, b],
        ),
        Op::Dora => (
            dora_linear(x.clone(), w, a.clone(), b.clone(), length, squares, 0.1),
            vec![x, a, b],
        ),
        Op::Kron => (
            kron_linear(x.clone(), w, w1.clone(), w2.clone(), 0.75),
            vec![x, w1, w2],
        ),
    };
    let g = backward(&y, 3);
    (floats(y), inputs.iter().map(|t| grad(t, &g)).collect())
}

/// Few rows take the dot products, more the packed product.
#[test]
fn bf16_weights_in_f32_products_match_the_reference_on_their_values() {
    for op in OPS {
        for rows in [1, 4, 5, 67] {
            let held = |values: HostValues| {
                let w = values.into_tensor([132, 300], &Device::flex());
                assert_eq!(w.dtype(), burn::tensor::DType::BF16);
                BaseWeight::new(w, Compute::F32)
            };
            let wide = |values: HostValues| values.into_tensor([132, 300], &ndarray()).into();
            let (got, got_grads) = run_on(op, &flex(), rows, held);
            let (want, want_grads) = run_on(op, &ndarray(), rows, wide);
            let what = format!("{op:?} of {rows} rows");
            close(&what, &got, &want, 1e-5);
            close_grads(&what, &got_grads, &want_grads, 1e-5);
        }
    }
}

/// Rounding a factor to 8 bits is off by 2⁻⁹ of it at most, so a sum of hundreds of products of both signs
/// by less than a hundredth of the largest sum.
#[test]
fn bf16_products_are_near_the_reference() {
    for op in OPS {
        for rows in [1, 67] {
            for rounded in [true, false] {
                let held = |values: HostValues| {
                    let values = match rounded {
                        true => values,
                        false => HostValues::F32(values.into_f32()),
                    };
                    let w = values.into_tensor([132, 300], &Device::flex());
                    BaseWeight::new(w, Compute::Bf16)
                };
                let wide = |values: HostValues| values.into_tensor([132, 300], &ndarray()).into();
                let (got, got_grads) = run_on(op, &flex(), rows, held);
                let (want, want_grads) = run_on(op, &ndarray(), rows, wide);
                let what = format!("{op:?} of {rows} rows");
                close(&what, &got, &want, 1e-2);
                close_grads(&what, &got_grads, &want_grads, 1e-2);
            }
        }
    }
}

#[test]
fn threads_do_not_matter_to_bf16_weights() {
    for (compute, rows) in [(Compute::F32, 1), (Compute::F32, 130), (Compute::Bf16, 130)] {
        same_on_any_pool(|| {
            let held = |values: HostValues| {
                BaseWeight::new(values.into_tensor([132, 300], &Device::flex()), compute)
            };
            let (y, g) = run_on(Op::Lora, &flex(), rows, held);
            std::iter::once(y).chain(g.into_iter().flatten()).collect()
        });
    }
}

#[test]
fn values_round_to_the_nearest_bf16_and_to_the_even_one_of_two() {
    // 8 bits of mantissa: from 1 on, steps of 2⁻⁷.
    let step = 1.0 / 128.0;
    let cases = [
        (1.0 + 0.5 * step, 1.0),
        (1.0 + 0.51 * step, 1.0 + step),
        (1.0 + 1.5 * step, 1.0 + 2.0 * step),
        (-1.0 - 0.75 * step, -1.0 - step),
        (f32::MAX, f32::INFINITY),
        (0.0, 0.0),
    ];
    let values = HostValues::F32(cases.iter().map(|(x, _)| *x).collect()).rounded();
    let want: Vec<f32> = cases.iter().map(|(_, want)| *want).collect();
    assert_eq!(values.into_f32(), want);
    let nan = HostValues::F32(vec![f32::NAN]).rounded().into_f32();
    assert!(nan[0].is_nan());
}
