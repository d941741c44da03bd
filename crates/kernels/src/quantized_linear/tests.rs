//! The map against dense weights and bitsandbytes.

use burn::tensor::{Device, Tensor};
use serde_json::Value;

use super::packed_linear;
use crate::check::property::{Case, Check, everything};
use crate::check::*;
use crate::quantized::formats::{FloatKind, FourBit, FourBitOptions, FourBitTensor, Int8Rows};
use crate::quantized::{PackedRows, PackedWeight};
use crate::{
    BaseWeight, Compute, Dropout, dora_linear, kron_linear, linear, lora_linear,
    lora_linear_dropout,
};

/// Sums of up to 300 products in another order.
const TOLERANCE: f32 = 5e-6;

pub(super) fn int8(values: &[f32], shape: [usize; 2], threshold: f32) -> PackedWeight {
    let half: Vec<f32> = values.iter().map(|x| FloatKind::F16.round(*x)).collect();
    let rows = Int8Rows::quantise(&half, shape).unwrap();
    of_rows(rows, threshold)
}

fn of_rows(rows: Int8Rows, threshold: f32) -> PackedWeight {
    let rows = PackedRows::Int8 { rows, threshold };
    PackedWeight::new(rows, FloatKind::F32, &Device::flex()).unwrap()
}

fn four_bit(shape: [usize; 2]) -> PackedWeight {
    let options = FourBitOptions {
        kind: FourBit::Nf4,
        double: true,
        ..FourBitOptions::default()
    };
    let values = noise(3, shape[0] * shape[1]);
    let rows = FourBitTensor::quantise(&values, &shape, options).unwrap();
    PackedWeight::new(PackedRows::FourBit(rows), FloatKind::Bf16, &Device::flex()).unwrap()
}

/// `packed_linear` in f32.
fn plain(x: Tensor<2>, w: &PackedWeight) -> Tensor<2> {
    packed_linear(x, w.clone(), Compute::F32)
}

fn bytes(value: &Value) -> Vec<u8> {
    let text = value.as_str().unwrap();
    let pair = |i: usize| u8::from_str_radix(&text[2 * i..2 * i + 2], 16).unwrap();
    (0..text.len() / 2).map(pair).collect()
}

fn numbers(value: &Value) -> Vec<f32> {
    let bytes = bytes(value);
    let four = bytes.as_chunks::<4>().0.iter();
    four.map(|b| f32::from_le_bytes(*b)).collect()
}

/// With and without outliers, one row and several, a row of zeros, values that reach the threshold in f16
/// alone, and a threshold so low that most columns are outliers. The tolerance is the f32 rounding of the products'
/// sums and scales.
#[test]
fn eight_bit_rows_are_multiplied_as_bitsandbytes_does() {
    let golden: Value =
        serde_json::from_str(include_str!("../../../../tests/fixtures/int8_linear.json")).unwrap();
    let cases = golden["cases"].as_array().unwrap();
    assert_eq!(cases.len(), 5);
    for case in cases {
        let size = |name: &str| case[name].as_u64().unwrap() as usize;
        let (m, k, n) = (size("rows"), size("width"), size("out"));
        let codes = bytes(&case["codes"]).into_iter().map(|b| b as i8).collect();
        let rows = Int8Rows::from_parts([n, k], codes, Some(numbers(&case["absmax"]))).unwrap();
        let w = of_rows(rows, case["threshold"].as_f64().unwrap() as f32);
        for device in [flex(), ndarray()] {
            let x = tensor(numbers(&case["x"]), [m, k], true, &device);
            let y = plain(x.clone(), &w);
            let weights = tensor(numbers(&case["weights"]), [m, n], false, &device);
            let grads = (y.clone() * weights).sum().backward();
            let got = grad(&x, &grads).unwrap();
            close("result", &floats(y), &numbers(&case["y"]), 1e-6);
            close("gradient", &got, &numbers(&case["grad"]), 1e-6);
        }
    }
}

/// The rounding is there: without it the golden test would prove little.
#[test]
fn a_threshold_says_which_columns_are_rounded() {
    let (k, n) = (40, 7);
    let values = noise(2, n * k);
    let x = |device: &Device| leaf(1, [6, k], false, device) * 3.0;
    let dense = floats(linear(x(&flex()), int8_dense(&values, [n, k])));
    let away = |threshold: f32| {
        let y = floats(plain(x(&flex()), &int8(&values, [n, k], threshold)));
        let gap = |(a, b): (&f32, &f32)| (a - b).abs();
        y.iter().zip(&dense).map(gap).fold(0.0_f32, f32::max)
    };
    // All columns are outliers: nothing is rounded but the sums.
    assert!(away(1e-9) < 1e-5, "{}", away(1e-9));
    // 40 inputs, each off by half a step of 3/127 at most.
    assert!((1e-3..40.0 * 1.5 / 127.0).contains(&away(0.0)));
    // No input is that large.
    assert_eq!(away(100.0), away(0.0));
    assert!(away(2.5) < away(0.0));
}

