//! `linear_cross_entropy` and `token_log_probs` against their references.

use burn::tensor::{Device, Tensor};

use super::{
    LossSpec, linear_cross_entropy, linear_cross_entropy_with, reference, token_log_probs,
};
use crate::check::property::{Case, Check, everything};
use crate::check::*;

/// The reference's log-softmax rounds sums over the vocabulary in f32; ours is the more exact.
const TOLERANCE: f32 = 1e-5;

type Op = fn(Tensor<2>, Tensor<2>, &[i64]) -> Tensor<1>;

fn plain_reference(hidden: Tensor<2>, head: Tensor<2>, labels: &[i64]) -> Tensor<1> {
    reference::linear_cross_entropy(hidden, head, labels, LossSpec::default())
}

fn smoothed(per_cent: usize) -> LossSpec {
    LossSpec {
        label_smoothing: per_cent as f64 / 100.0,
        ..LossSpec::default()
    }
}

#[test]
fn matches_reference_everywhere() {
    fn of(case: &Case, x: &[Tensor<2>]) -> (Vec<i64>, LossSpec) {
        let (rows, vocabulary) = (x[0].dims()[0], x[1].dims()[0]);
        let labels = (0..rows).map(|i| match (i + case.options[1]) % 4 {
            0 => -100,
            _ => ((i + 3) * case.options[1] % vocabulary) as i64,
        });
        (labels.collect(), smoothed([0, 0, 10, 100][case.options[0]]))
    }
    everything(&Check {
        name: "linear_cross_entropy",
        tolerance: TOLERANCE,
        case: |pick| {
            let [rows, width, vocabulary] = [pick.size(70), pick.size(90), pick.size(5000)];
            let options = vec![pick.below(4), 1 + pick.below(1000)];
            Case::new(vec![[rows, width], [vocabulary, width]]).options(options)
        },
        ours: |case, x| {
            let (labels, spec) = of(case, &x);
            let loss = linear_cross_entropy_with(x[0].clone(), x[1].clone(), &labels, spec);
            vec![loss.reshape([1, 1])]
        },
        reference: |case, x| {
            let (labels, spec) = of(case, &x);
            let loss = reference::linear_cross_entropy(x[0].clone(), x[1].clone(), &labels, spec);
            vec![loss.reshape([1, 1])]
        },
        slopes: None,
        non_finite: true,
    });
}

/// Many rows by many words: several tiles either way, whose largest logits grow from tile to tile.
#[test]
fn a_row_is_put_together_from_its_tiles() {
    let (rows, width, vocabulary) = (2100, 8, 3001);
    let mut head = noise(2, vocabulary * width);
    for (i, w) in head.iter_mut().enumerate() {
        *w *= 0.2 + (i / width) as f32 / 400.0;
    }
    let labels = labels(rows, vocabulary);
    for spec in [smoothed(0), smoothed(20)] {
        let run = |ours: bool, device: &Device| {
            let hidden = leaf(1, [rows, width], true, device);
            let head = tensor(head.clone(), [vocabulary, width], false, device);
            let loss = match ours {
                true => linear_cross_entropy_with(hidden.clone(), head, &labels, spec),
                false => reference::linear_cross_entropy(hidden.clone(), head, &labels, spec),
            };
            let g = loss.clone().backward();
            (floats(loss), grad(&hidden, &g).unwrap())
        };
        let (got, want) = (run(true, &flex()), run(false, &ndarray()));
        close("loss", &got.0, &want.0, TOLERANCE);
        close("gradient", &got.1, &want.1, TOLERANCE);
    }
}

/// A head in bf16 is what its widened numbers are, to the bit.
#[test]
fn a_head_in_bf16_is_widened() {
    use burn::tensor::FloatDType;
    let labels = labels(40, 700);
    let narrow = leaf(2, [700, 65], false, &flex()).cast(FloatDType::BF16);
    let run = |head: Tensor<2>| {
        let hidden = leaf(1, [40, 65], true, &flex());
        let loss = linear_cross_entropy_with(hidden.clone(), head.clone(), &labels, smoothed(10));
        let g = loss.clone().backward();
        let log_probs = token_log_probs(hidden.clone(), head, &labels);
        (floats(loss), grad(&hidden, &g), floats(log_probs))
    };
    assert!(run(narrow.clone()) == run(narrow.cast(FloatDType::F32)));
}

