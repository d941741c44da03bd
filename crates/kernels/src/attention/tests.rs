//! `attention` against its reference.

#[allow(clippy::unwrap_used)]
mod qkv;

use std::sync::Arc;

use burn::tensor::{Device, Tensor};

use super::{AttentionSpec, KeyMask, attention, reference};
use crate::check::*;

/// Online softmax over blocks and sums over up to 600 keys, in another order than the reference.
const TOLERANCE: f32 = 1e-5;

type Op = fn(Tensor<4>, Tensor<4>, Tensor<4>, &AttentionSpec) -> Tensor<4>;
type Outcome = (Vec<f32>, Vec<Option<Vec<f32>>>);

/// batch, tokens, keys, heads, kv_heads, dim
type Size = [usize; 6];

fn run(op: Op, device: &Device, size: Size, spec: &AttentionSpec, tracked: [bool; 3]) -> Outcome {
    let [batch, tokens, keys, heads, kv_heads, dim] = size;
    let q = leaf(1, [batch, tokens, heads, dim], tracked[0], device);
    let k = leaf(2, [batch, keys, kv_heads, dim], tracked[1], device);
    let v = leaf(3, [batch, keys, kv_heads, dim], tracked[2], device);
    // Scores wide enough that the softmax is far from uniform.
    let y = op(q.clone().mul_scalar(4.0), k.clone(), v.clone(), spec);
    let mut grads = vec![None; 3];
    if tracked != [false; 3] {
        let g = backward(&y, 5);
        grads = [&q, &k, &v].iter().map(|t| grad(t, &g)).collect();
    }
    (floats(y), grads)
}

fn spec(causal: bool, dim: usize) -> AttentionSpec {
    AttentionSpec {
        causal,
        scale: 1.0 / (dim as f64).sqrt(),
        offset: 0,
        sliding_window: None,
        key_mask: None,
        segments: None,
    }
}

/// Right padding on odd rows, left padding on even ones.
fn padding(batch: usize, keys: usize) -> KeyMask {
    let valid = (0..batch * keys)
        .map(|i| {
            let (b, s, n) = (i / keys, i % keys, keys / 4 + 1);
            if b % 2 == 1 {
                s + n < keys
            } else {
                s >= n.min(keys - 1)
            }
        })
        .collect();
    KeyMask {
        valid: Arc::new(valid),
        batch,
        keys,
    }
}

fn check(what: &str, size: Size, spec: &AttentionSpec) {
    for tracked in [[true; 3], [false; 3]] {
        let (got, got_grads) = run(attention, &flex(), size, spec, tracked);
        let (want, want_grads) = run(reference::attention, &ndarray(), size, spec, tracked);
        close(what, &got, &want, TOLERANCE);
        close_grads(what, &got_grads, &want_grads, TOLERANCE);
    }
}

/// One token, odd sizes, tile boundaries (64 queries, 256 keys) hit and just missed.
const SIZES: [Size; 7] = [
    [1, 1, 1, 1, 1, 4],
    [2, 1, 37, 9, 3, 8],
    [2, 5, 5, 6, 3, 7],
    [1, 64, 64, 2, 1, 16],
    [2, 65, 65, 3, 1, 16],
    [1, 257, 257, 4, 2, 8],
    [1, 300, 600, 2, 2, 12],
];

#[test]
fn full_matches_reference() {
    for size in SIZES {
        check(&format!("full {size:?}"), size, &spec(false, size[5]));
    }
}

#[test]
fn causal_matches_reference() {
    for size in SIZES {
        let offset = size[2] - size[1];
        let spec = AttentionSpec {
            offset,
            ..spec(true, size[5])
        };
        check(&format!("causal {size:?}"), size, &spec);
    }
}

#[test]
fn sliding_window_matches_reference() {
    for size in SIZES {
        for window in [1, 9, 300] {
            for causal in [true, false] {
                let offset = size[2] - size[1];
                let sliding_window = Some(window);
                let spec = AttentionSpec {
                    offset,
                    sliding_window,
                    ..spec(causal, size[5])
                };
                check(&format!("window {window} {size:?}"), size, &spec);
            }
        }
    }
}

/// Causal with left padding: the first queries of a row see nothing, and yield zeros.
#[test]
fn padding_matches_reference() {
    for size in SIZES {
        for causal in [true, false] {
            let spec = AttentionSpec {
                offset: size[2] - size[1],
                key_mask: Some(padding(size[0], size[2])),
                ..spec(causal, size[5])
            };
            check(&format!("padding {size:?}"), size, &spec);
        }
    }
}

