//! 8-bit AdamW against bitsandbytes' goldens, its reference and itself, in tensors and in pages.

use std::sync::Mutex;

use burn::tensor::{DType, Device, Tensor, TensorData};
use serde_json::Value;

use crate::adamw::cpu::PAGED_CHUNK;
use crate::adamw::{
    AdamW, AdamWInput, Codes, HostCodes, HostMoments, MOMENT_BLOCK, Moments, Paging, adamw,
    adamw_8bit, adamw_host, reference,
};
use crate::check::{close, floats, ndarray, noise, same_on_any_pool, tensor};
use crate::cpu::storage::CHUNK;
use crate::quantized::formats::{dynamic_map, unsigned_dynamic_map};

const SETTINGS: AdamW = AdamW {
    beta1: 0.9,
    beta2: 0.999,
    epsilon: 1e-8,
    weight_decay: 0.01,
};

fn golden() -> Value {
    serde_json::from_str(include_str!("../../../../../tests/fixtures/optim8bit.json")).unwrap()
}

fn bytes(json: &Value, key: &str) -> Vec<u8> {
    let text = json[key].as_str().unwrap_or_else(|| panic!("no {key}"));
    (0..text.len() / 2)
        .map(|i| u8::from_str_radix(&text[2 * i..2 * i + 2], 16).unwrap())
        .collect()
}

fn numbers(json: &Value, key: &str) -> Vec<f32> {
    let bytes = bytes(json, key);
    let numbers = bytes.chunks(4);
    numbers
        .map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]]))
        .collect()
}

fn plain() -> Device {
    Device::flex()
}

fn vector(values: Vec<f32>, device: &Device) -> Tensor<1> {
    let n = values.len();
    tensor(values, [n], false, device)
}

type Input = AdamWInput<Moments<Codes>>;
type Lists = (Vec<f32>, Moments<(Vec<u8>, Vec<f32>)>);

fn codes(moment: Codes) -> (Vec<u8>, Vec<f32>) {
    let codes = moment.codes.into_data().iter::<u8>().collect();
    (codes, floats(moment.absmax))
}

fn lists((value, moments): (Tensor<1>, Moments<Codes>)) -> Lists {
    (floats(value), moments.map(codes))
}

/// All numbers as bits, for comparing.
fn bits(lists: &Lists) -> Vec<u32> {
    let (value, Moments { first, second }) = lists;
    let floats = [value, &first.1, &second.1];
    let floats = floats.into_iter().flatten().map(|x| x.to_bits());
    let codes = first.0.iter().chain(&second.0).map(|c| u32::from(*c));
    floats.chain(codes).collect()
}

fn fresh(n: usize, seed: u64, device: &Device) -> Input {
    AdamWInput {
        value: vector(noise(seed, n), device),
        grad: vector(noise(seed + 1, n), device),
        moments: Moments {
            first: Codes::zeros(n, device),
            second: Codes::zeros(n, device),
        },
        rate: 1e-2,
        time: 1,
    }
}

/// So many steps with gradients of many magnitudes; the input of the next one.
fn trained(n: usize, seed: u64, steps: usize, device: &Device) -> Input {
    let mut p = fresh(n, seed, device);
    for step in 1..=steps {
        let grads = noise(seed + 100 * step as u64, n).into_iter().enumerate();
        let grads = grads.map(|(i, g)| g * 0.5f32.powi(i as i32 % 13));
        p.grad = vector(grads.collect(), device);
        p.time = step;
        let (value, moments) = adamw_8bit(&SETTINGS, 0.7, vec![p.clone()]).remove(0);
        (p.value, p.moments, p.time) = (value, moments, step + 1);
    }
    p
}

/// As in the goldens' script.
fn pseudo(elements: usize, salt: usize) -> impl Iterator<Item = f32> {
    (0..elements).map(move |i| {
        let whole = (i * 7919 + salt * 104_729 + (i % 17) * 31) % 1009;
        whole as f32 / 1009.0 - 0.5
    })
}

fn gradient(elements: usize, step: usize, sparse: bool) -> Vec<f32> {
    let all = pseudo(elements, step).enumerate();
    all.map(|(i, x)| match sparse && (step <= 2 || i % 3 == 0) {
        true => 0.0,
        false => x * 0.5f32.powi(i as i32 % 13),
    })
    .collect()
}