fn labels(rows: usize, vocabulary: usize) -> Vec<i64> {
    (0..rows)
        .map(|i| {
            if i % 3 == 1 {
                -100
            } else {
                (i * 7919 % vocabulary) as i64
            }
        })
        .collect()
}

fn run(
    op: Op,
    device: &Device,
    [rows, width, vocabulary]: [usize; 3],
    tracked: [bool; 2],
) -> (Vec<f32>, Vec<Option<Vec<f32>>>) {
    let hidden = leaf(1, [rows, width], tracked[0], device);
    let head = leaf(2, [vocabulary, width], tracked[1], device);
    let loss = op(hidden.clone(), head.clone(), &labels(rows, vocabulary));
    let mut grads = vec![None, None];
    if tracked != [false, false] {
        let g = loss.clone().mul_scalar(0.37).backward();
        grads = vec![grad(&hidden, &g), grad(&head, &g)];
    }
    (floats(loss), grads)
}

#[test]
fn matches_reference() {
    // One row, odd sizes, and a vocabulary so large that the rows need several chunks.
    for size in [[1, 5, 7], [2, 1, 1], [31, 33, 129], [57, 3, 1 << 20]] {
        let masks = [[true, true], [true, false], [false, true], [false, false]];
        for tracked in if size[2] < 1000 {
            &masks[..]
        } else {
            &masks[..1]
        } {
            let (got, got_grads) = run(linear_cross_entropy, &flex(), size, *tracked);
            let (want, want_grads) = run(plain_reference, &ndarray(), size, *tracked);
            close("loss", &got, &want, TOLERANCE);
            // A head gradient over 2²⁰ rows is small beside its few largest entries.
            close_grads("loss", &got_grads, &want_grads, TOLERANCE);
        }
    }
}

#[test]
fn log_probs_match_reference() {
    for [rows, width, vocabulary] in [[1, 4, 9], [31, 33, 129]] {
        let labels = labels(rows, vocabulary);
        let [got, want] = [flex(), ndarray()].map(|device| {
            let hidden = leaf(1, [rows, width], true, &device);
            let head = leaf(2, [vocabulary, width], false, &device);
            (hidden, head)
        });
        let got = floats(token_log_probs(got.0, got.1, &labels));
        let want = floats(reference::token_log_probs(want.0, want.1, &labels));
        close("log-probabilities", &got, &want, TOLERANCE);
        assert!(labels.iter().zip(&got).all(|(l, p)| *l >= 0 || *p == 0.0));
    }
}

#[test]
fn no_labels_no_loss() {
    let hidden = leaf(1, [4, 3], true, &flex());
    let loss = linear_cross_entropy(hidden.clone(), leaf(2, [5, 3], false, &flex()), &[-100; 4]);
    let g = loss.clone().backward();
    assert_eq!(floats(loss), [0.0]);
    assert_eq!(grad(&hidden, &g).unwrap(), vec![0.0; 12]);
}

#[test]
fn reads_views() {
    let ops: [(Op, Device); 2] = [(linear_cross_entropy, flex()), (plain_reference, ndarray())];
    let [got, want] = ops.map(|(op, device)| {
        let hidden = leaf(1, [8, 20], true, &device);
        let head = leaf(2, [8, 31], true, &device);
        let loss = op(
            hidden.clone().transpose().narrow(0, 3, 12),
            head.clone().transpose(),
            &labels(12, 31),
        );
        let g = loss.clone().backward();
        (floats(loss), vec![grad(&hidden, &g), grad(&head, &g)])
    });
    close("views", &got.0, &want.0, TOLERANCE);
    close_grads("views", &got.1, &want.1, TOLERANCE);
}