#[test]
fn a_query_that_sees_nothing_yields_zeros() {
    for tokens in [2, 40] {
        let mask = KeyMask {
            valid: Arc::new(vec![false; tokens]),
            batch: 1,
            keys: tokens,
        };
        let spec = AttentionSpec {
            key_mask: Some(mask),
            ..spec(true, 4)
        };
        let size = [1, tokens, tokens, 2, 1, 4];
        let (y, grads) = run(attention, &flex(), size, &spec, [true; 3]);
        assert!(y.iter().all(|x| *x == 0.0));
        assert!(grads.iter().flatten().flatten().all(|x| *x == 0.0));
    }
}

#[test]
fn gradients_only_where_tracked() {
    let size = [2, 20, 20, 4, 2, 8];
    for bits in 1..8usize {
        let tracked = std::array::from_fn(|i| bits >> i & 1 == 1);
        let (_, got) = run(attention, &flex(), size, &spec(true, 8), tracked);
        let (_, want) = run(
            reference::attention,
            &ndarray(),
            size,
            &spec(true, 8),
            tracked,
        );
        close_grads("mask", &got, &want, TOLERANCE);
    }
}

/// Heads as slices of one projection, tokens after heads, and a reversed incoming gradient.
#[test]
fn reads_views() {
    let ops: [(Op, Device); 2] = [(attention, flex()), (reference::attention, ndarray())];
    for tokens in [3, 21] {
        let [got, want] = ops.clone().map(|(op, device)| {
            let qkv = leaf(1, [2, tokens, 8, 6], true, &device);
            let v = leaf(2, [2, 2, 6, tokens], true, &device);
            let part = |from, n| qkv.clone().narrow(2, from, n);
            let value = v.clone().permute([0, 3, 1, 2]);
            let y = op(part(0, 4), part(4, 2), value, &spec(true, 6));
            let g = backward(&y.clone().permute([3, 2, 1, 0]), 3);
            (floats(y), vec![grad(&qkv, &g), grad(&v, &g)])
        });
        close("views", &got.0, &want.0, TOLERANCE);
        close_grads("views", &got.1, &want.1, TOLERANCE);
    }
}

#[test]
fn not_a_number_passes() {
    for tokens in [2, 40] {
        let mut values = noise(1, tokens * 8);
        values[(tokens - 1) * 8] = f32::NAN;
        let q = tensor(values, [1, tokens, 2, 4], false, &flex());
        let kv = || leaf(2, [1, tokens, 2, 4], false, &flex());
        let y = floats(attention(q, kv(), kv(), &spec(true, 4)));
        let last = (tokens - 1) * 8;
        assert!(y[last..last + 4].iter().all(|x| x.is_nan()));
        assert!(
            y[..last]
                .iter()
                .chain(&y[last + 4..])
                .all(|x| x.is_finite())
        );
    }
}

/// Directional derivatives in q, k and v. Step 1e-2: truncation ~1e-4, rounding ~1e-4.
#[test]
fn gradient_is_the_slope() {
    let n = 70 * 2 * 4;
    let shape = [1, 70, 2, 4];
    let spec = AttentionSpec {
        sliding_window: Some(50),
        ..spec(true, 4)
    };
    let inputs = [1, 2, 3].map(|seed| noise(seed, n));
    let weights = noise(5, n);
    for which in 0..3 {
        let f = |x: Vec<f32>| {
            let mut inputs = inputs.clone();
            inputs[which] = x;
            let [q, k, v] = inputs.map(|x| tensor(x, shape, false, &flex()));
            inner(&floats(attention(q, k, v, &spec)), &weights)
        };
        let leaves = inputs.clone().map(|x| tensor(x, shape, true, &flex()));
        let [q, k, v] = leaves.clone();
        let g = backward(&attention(q, k, v, &spec), 5);
        let d = noise(9, n);
        let got = inner(&grad(&leaves[which], &g).unwrap(), &d);
        let want = slope(&inputs[which], &d, 1e-2, f);
        assert!(
            (got - want).abs() < 2e-3 * want.abs().max(1.0),
            "{which}: {got} {want}"
        );
    }
}

#[test]
fn threads_do_not_matter() {
    for tokens in [1, 130] {
        same_on_any_pool(|| {
            let size = [2, tokens, 130, 9, 3, 64];
            let spec = AttentionSpec {
                offset: 130 - tokens,
                ..spec(true, 64)
            };
            let (y, g) = run(attention, &flex(), size, &spec, [true; 3]);
            std::iter::once(y).chain(g.into_iter().flatten()).collect()
        });
    }
}
