//! `gelu` and `gelu_mul` against their references and against f64.

use super::{GeluKind, gelu, gelu_mul, reference};
use crate::check::property::{Case, Check, everything};
use crate::check::*;
use crate::cpu::erf::tests::normal_f64;

/// One fused pass against about eight rounded operations, of which erf is the coarsest.
const TOLERANCE: f32 = 2e-6;

fn kind(case: &Case) -> GeluKind {
    GeluKind::ALL[case.options[0]]
}

#[test]
fn matches_reference_everywhere() {
    everything(&Check {
        name: "gelu",
        tolerance: TOLERANCE,
        case: |pick| {
            let shape = [pick.size(40), pick.size(600)];
            let kind = vec![pick.below(2)];
            Case::new(vec![shape]).scaled(0, 4.0).options(kind)
        },
        ours: |case, x| vec![gelu(x[0].clone(), kind(case))],
        reference: |case, x| vec![reference::gelu(x[0].clone(), kind(case))],
        slopes: None,
        non_finite: true,
    });
}

#[test]
fn product_matches_reference_everywhere() {
    everything(&Check {
        name: "gelu_mul",
        tolerance: TOLERANCE,
        case: |pick| {
            let shape = [pick.size(40), pick.size(600)];
            let kind = vec![pick.below(2)];
            Case::new(vec![shape; 2]).scaled(0, 4.0).options(kind)
        },
        ours: |case, x| vec![gelu_mul(x[0].clone(), x[1].clone(), kind(case))],
        reference: |case, x| {
            let gate = reference::gelu(x[0].clone(), kind(case));
            vec![gate * x[1].clone()]
        },
        slopes: None,
        non_finite: true,
    });
}

/// Against f64, with `Φ` or the tanh computed there: within 2e-7 of `max(1, |x|)`.
#[test]
fn matches_f64() {
    let xs: Vec<f32> = (-20_000..20_000).map(|i| i as f32 * 5e-4).collect();
    for kind in GeluKind::ALL {
        let x = tensor(xs.clone(), [xs.len()], false, &flex());
        for (x, y) in xs.iter().zip(floats(gelu(x, kind))) {
            let x = f64::from(*x);
            let want = match kind {
                GeluKind::Gelu => x * normal_f64(x),
                GeluKind::GeluPytorchTanh => {
                    let u = (2.0 / std::f64::consts::PI).sqrt() * (x + 0.044_715 * x.powi(3));
                    0.5 * x * (1.0 + u.tanh())
                }
            };
            let bound = 2e-7 * x.abs().max(1.0);
            assert!(
                (f64::from(y) - want).abs() <= bound,
                "{kind:?} {x}: {y} {want}"
            );
        }
    }
}

#[test]
fn names_are_those_of_transformers() {
    assert_eq!(GeluKind::named("gelu"), Some(GeluKind::Gelu));
    assert_eq!(
        GeluKind::named("gelu_pytorch_tanh"),
        Some(GeluKind::GeluPytorchTanh)
    );
    assert_eq!(GeluKind::named("silu"), None);
}

#[test]
fn threads_do_not_matter() {
    same_on_any_pool(|| {
        let (gate, up) = (
            leaf(1, [130, 517], true, &flex()),
            leaf(2, [130, 517], true, &flex()),
        );
        let y = gelu_mul(gate.clone(), up.clone(), GeluKind::Gelu);
        let g = backward(&y, 3);
        vec![floats(y), grad(&gate, &g).unwrap(), grad(&up, &g).unwrap()]
    });
}