fn int8_dense(values: &[f32], shape: [usize; 2]) -> BaseWeight {
    int8(values, shape, 0.0).dense().into()
}

/// The options are the weight's rows and the threshold.
#[test]
fn eight_bit_rows_match_reference_everywhere() {
    fn call(case: &Case, x: &[Tensor<2>]) -> Vec<Tensor<2>> {
        let (k, n) = (x[0].dims()[1], case.options[0]);
        let threshold = [0.0, 2.0, 1e-6][case.options[1]];
        vec![plain(
            x[0].clone(),
            &int8(&noise(9, n * k), [n, k], threshold),
        )]
    }
    everything(&Check {
        name: "packed_linear of int8",
        tolerance: TOLERANCE,
        case: |pick| {
            let (m, k, n) = (pick.size(70), pick.size(300), pick.size(300));
            let options = vec![n, pick.below(3)];
            Case::new(vec![[m, k]]).scaled(0, 2.5).options(options)
        },
        ours: |case, x| call(case, &x),
        reference: |case, x| call(case, &x),
        // The rounding has steps; the gradient passes over them.
        slopes: Some(&[]),
        non_finite: true,
    });
}

#[test]
fn packed_rows_match_reference_everywhere() {
    everything(&Check {
        name: "packed_linear",
        tolerance: TOLERANCE,
        case: |pick| {
            let (m, k, n) = (pick.size(70), pick.size(300), pick.size(300));
            Case::new(vec![[m, k]]).options(vec![n])
        },
        ours: |case, x| {
            let shape = [case.options[0], x[0].dims()[1]];
            vec![plain(x[0].clone(), &four_bit(shape))]
        },
        reference: |case, x| {
            let shape = [case.options[0], x[0].dims()[1]];
            let dense = tensor(four_bit(shape).values(), shape, false, &x[0].device());
            vec![linear(x[0].clone(), dense)]
        },
        slopes: None,
        non_finite: true,
    });
}

/// Several tiles of rows, the last not whole; both ways over them.
#[test]
fn tiles_make_up_the_weight() {
    let shape = [600, 33];
    for w in [four_bit(shape), int8(&noise(4, 600 * 33), shape, 1.5)] {
        let run = |device: &Device| {
            let x = tensor(noise(1, 5 * 33), [5, 33], true, device);
            let y = plain(x.clone() * 2.0, &w);
            let grads = backward(&y, 7);
            (floats(y), vec![grad(&x, &grads)])
        };
        let (got, want) = (run(&ndarray()), run(&flex()));
        close("tiles", &got.0, &want.0, TOLERANCE);
        close_grads("tiles", &got.1, &want.1, TOLERANCE);
    }
}

/// What other backends run: the same numbers, and the same gradient from plain tensors.
#[test]
fn plain_tensors_compute_the_same() {
    let shape = [300, 33];
    for w in [four_bit(shape), int8(&noise(4, 300 * 33), shape, 1.5)] {
        let run = |op: fn(Tensor<2>, &PackedWeight) -> Tensor<2>| {
            let x = tensor(noise(1, 5 * 33), [5, 33], true, &ndarray());
            let y = op(x.clone() * 2.0, &w);
            let grads = backward(&y, 7);
            (floats(y), vec![grad(&x, &grads)])
        };
        let op: fn(Tensor<2>, &PackedWeight) -> Tensor<2> =
            |x, w| super::reference::packed_linear(x, w, true);
        let (got, want) = (run(op), run(plain));
        close("plain", &got.0, &want.0, TOLERANCE);
        close_grads("plain", &got.1, &want.1, TOLERANCE);
    }
}

/// Where nothing is tracked, no rows and rows of no width.
#[test]
fn empty_and_untracked_inputs_pass() {
    for device in [Device::flex(), ndarray().without_autodiff()] {
        for (m, k, n) in [(0, 8, 5), (3, 8, 5), (1, 8, 1)] {
            for w in [int8(&noise(1, n * k), [n, k], 0.5), four_bit([n, k])] {
                let x = leaf(2, [m, k], false, &device);
                assert_eq!(plain(x, &w).dims(), [m, n]);
            }
        }
    }
}