/// Extreme but finite logits: the naive `ln Σ exp` would overflow.
#[test]
fn large_logits_stay_finite() {
    let hidden = tensor(vec![300.0, -300.0], [2, 1], true, &flex());
    let head = tensor(vec![1.0, -1.0, 0.5], [3, 1], false, &flex());
    let loss = linear_cross_entropy(hidden.clone(), head, &[0, 0]);
    let g = loss.clone().backward();
    assert_eq!(floats(loss), [600.0]);
    // Row 0 is certain and right, row 1 certain and wrong: its gradient is head[1] − head[0].
    assert_eq!(grad(&hidden, &g).unwrap(), [0.0, -2.0]);
}

#[test]
fn not_a_number_passes() {
    for bad in [f32::NAN, f32::INFINITY] {
        let hidden = tensor(vec![1.0, bad], [1, 2], true, &flex());
        let head = leaf(2, [40, 2], false, &flex());
        let loss = linear_cross_entropy(hidden.clone(), head, &[3]);
        let g = loss.clone().backward();
        assert!(floats(loss)[0].is_nan());
        assert!(grad(&hidden, &g).unwrap().iter().all(|x| x.is_nan()));
    }
}

/// The slope of the loss along a random direction is the gradient's inner product with it. Step
/// 1e-2: its error (third order, ~1e-5) and the loss's rounding (1e-6 / 1e-2) are both well below 1e-3.
#[test]
fn gradient_is_the_slope() {
    let (rows, width, vocabulary) = (6, 9, 50);
    let labels = labels(rows, vocabulary);
    let (x, d) = (noise(1, rows * width), noise(9, rows * width));
    let head = || leaf(2, [vocabulary, width], false, &flex());
    let f = |x: Vec<f32>| {
        let x = tensor(x, [rows, width], false, &flex());
        f64::from(floats(linear_cross_entropy(x, head(), &labels))[0])
    };
    let leaf = tensor(x.clone(), [rows, width], true, &flex());
    let g = linear_cross_entropy(leaf.clone(), head(), &labels).backward();
    let want = slope(&x, &d, 1e-2, f);
    let got = inner(&grad(&leaf, &g).unwrap(), &d);
    assert!(
        (got - want).abs() < 1e-3 * want.abs().max(1.0),
        "{got} {want}"
    );
}

#[test]
fn threads_do_not_matter() {
    same_on_any_pool(|| {
        let (y, g) = run(linear_cross_entropy, &flex(), [200, 65, 3001], [true, true]);
        std::iter::once(y).chain(g.into_iter().flatten()).collect()
    });
}

/// Numbers of the lists called `name`, one list after the other.
fn lists(json: &str, name: &str) -> Vec<Vec<f32>> {
    let start = format!("\"{name}\": [");
    json.split(&start)
        .skip(1)
        .map(|rest| {
            let numbers = rest.split(']').next().unwrap().split(", ");
            numbers.map(|x| x.parse().unwrap()).collect()
        })
        .collect()
}

/// Loss and gradients are those of PyTorch's `F.cross_entropy`, whose numbers are in the fixture.
#[test]
fn smoothing_is_pytorchs() {
    let json = include_str!("../../../../tests/fixtures/cross_entropy.json");
    let one = |name| lists(json, name).remove(0);
    let labels: Vec<i64> = one("labels").into_iter().map(|l| l as i64).collect();
    let (rows, width) = (labels.len(), one("hidden").len() / labels.len());
    let vocabulary = one("head").len() / width;
    let shares = lists(json, "smoothing");
    assert_eq!(shares.len(), 3);
    for (i, share) in shares.iter().enumerate() {
        let hidden = tensor(one("hidden"), [rows, width], true, &flex());
        let head = tensor(one("head"), [vocabulary, width], true, &flex());
        let spec = LossSpec {
            label_smoothing: f64::from((share[0] * 100.0).round()) / 100.0,
            ..LossSpec::default()
        };
        let loss = linear_cross_entropy_with(hidden.clone(), head.clone(), &labels, spec);
        let g = loss.clone().backward();
        close("loss", &floats(loss), &lists(json, "loss")[i], 1e-6);
        let want = &lists(json, "d_hidden")[i];
        close("hidden", &grad(&hidden, &g).unwrap(), want, 1e-6);
        close(
            "head",
            &grad(&head, &g).unwrap(),
            &lists(json, "d_head")[i],
            1e-6,
        );
    }
}
