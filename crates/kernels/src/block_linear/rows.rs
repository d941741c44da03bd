//! Loops over rows: what the projections' input is made of, and the way back.

use crate::cpu::exp::sigmoid;
use crate::cpu::simd::{dot, simd_fn};

simd_fn! {
    /// One row: `out = x · inverse · weight`; returns `inverse = 1/sqrt(mean(x²) + eps)`.
    pub(super) fn normalise<L>(x: &[f32], weight: &[f32], eps: f32, out: &mut [f32]) -> f32 {
        let inverse = (dot::<L>(x, x) / weight.len() as f32 + eps).sqrt().recip();
        for ((out, x), w) in out.iter_mut().zip(x).zip(weight) {
            *out = x * inverse * w;
        }
        inverse
    }
}

simd_fn! {
    /// Rows that were normalised before: `out = x · inverse · weight`.
    pub(super) fn normalise_again<L>(x: &[f32], weight: &[f32], inverse: &[f32], out: &mut [f32]) {
        let width = weight.len();
        let rows = x.chunks_exact(width).zip(out.chunks_exact_mut(width)).zip(inverse);
        for ((x, out), inverse) in rows {
            for ((out, x), w) in out.iter_mut().zip(x).zip(weight) {
                *out = x * inverse * w;
            }
        }
    }
}

simd_fn! {
    /// One row: `out = silu(gate) · up`.
    pub(super) fn gated<L>(gate: &[f32], up: &[f32], out: &mut [f32]) {
        for ((out, x), u) in out.iter_mut().zip(gate).zip(up) {
            *out = x * sigmoid::<L>(*x) * u;
        }
    }
}

simd_fn! {
    /// One row, with `s = sigmoid(x)` and `g` the gradient of `y = x·s·u`: `g·u·s·(1 + x·(1 − s))` replaces
    /// the gate x, `g·x·s` replaces u, and y replaces g.
    pub(super) fn gated_backward<L>(gate: &mut [f32], up: &mut [f32], grad: &mut [f32]) {
        for ((x, u), g) in gate.iter_mut().zip(up).zip(grad) {
            let s = sigmoid::<L>(*x);
            let silu = *x * s;
            let (d_gate, d_up) = (*g * *u * (s * (1.0 + *x * (1.0 - s))), *g * silu);
            *g = silu * *u;
            *x = d_gate;
            *u = d_up;
        }
    }
}

simd_fn! {
    /// `row += bias`, over several rows of a wider matrix whose columns from `from` on are meant.
    pub(super) fn add_bias<L>(rows: &mut [f32], width: usize, from: usize, bias: &[f32]) {
        for row in rows.chunks_exact_mut(width) {
            for (y, b) in row[from..from + bias.len()].iter_mut().zip(bias) {
                *y += b;
            }
        }
    }
}