/// An adapter beside it sees the input as it came, with dropout and without, on either backend.
#[test]
fn an_adapter_sees_what_was_not_rounded() {
    let (m, k, n, r) = (9, 40, 30, 3);
    let dropout = Dropout {
        probability: 0.3,
        seed: 4,
    };
    for w in [int8(&noise(6, n * k), [n, k], 0.7), four_bit([n, k])] {
        for drops in [false, true] {
            let run = |device: &Device, fused: bool| {
                let x = leaf(1, [m, k], true, device);
                let (a, b) = (leaf(2, [r, k], true, device), leaf(3, [n, r], true, device));
                let y = match (fused, drops) {
                    (true, true) => lora_linear_dropout(
                        x.clone(),
                        w.clone(),
                        a.clone(),
                        b.clone(),
                        0.5,
                        dropout,
                    ),
                    (true, false) => lora_linear(x.clone(), w.clone(), a.clone(), b.clone(), 0.5),
                    (false, _) => {
                        let zero = tensor(vec![0.0; n * k], [n, k], false, device);
                        let (x, a, b) = (x.clone(), a.clone(), b.clone());
                        let p = if drops { dropout.probability } else { 0.0 };
                        let dropout = Dropout {
                            probability: p,
                            ..dropout
                        };
                        plain(x.clone(), &w) + lora_linear_dropout(x, zero, a, b, 0.5, dropout)
                    }
                };
                let grads = backward(&y, 7);
                (floats(y), [x, a, b].map(|t| grad(&t, &grads)).to_vec())
            };
            let want = run(&ndarray(), false);
            for device in [flex(), ndarray()] {
                let got = run(&device, true);
                close("lora", &got.0, &want.0, TOLERANCE);
                close_grads("lora", &got.1, &want.1, TOLERANCE);
            }
        }
    }
}

/// What is put together from products with packed rows, beside the same from dense values. All columns of the
/// int8 input are outliers, so that nothing is rounded.
#[test]
fn dora_and_kron_read_packed_rows() {
    let (m, k, n, r) = (9, 40, 30, 3);
    for w in [int8(&noise(6, n * k), [n, k], 1e-9), four_bit([n, k])] {
        let run = |device: &Device, dense: bool| {
            let weight = || match dense {
                true => tensor(w.values(), [n, k], false, device).into(),
                false => BaseWeight::from(w.clone()),
            };
            let at = |seed, shape: [usize; 2]| leaf(seed, shape, true, device);
            let (x, a, b) = (at(1, [m, k]), at(2, [r, k]), at(3, [n, r]));
            let (w1, w2) = (at(4, [5, 8]), at(5, [6, 5]));
            let length = leaf(6, [n], true, device);
            let squares = tensor(w.row_squares(), [n], false, device);
            let (low, up) = (a.clone(), b.clone());
            let dora = dora_linear(x.clone(), weight(), low, up, length.clone(), squares, 0.5);
            let kron = kron_linear(x.clone(), weight(), w1.clone(), w2.clone(), 0.5);
            let y = Tensor::cat(vec![dora, kron], 1);
            let grads = backward(&y, 7);
            let mut all: Vec<_> = [x, a, b, w1, w2].iter().map(|t| grad(t, &grads)).collect();
            all.push(grad(&length, &grads));
            (floats(y), all)
        };
        let want = run(&ndarray(), true);
        for device in [flex(), ndarray()] {
            let got = run(&device, false);
            close("dora and kron", &got.0, &want.0, 2.0 * TOLERANCE);
            close_grads("dora and kron", &got.1, &want.1, 2.0 * TOLERANCE);
        }
    }
}

/// DoRA's lengths are of the weight's values: A is no input, and LLM.int8() does not round it.
#[test]
fn the_values_are_multiplied_without_rounding() {
    let w = int8(&noise(6, 30 * 40), [30, 40], 0.0);
    for device in [flex(), ndarray()] {
        let x = leaf(1, [3, 40], false, &device);
        let dense = tensor(w.values(), [30, 40], false, &device);
        let got = floats(super::values_linear(x.clone(), w.clone(), Compute::F32));
        close("values", &got, &floats(linear(x, dense)), TOLERANCE);
    }
}

#[test]
fn threads_do_not_matter() {
    for rows in [1, 130] {
        same_on_any_pool(|| {
            let w = int8(&noise(6, 192 * 300), [192, 300], 0.99);
            let x = leaf(1, [rows, 300], true, &flex());
            let y = plain(x.clone(), &w);
            let grads = backward(&y, 7);
            vec![floats(y), grad(&x, &grads).unwrap()]
        });
    }
}
