//! `embedding` against Burn's own.

use burn::tensor::{Device, Int, Tensor, TensorData};

use super::{embedding, reference};
use crate::check::*;

type Op = fn(Tensor<2>, Tensor<2, Int>) -> Tensor<3>;

const VOCABULARY: usize = 7;
const WIDTH: usize = 5;

/// Rows with tokens that come again, within a row and in another one.
fn ids(device: &Device) -> Tensor<2, Int> {
    let ids: Vec<i64> = vec![3, 0, 3, 6, 2, 3, 0, 0];
    Tensor::from_data(TensorData::new(ids, [2, 4]), device)
}

/// Rows, and the table's gradient where a head that shares the table has a part in it, or has none.
fn run(op: Op, device: &Device, tied: bool) -> (Vec<f32>, Vec<f32>) {
    let table = leaf(1, [VOCABULARY, WIDTH], true, device);
    let rows = op(table.clone(), ids(device));
    let mut loss = (rows.clone() * leaf(2, [2, 4, WIDTH], false, device)).sum();
    if tied {
        let flat = rows.clone().tanh().reshape([8, WIDTH]);
        let logits = flat.matmul(table.clone().transpose());
        loss = loss + (logits * leaf(3, [8, VOCABULARY], false, device)).sum();
    }
    let grads = loss.backward();
    (floats(rows), grad(&table, &grads).unwrap())
}

fn bits(values: &[f32]) -> Vec<u32> {
    // −0 and 0 are one number here: Burn adds a zero to rows that no token names.
    values.iter().map(|x| (x + 0.0).to_bits()).collect()
}

#[test]
fn rows_and_gradients_are_burn_s_to_the_bit() {
    for tied in [false, true] {
        let got = run(embedding, &flex(), tied);
        let want = run(reference::embedding, &flex(), tied);
        assert_eq!(bits(&got.0), bits(&want.0), "rows, tied {tied}");
        assert_eq!(bits(&got.1), bits(&want.1), "gradient, tied {tied}");
    }
}

#[test]
fn matches_reference_on_ndarray() {
    for tied in [false, true] {
        let got = run(embedding, &flex(), tied);
        let want = run(reference::embedding, &ndarray(), tied);
        // Sums of up to eight products in another order.
        close("rows", &got.0, &want.0, 0.0);
        close("gradient", &got.1, &want.1, 2e-6);
    }
}

#[test]
fn a_table_that_was_made_in_the_graph_hands_its_gradient_on() {
    let run = |op: Op| {
        let leaf = leaf(1, [VOCABULARY, WIDTH], true, &flex());
        // Two readers of one table that is no leaf, as with rows of it that are trained.
        let table = leaf.clone().mul_scalar(3.0);
        let twice = op(table.clone(), ids(&flex())) + op(table, ids(&flex()));
        let grads = backward(&twice, 4);
        grad(&leaf, &grads).unwrap()
    };
    assert_eq!(bits(&run(embedding)), bits(&run(reference::embedding)));
}

#[test]
fn a_second_backward_pass_starts_from_nothing() {
    let table = leaf(1, [VOCABULARY, WIDTH], true, &flex());
    let pass = || {
        let grads = backward(&embedding(table.clone(), ids(&flex())), 4);
        grad(&table, &grads).unwrap()
    };
    // A graph whose backward pass never comes leaves nothing behind either.
    drop(embedding(table.clone(), ids(&flex())));
    assert_eq!(pass(), pass());
}
