//! AdamW and the gradient's norm against their references and against double precision.

#[allow(clippy::unwrap_used)]
mod eight_bit;

use burn::backend::Flex;
use burn::tensor::{Device, Tensor};

use super::{AdamW, AdamWInput, Moments, adamw, reference, sum_of_squares};
use crate::check::{close, floats, inner, noise, same_on_any_pool, tensor};
use crate::cpu::storage::CHUNK;

const SETTINGS: AdamW = AdamW {
    beta1: 0.9,
    beta2: 0.999,
    epsilon: 1e-8,
    weight_decay: 0.01,
};

fn plain() -> Device {
    Device::flex()
}

fn vector(values: Vec<f32>, device: &Device) -> Tensor<1> {
    let n = values.len();
    tensor(values, [n], false, device)
}

/// A parameter in the middle of training, its moments as large as its gradient.
fn input(n: usize, seed: u64, time: usize, device: &Device) -> AdamWInput {
    let squares = noise(seed + 3, n).into_iter().map(|x| x * x).collect();
    AdamWInput {
        value: vector(noise(seed, n), device),
        grad: vector(noise(seed + 1, n), device),
        moments: Moments {
            first: vector(noise(seed + 2, n), device),
            second: vector(squares, device),
        },
        rate: 1e-2,
        time,
    }
}

fn lists((value, moments): (Tensor<1>, Moments)) -> [Vec<f32>; 3] {
    [value, moments.first, moments.second].map(floats)
}

/// The same in double precision, one element after the other.
fn scalar(settings: &AdamW, factor: f64, p: &AdamWInput) -> [Vec<f32>; 3] {
    let read = |t: &Tensor<1>| floats(t.clone()).into_iter().map(f64::from);
    let moments = read(&p.moments.first).zip(read(&p.moments.second));
    let mut all = [Vec::new(), Vec::new(), Vec::new()];
    for ((value, grad), (m, v)) in read(&p.value).zip(read(&p.grad)).zip(moments) {
        let grad = grad * factor;
        let m = settings.beta1 * m + (1.0 - settings.beta1) * grad;
        let v = settings.beta2 * v + (1.0 - settings.beta2) * grad * grad;
        let m_hat = m / (1.0 - settings.beta1.powi(p.time as i32));
        let v_hat = v / (1.0 - settings.beta2.powi(p.time as i32));
        let decayed = value - p.rate * settings.weight_decay * value;
        let value = decayed - p.rate * m_hat / (v_hat.sqrt() + settings.epsilon);
        for (list, x) in all.iter_mut().zip([value, m, v]) {
            list.push(x as f32);
        }
    }
    all
}

#[test]
fn a_step_is_that_of_the_formula_and_of_the_reference() {
    for n in [1, 3, 37, 1000, CHUNK - 1, CHUNK + 1, 2 * CHUNK + 17] {
        for (time, factor, weight_decay) in [(1, 1.0, 0.0), (1, 0.3, 0.1), (1000, 0.7, 0.01)] {
            let settings = AdamW {
                weight_decay,
                ..SETTINGS
            };
            let make = |device: &Device| {
                let mut p = input(n, 7, time, device);
                if time == 1 {
                    let zeros = || vector(vec![0.0; n], device);
                    (p.moments.first, p.moments.second) = (zeros(), zeros());
                }
                p
            };
            let want = scalar(&settings, factor, &make(&plain()));
            let got = adamw(&settings, factor, vec![make(&plain())]);
            let got = lists(got.into_iter().next().unwrap());
            let other = crate::check::ndarray().without_autodiff();
            let numbers = settings.numbers(factor, 1e-2, time);
            let reference = lists(reference::adamw(&numbers, make(&other)));
            for (i, what) in ["value", "first", "second"].into_iter().enumerate() {
                let what = format!("{what} of {n} at step {time}");
                close(&what, &got[i], &want[i], 1e-6);
                close(&what, &reference[i], &want[i], 1e-6);
            }
        }
    }
}

/// The second moment of a small gradient is far below what the comparison above can see.
#[test]
fn the_first_step_is_as_long_as_the_rate_however_small_the_gradient() {
    let n = 100;
    let grads: Vec<f32> = (0..n).map(|i| 10f32.powi(-(i % 6)) * 0.5).collect();
    let zeros = || vector(vec![0.0; n as usize], &plain());
    let p = AdamWInput {
        value: zeros(),
        grad: vector(grads, &plain()),
        moments: Moments {
            first: zeros(),
            second: zeros(),
        },
        rate: 0.25,
        time: 1,
    };
    let settings = AdamW {
        epsilon: 1e-12,
        ..SETTINGS
    };
    let (value, _) = adamw(&settings, 1.0, vec![p]).remove(0);
    close("steps", &floats(value), &[-0.25; 100], 1e-5);
}

#[test]
fn a_rate_near_the_largest_number_does_not_overflow_by_itself() {
    let mut p = input(50, 1, 1, &plain());
    let zeros = || vector(vec![0.0; 50], &plain());
    (p.moments.first, p.moments.second) = (zeros(), zeros());
    p.rate = 3e38;
    let (value, _) = adamw(
        &AdamW {
            weight_decay: 0.0,
            ..SETTINGS
        },
        1.0,
        vec![p],
    )
    .remove(0);
    assert!(floats(value).iter().all(|x| x.is_finite()));
}

