//! `rope` against its reference.

use burn::tensor::{Device, Tensor};

use super::{reference, rope};
use crate::check::property::{Case, Check, everything};
use crate::check::*;

/// Two products and a sum, one of them fused: one unit in the last place of the larger.
const TOLERANCE: f32 = 5e-7;

type Op = fn(Tensor<4>, Tensor<2>, Tensor<2>) -> Tensor<4>;
type Outcome = (Vec<f32>, Option<Vec<f32>>);

fn run(op: Op, device: &Device, shape: [usize; 4], tracked: bool) -> Outcome {
    let x = leaf(1, shape, tracked, device);
    let table = |seed| leaf(seed, [shape[1], shape[3] / 2], false, device);
    let y = op(x.clone(), table(2), table(3));
    let g = tracked.then(|| backward(&y, 4)).and_then(|g| grad(&x, &g));
    (floats(y), g)
}

#[test]
fn matches_reference() {
    for shape in [[1, 1, 1, 2], [2, 5, 3, 14], [3, 70, 4, 64]] {
        for tracked in [true, false] {
            let (got, got_grad) = run(rope, &flex(), shape, tracked);
            let (want, want_grad) = run(reference::rope, &ndarray(), shape, tracked);
            close("rope", &got, &want, TOLERANCE);
            close_grads("rope", &[got_grad], &[want_grad], TOLERANCE);
        }
    }
}

/// The options are batch, tokens and heads. In half of the cases tokens and heads come transposed.
#[test]
fn matches_reference_everywhere() {
    fn call(op: Op, case: &Case, x: &[Tensor<2>]) -> Vec<Tensor<2>> {
        let [batch, tokens, heads, swapped] = case.options[..].try_into().unwrap();
        let (rows, dim) = (batch * tokens, x[0].dims()[1] / heads);
        let split = match swapped {
            0 => x[0].clone().reshape([batch, tokens, heads, dim]),
            _ => x[0]
                .clone()
                .reshape([batch, heads, tokens, dim])
                .swap_dims(1, 2),
        };
        let y = op(split, x[1].clone(), x[2].clone());
        vec![y.reshape([rows, heads * dim])]
    }
    everything(&Check {
        name: "rope",
        tolerance: TOLERANCE,
        case: |pick| {
            let [batch, tokens, heads] = [pick.size(3), pick.size(40), pick.size(6)];
            let half = pick.size(40);
            let shapes = vec![
                [batch * tokens, heads * 2 * half],
                [tokens, half],
                [tokens, half],
            ];
            let options = vec![batch, tokens, heads, pick.below(2)];
            Case::new(shapes).constant(&[1, 2]).options(options)
        },
        ours: |case, x| call(rope, case, &x),
        reference: |case, x| call(reference::rope, case, &x),
        slopes: None,
        non_finite: true,
    });
}

#[test]
fn rows_with_positions_of_their_own_matches_reference() {
    let ops: [(Op, Device); 2] = [(rope, flex()), (reference::rope, ndarray())];
    let [got, want] = ops.map(|(op, device)| {
        let x = leaf(1, [3, 5, 2, 6], true, &device);
        let table = |seed| leaf(seed, [15, 3], false, &device);
        let y = op(x.clone(), table(2), table(3));
        let g = backward(&y, 4);
        (floats(y), vec![grad(&x, &g)])
    });
    close("rope", &got.0, &want.0, TOLERANCE);
    close_grads("rope", &got.1, &want.1, TOLERANCE);
}

#[test]
fn reads_views() {
    let ops: [(Op, Device); 2] = [(rope, flex()), (reference::rope, ndarray())];
    let [got, want] = ops.map(|(op, device)| {
        let x = leaf(1, [2, 8, 4, 6], true, &device);
        let (cos, sin) = (
            leaf(2, [9, 3], false, &device),
            leaf(3, [3, 4], false, &device),
        );
        let y = op(
            x.clone().swap_dims(1, 2).narrow(2, 1, 5),
            cos.narrow(0, 2, 4),
            sin.transpose(),
        );
        let g = backward(&y.clone().permute([3, 1, 0, 2]), 4);
        (floats(y), vec![grad(&x, &g)])
    });
    close("views", &got.0, &want.0, TOLERANCE);
    close_grads("views", &got.1, &want.1, TOLERANCE);
}

/// It works in place only where nobody else looks.
#[test]
fn leaves_shared_inputs_alone() {
    let x = leaf(1, [1, 3, 2, 4], false, &flex());
    let before = floats(x.clone());
    let table = |seed| leaf(seed, [3, 2], false, &flex());
    let y = rope(x.clone(), table(2), table(3));
    assert_eq!(floats(x), before);
    assert_ne!(floats(y), before);
}

#[test]
fn threads_do_not_matter() {
    same_on_any_pool(|| {
        let (y, g) = run(rope, &flex(), [3, 70, 4, 64], true);
        vec![y, g.unwrap()]
    });
}