#[test]
fn the_unsigned_map_is_bitsandbytes_own() {
    let want = numbers(&golden(), "unsigned_dynamic_map");
    let bits = |map: &[f32]| map.iter().map(|x| x.to_bits()).collect::<Vec<_>>();
    assert_eq!(bits(unsigned_dynamic_map()), bits(&want));
}

/// PyTorch orders products and sums otherwise and fuses some: a scale may differ in its last bits, a
/// parameter of at most 1 by a rounding of each of its 20 steps. No moment of the goldens lies so near the
/// boundary of two codes that this gives it another one.
#[test]
fn steps_are_those_of_bitsandbytes() {
    let golden = golden();
    for case in golden["cases"].as_array().unwrap() {
        let elements = case["elements"].as_u64().unwrap() as usize;
        let sparse = case["sparse"].as_bool().unwrap();
        let number = |key: &str| case[key].as_f64().unwrap();
        let settings = AdamW {
            beta1: case["betas"][0].as_f64().unwrap(),
            beta2: case["betas"][1].as_f64().unwrap(),
            epsilon: number("epsilon"),
            weight_decay: number("weight_decay"),
        };
        let mut p = fresh(elements, 0, &plain());
        p.value = vector(pseudo(elements, 1000).collect(), &plain());
        let mut compared = 0;
        for step in 1..=20 {
            p.grad = vector(gradient(elements, step, sparse), &plain());
            (p.rate, p.time) = (number("rate") / step as f64, step);
            let (value, moments) = adamw_8bit(&settings, 1.0, vec![p.clone()]).remove(0);
            (p.value, p.moments) = (value.clone(), moments.clone());
            let want = &case["steps"][step.to_string()];
            if want.is_null() {
                continue;
            }
            compared += 1;
            let what = format!("{elements} elements, step {step}");
            let (value, moments) = lists((value, moments));
            for (name, (codes, absmax), keys) in [
                ("first", moments.first, ["state1", "absmax1"]),
                ("second", moments.second, ["state2", "absmax2"]),
            ] {
                assert!(codes == bytes(want, keys[0]), "{what}: codes of the {name}");
                let want = numbers(want, keys[1]);
                assert_eq!(absmax.len(), want.len());
                for (got, want) in absmax.iter().zip(want) {
                    assert!((got - want).abs() <= 1e-6 * want, "{what}: {got} {want}");
                }
            }
            close(&what, &value, &numbers(want, "parameter"), 1e-6);
        }
        assert!(compared >= 1);
    }
}

#[test]
fn a_step_matches_reference_on_another_backend() {
    let other = ndarray().without_autodiff();
    for n in [1, 255, 256, 4096 + 37, CHUNK + 300] {
        for steps in [0, 3] {
            let make = |device: &Device| {
                let (value, moments) = {
                    let p = trained(n, 5, steps, &plain());
                    (floats(p.value), p.moments.map(codes))
                };
                let mut p = fresh(n, 5, device);
                p.value = vector(value, device);
                p.moments = moments.map(|(codes, absmax)| Codes {
                    codes: Tensor::from_data(TensorData::new(codes, [n]), (device, DType::U8)),
                    absmax: vector(absmax, device),
                });
                p.time = steps + 1;
                p
            };
            let got = lists(adamw_8bit(&SETTINGS, 0.7, vec![make(&plain())]).remove(0));
            let want = lists(adamw_8bit(&SETTINGS, 0.7, vec![make(&other)]).remove(0));
            assert!(
                bits(&got) == bits(&want),
                "{n} elements after {steps} steps"
            );
        }
    }
}