#[test]
fn every_parameter_has_its_own_rate_and_time() {
    let make = || {
        let mut all: Vec<_> = [5, CHUNK + 5, 1, 640]
            .into_iter()
            .enumerate()
            .map(|(i, n)| input(n, 10 * i as u64, 1 + 7 * i, &plain()))
            .collect();
        all[2].rate = 0.5;
        all
    };
    let together = adamw(&SETTINGS, 0.5, make());
    for (i, (one, together)) in make().into_iter().zip(together).enumerate() {
        let alone = adamw(&SETTINGS, 0.5, vec![one]).remove(0);
        assert_eq!(lists(alone), lists(together), "parameter {i}");
    }
}

#[test]
fn not_a_number_passes_into_value_and_moments_and_stays_there() {
    let mut p = input(40, 1, 3, &plain());
    let mut grad = noise(2, 40);
    grad[7] = f32::NAN;
    p.grad = vector(grad, &plain());
    let lists = lists(adamw(&SETTINGS, 1.0, vec![p]).remove(0));
    for list in lists {
        for (i, x) in list.iter().enumerate() {
            assert_eq!(x.is_nan(), i == 7, "{i}");
        }
    }
}

fn address(t: &Tensor<1>) -> usize {
    let t = t.clone().try_into_primitive::<Flex>().unwrap();
    t.storage::<f32>().as_ptr() as usize
}

#[test]
fn what_nobody_else_holds_is_overwritten_in_place() {
    let p = input(300, 1, 1, &plain());
    let of = |value: &Tensor<1>, m: &Moments| [value, &m.first, &m.second].map(address);
    let before = of(&p.value, &p.moments);
    let (value, moments) = adamw(&SETTINGS, 1.0, vec![p]).remove(0);
    assert_eq!(of(&value, &moments), before);
}

#[test]
fn what_somebody_else_holds_keeps_its_values() {
    let p = input(300, 1, 1, &plain());
    let held = p.clone();
    let want = adamw(&SETTINGS, 1.0, vec![input(300, 1, 1, &plain())]).remove(0);
    let got = adamw(&SETTINGS, 1.0, vec![p]).remove(0);
    assert_eq!(lists(got), lists(want));
    let fresh = input(300, 1, 1, &plain());
    assert_eq!(floats(held.grad), floats(fresh.grad));
    assert_eq!(
        lists((held.value, held.moments)),
        lists((fresh.value, fresh.moments))
    );
}

/// A parameter that is a part of a larger buffer, and a gradient whose elements lie in another order.
#[test]
fn views_are_read_as_what_they_show() {
    let buffer = || tensor(noise(1, 60), [6, 10], false, &plain());
    let want = {
        let mut p = input(20, 1, 1, &plain());
        p.value = vector(floats(buffer().narrow(0, 2, 2)), &plain());
        p.grad = vector(floats(buffer().narrow(1, 0, 2).transpose()), &plain());
        p.grad = p.grad.narrow(0, 0, 12).repeat_dim(0, 2).narrow(0, 0, 20);
        p
    };
    let mut p = input(20, 1, 1, &plain());
    p.value = buffer().narrow(0, 2, 2).reshape([20]);
    let flat: Tensor<1> = buffer().narrow(1, 0, 2).transpose().reshape([12]);
    p.grad = flat.repeat_dim(0, 2).narrow(0, 0, 20);
    let norms = [&p, &want].map(|p| sum_of_squares(std::slice::from_ref(&p.grad)));
    assert_eq!(norms[0], norms[1]);
    let [got, want] = [p, want].map(|p| lists(adamw(&SETTINGS, 1.0, vec![p]).remove(0)));
    assert_eq!(got, want);
}

#[test]
fn the_sum_of_squares_is_that_of_double_precision() {
    for n in [0, 1, 31, 1025, CHUNK, 3 * CHUNK + 7] {
        let (a, b) = (noise(1, n), noise(2, 37));
        let want = inner(&a, &a) + inner(&b, &b);
        let make = |device: &Device| [vector(a.clone(), device), vector(b.clone(), device)];
        let got = sum_of_squares(&make(&plain()));
        assert!((got - want).abs() <= 1e-6 * want, "{n}: {got} {want}");
        let got = reference::sum_of_squares(&make(&plain()));
        assert!((got - want).abs() <= 1e-5 * want, "{n}: {got} {want}");
    }
    assert_eq!(sum_of_squares(&[]), 0.0);
}

#[test]
fn a_sum_of_squares_of_bad_numbers_is_not_finite() {
    for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
        for place in [0, 1030, CHUNK + 3] {
            let mut x = noise(1, 2 * CHUNK);
            x[place] = bad;
            assert!(!sum_of_squares(&[vector(x, &plain())]).is_finite());
        }
    }
}

#[test]
fn threads_do_not_matter() {
    same_on_any_pool(|| {
        let sizes = [3 * CHUNK + 5, 11, 2 * CHUNK, 700];
        let all: Vec<_> = sizes.map(|n| input(n, n as u64, 5, &plain())).into();
        let grads: Vec<_> = all.iter().map(|p| p.grad.clone()).collect();
        let bits = sum_of_squares(&grads).to_bits();
        let halves = [bits as u32, (bits >> 32) as u32].map(f32::from_bits);
        let stepped = adamw(&SETTINGS, 0.9, all).into_iter().flat_map(lists);
        stepped.chain([halves.to_vec()]).collect()
    });
}
