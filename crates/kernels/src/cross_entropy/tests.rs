//! `linear_cross_entropy` and `token_log_probs` against their references.

use burn::tensor::{Device, Tensor};

use super::{linear_cross_entropy, reference, token_log_probs};
use crate::check::*;

/// The reference's log-softmax rounds sums over the vocabulary in f32; ours is the more exact.
const TOLERANCE: f32 = 1e-5;

type Op = fn(Tensor<2>, Tensor<2>, &[i64]) -> Tensor<1>;

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
            let (want, want_grads) =
                run(reference::linear_cross_entropy, &ndarray(), size, *tracked);
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
    let ops: [(Op, Device); 2] = [
        (linear_cross_entropy, flex()),
        (reference::linear_cross_entropy, ndarray()),
    ];
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