#[test]
fn a_block_of_zeros_and_blocks_of_very_small_gradients_are_the_references_too() {
    let n = 4 * MOMENT_BLOCK;
    let make = |device: &Device| {
        let mut p = fresh(n, 9, device);
        let mut grads = noise(3, n);
        grads[..MOMENT_BLOCK].fill(0.0);
        for g in &mut grads[MOMENT_BLOCK..2 * MOMENT_BLOCK] {
            *g *= 1e-20;
        }
        grads[3 * MOMENT_BLOCK..][..40].fill(0.0);
        p.grad = vector(grads, device);
        p
    };
    let got = lists(adamw_8bit(&SETTINGS, 1.0, vec![make(&plain())]).remove(0));
    let other = make(&ndarray().without_autodiff());
    let numbers = SETTINGS.numbers(1.0, other.rate, other.time);
    let want = lists(reference::adamw_8bit(&numbers, other));
    assert!(bits(&got) == bits(&want));
    assert!(got.0.iter().all(|x| x.is_finite()));
    assert_eq!(got.1.first.1[0], 0.0);
    assert!(got.1.first.0[..MOMENT_BLOCK].iter().all(|c| *c == 0));
}

/// Codes lie the closer together the nearer to the scale; between two neighbours, no value above the table's
/// first step is further from one than a quarter of itself.
#[test]
fn a_step_is_near_that_of_f32_moments_and_the_moments_are_what_their_codes_say() {
    let n = CHUNK + 77;
    let p = trained(n, 11, 2, &plain());
    let dense = p.clone().map(|m| Moments {
        first: dequantised(m.first, dynamic_map()),
        second: dequantised(m.second, unsigned_dynamic_map()),
    });
    let (want, want_moments) = adamw(&SETTINGS, 0.7, vec![dense]).remove(0);
    let (value, moments) = adamw_8bit(&SETTINGS, 0.7, vec![p]).remove(0);
    assert_eq!(floats(value), floats(want), "the step itself is the same");
    for (got, want, map) in [
        (moments.first, want_moments.first, dynamic_map()),
        (moments.second, want_moments.second, unsigned_dynamic_map()),
    ] {
        let scales = floats(got.absmax.clone());
        let pairs = floats(dequantised(got, map)).into_iter().zip(floats(want));
        for (i, (got, want)) in pairs.enumerate() {
            let scale = scales[i / MOMENT_BLOCK];
            // A step of the table is 3.1e-5 of the scale.
            let bound = want.abs() / 4.0 + 3.1e-5 * scale;
            assert!(
                (got - want).abs() <= bound,
                "{i}: {got} {want}, scale {scale}"
            );
        }
    }
}

fn dequantised(moment: Codes, map: &[f32; 256]) -> Tensor<1> {
    let (codes, absmax) = codes(moment);
    let values = codes.iter().enumerate();
    let values = values.map(|(i, c)| map[usize::from(*c)] * absmax[i / MOMENT_BLOCK]);
    vector(values.collect(), &plain())
}

#[test]
fn every_parameter_steps_as_if_it_were_alone() {
    let sizes = [5, CHUNK + 5, 1, 640];
    let all: Vec<Input> = sizes.map(|n| trained(n, n as u64, 1, &plain())).into();
    let together = adamw_8bit(&SETTINGS, 0.5, all.clone());
    for (one, together) in all.into_iter().zip(together) {
        let alone = adamw_8bit(&SETTINGS, 0.5, vec![one]).remove(0);
        assert!(bits(&lists(alone)) == bits(&lists(together)));
    }
}

/// As without codes the parameter is lost at once; the codes share their scale, so the block follows.
#[test]
fn what_is_not_finite_passes_into_the_parameter_and_its_block_and_stays_there() {
    for device in [plain(), ndarray().without_autodiff()] {
        for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            let n = 3 * MOMENT_BLOCK;
            let mut p = fresh(n, 1, &device);
            let mut grads = noise(2, n);
            grads[MOMENT_BLOCK + 7] = bad;
            p.grad = vector(grads, &device);
            let (value, moments) = adamw_8bit(&SETTINGS, 1.0, vec![p.clone()]).remove(0);
            for (i, x) in floats(value.clone()).iter().enumerate() {
                assert_eq!(x.is_nan(), i == MOMENT_BLOCK + 7, "{bad}: {i}");
            }
            for scales in [&moments.first, &moments.second].map(|m| floats(m.absmax.clone())) {
                let lost: Vec<bool> = scales.iter().map(|s| s.is_nan()).collect();
                assert_eq!(lost, [false, true, false], "{bad}");
            }
            (p.value, p.moments, p.time) = (value, moments, 2);
            p.grad = vector(noise(3, n), &device);
            let (value, _) = adamw_8bit(&SETTINGS, 1.0, vec![p]).remove(0);
            for (i, x) in floats(value).iter().enumerate() {
                assert_eq!(x.is_nan(), i / MOMENT_BLOCK == 1, "{bad}: {i}");
            }
        }
    }
}

#[test]
fn threads_do_not_matter() {
    same_on_any_pool(|| {
        let sizes = [3 * CHUNK + 5, 11, 2 * CHUNK, 700];
        let all = sizes.map(|n| trained(n, n as u64, 2, &plain()));
        let done = adamw_8bit(&SETTINGS, 0.9, all.into());
        let done = done.into_iter().map(|d| bits(&lists(d)));
        done.map(|bits| bits.into_iter().map(f32::from_bits).collect())
            .collect()
    });
}

#[test]
fn what_somebody_else_holds_keeps_its_values() {
    let p = trained(700, 1, 2, &plain());
    let before = bits(&lists((p.value.clone(), p.moments.clone())));
    adamw_8bit(&SETTINGS, 1.0, vec![p.clone()]);
    assert!(bits(&lists((p.value, p.moments))) == before);
}

/// Notes what a step says of the memory it uses.
#[derive(Default)]
struct Notes {
    inside: Mutex<(usize, usize)>,
    seen: Mutex<usize>,
}

impl Paging for Notes {
    fn bring_in(&self, bytes: &[u8]) {
        let mut inside = self.inside.lock().unwrap();
        inside.0 += bytes.len();
        inside.1 = inside.1.max(inside.0);
        *self.seen.lock().unwrap() += bytes.len();
    }

    fn let_go(&self, bytes: &[u8]) {
        self.inside.lock().unwrap().0 -= bytes.len();
    }
}

#[test]
fn moments_in_the_hosts_memory_take_the_same_steps_on_every_device() {
    let n = 3 * PAGED_CHUNK + 300;
    for device in [plain(), ndarray().without_autodiff()] {
        let on_flex = device == plain();
        let p = fresh(n, 4, &device);
        let f32s = p.clone().map(|_| Moments {
            first: vector(noise(1, n), &device),
            second: vector(noise(2, n).iter().map(|x| x * x).collect(), &device),
        });
        let mut host = f32s.moments.clone().map(floats);
        let (want, want_moments) = adamw(&SETTINGS, 0.7, vec![f32s.clone()]).remove(0);
        let notes = Notes::default();
        let input = f32s.map(|_| {
            HostMoments::F32(Moments {
                first: &mut host.first,
                second: &mut host.second,
            })
        });
        let got = adamw_host(&SETTINGS, 0.7, &notes, vec![input]).remove(0);
        assert_eq!(floats(got), floats(want));
        assert_eq!(host.first, floats(want_moments.first));
        assert_eq!(host.second, floats(want_moments.second));
        told_of_all(&notes, 8 * n, on_flex);

        let mut host = p.moments.clone().map(codes);
        let want = lists(adamw_8bit(&SETTINGS, 0.7, vec![p.clone()]).remove(0));
        let notes = Notes::default();
        let Moments { first, second } = &mut host;
        let moments = Moments { first, second }.map(|m| HostCodes {
            codes: &mut m.0,
            absmax: &mut m.1,
        });
        let input = p.map(|_| HostMoments::EightBit(moments));
        let got = adamw_host(&SETTINGS, 0.7, &notes, vec![input]).remove(0);
        assert!(bits(&(floats(got), host)) == bits(&want));
        told_of_all(&notes, 2 * n, on_flex);
    }
}

/// All memory was brought in and let go; on a CPU, never more than a chunk a thread at once.
fn told_of_all(notes: &Notes, bytes: usize, by_chunks: bool) {
    let (left, most) = *notes.inside.lock().unwrap();
    assert_eq!((left, *notes.seen.lock().unwrap()), (0, bytes));
    if by_chunks {
        let threads = rayon::current_num_threads();
        assert!(
            most <= threads * 8 * PAGED_CHUNK,
            "{most} by {threads} threads"
        );
    }
}
